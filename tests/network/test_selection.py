"""The choice against NumPy's stable sort, the openness of its gates, and the tokens of pixels."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sklearn_sparseattn.network import openness, pixel_tokens, select_pixels
from sklearn_sparseattn.network.selection import LEAST, n_closing

# Few different values, so that ties are the rule; both zeros, both infinities, subnormals.
SUBNORMAL = float(np.float32(1e-40))  # exact in both dtypes
tied_values = st.sampled_from([-np.inf, -1.5, -SUBNORMAL, -0.0, 0.0, SUBNORMAL, 1.0, 2.0, np.inf])
any_values = st.floats(allow_nan=False, width=32)
score_maps = st.tuples(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=7),
    st.sampled_from([tied_values, any_values]),
).flatmap(lambda drawn: hnp.arrays(drawn[0], drawn[1], elements=drawn[2]))


def best_first(scores, k):
    """Reference: NumPy's stable sort of the negated scores, a tie to the lower index."""
    flat = scores.reshape(len(scores), -1)
    return np.argsort(-flat, axis=1, kind="stable")[:, :k]


@given(scores=score_maps, data=st.data())
@example(scores=np.zeros((2, 5), np.float32), data=None)
@example(scores=np.array([[-0.0, 0.0, -0.0, 0.0]]), data=None)
@example(scores=np.full((1, 3, 3), np.inf), data=None)
def test_the_choice_is_that_of_a_stable_sort(scores, data):
    n_pixels = scores[0].size
    ks = range(1, n_pixels + 1) if data is None else [data.draw(st.integers(1, n_pixels))]
    for k in ks:
        found = select_pixels(torch.from_numpy(scores), k)
        assert found.dtype == torch.int64
        np.testing.assert_array_equal(found.numpy(), best_first(scores, k))


def test_large_maps_with_plateaus():
    scores = np.random.default_rng(0).integers(0, 5, (3, 135, 135)).astype(np.float32)
    for k in (1, 2146, 10_000, 135 * 135):
        found = select_pixels(torch.from_numpy(scores), k).numpy()
        np.testing.assert_array_equal(found, best_first(scores, k))


def test_one_pixel():
    assert select_pixels(torch.tensor([[[3.0]], [[-1.0]]]), 1).tolist() == [[0], [0]]


@pytest.mark.parametrize("k", [-1, 0, 7])
def test_k_must_be_within_the_image(k):
    with pytest.raises(ValueError, match=f"k={k} cannot be chosen of 6: 1 <= k <= H \\* W"):
        select_pixels(torch.zeros(1, 2, 3), k)


def test_no_gradient_goes_through_the_choice():
    scores = torch.randn(2, 4, 5, requires_grad=True)
    assert not select_pixels(scores, 3).requires_grad
    assert not select_pixels(scores, 20).requires_grad


# ---- how far gates are open ----


def openness_reference(scores, chosen):
    """Of one image, in Python's numbers."""
    n = len(chosen)
    if n == len(scores):
        return [1.0] * n
    in_order = sorted(scores, reverse=True)
    n_last = max(1, int(0.1 * n + 0.5))
    left, full = in_order[n], in_order[max(n - n_last, 1) - 1]  # a_(n + 1), a_(n - r)
    return [min(1.0, (scores[j] - left) / max(full - left, 0.05)) for j in chosen]


cases = st.tuples(st.integers(1, 60), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.1, 3.0]))


