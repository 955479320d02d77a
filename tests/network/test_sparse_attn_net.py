"""The whole network: its forward pass in NumPy, its k, its weights, and what a pass costs."""

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.network import SparseAttnNet
from sklearn_sparseattn.training.setup import new_network

VARIANTS = ("tiles", "paper")
N_LAYERS = {"default": 2, "large": 3}


def make_net(n_channels=1, n_classes=3, k=20.0, seed=0, **options):
    """Float64, in evaluation mode, with weights and statistics as after some training."""
    generator = torch.Generator().manual_seed(seed)
    net = SparseAttnNet(n_channels, n_classes, k, **options)
    net.reset_parameters(generator)
    net.coarse.background.fill_(0.37)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return net.double().eval()


def random_images(n, n_channels, height, width, seed=0):
    images = np.random.default_rng(seed).uniform(size=(n, n_channels, height, width))
    return torch.from_numpy(images)


# ---- the forward pass ----


class Reference:
    """The forward pass of one image, from the weights alone, by arithmetic on arrays."""

    def __init__(self, net, strides=(2, 2, 2), n_layers=2, n_heads=2):
        self.w = {name: value.numpy().astype(float) for name, value in net.state_dict().items()}
        self.strides, self.n_layers, self.n_heads = strides, n_layers, n_heads
        self.of_tiles = "tokens.first.weight" in self.w
        self.tile = strides[0] * strides[1] if self.of_tiles else 1

    def norm(self, x, name, eps=1e-5):
        mean, variance = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        return (x - mean) / np.sqrt(variance + eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def stage(self, x, name, stride=1):
        """x : (H, W, C)."""
        kernel = self.w[f"{name}.0.weight"]
        border = kernel.shape[2] // 2
        padded = np.pad(x, ((border, border), (border, border), (0, 0)))
        windows = sliding_window_view(padded, kernel.shape[2:], axis=(0, 1))[::stride, ::stride]
        x = np.einsum("hwcij,ocij->hwo", windows, kernel)
        return np.maximum(self.norm(x, f"{name}.1"), 0)

    def coarse(self, image):
        """Scores of what is chosen from, pooled features, and the maps (h, w, C)."""
        _, height, width = image.shape
        above = np.moveaxis(image, 0, -1) - self.w["coarse.background"]
        maps = [self.stage(above, "coarse.early", self.strides[0])]
        maps.append(self.stage(maps[0], "coarse.middle", self.strides[1]))
        scores = maps[1] @ self.w["coarse.score.weight"][0, :, 0, 0] + self.w["coarse.score.bias"]
        if not self.of_tiles:
            deep = self.stage(maps[1], "coarse.deep.0", self.strides[2])
            maps.append(self.stage(deep, "coarse.deep.1"))
            step = self.strides[0] * self.strides[1]
            across = [np.interp(np.arange(width), np.arange(len(row)) * step, row) for row in scores]
            below = np.arange(len(scores)) * step
            scores = np.stack([np.interp(np.arange(height), below, c) for c in np.transpose(across)], axis=1)
        z_coarse = np.concatenate([maps[-1].mean((0, 1)), maps[-1].max((0, 1))])
        return scores, z_coarse, maps

    def gates(self, scores, tiles):
        """sigmoid(a) times how far a is above the best score left, as a share of that of the last tenth."""
        a, n = scores.ravel()[tiles], len(tiles)
        gates = 1 / (1 + np.exp(-a))
        if n < scores.size:
            in_order = -np.sort(-scores.ravel())
            full = in_order[max(n - max(1, int(n / 10 + 0.5)), 1) - 1]
            gates *= np.minimum((a - in_order[n]) / max(full - in_order[n], 0.05), 1)
        return gates

    def pixel_embedding(self, image, pixels):
        """relu(W1 p + b1)."""
        n_channels, height, width = image.shape
        i, j = np.divmod(pixels, width)
        place = [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1]
        tokens = np.stack([*place, *image.reshape(n_channels, -1)[:, pixels]], axis=1)
        return np.maximum(tokens @ self.w["embedding.first.weight"].T + self.w["embedding.first.bias"], 0)

    def tile_tokens(self, early, middle, tiles, gates):
        """Of maps (h, w, C)."""
        height, width, _ = middle.shape
        side = self.strides[1]
        around = np.pad(middle, ((1, 1), (1, 1), (0, 0)))
        under = np.pad(
            early, [(0, side * n - m) for n, m in zip((height, width), early.shape, strict=False)] + [(0, 0)]
        )
        places = [divmod(int(tile), width) for tile in tiles]
        known = [
            np.concatenate(
                [
                    [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1],
                    around[i : i + 3, j : j + 3].ravel(),
                    under[side * i : side * (i + 1), side * j : side * (j + 1)].ravel(),
                ]
            )
            for i, j in places
        ]
        linear = np.array(known) @ self.w["tokens.first.weight"].T
        tokens = gates[:, None] * np.maximum(self.norm(linear, "tokens.norms.0"), 0)
        for layer in range(self.n_layers):
            table = np.zeros((height + 2, width + 2, tokens.shape[1]))
            for (i, j), token in zip(places, tokens, strict=True):
                table[i + 1, j + 1] = token
            near = np.array([table[i : i + 3, j : j + 3].ravel() for i, j in places])
            added = self.norm(near @ self.w[f"tokens.layers.{layer}.weight"].T, f"tokens.norms.{layer + 1}")
            tokens = tokens + gates[:, None] * np.maximum(added, 0)
        return tokens

    def fine(self, tokens, out):
        """Keys and values of W2 T + b2, head by head."""
        cls = self.w["fine.cls_token"][0, 0]
        rows = np.vstack([tokens @ self.w[f"{out}.weight"].T + self.w[f"{out}.bias"], cls])
        z_fine, attention, signed = 0, 0, 0
        for w_key, w_query in zip(
            np.split(self.w["fine.key.weight"], self.n_heads),
            np.split(self.w["fine.query.weight"], self.n_heads),
            strict=True,
        ):
            key = np.maximum(rows @ w_key.T, 0) + (1e-3 if self.of_tiles else 1e-6)
            a = key / key.sum(0)
            query = w_query @ cls
            z_fine = z_fine + query @ (a.T @ (rows @ self.w["fine.value.weight"].T)) / self.n_heads
            attention = attention + a[:-1].mean(1) / self.n_heads
            signed = signed + a[:-1] @ query / self.n_heads
        z_fine = (z_fine - z_fine.mean()) / np.sqrt(z_fine.var() + 1e-5)
        return z_fine * self.w["fine_norm.weight"] + self.w["fine_norm.bias"], attention, signed

    def fusion(self, x):
        def layer(x, name):
            return np.maximum(self.norm(x @ self.w[f"{name}.0.weight"].T, f"{name}.1"), 0)

        if self.of_tiles:
            x = self.norm(x, "fusion.norm", eps=2e-3)
        x = layer(x, "fusion.first")
        x = x + layer(x, "fusion.residual")
        return x @ self.w["fusion.out.weight"].T + self.w["fusion.out.bias"]

    def __call__(self, image, k=None):
        scores, z_coarse, maps = self.coarse(image)
        k = self.w["k"] if k is None else k
        area = min(self.tile, image.shape[1]) * min(self.tile, image.shape[2])
        n = int(np.clip(np.floor(k / area + 0.5), 1, scores.size))
        tiles = np.argsort(-scores.ravel(), kind="stable")[:n]
        if self.of_tiles:
            tokens = self.tile_tokens(*maps, tiles, self.gates(scores, tiles))
            z_fine, attention, signed = self.fine(tokens, "tokens.out")
            features = np.concatenate([z_fine, tokens.max(0), z_coarse])
        else:
            z_fine, attention, signed = self.fine(self.pixel_embedding(image, tiles), "embedding.out")
            features = np.concatenate([z_fine, z_coarse])
        return self.fusion(features), features, scores, tiles, attention, signed


CASES = [
    (1, 1, 1, 1, {}),
    (3, 1, 7, 3, {}),
    (5, 5, 3, 8.5, {"strides": (1, 1, 1)}),
    (1, 135, 135, 2146, {}),
    (3, 40, 26, 155.4, {"embed_dim": 7, "n_heads": 3, "hidden_dim": 11}),
    (1, 16, 16, 1e9, {"strides": (1, 2, 2)}),
    (3, 9, 8, 20, {"strides": (1, 1, 2), "embed_dim": 5, "n_heads": 5}),
    (2, 19, 13, 30, {"strides": (2, 1, 1)}),
    (2, 19, 12, 90, {"size": "large"}),
    (1, 33, 26, 200, {"size": "large", "strides": (1, 2, 2)}),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n_channels", "height", "width", "k", "options"), CASES)
def test_forward_pass_is_the_reference(n_channels, height, width, k, options, variant):
    size = options.get("size", "default")
    if variant == "paper":
        options = {name: value for name, value in options.items() if name != "size"}
    net = make_net(n_channels, 4, k, variant=variant, **options)
    images = random_images(2, n_channels, height, width)
    output = net(images)
    how = {name: options[name] for name in ("strides", "n_heads") if name in options}
    reference = Reference(net, n_layers=N_LAYERS[size], **how)
    assert reference.of_tiles == (variant == "tiles")
    assert net.tile == reference.tile
    for b in range(2):
        for name, expected in zip(output._fields, reference(images[b].numpy()), strict=True):
            found = getattr(output, name)[b].detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ks", [[1.0, 200.0, 64.0], [30.0, 30.0, 30.0], [1e9, 2.5, 1e9]])
def test_each_image_can_have_a_k_of_its_own(ks, variant):
    """The answer is that of a network with this k; what is not chosen of an image has no attention."""
    net, images = make_net(2, 4, 50, variant=variant), random_images(3, 2, 19, 13)
    net.k_by_image = torch.tensor(ks)
    output, reference = net(images), Reference(net)
    for b, k in enumerate(ks):
        expected = dict(zip(output._fields, reference(images[b].numpy(), k), strict=True))
        n = len(expected["tiles"])
        assert (output.attention[b] > 0).tolist() == [True] * n + [False] * (output.tiles.shape[1] - n)
        for name, value in expected.items():
            found = getattr(output, name)[b].detach().numpy()
            if name in ("tiles", "attention", "contribution"):
                assert name == "tiles" or not found[n:].any()
                found = found[:n]
            np.testing.assert_allclose(found, value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_batch_norm_sees_the_chosen_tiles_of_each_image_alone():
    net, images, seen = make_net(k=50).train(), random_images(3, 1, 24, 24), []
    for norm in net.tokens.norms:
        norm.register_forward_hook(lambda layer, args, output: seen.append(args[0].detach()))
    n = torch.tensor([1, 9, 30])
    net.k_by_image = n * net.tile**2
    output = net(images)
    output.logits.square().sum().backward()
    assert [len(rows) for rows in seen] == [40] * 3
    alone = make_net(k=50)
    alone.load_state_dict(net.state_dict())
    first = []
    alone.tokens.norms[0].register_forward_hook(lambda layer, args, output: first.append(args[0].detach()))
    for b in range(3):
        # The coarse maps are those of the whole batch, which batch norm there depends on.
        look = net.coarse.look(images)
        tiles = output.tiles[b : b + 1, : n[b]]
        alone.tokens.eval()(*(part[b : b + 1] for part in look.maps), tiles, torch.ones(tiles.shape))
    torch.testing.assert_close(seen[0], torch.cat(first))
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("variant", "size", "n_features"),
    [
        ("tiles", "default", 96),
        ("tiles", "large", 128),
        ("paper", "default", 80),
    ],
)
@pytest.mark.parametrize("n_channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3), (33, 2), (70, 41)])
def test_any_image_size_trains(n_channels, height, width, variant, size, n_features):
    net = SparseAttnNet(n_channels, 2, k=70, variant=variant, size=size).train()
    output = net(torch.rand(3, n_channels, height, width))
    rows, columns = net.grid_of(height, width)
    assert (rows, columns) == (-(-height // net.tile), -(-width // net.tile))
    area = min(net.tile, height) * min(net.tile, width)  # a tile is no larger than the image
    n = min(max(round(70 / area), 1), rows * columns)
    assert output.logits.shape == (3, 2)
    assert output.features.shape == (3, n_features)
    assert output.scores.shape == (3, rows, columns)
    assert output.tiles.shape == output.attention.shape == output.contribution.shape == (3, n)
    output.logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def without_gradient(net):
    return {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}


def test_scores_learn_from_no_gradient_of_the_answer():
    """As printed: what is chosen is not differentiated through; every other weight learns from the logits."""
    net = make_net(variant="paper").train()
    output = net(random_images(4, 1, 24, 24))
    output.logits.square().sum().backward(retain_graph=True)
    assert without_gradient(net) == {"coarse.score.weight", "coarse.score.bias"}
    output.scores.square().sum().backward()
    assert net.coarse.score.weight.grad.any()


@pytest.mark.parametrize("size", N_LAYERS)
def test_with_tiles_every_weight_learns_from_the_answer(size):
    net = make_net(size=size, k=200).train()
    net(random_images(4, 1, 24, 24)).logits.square().sum().backward()
    assert without_gradient(net) == set()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_answer_moves_with_the_level_of_the_scores_through_the_gate_alone(variant):
    """The bias of the scores leaves the choice as it is: its gradient is the slope of the logits."""
    net = make_net(k=40, variant=variant)
    images = random_images(2, 1, 24, 24)
    bias = net.coarse.score.bias

    def logits(shift):
        with torch.no_grad():
            bias.add_(shift)
            output = net(images)
            bias.sub_(shift)
        return output.logits

    before = net(images)
    (slope,) = torch.autograd.grad(before.logits[0, 1], bias, allow_unused=True)
    measured = ((logits(1e-5) - logits(-1e-5)) / 2e-5)[0, 1]
    if variant == "paper":
        assert slope is None
        assert torch.equal(logits(3.0), before.logits)
    else:
        assert measured.abs() > 1e-4
        torch.testing.assert_close(slope[0], measured, rtol=1e-6, atol=1e-9)


def fixed(net, look):
    """The network with another coarse pass, the same for all images."""
    other = copy.deepcopy(net)
    other.coarse = FixedCoarse(look)
    return other


def test_the_gradient_of_the_scores_is_that_of_the_first_factor_of_the_gates():
    """Each chosen tile's score has the slope of sigmoid; how far a gate is open has none, nor have others."""
    net = make_net(k=80)
    images = random_images(1, 1, 24, 24)
    look = net.coarse.look(images)
    scores = look.scores.detach().requires_grad_()
    output = fixed(net, look._replace(scores=scores))(images)
    (found,) = torch.autograd.grad(output.logits[0, 1], scores)
    flat = scores.detach().flatten(1)
    gate = flat.gather(1, output.tiles).sigmoid().requires_grad_()
    tokens = net.tokens(*look.maps, output.tiles, gate * net.openness(flat, output.tiles))
    z_fine, _, _ = net.fine.attend(tokens, net.tokens.out)
    features = torch.cat([net.fine_norm(z_fine), tokens.amax(1), look.z_coarse], dim=1)
    (by_gate,) = torch.autograd.grad(net.fusion(features)[0, 1], gate)
    expected = torch.zeros_like(flat).scatter_(1, output.tiles, by_gate * gate * (1 - gate))
    torch.testing.assert_close(found.flatten(1), expected.detach(), rtol=1e-9, atol=1e-12)
    assert (found != 0).sum() == output.tiles.shape[1] < scores.numel()


@pytest.mark.parametrize("size", N_LAYERS)
@pytest.mark.parametrize("k", [1, 40, 160, 400])
@pytest.mark.parametrize("seed", [0, 1])
def test_another_choice_is_no_jump(k, size, seed):
    """From image to image, up to where other tiles are chosen: there the answer goes on."""
    net = make_net(k=k, size=size, seed=seed)
    one, other = random_images(2, 1, 24, 24, seed)
    jump, high = jumps(net, one, other)
    assert high < 1
    assert jump < 1e-9


def jumps(net, one, other):
    """How far logits and features jump where tiles are chosen otherwise, and where on the way that is."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        tiles = net(torch.stack([one + t * (other - one) for t in (low, middle)])).tiles.sort().values
        low, high = (middle, high) if tiles[0].equal(tiles[1]) else (low, middle)
    output = net(torch.stack([one + t * (other - one) for t in (low, high)]))
    assert high - low < 1e-14
    return max((part[1] - part[0]).abs().max().item() for part in (output.logits, output.features)), high


def test_without_the_ramp_another_choice_is_a_jump(monkeypatch):
    net = make_net(k=160)
    monkeypatch.setattr(net, "openness", lambda scores, tiles, kept: torch.ones_like(scores.gather(1, tiles)))
    jump, _ = jumps(net, *random_images(2, 1, 24, 24))
    assert jump > 1e-5


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), n=st.integers(1, 35), training=st.booleans())
def test_it_does_not_matter_which_of_two_equal_tiles_is_chosen(seed, n, training):
    net = make_net(k=16 * n, seed=seed % 7).train(training)
    if training:  # batch statistics count all tokens: here those of one tile stand for those of the other
        net.tokens.eval()
    images = random_images(2, 1, 24, 24, seed)
    look = net.coarse.look(images)
    order = look.scores.flatten(1).sort(1, descending=True).indices
    scores = look.scores.flatten(1).clone()
    # The best one that is left is as good as the last one chosen.
    scores.scatter_(1, order[:, n : n + 1], scores.gather(1, order[:, n - 1 : n]))
    fixed_net = fixed(net, look._replace(scores=scores.view(2, 6, 6)))
    answers = []
    for last in (n - 1, n):
        tiles = torch.cat([order[:, : n - 1], order[:, last : last + 1]], dim=1)
        fixed_net.choose = lambda images, scores, tiles=tiles: tiles
        answers.append(fixed_net(images))
    for name in ("logits", "features", "attention", "contribution"):
        torch.testing.assert_close(getattr(answers[0], name), getattr(answers[1], name), rtol=1e-9, atol=1e-9)


class FixedCoarse(nn.Module):
    """Says the same of every image."""

    def __init__(self, look):
        super().__init__()
        self.answer = look

    def look(self, images):
        return self.answer


def test_pixels_not_chosen_matter_through_the_coarse_net_only():
    net = make_net(n_channels=2, k=30, variant="paper")
    images = random_images(3, 2, 12, 14)
    before = net(images)
    net.coarse = FixedCoarse(net.coarse.look(images))
    chosen = torch.zeros(3, 12 * 14, dtype=torch.bool).scatter_(1, before.tiles, True).view(3, 1, 12, 14)
    other = random_images(3, 2, 12, 14, seed=1)
    off = net(torch.where(chosen, images, other))
    for name, part in before._asdict().items():
        assert torch.equal(getattr(off, name), part), name
    # One value of one channel of one chosen pixel moves that image's answer, and no other.
    images[1].flatten(1)[1, before.tiles[1, 7]] += 0.5
    on = net(images)
    moved = (on.logits != before.logits).any(1)
    assert moved.tolist() == [False, True, False]


def test_tiles_not_chosen_matter_through_scores_and_pooled_features_only():
    """With these as they are, maps may hold anything beyond the 3 x 3 cells around a chosen tile."""
    net = make_net(n_channels=2, k=80)
    images = random_images(2, 2, 40, 40)
    before, look = net(images), net.coarse.look(images)
    near = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    chosen = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    for b, tile in zip(np.repeat([0, 1], 5), before.tiles.flatten().tolist(), strict=True):
        i, j = divmod(tile, 10)
        near[b, 0, i : i + 3, j : j + 3] = True
        chosen[b, 0, i, j] = True
    early, middle = look.maps
    under = chosen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    off = torch.where(under, early, torch.nan), torch.where(near[..., 1:-1, 1:-1], middle, torch.nan)
    assert torch.equal(fixed(net, look._replace(maps=off))(images).logits, before.logits)
    for s, seen in enumerate((under, near[..., 1:-1, 1:-1])):
        on = list(look.maps)
        on[s] = torch.where(seen, on[s] + 7, on[s])
        assert (fixed(net, look._replace(maps=tuple(on)))(images).logits != before.logits).any(1).all()


@pytest.mark.parametrize(("variant", "own"), [("tiles", {"tokens"}), ("paper", {"embedding", "coarse.deep"})])
def test_no_weight_is_kept_that_a_variant_does_not_use(variant, own):
    net = make_net(variant=variant)
    parts = {".".join(name.split(".")[: 1 + name.startswith("coarse")]) for name, _ in net.named_parameters()}
    assert parts == own | {"coarse.early", "coarse.middle", "coarse.score", "fine", "fine_norm", "fusion"}


def test_z_fine_is_normed():
    net = make_net()
    with torch.no_grad():
        net.fine_norm.weight.fill_(1)
        net.fine_norm.bias.zero_()
    z_fine = net(random_images(2, 1, 20, 20)).features[:, :32]
    torch.testing.assert_close(z_fine.mean(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z_fine.std(1, correction=0), torch.ones(2).double(), rtol=1e-2, atol=0)


def test_features_are_tokens_pooled_twice_and_the_coarse_ones():
    net, images = make_net(k=100), random_images(2, 1, 24, 24)
    output, look = net(images), net.coarse.look(images)
    tokens = net.tile_tokens(look.scores, look.maps, output.tiles)
    assert (tokens >= 0).all()
    z_fine, _, _ = net.fine.attend(net.tokens.out(tokens))
    for found, expected in zip(
        output.features.split([32, 32, 32], dim=1),
        (net.fine_norm(z_fine), tokens.amax(1), look.z_coarse),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layout_in_memory_does_not_matter(variant):
    net = make_net(n_channels=3, variant=variant)
    images = random_images(2, 3, 20, 23)
    expected = net(images)
    net.coarse.to(memory_format=torch.channels_last)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = net(images.contiguous(memory_format=layout))
        assert torch.equal(found.tiles, expected.tiles)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_answers_the_same_and_is_another(variant, copied):
    net, images = make_net(variant=variant), random_images(2, 1, 20, 20)
    other = copied(net)
    assert other.form == net.form
    assert all(torch.equal(*parts) for parts in zip(other(images), net(images), strict=True))
    other.k.fill_(200)
    with torch.no_grad():
        other.fusion.out.bias.add_(1)
    assert net.k.item() == 20
    assert other(images).tiles.shape[1] > net(images).tiles.shape[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_are_called_on_the_layers(variant):
    net, called = make_net(variant=variant), set()
    for name, layer in net.named_modules():
        layer.register_forward_hook(lambda *args, name=name: called.add(name))
    net(random_images(2, 1, 20, 20))
    layers = {name for name, layer in net.named_modules() if not [*layer.children()]}
    folded = {"tokens.out", "embedding.out"}
    assert layers - called <= folded
    assert not called & (folded | {"coarse", "embedding", "fine"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_form_makes_the_same_network(variant):
    net = make_net(3, 4, 50, variant=variant, embed_dim=6, n_heads=3, hidden_dim=9, strides=(1, 2, 2))
    assert list(net.form) == [
        *("n_channels", "n_classes", "embed_dim", "n_heads", "hidden_dim", "strides", "variant", "size")
    ]
    other = SparseAttnNet(k=1, **net.form).double().eval()
    other.load_state_dict(net.state_dict())
    images = random_images(2, 3, 20, 20)
    assert torch.equal(other(images).logits, net(images).logits)


# ---- k ----


@pytest.mark.parametrize(
    ("k", "n_tiles", "expected"),
    [
        (2.5, 100, 3),
        (2.4999, 100, 2),
        (3.5, 100, 4),
        (0.2, 100, 1),
        (-5, 100, 1),
        (99.5, 100, 100),
        (1e12, 100, 100),
        (7, 1, 1),
    ],
)
def test_k_is_rounded_half_up_within_the_image(k, n_tiles, expected):
    net = make_net(k=k, variant="paper")
    assert net.n_chosen(1, n_tiles) == expected
    assert net(random_images(1, 1, 1, n_tiles)).tiles.shape == (1, expected)
    # A tile of an image with fewer than four rows has fewer pixels.
    for height in (1, 2, 3, 4):
        area = 4 * height
        of_tiles = make_net(k=area * k)
        assert of_tiles.tile == 4
        for size in [(height, 4 * n_tiles), (4 * n_tiles, height)]:
            assert of_tiles.tile_area(*size) == area
            assert of_tiles.n_chosen(*size) == expected
            assert of_tiles(random_images(1, 1, *size)).tiles.shape == (1, expected)
            of_tiles.k_by_image = torch.tensor([area * k, area * 5.0])
            kept = of_tiles.kept(torch.zeros(2, n_tiles, dtype=torch.int64), *size)
            assert kept.sum(1).tolist() == [expected, min(5, n_tiles)]
            of_tiles.k_by_image = None
            # Another k may be asked about, that of the network stays.
            assert of_tiles.n_chosen(*size, area * 5) == min(5, n_tiles)
            assert of_tiles.n_chosen(*size) == expected
            assert of_tiles.k_of(*size) == expected * area
            assert of_tiles.area_of(*size) == n_tiles * area


@settings(max_examples=50)
@given(
    k=st.floats(-1e3, 1e5),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    strides=st.sampled_from([(2, 2, 2), (1, 2, 2), (1, 1, 2)]),
)
def test_chosen_tiles_are_within_the_image_and_nearest_to_k(k, height, width, strides):
    net = make_net(strides=strides)
    n_tiles = math.prod(net.grid_of(height, width))
    n, area = net.n_chosen(height, width, k), net.tile_area(height, width)
    assert 1 <= n <= n_tiles
    if 1 < n < n_tiles:
        assert abs(n * area - k) <= area / 2


def test_k_is_saved_and_restored_with_the_weights():
    net = make_net(k=123.456789)
    state = copy.deepcopy(net.state_dict())
    assert state["k"].item() == 123.456789
    assert "k" not in dict(net.named_parameters())
    other = make_net(k=1)
    other.load_state_dict(state)
    assert other.k.item() == 123.456789


MOVES = {
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "float": lambda net: net.float(),
    "double": lambda net: net.double(),
    "to": lambda net: net.to(device="cpu", dtype=torch.float16),
    "to_empty": lambda net: net.to_empty(device="cpu"),
    "meta": lambda net: net.to("meta"),
    "in a model": lambda net: nn.Sequential(net).half()[0],
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES)
def test_k_stays_exact_and_on_the_cpu(move):
    net = MOVES[move](make_net(k=12345.678901))
    assert net.k.dtype == torch.float64
    assert net.k.device.type == "cpu"
    assert net.k.item() == 12345.678901
    assert net.n_chosen(540, 540) == round(12345.678901 / 16)
    assert net.state_dict()["k"] is not None


def test_k_follows_what_is_written_into_it():
    net, images = make_net(k=10), random_images(1, 1, 40, 40)
    n_tiles = []
    for k in (16, 32, 400, 1e4, 24, 16):
        net.k.fill_(k)
        n_tiles.append(net(images).tiles.shape[1])
    assert n_tiles == [1, 2, 25, 100, 2, 1]
    net.half()
    net.k.fill_(3)
    assert net.state_dict()["k"].item() == 3


# ---- weights ----


def global_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


PARAMS = SparseAttnClassifier().get_params(deep=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_network_draws_from_its_generator_alone(variant):
    before = global_states()
    params = PARAMS | {"variant": variant}
    nets = [new_network(params, (20, 30, 3), 4, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert (nets[0].tokens is None) == (variant == "paper")
    assert (nets[0].embedding is None) == (variant == "tiles")
    assert global_states() == before
    first, same, other = (net.state_dict() for net in nets)
    for name, value in first.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, same[name]), name
    differs = {name for name in first if not torch.equal(first[name], other[name])}
    biases = ["embedding.first.bias", "embedding.out.bias"] if variant == "paper" else ["tokens.out.bias"]
    drawn = {name for name, p in nets[0].named_parameters() if p.dim() > 1}
    drawn |= {*biases, "fusion.out.bias"}
    assert differs == drawn
    assert nets[0].k.item() == pytest.approx(PARAMS["k_init"] * 600)


def test_new_network_starts_as_the_layers_do():
    """Nothing is left as the memory happened to be: norms are neutral, weights scaled by their inputs."""
    # Of many networks, so that layers of few weights say what they were drawn from.
    nets = [new_network(PARAMS, (64, 64, 1), 3, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for module, *others in zip(*(net.modules() for net in nets), strict=True):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()
            assert module.num_batches_tracked == 0
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            weights = torch.stack([each.weight for each in (module, *others)])
            assert weights.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.2)
            assert abs(weights.mean().item()) < 5 * weights.std().item() / weights.numel() ** 0.5
            assert module.bias is None or (module.bias == 0).all()
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert 0.5 * bound < module.weight.abs().max() <= bound
            assert module.bias is None or 0 < module.bias.abs().max() <= bound


def test_reset_leaves_k_and_is_repeatable():
    net = make_net(k=77.7)
    states = []
    for _ in range(2):
        net.reset_parameters(torch.Generator().manual_seed(3))
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert net.k.item() == 77.7


# ---- the budget: 135 x 135, one channel (brightfield: three), k = 2146, three classes, default settings ----

N_PARAMETERS = {"tiles": 0.060e6, "paper": 0.050e6}
N_MULTIPLY_ADDS = {"tiles": 0.006e9, "paper": 0.010e9}
N_TILES = 134  # of 16 pixels


def default_network(variant, n_channels=1, k=2146, **params):
    params = PARAMS | {"variant": variant} | params
    net = new_network(params, (135, 135, n_channels), 3, torch.Generator().manual_seed(0)).eval()
    net.k.fill_(k)
    return net


def costs(net, n_channels=1):
    """Multiply-adds of one pass, in all and by module."""
    image = torch.rand(1, n_channels, 135, 135, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        net(image)
    by_module = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    return counter.get_total_flops() / 2, by_module


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_stay_in_the_budget(variant, n_channels):
    assert sum(p.numel() for p in default_network(variant, n_channels).parameters()) <= N_PARAMETERS[variant]


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_adds_stay_in_the_budget(variant, n_channels):
    total, _ = costs(default_network(variant, n_channels), n_channels)
    assert total <= N_MULTIPLY_ADDS[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_of_a_pass_is_counted(variant):
    """Every convolution and matrix product of a pass, the fine attention's own among them."""
    total, by_module = costs(default_network(variant))
    # What is called as functions, not as modules, must be in the count as well: keys, and the pooling.
    parts = ["coarse.early", "coarse.middle", "coarse.score", "fusion"]
    parts += ["coarse.deep", "embedding.first"] if variant == "paper" else ["tokens"]
    inside = sum(by_module[f"SparseAttnNet.{part}"] for part in parts)
    assert all(by_module[f"SparseAttnNet.{part}"] > 0 for part in parts)
    n = {"tiles": N_TILES, "paper": 2146}[variant]
    assert total - inside >= n * (32 * 32 + 2 * 32 + 32)
    if variant == "tiles":  # a linear layer and two sparse ones, for the chosen tiles alone
        known = 2 + 9 * 16 + 4 * 8
        assert by_module["SparseAttnNet.tokens"] == n * (known * 32 + 2 * 9 * 32 * 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cost_of_the_fine_branch_is_linear_in_k(variant):
    one, two, three = (costs(default_network(variant, k=k))[0] for k in (1600, 3200, 4800))
    assert three - two == two - one > 0


@pytest.mark.parametrize("variant", ["Tiles", "context", "", None])
def test_unknown_variant_is_named(variant):
    with pytest.raises(ValueError, match=rf"variant={variant!r} must be 'tiles' or 'paper'"):
        SparseAttnNet(1, 2, k=3, variant=variant)


@pytest.mark.parametrize("size", ["Large", "", None])
def test_unknown_size_is_named(size):
    with pytest.raises(ValueError, match=rf"size={size!r} must be 'default' or 'large'"):
        SparseAttnNet(1, 2, k=3, size=size)


def test_the_papers_form_has_no_other_size():
    with pytest.raises(ValueError, match="size='large' has no effect with variant='paper'"):
        SparseAttnNet(1, 2, k=3, variant="paper", size="large")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [5, 400])
def test_no_images_are_no_trouble(variant, k):
    net = make_net(k=k, variant=variant).float()
    output = net(torch.zeros(0, 1, 20, 20))
    grid = net.grid_of(20, 20)
    n = net.n_chosen(20, 20)
    assert output.logits.shape == (0, 3)
    assert output.scores.shape == (0, *grid)
    assert output.tiles.shape == output.attention.shape == output.contribution.shape == (0, n)
