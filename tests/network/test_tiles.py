"""Tokens of tiles and the sparse convolutions between them, against their equations in plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sklearn_sparseattn.network import TileTokens

EPS = 1e-5  # of batch norm
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make_tokens(channels=(3, 4), stride=2, embed_dim=5, n_layers=2, seed=0):
    """Float64, in evaluation mode, all weights and statistics drawn."""
    generator = torch.Generator().manual_seed(seed)
    module = TileTokens(channels, stride, embed_dim, n_layers).double().eval()
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.copy_(0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for norm in module.norms:
            norm.running_var.abs_().add_(0.3)
    return module


def make_case(n_images=2, height=6, width=7, stride=2, n=9, channels=(3, 4), seed=0, missing=(0, 0)):
    """Maps, chosen tiles and gates; `missing` rows and columns of early cells end before the tiles do."""
    rng = np.random.default_rng(seed)
    early = rng.normal(
        size=(n_images, channels[0], height * stride - missing[0], width * stride - missing[1])
    )
    middle = rng.normal(size=(n_images, channels[1], height, width))
    tiles = np.stack([rng.permutation(height * width)[:n] for _ in range(n_images)])
    gates = rng.uniform(size=tiles.shape)
    return tuple(torch.from_numpy(part) for part in (early, middle, tiles, gates))


def array(tensor):
    return tensor.detach().numpy()


def cell(maps, row, column):
    """Features of a cell (channels,), zero beyond the border."""
    inside = 0 <= row < maps.shape[1] and 0 <= column < maps.shape[2]
    return maps[:, row, column] if inside else np.zeros(len(maps))


def normed(rows, norm, training):
    """Batch norm of a list of vectors."""
    rows = np.array(rows)
    mean, variance = array(norm.running_mean), array(norm.running_var)
    if training:
        mean = sum(rows) / len(rows)
        variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / np.sqrt(variance + EPS) * array(norm.weight) + array(norm.bias) for row in rows]


def reference(module, early, middle, tiles, gates, training=False):
    """Tokens of all images, [(n, D), ...], tile by tile."""
    stride, embed_dim = module.stride, module.first.out_features
    early, middle, gates = (array(part) for part in (early, middle, gates))
    height, width = middle.shape[2:]
    places = [[divmod(int(tile), width) for tile in of_image] for of_image in tiles]

    def by_rows(of_images, norm):
        """Statistics are those of all tokens of all images."""
        found = iter(normed([row for rows in of_images for row in rows], norm, training))
        return [[np.maximum(next(found), 0) for _ in rows] for rows in of_images]

    known = []
    for b, of_image in enumerate(places):
        rows = []
        for i, j in of_image:
            u = [[(2 * j + 1) / width - 1, (2 * i + 1) / height - 1]]
            u += [cell(middle[b], i + p, j + q) for p in (-1, 0, 1) for q in (-1, 0, 1)]
            u += [cell(early[b], stride * i + p, stride * j + q) for p, q in np.ndindex(stride, stride)]
            rows.append(array(module.first.weight) @ np.concatenate(u))
        known.append(rows)
    tokens = by_rows(known, module.norms[0])
    tokens = [[g * t for g, t in zip(*pair, strict=True)] for pair in zip(gates, tokens, strict=True)]
    for layer, norm in zip(module.layers, module.norms[1:], strict=True):
        seen = []
        for of_image, rows in zip(places, tokens, strict=True):
            at = dict(zip(of_image, rows, strict=True))
            sums = []
            for i, j in of_image:
                total = np.zeros(embed_dim)
                for place, (p, q) in enumerate(np.ndindex(3, 3)):
                    weight = array(layer.weight)[:, place * embed_dim : (place + 1) * embed_dim]
                    if (i + p - 1, j + q - 1) in at:
                        total = total + weight @ at[i + p - 1, j + q - 1]
                sums.append(total)
            seen.append(sums)
        added = by_rows(seen, norm)
        tokens = [
            [t + g * a for t, g, a in zip(*parts, strict=True)]
            for parts in zip(tokens, gates, added, strict=True)
        ]
    return np.array(tokens)


@settings(max_examples=60)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    stride=st.integers(1, 2),
    n_layers=st.integers(0, 3),
    training=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
@example(height=1, width=1, stride=2, n_layers=2, training=False, data=None, seed=0)
@example(height=5, width=5, stride=2, n_layers=3, training=True, data=None, seed=0)
def test_tokens_follow_the_equations(height, width, stride, n_layers, training, data, seed):
    n, missing = height * width, (0, 0)
    if data is not None:
        n = data.draw(st.integers(1, n))
        missing = (data.draw(st.integers(0, stride - 1)), data.draw(st.integers(0, stride - 1)))
    module = make_tokens(stride=stride, n_layers=n_layers, seed=seed % 1000).train(training)
    case = make_case(2, height, width, stride, n, seed=seed, missing=missing)
    found = module(*case)
    assert found.shape == (2, n, 5)
    assert (found >= 0).all()
    np.testing.assert_allclose(array(found), reference(module, *case, training=training), **CLOSE)


def test_with_all_tiles_a_layer_is_a_dense_convolution():
    module = make_tokens(n_layers=1)
    early, middle, _, _ = make_case()
    tiles, gates = torch.arange(42).expand(2, 42), torch.ones(2, 42, dtype=torch.float64)
    first = make_tokens(n_layers=0)
    first.load_state_dict(module.state_dict(), strict=False)
    begin = first(early, middle, tiles, gates).transpose(1, 2).unflatten(2, (6, 7))
    kernel = module.layers[0].weight.unflatten(1, (3, 3, 5)).permute(0, 3, 1, 2)
    norm = module.norms[1]
    added = F.batch_norm(
        F.conv2d(begin, kernel, padding=1), norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    expected = (begin + added.relu()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(early, middle, tiles, gates), expected, **CLOSE)


def test_the_order_of_the_tiles_does_not_matter():
    module, (early, middle, tiles, gates) = make_tokens(), make_case()
    order = torch.tensor(np.random.default_rng(0).permutation(9))
    found = module(early, middle, tiles[:, order], gates[:, order])
    torch.testing.assert_close(found, module(early, middle, tiles, gates)[:, order], **CLOSE)


def test_images_do_not_mix():
    module, case = make_tokens(), make_case(4)
    together = module(*case)
    for b in range(4):
        torch.testing.assert_close(module(*(part[b : b + 1] for part in case))[0], together[b], **CLOSE)


def test_a_tile_whose_gate_is_closed_is_as_if_it_were_not_there():
    module, (early, middle, tiles, gates) = make_tokens(), make_case(height=3, width=4, n=9)
    gates[:, 3] = 0
    found = module(early, middle, tiles, gates)
    assert not found[:, 3].any()
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    torch.testing.assert_close(module(early, middle, tiles[:, kept], gates[:, kept]), found[:, kept], **CLOSE)
    # Another tile in its place, one that was not chosen, changes nothing.
    for b in range(2):
        tiles[b, 3] = np.setdiff1d(np.arange(12), tiles[b])[0]
    torch.testing.assert_close(module(early, middle, tiles, gates), found, **CLOSE)


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_a_token_sees_one_tile_further_with_each_layer(n_layers):
    """And only through tiles that were chosen."""
    module = make_tokens(n_layers=n_layers)
    early, middle, _, _ = make_case(1, 1, 9)
    tiles, gates = torch.arange(9)[None], torch.ones(1, 9, dtype=torch.float64)
    other = early.clone()
    other[:, :, :, 8:10] += 3  # under tile 4

    def moved(tiles):
        before, after = (module(maps, middle, tiles, gates[:, : tiles.shape[1]]) for maps in (early, other))
        return tiles[0, (before != after).any(2)[0]].tolist()

    assert moved(tiles) == list(range(4 - n_layers, 4 + n_layers + 1))
    without_5 = torch.tensor([[0, 1, 2, 3, 4, 6, 7, 8]])
    assert moved(without_5) == list(range(4 - n_layers, 5))


def test_only_what_is_around_the_chosen_tiles_is_looked_at():
    module = make_tokens(n_layers=2)
    early, middle, _, _ = make_case(1, 8, 8)
    tiles = torch.tensor([[18, 19, 54]])
    gates = torch.ones(1, 3, dtype=torch.float64)
    under, around = torch.zeros(1, 1, 16, 16, dtype=torch.bool), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    for i, j in ((2, 2), (2, 3), (6, 6)):
        under[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = True
        around[..., i - 1 : i + 2, j - 1 : j + 2] = True
    before = module(early, middle, tiles, gates)
    off = [torch.where(seen, m, torch.nan) for seen, m in ((under, early), (around, middle))]
    assert torch.equal(module(*off, tiles, gates), before)
    early.requires_grad_()
    middle.requires_grad_()
    slopes = torch.autograd.grad(module(early, middle, tiles, gates).square().sum(), (early, middle))
    for slope, seen in zip(slopes, (under, around), strict=True):
        assert torch.equal(slope.any(1, keepdim=True), seen)


def test_gradients_are_right():
    module, (early, middle, tiles, gates) = make_tokens(embed_dim=3), make_case(1, 2, 3, n=4)
    leaves = [part.requires_grad_() for part in (early, middle, gates)]
    names, values = zip(*module.named_parameters(), strict=True)

    def call(early, middle, gates, *values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, weights, (early, middle, tiles, gates))

    assert torch.autograd.gradcheck(call, (*leaves, *values))


def test_every_weight_but_that_which_is_folded_learns():
    module = make_tokens().train()
    module(*make_case()).square().sum().backward()
    without = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"out.weight", "out.bias"}


def test_the_layout_in_memory_does_not_matter():
    module, (early, middle, tiles, gates) = make_tokens(), make_case()
    last = [maps.contiguous(memory_format=torch.channels_last) for maps in (early, middle)]
    torch.testing.assert_close(module(*last, tiles, gates), module(early, middle, tiles, gates), **CLOSE)


def test_no_images_and_one_tile():
    module = make_tokens()
    early, middle, tiles, gates = make_case(n=1)
    assert module(early[:0], middle[:0], tiles[:0], gates[:0]).shape == (0, 1, 5)
    assert module(early, middle, tiles, gates).shape == (2, 1, 5)


def test_norms_are_one_more_than_layers():
    module = TileTokens((8, 16), 2, 32, 3)
    assert module.first.in_features == 2 + 9 * 16 + 4 * 8
    assert [tuple(layer.weight.shape) for layer in module.layers] == [(32, 288)] * 3
    assert [type(norm) for norm in module.norms] == [nn.BatchNorm1d] * 4
