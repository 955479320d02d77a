"""The choice of pixels against NumPy's stable sort, and the tokens made of them."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sklearn_sparseattn.network import pixel_tokens, select_pixel_set, select_pixels

# Few different values, so that ties are the rule; both zeros, both infinities, subnormals.
tied_values = st.sampled_from([-np.inf, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 2.0, np.inf])
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
        expected = best_first(scores, k)
        ordered = select_pixels(torch.from_numpy(scores), k)
        assert ordered.dtype == torch.int64
        np.testing.assert_array_equal(ordered.numpy(), expected)
        unordered = select_pixel_set(torch.from_numpy(scores), k)
        assert unordered.dtype == torch.int64
        np.testing.assert_array_equal(unordered.numpy(), np.sort(expected, axis=1))


@pytest.mark.parametrize("select", [select_pixels, select_pixel_set])
def test_large_maps_with_plateaus(select):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (3, 135, 135)).astype(np.float32)
    for k in (1, 2146, 10_000, 135 * 135):
        found = select(torch.from_numpy(scores), k).numpy()
        expected = best_first(scores, k)
        np.testing.assert_array_equal(found, np.sort(expected, 1) if select is select_pixel_set else expected)


@pytest.mark.parametrize("select", [select_pixels, select_pixel_set])
def test_one_pixel(select):
    assert select(torch.tensor([[[3.0]], [[-1.0]]]), 1).tolist() == [[0], [0]]


@pytest.mark.parametrize("select", [select_pixels, select_pixel_set])
@pytest.mark.parametrize("k", [-1, 0, 7])
def test_k_must_be_within_the_image(select, k):
    with pytest.raises(ValueError, match=f"k={k} pixels cannot be chosen of 6"):
        select(torch.zeros(1, 2, 3), k)


@pytest.mark.parametrize("select", [select_pixels, select_pixel_set])
def test_no_gradient_goes_through_the_choice(select):
    scores = torch.randn(2, 4, 5, requires_grad=True)
    assert not select(scores, 3).requires_grad
    assert not select(scores, 20).requires_grad


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
