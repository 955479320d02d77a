"""The whole network: its forward pass in NumPy, its k, its weights, and what a pass costs."""

import copy
import random

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.network import SparseAttnNet
from sklearn_sparseattn.training.setup import new_network

VARIANTS = ("context", "paper")


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

    def __init__(self, net, strides):
        self.w = {name: value.numpy().astype(float) for name, value in net.state_dict().items()}
        self.n_heads = net.fine.n_heads
        self.spread, self.margin, self.separable = (
            net.form[name] for name in ("spread", "margin", "separable")
        )
        self.margins, self.depth = net.form["margins"], net.form["depth"]
        self.strides = strides
        self.with_context = net.context is not None

    def norm(self, x, name):
        mean, variance = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        return (x - mean) / np.sqrt(variance + 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def stage(self, x, name, stride=1, first=0):
        """x : (H, W, C)."""
        kernel = self.w[f"{name}.{first}.weight"]
        border = kernel.shape[2] // 2
        padded = np.pad(x, ((border, border), (border, border), (0, 0)))
        windows = sliding_window_view(padded, kernel.shape[2:], axis=(0, 1))[::stride, ::stride]
        x = np.einsum("hwcij,ocij->hwo", windows, kernel)
        return np.maximum(self.norm(x, f"{name}.{first + 1}"), 0)

    def coarse(self, image):
        """Scores (H, W), pooled features, and the maps (h, w, C) with the pixels between their cells."""
        _, height, width = image.shape
        above = np.moveaxis(image, 0, -1) - self.w["coarse.background"]
        early = self.stage(above, "coarse.early", self.strides[0])
        middle = self.stage(early, "coarse.middle", self.strides[1])
        if self.depth == 3:
            middle = self.stage(middle, "coarse.middle", first=3)
        stages = [early, middle]
        if not self.with_context:
            deep = self.stage(middle, "coarse.deep.0", self.strides[2])
            stages.append(self.stage(deep, "coarse.deep.1"))
        cells = middle @ self.w["coarse.score.weight"][0, :, 0, 0] + self.w["coarse.score.bias"]
        steps = np.cumprod(self.strides)
        across = [np.interp(np.arange(width), np.arange(len(row)) * steps[1], row) for row in cells]
        below = np.arange(len(cells)) * steps[1]
        scores = np.stack([np.interp(np.arange(height), below, c) for c in np.transpose(across)], axis=1)
        z_coarse = np.concatenate([stages[-1].mean((0, 1)), stages[-1].max((0, 1))])
        return scores, z_coarse, list(zip(stages, steps, strict=False))

    def embed(self, image, pixels, scores, maps):
        """E = W2 [gate * relu(W1 p + b1 + sum_s U_s * c_s)] + b2, without gate and sum in the paper.

        The gate is sigmoid(a), times (rank - the highest rank not chosen) / margin where that is below 1.
        """
        n_channels, height, width = image.shape
        i, j = np.divmod(pixels, width)
        place = [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1]
        tokens = np.stack([*place, *image.reshape(n_channels, -1)[:, pixels]], axis=1)
        hidden = tokens @ self.w["embedding.first.weight"].T + self.w["embedding.first.bias"]
        gate = 1.0
        if self.with_context:
            gate = 1 / (1 + np.exp(-scores[i, j]))[:, None]
            if self.margins:
                above = scores[i, j][:, None] - scores[i, j].min() + 1e-6
                gate *= above / (above + above.mean())
            ranks = self.ranks(scores)
            others = np.delete(ranks.ravel(), pixels)
            if self.margin and len(others):
                gate *= np.minimum((ranks[i, j] - others.max()) / self.margin, 1)[:, None]
            for s, (cells, step) in enumerate(maps):
                row = np.minimum(np.floor(i / step + 0.5).astype(int), len(cells) - 1)
                column = np.minimum(np.floor(j / step + 0.5).astype(int), len(cells[0]) - 1)
                framed = np.pad(cells, ((1, 1), (1, 1), (0, 0)))
                for p, q in np.ndindex(3, 3):
                    if self.separable:
                        each = self.w[f"context.convolve.{s}.0.weight"][:, 0, p, q]
                        kernel = self.w[f"context.convolve.{s}.1.weight"][:, :, 0, 0] * each
                    else:
                        kernel = self.w[f"context.convolve.{s}.weight"][:, :, p, q]
                    hidden += framed[row + p, column + q] @ kernel.T
        return (gate * np.maximum(hidden, 0)) @ self.w["embedding.out.weight"].T + self.w[
            "embedding.out.bias"
        ]

    def ranks(self, scores):
        """Scores less spread * n / step**2, n the place of a pixel in the order over its cell."""
        if not (self.with_context and self.spread):
            return scores
        order = {
            1: [[0]],
            2: [[0, 2], [3, 1]],
            4: [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]],
        }[self.strides[0] * self.strides[1]]
        step = len(order)
        turns = [[order[i % step][j % step] for j in range(scores.shape[1])] for i in range(scores.shape[0])]
        return scores - self.spread * np.array(turns) / step**2

    def fine(self, tokens):
        cls = self.w["fine.cls_token"][0, 0]
        rows = np.vstack([tokens, cls])
        z_fine, attention, signed = 0, 0, 0
        for w_key, w_query in zip(
            np.split(self.w["fine.key.weight"], self.n_heads),
            np.split(self.w["fine.query.weight"], self.n_heads),
            strict=True,
        ):
            key = np.maximum(rows @ w_key.T, 0) + 1e-6
            a = key / key.sum(0)
            query = w_query @ cls
            z_fine = z_fine + query @ (a.T @ (rows @ self.w["fine.value.weight"].T)) / self.n_heads
            attention = attention + a[:-1].mean(1) / self.n_heads
            signed = signed + a[:-1] @ query / self.n_heads
        if "fine_norm.weight" in self.w:
            z_fine = (z_fine - z_fine.mean()) / np.sqrt(z_fine.var() + 1e-5)
            z_fine = z_fine * self.w["fine_norm.weight"] + self.w["fine_norm.bias"]
        return z_fine, attention, signed

    def fusion(self, x):
        def layer(x, name):
            return np.maximum(self.norm(x @ self.w[f"{name}.0.weight"].T, f"{name}.1"), 0)

        x = layer(x, "fusion.first")
        x = x + layer(x, "fusion.residual")
        return x @ self.w["fusion.out.weight"].T + self.w["fusion.out.bias"]

    def __call__(self, image):
        scores, z_coarse, maps = self.coarse(image)
        k = int(np.clip(np.floor(self.w["k"] + 0.5), 1, scores.size))
        pixels = np.sort(np.argsort(-self.ranks(scores).ravel(), kind="stable")[:k])
        z_fine, attention, signed = self.fine(self.embed(image, pixels, scores, maps))
        features = np.concatenate([z_fine, z_coarse])
        return self.fusion(features), features, scores, pixels, attention, signed


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("n_channels", "height", "width", "k", "options"),
    [
        (1, 1, 1, 1, {}),
        (3, 1, 7, 3, {}),
        (5, 5, 3, 8.5, {"strides": (1, 1, 1)}),
        (1, 135, 135, 2146, {}),
        (3, 40, 26, 155.4, {"embed_dim": 7, "n_heads": 3, "hidden_dim": 11}),
        (1, 16, 16, 1e9, {"strides": (1, 2, 2), "normalize_fine": False}),
        (3, 9, 8, 20, {"strides": (1, 1, 2), "embed_dim": 5, "n_heads": 5}),
        (2, 19, 12, 30, {"margin": 0.0}),
        (2, 19, 12, 30, {"spread": 0.0}),
        (2, 19, 12, 30, {"kernel_size": 7}),
        (2, 19, 12, 30, {"kernel_size": 5, "depth": 3}),
        (2, 33, 26, 130, {"spread": 0.7, "margin": 1.5}),
        (1, 33, 26, 130, {"spread": 0.0, "margin": 0.0, "separable": False}),
        (1, 33, 26, 130, {"spread": 0.0, "margin": 0.0, "margins": True}),
    ],
)
def test_forward_pass_is_the_reference(n_channels, height, width, k, options, variant):
    net = make_net(n_channels, 4, k, variant=variant, **options)
    images = random_images(2, n_channels, height, width)
    output = net(images)
    reference = Reference(net, options.get("strides", (2, 2, 2)))
    assert reference.with_context == (variant == "context")
    for b in range(2):
        for name, expected in zip(output._fields, reference(images[b].numpy()), strict=True):
            found = getattr(output, name)[b].detach().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("variant", "n_coarse"), [("context", 32), ("paper", 48)])
