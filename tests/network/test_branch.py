"""Compiled selection and sparse branch, held to the same network in PyTorch, float64."""

import copy
import ctypes

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sklearn_sparseattn.network import SparseAttnNet, branch, select_pixel_set, strides_for

N_CLASSES = 3


def make_network(shape, k, *, seed=0, **options):
    _, n_channels, height, width = shape
    options.setdefault("strides", strides_for(height, width))
    network = SparseAttnNet(n_channels, N_CLASSES, k, **options)
    network.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        network.coarse.score.weight.mul_(3)  # so that gates differ
    return network.train()


def make_images(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def gradients_of(network, images, seed=0):
    """Output, and the gradients of a random linear function of what is learned from."""
    generator = torch.Generator().manual_seed(seed)
    network.zero_grad()
    output = network(images)
    parts = (output.logits, output.features, output.scores)
    weights = (torch.randn(part.shape, generator=generator).to(part) for part in parts)
    sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
    return output, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def in_pytorch(network, pixels, dtype=torch.float64):
    """The same network without compiled code, with these pixels."""
    exact = copy.deepcopy(network).to(dtype)
    exact.compiled = False
    exact.choose = lambda images, scores: pixels
    return exact


def assert_as_pytorch(shape, k, seed=0, **options):
    network, images = make_network(shape, k, seed=seed, **options), make_images(shape, seed)
    assert network.is_compiled(images)
    found, gradients = gradients_of(network, images)
    expected, exact = gradients_of(in_pytorch(network, found.pixels), images.double())
    for name in ("logits", "features", "attention", "contribution"):
        part, other = (getattr(output, name).detach().double() for output in (found, expected))
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert gradients.keys() == exact.keys()
    # PyTorch's own float32 is no nearer: batch norm of few rows magnifies what is rounded.
    _, rounded = gradients_of(in_pytorch(network, found.pixels, torch.float32), images)
    for name, gradient in gradients.items():
        size = exact[name].abs().max() + 1e-2
        error, usual = ((g.double() - exact[name]).abs().max() / size for g in (gradient, rounded[name]))
        assert error <= max(1e-3, 5 * usual), f"{name}: {error}, in PyTorch {usual}"


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((5, 3, 64, 64), 337),
        ((3, 1, 135, 135), 2146),
        ((3, 2, 9, 7), 63),
        ((4, 1, 1, 30), 4),
        ((4, 1, 30, 1), 3),
        ((4, 5, 2, 2), 4),
        ((7, 1, 20, 33), 100),
        ((2, 1, 61, 61), 61),
    ],
    ids=str,
)
def test_output_and_gradients(shape, k):
    assert_as_pytorch(shape, k)


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 80, "n_heads": 5, "hidden_dim": 16},
        {"embed_dim": 16, "n_heads": 4},
        {"embed_dim": 48, "n_heads": 3},
        {"embed_dim": 64, "n_heads": 2},
        {"normalize_fine": False},
        {"strides": (3, 2, 1)},
        {"strides": (1, 5, 1)},
    ],
    ids=str,
)
def test_widths_and_strides(options):
    assert_as_pytorch((4, 2, 25, 18), 60, **options)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_the_same_bits_with_any_number_of_threads(n_threads):
    generator = torch.Generator().manual_seed(0)
    images = make_images((7, 1, 40, 40))
    pixels = torch.stack([torch.randperm(1600, generator=generator)[:200].sort()[0] for _ in range(7)])
    shapes = [(7, 200), (7, 8, 20, 20), (7, 16, 10, 10), (8, 1, 3, 3), (32, 8, 1, 1), (16, 1, 3, 3)]
    shapes += [(32, 16, 1, 1), (32, 3), (32,), (32, 32), (32,), (1, 32), (1, 32)]
    tensors = [torch.rand(shape, generator=generator) - 0.3 for shape in shapes]
    before = torch.get_num_threads()
    outcomes = []
    try:
        for n in (1, n_threads):
            torch.set_num_threads(n)
            given = [tensor.clone().requires_grad_() for tensor in tensors]
            pooled, weight, cls_weight, *rest = branch.TokenBranch.apply(images, pixels, (2, 4), *given)
            gradients = [torch.ones_like(part) for part in (pooled, weight, cls_weight)]
            torch.autograd.backward([pooled, weight, cls_weight], gradients)
            outcomes.append([pooled, weight, cls_weight, *rest, *(tensor.grad for tensor in given)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_when_pytorch_has_to_do_it():
    images, channels = torch.zeros(2, 1, 8, 8), (8, 16)
    assert branch.is_compiled(images, channels, 32, 32)
    assert not branch.is_compiled(images.double(), channels, 32, 32)
    assert not branch.is_compiled(images.to("meta"), channels, 32, 32)
    assert not branch.is_compiled(images.clone().requires_grad_(), channels, 32, 32)
    assert not branch.is_compiled(images, channels[:1], 32, 32)
    assert not branch.is_compiled(images, channels, 33, 32)
    assert not branch.is_compiled(images, channels, 32, 8)
    assert not branch.is_compiled(images, (3, 16), 32, 32)


@pytest.mark.parametrize(
    "options",
    [{"embed_dim": 24}, {"embed_dim": 30, "n_heads": 3}, {"separable": False}, {"variant": "paper"}],
    ids=str,
)
def test_networks_that_pytorch_computes(options):
    network, images = make_network((4, 1, 16, 16), 40, **options), make_images((4, 1, 16, 16))
    assert not network.is_compiled(images)
    found, gradients = gradients_of(network, images)
    expected, exact = gradients_of(in_pytorch(network, found.pixels), images.double())
    torch.testing.assert_close(found.logits.double(), expected.logits, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == exact.keys()


def test_features_in_half_precision_are_left_to_pytorch():
    network, images = make_network((4, 1, 16, 16), 40).eval(), make_images((4, 1, 16, 16))
    with torch.autocast("cpu"):
        found = network(images).logits
        network.compiled = False
        assert torch.equal(found, network(images).logits)


# What PyTorch says where a layer is given pixels, which have no gradients.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
@pytest.mark.parametrize("layer", ["context", "embedding.first", "fine.key", "fine.value", "fusion.out"])
def test_hooks_are_called(layer, hook):
    """Whether or not compiled code could stand in for the layer."""
    network, images, calls = make_network((4, 1, 16, 16), 40), make_images((4, 1, 16, 16)), []
    getattr(network.get_submodule(layer), hook)(lambda *given: calls.append(layer))
    network(images).logits.sum().backward()
    assert calls == [layer]


def test_without_compiled_code_pytorch_does_it(monkeypatch):
    shape = (4, 1, 16, 16)
    network, images = make_network(shape, 40), make_images(shape)
    compiled, gradients = gradients_of(network, images)
    monkeypatch.setattr(branch, "_LIBRARY", None)
    plain, others = gradients_of(network, images)
    torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled.pixels, plain.pixels)
    assert gradients.keys() == others.keys()


def test_images_may_have_gradients():
    shape = (3, 1, 12, 12)
    network = make_network(shape, 20)
    images = make_images(shape).requires_grad_()
    network(images).logits.sum().backward()
    assert images.grad.abs().sum() > 0


def test_code_built_from_other_sources_is_refused(monkeypatch):
    class Other(ctypes.Structure):
        _fields_ = [("n", ctypes.c_int32)]

    monkeypatch.setattr(branch, "_Branch", Other)
    with pytest.raises(ImportError, match="built from other sources"):
        branch._load_library()


# ---- selection ----


@given(
    n=st.integers(1, 3000),
    share=st.floats(0, 1),
    kind=st.sampled_from(["normal", "few values", "equal", "outlier", "neighbours", "subnormal", "cubes"]),
    seed=st.integers(0, 10),
)
@example(n=18225, share=0.118, kind="normal", seed=0)
@example(n=18225, share=0.118, kind="cubes", seed=0)
@settings(max_examples=150, deadline=None)
def test_selection(n, share, kind, seed):
    rng = np.random.default_rng(seed)
    scores = {
        "normal": lambda: rng.normal(size=n),
        "few values": lambda: rng.integers(-2, 3, n).astype(float),
        "equal": lambda: np.full(n, -1.5),
        "outlier": lambda: np.r_[1e37, rng.normal(size=n)][:n] * 1e-3,
        "neighbours": lambda: np.nextafter(np.float32(1), np.float32(2)) ** rng.integers(0, 3, n),
        "subnormal": lambda: 1e-44 * rng.integers(-9, 9, n),
        "cubes": lambda: rng.normal(size=n) ** 9,
    }[kind]()
    scores = np.stack([scores, scores[::-1]]).astype(np.float32)
    k = 1 + int(share * (n - 1))
    order = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")
    expected = np.sort(order[:, :k], axis=1)
    np.testing.assert_array_equal(branch.select(torch.from_numpy(scores), k), expected)
    np.testing.assert_array_equal(select_pixel_set(torch.from_numpy(scores), k), expected)


def test_selection_where_small_numbers_are_flushed():
    rng = np.random.default_rng(0)
    scores = np.float32(1.2e-38) + np.float32(1e-42) * rng.integers(0, 2000, (1, 3000)).astype(np.float32)
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :20], axis=1)
    torch.set_flush_denormal(True)  # where the processor cannot, nothing is flushed, and all is as ever
    try:
        found = branch.select(torch.from_numpy(scores), 20)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(found, expected)


def test_more_scores_than_can_be_counted_are_left_to_pytorch():
    assert branch.select(torch.zeros(1).expand(1, 2**31), 5) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_left_to_pytorch(value):
    scores = torch.zeros(2, 50)
    scores[1, 7] = value
    assert branch.select(scores, 3) is None
    if np.isnan(value):
        with pytest.raises(FloatingPointError):
            select_pixel_set(scores, 3)
    else:
        expected = [7, 0, 1] if value > 0 else [0, 1, 2]
        assert select_pixel_set(scores, 3)[1].tolist() == sorted(expected)


def test_a_range_that_float32_cannot_hold_is_left_to_pytorch():
    scores = torch.tensor([[3e38, -3e38, 0.0, 1.0]])
    assert branch.select(scores, 2) is None
    assert select_pixel_set(scores, 2).tolist() == [[0, 3]]