@given(case=cases, data=st.data(), is_tied=st.booleans())
def test_openness_follows_its_equation(case, data, is_tied):
    n_tiles, seed, spread = case
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(2, n_tiles)) * spread
    scores = np.round(2 * scores) / 2 if is_tied else scores
    n = data.draw(st.integers(1, n_tiles))
    chosen = rng.permuted(best_first(scores, n), axis=1)  # the order does not matter
    found = openness(torch.from_numpy(scores), torch.from_numpy(chosen)).numpy()
    expected = [openness_reference(*pair) for pair in zip(scores.tolist(), chosen, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()
    assert (found <= 1).all()


@given(case=cases, data=st.data())
def test_openness_where_images_have_numbers_of_their_own(case, data):
    n_tiles, seed, spread = case
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, n_tiles)) * spread
    ns = data.draw(st.lists(st.integers(1, n_tiles), min_size=3, max_size=3))
    chosen = best_first(scores, max(ns))
    kept = np.arange(max(ns)) < np.array(ns)[:, None]
    found = openness(*map(torch.from_numpy, (scores, chosen, kept))).numpy()
    for row, own, n, opened in zip(scores.tolist(), chosen, ns, found, strict=True):
        np.testing.assert_allclose(opened[:n], openness_reference(row, own[:n]), rtol=1e-9, atol=1e-12)
        assert not opened[n:].any()


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 1), (4, 1), (14, 1), (15, 2), (94, 9), (95, 10), (1000, 100)]
)
def test_a_tenth_of_the_gates_close(n, expected):
    assert n_closing(n) == expected
    scores = torch.arange(2.0 * n, 0, -1)[None]
    found = openness(scores, torch.arange(n)[None])[0]
    assert (found < 1).sum() == (expected if n > 1 else 0)
    torch.testing.assert_close(found[-1].item(), 1 / max(min(expected + 1, n), 1))


def test_what_is_chosen_by_a_tie_is_closed():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert openness(scores, torch.tensor([[0, 1]])).tolist() == [[1.0, 0.0]]
    assert openness(scores, torch.tensor([[0, 3]])).tolist() == [[1.0, 0.0]]
    # Of equal scores all are closed, not only the last tenth.
    assert not openness(torch.full((1, 30), 0.7), torch.arange(20)[None]).any()


def test_the_ramp_has_a_least_width():
    """So that scores which differ by rounding do not open and close gates."""
    scores = torch.tensor([[LEAST / 4, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(openness(scores, torch.tensor([[0]])).item(), 0.25)


@given(case=cases.filter(lambda case: case[0] > 1), data=st.data())
def test_openness_goes_on_where_scores_change_places(case, data):
    """Whichever two neighbours in the order do, the two at the end of the choice among them."""
    n_tiles, seed, spread = case
    scores = np.random.default_rng(seed).normal(size=n_tiles) * spread
    n, first = data.draw(st.integers(1, n_tiles - 1)), data.draw(st.integers(0, n_tiles - 2))
    for place in (first, n - 1):
        one, other = best_first(scores[None], n_tiles)[0, place : place + 2]
        gates = []
        for sign in (1e-9, -1e-9):
            near = scores.copy()
            near[[one, other]] = scores[[one, other]].mean() + np.array([sign, -sign])
            near = torch.from_numpy(near)[None]
            chosen = select_pixels(near, n)
            gates.append(torch.zeros_like(near).scatter_(1, chosen, openness(near, chosen)))
        torch.testing.assert_close(gates[0], gates[1], rtol=0, atol=1e-6)


def test_openness_has_no_gradient():
    scores = torch.randn(2, 9, requires_grad=True)
    assert not openness(scores, torch.tensor([[0, 1], [2, 3]])).requires_grad


# ---- tokens of pixels ----


@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    n_channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_tokens_say_where_and_how_bright(height, width, n_channels, dtype, seed):
    rng = np.random.default_rng(seed)
    n_images, n_pixels = 2, height * width
    images = rng.normal(size=(n_images, n_channels, height, width))
    k = int(rng.integers(1, n_pixels + 1))
    indices = np.stack([rng.permutation(n_pixels)[:k] for _ in range(n_images)])
    found = pixel_tokens(torch.from_numpy(images).to(dtype), torch.from_numpy(indices))
    assert found.dtype == dtype
    assert found.shape == (n_images, k, 2 + n_channels)
    for b in range(n_images):
        for place, index in enumerate(indices[b]):
            i, j = divmod(int(index), width)
            expected = [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1, *images[b, :, i, j]]
            np.testing.assert_allclose(found[b, place].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_coordinates_are_symmetric_about_the_centre():
    pixels = pixel_tokens(torch.zeros(1, 1, 3, 4), torch.arange(12)[None])[0, :, :2]
    assert pixels[:4, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    torch.testing.assert_close(pixels[[0, 4, 8], 1], torch.tensor([-2 / 3, 0, 2 / 3]))
    torch.testing.assert_close(pixels, -pixels.flip(0))
