"""The context of the tokens against loops over pixels, cells and neighbours, in value and in gradient."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn.network import CoarseAttention
from sklearn_sparseattn.network.context import TokenContext

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
CHANNELS = (2, 3, 4)  # of as many maps as there are strides
STRIDES = [(2, 2), (1, 2), (1, 1), (2, 1), (3, 2), (4,), (2, 2, 2), (1, 1, 2)]
AROUND = list(itertools.product((-1, 0, 1), repeat=2))

cases = st.fixed_dictionaries(
    {
        "height": st.integers(1, 40),
        "width": st.integers(1, 40),
        "n_images": st.integers(1, 3),
        "k": st.integers(1, 12),
        "embed_dim": st.integers(1, 6),
        "strides": st.sampled_from(STRIDES),
        "seed": st.integers(0, 2**31 - 1),
        "separable": st.booleans(),
    }
)


def case_of(separable=True, **case):
    return {"separable": separable, **case}


def make_case(height, width, n_images, k, embed_dim, strides, seed, separable=True):
    """A context in float64, maps of the sizes that an image leaves, and pixels, the last one among them."""
    generator = torch.Generator().manual_seed(seed)
    steps = tuple(int(step) for step in np.cumprod(strides))
    channels = CHANNELS[: len(steps)]
    context = TokenContext(channels, steps, embed_dim, separable).double()
    maps = []
    for n_channels, step, layer in zip(channels, steps, context.convolve, strict=True):
        for weight in layer.parameters():
            weight.data.normal_(generator=generator)
        size = -(-height // step), -(-width // step)
        cells = torch.randn(n_images, n_channels, *size, dtype=torch.float64, generator=generator)
        maps.append(cells.requires_grad_())
    pixels = torch.randint(height * width, (n_images, k), generator=generator)
    pixels[-1, -1] = height * width - 1
    return context, tuple(maps), pixels


def nearest(position, n_cells, step):
    """The cell nearest to a pixel of those there are; halfway between two, the later."""
    return min(range(n_cells), key=lambda cell: (abs(cell * step - position), -cell))


def cells_of(maps, steps, pixels, width):
    """Where each pixel lies: stage, image, number of the pixel, cell."""
    for s, b, t in itertools.product(range(len(maps)), range(len(pixels)), range(pixels.shape[1])):
        i, j = divmod(int(pixels[b, t]), width)
        n_rows, n_columns = maps[s].shape[2:]
        yield s, b, t, nearest(i, n_rows, steps[s]), nearest(j, n_columns, steps[s])


def neighbours_of(maps, steps, pixels, width):
    """The cells around those: stage, image, number of the pixel, cell, its place in the kernel."""
    for s, b, t, i, j in cells_of(maps, steps, pixels, width):
        for down, right in AROUND:
            if 0 <= i + down < maps[s].shape[2] and 0 <= j + right < maps[s].shape[3]:
                yield s, b, t, i + down, j + right, down + 1, right + 1


def seen_by(maps, steps, pixels, width):
    """For each map, the cells in the neighbourhoods of the pixels: bool (B, 1, h, w)."""
    seen = [torch.zeros(len(cells), 1, *cells.shape[2:], dtype=torch.bool) for cells in maps]
    for s, b, _, i, j, _, _ in neighbours_of(maps, steps, pixels, width):
        seen[s][b, 0, i, j] = True
    return seen


def weights_of(context):
    """As those of whole convolutions (D, channels, 3, 3)."""
    found = [[weight.detach().numpy() for weight in layer.parameters()] for layer in context.convolve]
    if not context.separable:
        return [weight for (weight,) in found]
    return [np.einsum("cpq,dc->dcpq", each[:, 0], all_[:, :, 0, 0]) for each, all_ in found]


def reference(context, maps, pixels, width):
    weights, arrays = weights_of(context), [cells.detach().numpy() for cells in maps]
    expected = np.zeros((*pixels.shape, len(weights[0])))
    for s, b, t, i, j, p, q in neighbours_of(maps, context.steps, pixels, width):
        expected[b, t] += weights[s][:, :, p, q] @ arrays[s][b, :, i, j]
    return expected


@given(case=cases)
@example(case=case_of(height=1, width=1, n_images=1, k=3, embed_dim=1, strides=(2, 2), seed=0))
@example(case=case_of(height=1, width=37, n_images=2, k=9, embed_dim=4, strides=(2, 2), seed=0))
@example(case=case_of(height=37, width=1, n_images=2, k=9, embed_dim=4, strides=(2, 2), seed=0))
@example(case=case_of(height=135, width=135, n_images=2, k=200, embed_dim=32, strides=(2, 2), seed=0))
@example(case=case_of(False, height=135, width=135, n_images=2, k=200, embed_dim=9, strides=(2, 2), seed=0))
def test_context_is_the_sum_over_neighbours_and_maps(case):
    context, maps, pixels = make_case(**case)
    found = context(maps, pixels, case["width"]).detach().numpy()
    np.testing.assert_allclose(found, reference(context, maps, pixels, case["width"]), **TOLERANCE)


@given(case=cases)
@example(case=case_of(height=30, width=30, n_images=2, k=300, embed_dim=5, strides=(2, 2), seed=0))
@example(case=case_of(height=1, width=9, n_images=2, k=20, embed_dim=2, strides=(2, 2), seed=0))
def test_gradient_comes_back_to_the_cells_and_the_kernels(case):
    """A cell gets the gradients of all the pixels that saw it, and the others none."""
    context, maps, pixels = make_case(**case)
    output = context(maps, pixels, case["width"])
    upstream = np.random.default_rng(case["seed"]).normal(size=output.shape)
    output.backward(torch.from_numpy(upstream))
    weights, arrays = weights_of(context), [cells.detach().numpy() for cells in maps]
    to_maps, to_weights = [np.zeros(cells.shape) for cells in maps], [np.zeros(w.shape) for w in weights]
    for s, b, t, i, j, p, q in neighbours_of(maps, context.steps, pixels, case["width"]):
        to_maps[s][b, :, i, j] += weights[s][:, :, p, q].T @ upstream[b, t]
        to_weights[s][:, :, p, q] += np.outer(upstream[b, t], arrays[s][b, :, i, j])
    seen = seen_by(maps, context.steps, pixels, case["width"])
    for s, (cells, layer) in enumerate(zip(maps, context.convolve, strict=True)):
        np.testing.assert_allclose(cells.grad.numpy(), to_maps[s], **TOLERANCE)
        expected = [to_weights[s]]
        if context.separable:
            each, all_ = (weight.detach().numpy() for weight in layer.parameters())
            by_each = np.einsum("dcpq,dc->cpq", to_weights[s], all_[:, :, 0, 0])[:, None]
            expected = [by_each, np.einsum("dcpq,cpq->dc", to_weights[s], each[:, 0])[:, :, None, None]]
        for weight, gradient in zip(layer.parameters(), expected, strict=True):
            np.testing.assert_allclose(weight.grad.numpy(), gradient, **TOLERANCE)
        assert not cells.grad[~seen[s].expand_as(cells)].any()


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(("height", "width"), [(7, 9), (1, 9), (9, 1), (1, 1)])
def test_gradient_is_that_of_finite_differences(height, width, separable):
    context, maps, pixels = make_case(height, width, 2, 5, 3, (2, 2), seed=0, separable=separable)
    pixels[:, 1] = pixels[:, 0]
    names, weights = zip(*context.named_parameters(), strict=True)

    def output(first, second, *weights):
        arguments = (first, second), pixels, width
        return functional_call(context, dict(zip(names, weights, strict=True)), arguments)

    assert torch.autograd.gradcheck(output, (*maps, *weights))


@pytest.mark.parametrize(
    ("pixel", "cell"),
    [((0, 0), (0, 0)), ((3, 4), (0, 1)), ((11, 12), (1, 2)), ((18, 20), (2, 2)), ((21, 16), (2, 2))],
)
@pytest.mark.parametrize(("down", "right"), AROUND)
def test_a_pixel_sees_around_the_cell_it_is_nearest_to(pixel, cell, down, right):
    """Cells 8 pixels apart in an image of 22 x 21: over 0, 8 and 16; halfway counts to the later."""
    context = TokenContext((1,), (8,), 1, separable=False)
    context.convolve[0].weight.data.zero_()[0, 0, down + 1, right + 1] = 1
    cells = torch.arange(1.0, 10).view(1, 1, 3, 3)
    found = context((cells,), torch.tensor([[pixel[0] * 21 + pixel[1]]]), 21)
    i, j = cell[0] + down, cell[1] + right
    assert found.item() == (cells[0, 0, i, j] if 0 <= i < 3 and 0 <= j < 3 else 0)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (3, 4, [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]),
        (1, 3, [[2, 3, 2]]),
        (3, 1, [[2], [3], [2]]),
        (1, 1, [[1]]),
    ],
)
def test_beyond_the_map_there_is_nothing(height, width, expected):
    """With ones everywhere the context counts the cells around; of the other image it counts none."""
    context = TokenContext((1,), (1,), 1)
    for weight in context.parameters():
        weight.data.fill_(1)
    cells = torch.ones(2, 1, height, width)
    cells[1] = 100
    found = context((cells,), torch.arange(height * width).expand(2, -1), width).view(2, height, width)
    assert found[0].tolist() == expected
    assert found[1].tolist() == (100 * np.array(expected)).tolist()


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), strides=st.sampled_from([(2, 2), (1, 2), (2, 2, 2)])
)
@example(height=1, width=40, strides=(2, 2))
@example(height=40, width=1, strides=(2, 2))
@example(height=1, width=1, strides=(2, 2))
def test_maps_of_the_coarse_network_fit(height, width, strides):
    """All pixels chosen: at each, the whole maps convolved, at the cell that the step of the map promises."""
    channels = CHANNELS[: len(strides)]
    coarse = CoarseAttention(1, channels, strides).double().eval()
    context = TokenContext(channels, coarse.steps, 3).double()
    maps = coarse.look(torch.rand(2, 1, height, width, dtype=torch.float64)).maps
    pixels = torch.arange(height * width).expand(2, -1)
    found = context(maps, pixels, width)
    i, j = np.divmod(np.arange(height * width), width)
    expected = 0
    for cells, step, weight in zip(maps, coarse.steps, weights_of(context), strict=True):
        framed = np.pad(cells.detach().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(framed, (3, 3), axis=(2, 3))
        convolved = np.einsum("dcpq,bchwpq->bhwd", weight, windows)
        row = np.abs(i[:, None] + 0.1 - np.arange(cells.shape[2]) * step).argmin(1)
        column = np.abs(j[:, None] + 0.1 - np.arange(cells.shape[3]) * step).argmin(1)
        expected = expected + convolved[:, row, column]
    np.testing.assert_allclose(found.detach().numpy(), expected, **TOLERANCE)


@given(case=cases)
@example(case=case_of(height=40, width=40, n_images=2, k=3, embed_dim=4, strides=(2, 2), seed=0))
def test_cells_beyond_the_neighbourhoods_may_hold_anything(case):
    """Even what is not a number. Each cell within matters."""
    context, maps, pixels = make_case(**case)
    before = context(maps, pixels, case["width"])
    seen = seen_by(maps, context.steps, pixels, case["width"])
    off = [torch.where(at, cells, torch.nan) for at, cells in zip(seen, maps, strict=True)]
    assert torch.equal(context(tuple(off), pixels, case["width"]), before)
    gradients = torch.autograd.grad(before.square().sum(), maps)
    for at, gradient in zip(seen, gradients, strict=True):
        assert torch.equal(gradient.any(1, keepdim=True), at)


def test_images_do_not_mix():
    context, maps, pixels = make_case(20, 17, 3, 8, 4, (2, 2), seed=0)
    together = context(maps, pixels, 17)
    for b in range(3):
        alone = context(tuple(cells[b : b + 1] for cells in maps), pixels[b : b + 1], 17)
        torch.testing.assert_close(alone[0], together[b], **TOLERANCE)


def test_order_and_repetition_of_pixels_change_nothing():
    context, maps, pixels = make_case(20, 17, 3, 30, 4, (2, 2), seed=0)
    before = context(maps, pixels, 17)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(30, generator=generator) for _ in range(3)])
    rows = order.unsqueeze(-1).expand(-1, -1, 4)
    assert torch.equal(context(maps, pixels.gather(1, order), 17), before.gather(1, rows))
    twice = context(maps, torch.cat([pixels, pixels], 1), 17)
    assert torch.equal(twice, torch.cat([before, before], 1))


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("k", [1, 7, 200, 20 * 17])
def test_cost_is_that_of_the_cells_of_the_pixels(k, separable):
    """Multiply-adds: 3 x 3 x channels x embed_dim for each cell, however many pixels are its own.

    If the convolutions are separable channels x embed_dim, and 3 x 3 x channels that are not counted here.
    """
    context, maps, _ = make_case(20, 17, 2, 1, 4, (2, 2), seed=0, separable=separable)
    generator = torch.Generator().manual_seed(k)
    pixels = torch.stack([torch.randperm(20 * 17, generator=generator)[:k] for _ in range(2)])
    pixels = torch.cat([pixels, pixels[:, :1]], 1)
    with FlopCounterMode(display=False) as counter:
        context(maps, pixels, 17)
    cells = {(s, b, i, j) for s, b, _, i, j in cells_of(maps, context.steps, pixels, 17)}
    kernel = 1 if separable else 9
    assert counter.get_total_flops() / 2 == sum(kernel * CHANNELS[s] * 4 for s, *_ in cells)


@pytest.mark.parametrize("separable", [True, False])
def test_kernels_are_those_of_whole_convolutions(separable):
    context, *_ = make_case(20, 17, 2, 1, 4, (2, 2), seed=0, separable=separable)
    for kernel, expected in zip(context.kernels(), weights_of(context), strict=True):
        np.testing.assert_allclose(kernel.detach().numpy(), expected, rtol=1e-14)


def test_gradient_is_the_same_in_every_run_with_several_threads():
    """Many pixels share a cell: where threads add to it in any order, the last bits differ.

    Seen only where two threads do run at once: not on a busy machine, and not with little work.
    """
    generator = torch.Generator().manual_seed(0)
    context = TokenContext((8, 16), (2, 4), 32)
    maps = [torch.randn(1, n, 128 // step, 128 // step, generator=generator) for n, step in ((8, 2), (16, 4))]
    pixels = torch.randint(128 * 128, (1, 9000), generator=generator)
    upstream = torch.randn(1, 9000, 32, generator=generator)
    wanted = [*(cells.requires_grad_() for cells in maps), *context.parameters()]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (
            torch.autograd.grad(context(tuple(maps), pixels, 128), wanted, upstream) for _ in range(12)
        )
    finally:
        torch.set_num_threads(n_threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