@pytest.mark.parametrize("n_channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3), (33, 2), (135, 135)])
def test_any_image_size_trains(n_channels, height, width, variant, n_coarse):
    net = SparseAttnNet(n_channels, 2, k=6, variant=variant).train()
    output = net(torch.rand(3, n_channels, height, width))
    k = min(6, height * width)
    assert output.logits.shape == (3, 2)
    assert output.features.shape == (3, 32 + n_coarse)
    assert output.scores.shape == (3, height, width)
    assert output.pixels.shape == output.attention.shape == output.contribution.shape == (3, k)
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


def test_with_context_every_weight_learns_from_the_answer():
    net = make_net().train()
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


@pytest.mark.parametrize("margin", [0.4, 0.02, 0.0])
def test_with_a_margin_another_choice_is_no_jump(margin):
    """From image to image, up to where other pixels are chosen: there the answer goes on, or jumps."""
    net = make_net(k=40, margin=margin)
    one, other = random_images(2, 1, 24, 24)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        pixels = net(torch.stack([one + t * (other - one) for t in (low, middle)])).pixels
        low, high = (middle, high) if pixels[0].equal(pixels[1]) else (low, middle)
    outputs = net(torch.stack([one + t * (other - one) for t in (low, high)]))
    assert high - low < 1e-14
    assert not outputs.pixels[0].equal(outputs.pixels[1])
    jump = (outputs.logits[1] - outputs.logits[0]).abs().max()
    assert jump < 1e-9 if margin else jump > 1e-5


def test_gates_are_open_as_far_as_scores_are_above_those_not_chosen():
    net = make_net(spread=0.0, margin=0.02)
    scores = torch.tensor([[[1.0, 1.01, 1.5], [1.02, 0.5, 0.0]], [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]])
    pixels = torch.tensor([[1, 2, 3], [0, 1, 2]])
    open_parts = torch.tensor([[0.5, 1.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(
        net.gates(scores, pixels), scores.flatten(1).gather(1, pixels).sigmoid() * open_parts
    )
    everything = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(net.gates(scores, everything), scores.flatten(1).sigmoid())


@pytest.mark.parametrize("name", ["spread", "margin"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_numbers_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        make_net(**{name: value})


def test_pixels_over_an_even_area_are_chosen_far_from_each_other():
    """Of scores that are all alike one pixel of each cell, then a second one in the middle between those."""
    net = make_net()
    for k, places in ((64, [(0, 0)]), (128, [(0, 0), (2, 2)])):
        net.k.fill_(k)
        chosen = torch.zeros(32 * 32, dtype=torch.bool)
        chosen[net.choose(torch.zeros(1, 1, 32, 32), torch.full((1, 32, 32), 0.3))[0]] = True
        expected = torch.zeros(32, 32, dtype=torch.bool)
        for i, j in places:
            expected[i::4, j::4] = True
        assert torch.equal(chosen.view(32, 32), expected)


class FixedCoarse(nn.Module):
    """Says the same of every image."""

    def __init__(self, look):
        super().__init__()
        self.answer = look

    def look(self, images):
        return self.answer


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_not_chosen_matter_through_the_coarse_net_only(variant):
    net = make_net(n_channels=2, k=30, variant=variant)
    images = random_images(3, 2, 12, 14)
    before = net(images)
    net.coarse = FixedCoarse(net.coarse.look(images))
    chosen = torch.zeros(3, 12 * 14, dtype=torch.bool).scatter_(1, before.pixels, True).view(3, 1, 12, 14)
    other = random_images(3, 2, 12, 14, seed=1)
    off = net(torch.where(chosen, images, other))
    for name, part in before._asdict().items():
        assert torch.equal(getattr(off, name), part), name
    # One value of one channel of one chosen pixel moves that image's answer, and no other.
    images[1].flatten(1)[1, before.pixels[1, 7]] += 0.5
    on = net(images)
    moved = (on.logits != before.logits).any(1)
    assert moved.tolist() == [False, True, False]


def test_maps_reach_the_tokens_only_around_the_chosen_pixels():
    """Scores and pooled features as they are: beyond the 3 x 3 cells around, maps may hold anything."""
    net = make_net(k=5)
    images = random_images(2, 1, 40, 40)
    before = net(images)
    look = net.coarse.look(images)
    maps = [cells.detach().requires_grad_() for cells in look.maps]
    assert [cells.shape[1:] for cells in maps] == [(8, 20, 20), (16, 10, 10)]

    def answer(*maps):
        fixed = copy.deepcopy(net)
        fixed.coarse = FixedCoarse(look._replace(maps=maps))
        return fixed(images).logits

    seen = []
    for cells, step in zip(maps, (2, 4), strict=True):
        near = torch.zeros(2, 1, *cells.shape[2:], dtype=torch.bool)
        for b, pixel in zip(np.repeat([0, 1], 5), before.pixels.flatten(), strict=True):
            i, j = (min((int(at) + step // 2) // step, cells.shape[2] - 1) for at in divmod(int(pixel), 40))
            near[b, 0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
        assert not near.all()
        seen.append(near)
    off = [torch.where(near, cells, torch.nan) for near, cells in zip(seen, maps, strict=True)]
    assert torch.equal(answer(*off), before.logits)
    gradients = torch.autograd.grad(answer(*maps).square().sum(), maps)
    for s, (near, gradient) in enumerate(zip(seen, gradients, strict=True)):
        assert gradient.any()
        assert not gradient[~near.expand_as(gradient)].any()
        on = list(maps)
        on[s] = torch.where(near, maps[s] + 7, maps[s])
        assert (answer(*on) != before.logits).any(1).all()


@pytest.mark.parametrize(("variant", "stages"), [("context", 2), ("paper", 3)])
def test_stages_and_context_of_each_variant(variant, stages):
    """No weight is kept that a variant does not use."""
    net = make_net(variant=variant)
    assert len(net.coarse.look(random_images(1, 1, 20, 20)).maps) == stages
    parts = {".".join(name.split(".")[: 1 + name.startswith("coarse")]) for name, _ in net.named_parameters()}
    both = {"coarse.early", "coarse.middle", "coarse.score", "embedding", "fine", "fine_norm", "fusion"}
    assert parts == both | ({"context"} if variant == "context" else {"coarse.deep"})


def test_layer_norm_of_z_fine_is_a_named_choice():
    assert make_net(normalize_fine=False).fine_norm.state_dict() == {}
    net = make_net()
    with torch.no_grad():
        net.fine_norm.weight.fill_(1)
        net.fine_norm.bias.zero_()
    z_fine = net(random_images(2, 1, 20, 20)).features[:, :32]
    torch.testing.assert_close(z_fine.mean(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z_fine.std(1, correction=0), torch.ones(2).double(), rtol=1e-2, atol=0)


# ---- k ----


@pytest.mark.parametrize(
    ("k", "n_pixels", "expected"),
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
def test_k_is_rounded_half_up_within_the_image(k, n_pixels, expected):
    net = make_net(k=k)
    assert net.n_chosen(n_pixels) == expected
    assert net(random_images(1, 1, 1, n_pixels)).pixels.shape == (1, expected)


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
    assert net.n_chosen(18225) == 12346
    assert net.state_dict()["k"] is not None


def test_k_follows_what_is_written_into_it():
    net = make_net(k=10)
    net.k.fill_(17.5)
    assert net(random_images(1, 1, 8, 8)).pixels.shape == (1, 18)
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
    assert (nets[0].context is None) == (variant == "paper")
    assert global_states() == before
    first, same, other = (net.state_dict() for net in nets)
    for name, value in first.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, same[name]), name
    differs = {name for name in first if not torch.equal(first[name], other[name])}
    drawn = {name for name, p in nets[0].named_parameters() if p.dim() > 1} | {
        "embedding.first.bias",
        "embedding.out.bias",
        "fusion.out.bias",
    }
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
            gain = 2 if module.groups == 1 else 1  # no ReLU follows the convolution of a channel by itself
            assert weights.std().item() == pytest.approx((gain / fan_in) ** 0.5, rel=0.2)
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

N_PARAMETERS = 0.050e6
N_MULTIPLY_ADDS = 0.010e9
KINDS = ("noise", "opd", "hologram", "event", "brightfield")


def default_network(variant, n_channels, seed=0):
    params = PARAMS | {"variant": variant}
    net = new_network(params, (135, 135, n_channels), 3, torch.Generator().manual_seed(seed)).eval()
    net.k.fill_(2146)
    net.compiled = False  # what compiled code does is not counted
    return net


@pytest.fixture(scope="module", params=VARIANTS)
def default_net(request):
    return default_network(request.param, 1)


def budget_images(kind):
    """Eight images scaled to [0, 1], (8, C, 135, 135): noise or generated cells."""
    if kind == "noise":
        return torch.rand(8, 1, 135, 135, generator=torch.Generator().manual_seed(0))
    images = make_cells(8, modality=kind, image_size=135, random_state=0).images.astype(np.float32)
    images = images.reshape(8, 135, 135, -1).transpose(0, 3, 1, 2)
    return torch.from_numpy((images - images.min()) / (images.max() - images.min()))


def n_cells(pixels):
    """How many cells of the maps some pixels of an image of 135 x 135 belong to."""
    row, column = np.divmod(pixels, 135)
    found = []
    for step in (2, 4):
        last = -(-135 // step) - 1
        i, j = (np.minimum(np.floor(at / step + 0.5), last) for at in (row, column))
        found.append(len(set(zip(i, j, strict=True))))
    return found


def costs(net, image):
    """Multiply-adds of one pass, in all and by module."""
    with FlopCounterMode(display=False) as counter:
        pixels = net(image[None]).pixels
    assert pixels.shape == (1, 2146)
    by_module = {name: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    if net.context is None:
        return counter.get_total_flops() / 2, by_module
    # 3x3 of each channel by itself is no matrix product, and not counted by PyTorch.
    depthwise = sum(9 * n * channels for n, channels in zip(n_cells(pixels[0].numpy()), (8, 16), strict=True))
    by_module["SparseAttnNet.context"] += depthwise
    return counter.get_total_flops() / 2 + depthwise, by_module


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_stay_in_the_budget(variant, n_channels):
    assert sum(p.numel() for p in default_network(variant, n_channels).parameters()) <= N_PARAMETERS


def test_every_part_of_a_pass_is_counted(default_net):
    """Every convolution and matrix product of a pass, the fine attention's own among them."""
    total, by_module = costs(default_net, budget_images("noise")[0])
    # What is called as functions, not as modules, must be in the count as well: keys, and the pooling.
    parts = ["coarse.early", "coarse.middle", "coarse.score", "embedding.first", "fusion"]
    parts += ["coarse.deep"] if default_net.context is None else ["context"]
    inside = sum(by_module[f"SparseAttnNet.{part}"] for part in parts)
    assert all(by_module[f"SparseAttnNet.{part}"] > 0 for part in parts)
    assert total - inside >= 2146 * (32 * 32 + 2 * 32 + 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_adds_stay_in_the_budget(variant, kind):
    """Of each image: with context the cost depends on how many cells the chosen pixels share."""
    images = budget_images(kind)
    for seed in range(3):
        net = default_network(variant, images.shape[1], seed)
        assert max(costs(net, image)[0] for image in images) <= N_MULTIPLY_ADDS


def test_cost_of_the_fine_branch_is_linear_in_k(default_net):
    """But for the context, whose cost is that of the cells the pixels belong to: at most linear."""
    images = torch.rand(1, 1, 135, 135, generator=torch.Generator().manual_seed(0))

    def cost(k):
        net = copy.deepcopy(default_net)
        net.k.fill_(k)
        with FlopCounterMode(display=False) as counter:
            pixels = net(images).pixels[0].numpy()
        total = counter.get_total_flops() / 2
        if net.context is None:
            return total
        context = sum(counter.get_flop_counts()["SparseAttnNet.context"].values()) / 2
        assert context == sum(32 * n * channels for n, channels in zip(n_cells(pixels), (8, 16), strict=True))
        return total - context

    assert cost(3000) - cost(2000) == cost(2000) - cost(1000) > 0


@pytest.mark.parametrize("variant", ["Context", "", None])
def test_unknown_variant_is_named(variant):
    with pytest.raises(ValueError, match=rf"variant={variant!r} must be 'context' or 'paper'"):
        SparseAttnNet(1, 2, k=3, variant=variant)


@pytest.mark.parametrize("variant", ["context", "paper"])
@pytest.mark.parametrize("k", [5, 400])
def test_no_images_are_no_trouble(variant, k):
    net = make_net(k=k, variant=variant).float()
    output = net(torch.zeros(0, 1, 20, 20))
    assert output.logits.shape == (0, 3)
    assert output.scores.shape == (0, 20, 20)
    assert output.pixels.shape == output.attention.shape == output.contribution.shape == (0, k)
