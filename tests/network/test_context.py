"""The context of the tokens against a loop over pixels and cells, in value and in gradient."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sklearn_sparseattn.network import CoarseAttention
from sklearn_sparseattn.network.context import TokenContext

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
CHANNELS = (2, 3, 4)
STRIDES = [(2, 2, 2), (1, 2, 2), (1, 1, 2), (1, 1, 1), (2, 1, 1)]

cases = st.fixed_dictionaries(
    {
        "height": st.integers(1, 40),
        "width": st.integers(1, 40),
        "n_images": st.integers(1, 3),
        "k": st.integers(1, 12),
        "embed_dim": st.integers(1, 6),
        "strides": st.sampled_from(STRIDES),
        "seed": st.integers(0, 2**31 - 1),
    }
)


def case_of(**case):
    return case


def make_case(height, width, n_images, k, embed_dim, strides, seed):
    """A context in float64, maps of the sizes that an image leaves, and pixels, the last one among them."""
    generator = torch.Generator().manual_seed(seed)
    steps = tuple(int(step) for step in np.cumprod(strides))
    context = TokenContext(CHANNELS, steps, embed_dim).double()
    maps = []
    for n_channels, step, layer in zip(CHANNELS, steps, context.project, strict=True):
        layer.weight.data.normal_(generator=generator)
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
    """Where each pixel takes its features: stage, image, number of the pixel, cell."""
    for s, b, t in itertools.product(range(len(maps)), range(len(pixels)), range(pixels.shape[1])):
        i, j = divmod(int(pixels[b, t]), width)
        n_rows, n_columns = maps[s].shape[2:]
        yield s, b, t, nearest(i, n_rows, steps[s]), nearest(j, n_columns, steps[s])


def weights_of(context):
    return [layer.weight.detach().numpy()[:, :, 0, 0] for layer in context.project]


@given(case=cases)
@example(case=case_of(height=1, width=1, n_images=1, k=3, embed_dim=1, strides=(2, 2, 2), seed=0))
@example(case=case_of(height=1, width=37, n_images=2, k=9, embed_dim=4, strides=(2, 2, 2), seed=0))
@example(case=case_of(height=135, width=135, n_images=2, k=200, embed_dim=32, strides=(2, 2, 2), seed=0))
def test_context_is_the_sum_of_the_nearest_cells(case):
    context, maps, pixels = make_case(**case)
    expected = np.zeros((*pixels.shape, case["embed_dim"]))
    weights = weights_of(context)
    for s, b, t, i, j in cells_of(maps, context.steps, pixels, case["width"]):
        expected[b, t] += weights[s] @ maps[s].detach().numpy()[b, :, i, j]
    found = context(maps, pixels, case["width"]).detach().numpy()
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@given(case=cases)
@example(case=case_of(height=30, width=30, n_images=2, k=300, embed_dim=5, strides=(2, 2, 2), seed=0))
def test_gradient_comes_back_to_the_cells_and_the_projections(case):
    """A cell gets the gradients of all the pixels that took it, and the others none."""
    context, maps, pixels = make_case(**case)
    output = context(maps, pixels, case["width"])
    upstream = torch.from_numpy(np.random.default_rng(case["seed"]).normal(size=output.shape))
    output.backward(upstream)
    weights = weights_of(context)
    to_maps, to_weights = [np.zeros(cells.shape) for cells in maps], [np.zeros(w.shape) for w in weights]
    for s, b, t, i, j in cells_of(maps, context.steps, pixels, case["width"]):
        gradient = upstream[b, t].numpy()
        to_maps[s][b, :, i, j] += weights[s].T @ gradient
        to_weights[s] += np.outer(gradient, maps[s].detach().numpy()[b, :, i, j])
    for s, (cells, layer) in enumerate(zip(maps, context.project, strict=True)):
        np.testing.assert_allclose(cells.grad.numpy(), to_maps[s], **TOLERANCE)
        np.testing.assert_allclose(layer.weight.grad.numpy()[:, :, 0, 0], to_weights[s], **TOLERANCE)


@pytest.mark.parametrize(
    ("pixel", "cell"),
    [((0, 0), (0, 0)), ((3, 4), (0, 1)), ((11, 12), (1, 2)), ((18, 20), (2, 2)), ((21, 16), (2, 2))],
)
def test_a_pixel_takes_the_cell_it_is_nearest_to(pixel, cell):
    """Cells 8 pixels apart in an image of 22 x 21: over 0, 8 and 16; halfway counts to the later."""
    context = TokenContext((1,), (8,), 1)
    context.project[0].weight.data.fill_(1)
    cells = torch.arange(9.0).view(1, 1, 3, 3)
    found = context((cells,), torch.tensor([[pixel[0] * 21 + pixel[1]]]), 21)
    assert found.item() == cells[0, 0][cell]


@given(height=st.integers(1, 40), width=st.integers(1, 40), strides=st.sampled_from(STRIDES))
def test_maps_of_the_coarse_network_fit(height, width, strides):
    """At every pixel: each map of the coarse network has the cells that its step promises."""
    coarse = CoarseAttention(1, CHANNELS, strides).double().eval()
    context = TokenContext(CHANNELS, coarse.steps, 3).double()
    maps = coarse.look(torch.rand(2, 1, height, width, dtype=torch.float64)).maps
    pixels = torch.arange(height * width).expand(2, -1)
    found = context(maps, pixels, width)
    i, j = np.divmod(np.arange(height * width), width)
    expected = 0
    for cells, step, weight in zip(maps, coarse.steps, weights_of(context), strict=True):
        row = np.abs(i[:, None] + 0.1 - np.arange(cells.shape[2]) * step).argmin(1)
        column = np.abs(j[:, None] + 0.1 - np.arange(cells.shape[3]) * step).argmin(1)
        expected = expected + np.einsum("dc,bck->bkd", weight, cells.detach().numpy()[:, :, row, column])
    np.testing.assert_allclose(found.detach().numpy(), expected, **TOLERANCE)


def test_images_do_not_mix():
    context, maps, pixels = make_case(20, 17, 3, 8, 4, (2, 2, 2), seed=0)
    together = context(maps, pixels, 17)
    for b in range(3):
        alone = context(tuple(cells[b : b + 1] for cells in maps), pixels[b : b + 1], 17)
        torch.testing.assert_close(alone[0], together[b], **TOLERANCE)


def test_gradient_is_the_same_in_every_run_with_several_threads():
    """Many pixels share a cell: where threads add to it in any order, the last bits differ."""
    context, maps, _ = make_case(64, 64, 1, 1, 32, (2, 2, 2), seed=0)
    context.float()
    maps = [cells.detach().float().requires_grad_() for cells in maps]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(64 * 64, (1, 9000), generator=generator)
    upstream = torch.randn(1, 9000, 32, generator=generator)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (
            torch.autograd.grad(context(tuple(maps), pixels, 64), maps, upstream) for _ in range(20)
        )
    finally:
        torch.set_num_threads(n_threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
