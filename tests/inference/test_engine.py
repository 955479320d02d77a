"""The compiled engine, held to the PyTorch forward in float64 and to itself in other company."""

import copy
import ctypes
import importlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sklearn_sparseattn.images import ImageRows, PixelScale
from sklearn_sparseattn.inference import Engine, evaluate, run
from sklearn_sparseattn.network import SparseAttnNet, strides_for

BYTES = PixelScale((0.0, 255.0))
MODULE = importlib.import_module("sklearn_sparseattn.inference.engine")


def make_network(image_shape, k, *, seed=0, n_classes=3, **options):
    """As a fit leaves it: float32, in evaluation mode, its statistics moved by data."""
    height, width, channels = image_shape
    generator = torch.Generator().manual_seed(seed)
    network = SparseAttnNet(channels, n_classes, k, strides=strides_for(height, width), **options)
    network.reset_parameters(generator)
    network.coarse.background.fill_(0.37)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return network.eval()


def make_images(kind, n, image_shape, seed=0):
    rng = np.random.default_rng(seed)
    images = np.zeros((n, *image_shape), np.uint8)
    if kind == "constant":
        images += rng.integers(0, 256, (n, 1, 1, 1), dtype=np.uint8)
    elif kind == "few values":
        images += rng.integers(0, 2, images.shape, dtype=np.uint8) * 255
    elif kind == "noise":
        images += rng.integers(0, 256, images.shape, dtype=np.uint8)
    elif kind == "areas":
        images[:, image_shape[0] // 3 :, image_shape[1] // 2 :] = 90
        images[:, : image_shape[0] // 4] += rng.integers(0, 200, (n, 1, 1, 1), dtype=np.uint8)
    return images


def reference(network, images, pixels, scale=BYTES):
    """The PyTorch forward in float64, with these pixels instead of its own choice."""
    exact = copy.deepcopy(network).double()
    exact.choose = lambda images, scores: torch.from_numpy(pixels.astype(np.int64))
    with torch.inference_mode():
        return exact(torch.from_numpy(scale(images)).double())


def highest(ranks, k):
    """Of float32 ranks the k highest, a tie to the lower index; ascending."""
    order = np.argsort(-ranks.astype(np.float64), axis=1, kind="stable")
    return np.sort(order[:, :k], axis=1)


def assert_as_reference(network, images, found):
    scores = torch.from_numpy(found["scores"]).view(images.shape[:3])
    ranks = network.ranks(scores).flatten(1).numpy()
    np.testing.assert_array_equal(found["pixels"], highest(ranks, found["pixels"].shape[1]))
    expected = reference(network, images, found["pixels"])
    # Where all keys of a column are 0 but for rounding, that is divided by little more than k * epsilon.
    tolerances = {"scores": 1e-6, "attention": 1e-3, "contribution": 1e-3, "features": 1e-4}
    for name, tolerance in tolerances.items():
        other = getattr(expected, name).numpy().reshape(found[name].shape)
        # Relative to the largest of an image: weights are drawn, and their sums may be large.
        size = np.maximum(1, np.abs(other).max(axis=1, keepdims=True))
        np.testing.assert_allclose(found[name] / size, other / size, rtol=0, atol=tolerance, err_msg=name)
    probabilities = torch.softmax(torch.from_numpy(found["logits"]).double(), 1)
    np.testing.assert_allclose(probabilities, torch.softmax(expected.logits, 1), rtol=0, atol=1e-5)
    assert not found["failed"].any()


def test_the_engine_is_there():
    """CI has a compiler: were it not built, everything below would be about nothing."""
    assert Engine.of(make_network((8, 8, 1), 5), (8, 8, 1), BYTES) is not None


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    n_channels=st.integers(1, 5),
    share=st.floats(0, 1),
    kind=st.sampled_from(["zeros", "constant", "few values", "noise", "areas"]),
    seed=st.integers(0, 5),
    variant=st.sampled_from(["context", "paper"]),
)
@example(height=135, width=135, n_channels=1, share=0.118, kind="noise", seed=0, variant="context")
@example(height=135, width=135, n_channels=1, share=1, kind="areas", seed=1, variant="paper")
@example(height=1, width=300, n_channels=2, share=0.5, kind="noise", seed=0, variant="context")
@example(height=17, width=4200, n_channels=1, share=0.1, kind="noise", seed=0, variant="context")  # in bands
@example(height=17, width=4200, n_channels=1, share=0.1, kind="noise", seed=1, variant="context")
@example(height=64, width=65, n_channels=3, share=0, kind="zeros", seed=0, variant="context")
@settings(max_examples=60, deadline=None)
def test_it_is_the_network(height, width, n_channels, share, kind, seed, variant):
    shape = height, width, n_channels
    options = {"variant": variant, "kernel_size": 3 + 2 * (seed % 3), "depth": 2 + seed % 2}
    network = make_network(shape, 1 + share * (height * width - 1), seed=seed, **options)
    images = make_images(kind, 3, shape, seed)
    assert_as_reference(network, images, Engine.of(network, shape, BYTES).run(images, maps=True))


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 8, "n_heads": 1},
        {"embed_dim": 13, "n_heads": 3},
        {"embed_dim": 64, "n_heads": 4},
        {"embed_dim": 32, "n_heads": 32, "variant": "paper"},
        {"embed_dim": 1, "n_heads": 1},
        {"hidden_dim": 5},
        {"hidden_dim": 512, "n_classes": 40},
        {"normalize_fine": False},
        {"spread": 0.0},
        {"spread": 0.1, "margin": 0.0, "embed_dim": 40},
        {"spread": 0.0, "margin": 0.0, "separable": False},
        {"separable": False, "embed_dim": 13, "n_heads": 3},
        {"kernel_size": 5},
        {"kernel_size": 7},
        {"kernel_size": 7, "variant": "paper"},
        {"depth": 3},
        {"depth": 3, "variant": "paper"},
        {"depth": 3, "separable": False, "embed_dim": 13, "n_heads": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(21, 34, 2), (2, 3, 1)], ids=str)
def test_widths_of_all_kinds(options, shape):
    network = make_network(shape, 77, **options)
    images = make_images("noise", 4, shape)
    assert_as_reference(network, images, Engine.of(network, shape, BYTES).run(images, maps=True))


def run_all(engine, network, images, scale=BYTES, **options):
    passes = list(run(engine, network, images, scale, **options))
    rows = [i for rows, _ in passes for i in range(rows.start, rows.stop)]
    assert rows == list(range(len(images)))
    return [torch.cat(parts).numpy() for parts in zip(*(output for _, output in passes), strict=True)]


@pytest.mark.parametrize("image_shape", [(135, 135, 1), (40, 24, 3), (1, 1, 1)], ids=str)
def test_the_same_bits_in_any_company_order_and_number_of_threads(image_shape):
    height, width, _ = image_shape
    network = make_network(image_shape, 0.12 * height * width)
    engine = Engine.of(network, image_shape, BYTES)
    kinds = ("noise", "areas", "zeros", "few values")
    X = np.concatenate([make_images(kind, 6, image_shape) for kind in kinds])
    images = ImageRows(X, image_shape)
    together = run_all(engine, network, images, maps=True)
    order = np.random.default_rng(0).permutation(len(X))
    for n_threads in (1, 2, 3):
        shuffled = run_all(engine, network, images.take(order), maps=True, n_threads=n_threads)
        for one, other in zip(together, shuffled, strict=True):
            np.testing.assert_array_equal(one[order], other)
    for i in (0, 7, 23):
        alone = run_all(engine, network, images.take(np.array([i])), n_threads=2)
        np.testing.assert_array_equal(alone[0][0], together[0][i])


def test_containers_and_dtypes_give_the_same_bits():
    shape = (12, 15, 1)
    network = make_network(shape, 40)
    engine = Engine.of(network, shape, BYTES)
    X = make_images("noise", 5, shape)
    expected = engine.run(X, maps=True)
    for other in (X.astype(np.float64), X.astype(">u2"), np.asfortranarray(X), X[::-1][::-1]):
        for name, part in engine.run(other, maps=True).items():
            np.testing.assert_array_equal(part, expected[name], err_msg=name)


def test_without_maps_the_answer_is_the_same():
    shape = (30, 20, 3)
    network = make_network(shape, 100)
    engine = Engine.of(network, shape, BYTES)
    images = make_images("noise", 3, shape)
    short, full = engine.run(images), engine.run(images, maps=True)
    assert set(short) == {"failed", "logits", "features"}
    for name in short:
        np.testing.assert_array_equal(short[name], full[name])


def test_time_is_taken_if_asked_for():
    shape = (64, 64, 1)
    engine = Engine.of(make_network(shape, 300), shape, BYTES)
    images = make_images("noise", 8, shape)
    engine.run(images)
    np.testing.assert_array_equal(engine.seconds, 0)
    engine.run(images, timed=True)
    assert (engine.seconds > 0).all()
    assert len(engine.seconds) == len(MODULE.PARTS)


# ---- numbers that are too large ----


@pytest.mark.parametrize("maps", [False, True])
def test_what_overflows_in_float32_is_answered_in_float64(maps):
    shape = (16, 16, 1)
    scale = PixelScale((0.0, 1.0))
    network = make_network(shape, 50)
    X = np.random.default_rng(0).uniform(size=(5, *shape))
    X[2] *= 1e38  # finite in float32, its convolutions are not
    images = ImageRows(X, shape)
    engine = Engine.of(network, shape, scale)
    assert engine.run(X)["failed"].tolist() == [False, False, True, False, False]
    [(_, found)] = run(engine, network, images, scale, maps=maps)
    [(_, exact)] = evaluate(network, images, scale)
    assert torch.isfinite(found.logits).all()
    torch.testing.assert_close(found.logits[2], exact.logits[2], rtol=1e-12, atol=0)
    plain = engine.run(X)["logits"]
    np.testing.assert_array_equal(found.logits[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])
    if maps:
        assert torch.equal(found.pixels[2].long(), exact.pixels[2])
        torch.testing.assert_close(found.scores[2], exact.scores[2], rtol=1e-12, atol=0)


def test_what_is_left_of_an_image_that_overflowed_is_not_looked_at():
    """It was not written, and may be a NaN that signals where it is converted."""
    shape, scale = (16, 16, 1), PixelScale((0.0, 1.0))
    network = make_network(shape, 50)
    X = np.random.default_rng(0).uniform(size=(4, *shape))
    X[1] *= 1e38
    engine = Engine.of(network, shape, scale)
    images, exact_run = ImageRows(X, shape), engine.run

    def leave_signals(images, **options):
        found = exact_run(images, **options)
        for part in found.values():
            if part.dtype == np.float32:
                part[found["failed"]] = np.array(0x7FA00000, np.uint32).view(np.float32)
        return found

    engine.run = leave_signals
    [(_, found)] = run(engine, network, images, scale, maps=True)
    [(_, exact)] = evaluate(network, images, scale)
    torch.testing.assert_close(found.logits[1], exact.logits[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["context", "paper"])
@pytest.mark.parametrize("largest", [3e37, 1e38, -3e38])
def test_no_wrong_answer_where_float32_ends(largest, variant):
    """Wherever in the network it overflows, in some of the cells: what was not left to float64 is right."""
    scale, n_failed = PixelScale((0.0, 1.0)), 0
    for seed in range(12):
        network = make_network((16, 16, 1), 50, seed=seed, variant=variant)
        X = largest * np.random.default_rng(seed).uniform(size=(20, 16, 16, 1))
        found = Engine.of(network, (16, 16, 1), scale).run(X, maps=True)
        ran = ~found["failed"]
        n_failed += 20 - ran.sum()
        assert np.isfinite(found["scores"][ran]).all()
        if ran.any():
            logits = reference(network, X[ran], found["pixels"][ran], scale).logits
            probabilities = torch.softmax(torch.from_numpy(found["logits"][ran]).double(), 1)
            torch.testing.assert_close(probabilities, torch.softmax(logits, 1), rtol=0, atol=1e-4)
    assert n_failed > 0


def test_scores_that_are_no_numbers_are_not_passed_over():
    """Infinite features of both weights make a score that is no number; further on it may leave no trace."""
    shape, scale = (32, 32, 1), PixelScale((0.0, 1.0))
    network = make_network(shape, 50, variant="paper")
    with torch.no_grad():
        for stage in (network.coarse.early, network.coarse.middle):
            stage[0].weight.abs_().mul_(100)
    X = np.random.default_rng(0).uniform(size=(1, *shape))
    X[0, 16, 16] = 3e38
    engine = Engine.of(network, shape, scale)
    found = engine.run(X, maps=True)
    assert found["failed"].all()
    cells = network.coarse.look(torch.from_numpy(X[..., 0])[:, None].float()).maps[1]
    assert set(cells.isinf().sum(1).unique().tolist()) == {0, cells.shape[1]}


@pytest.mark.parametrize("data_range", [(0.0, 1e-320), (1e-40, 2e-40)])
def test_bytes_far_out_of_a_small_range_are_refused(data_range):
    shape = (4, 4, 1)
    scale = PixelScale(data_range)
    engine = Engine.of(make_network(shape, 4), shape, scale)
    with pytest.raises(ValueError, match="too far from data_range_"):
        engine.run(np.full((1, *shape), 200, np.uint8))
    assert not engine.run(np.zeros((1, *shape)))["failed"].any() or data_range[0]


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(1000),
        np.repeat([3.0, 1.0, 2.0], 400),
        np.random.default_rng(0).normal(size=5000),
        np.r_[np.zeros(3000), 1e-30 * np.arange(100), 1e30],
        np.r_[np.full(500, 1.0), np.nextafter(np.float32(1), np.float32(2))],
        1e-44 * np.arange(200),
        np.linspace(-1, 1, 4097) ** 9,
    ],
    ids=["equal", "three values", "normal", "an outlier", "neighbours", "subnormal", "dense at zero"],
)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999])
def test_selection_of_all_kinds_of_scores(scores, share):
    """By a network that is nothing but its score: middle features are the pixels, scored by 1."""
    n = len(scores)
    shape = (1, n, 1)
    network = SparseAttnNet(1, 2, 1 + share * (n - 1), strides=(1, 1, 1))
    network.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for stage in (network.coarse.early, network.coarse.middle):
            stage[0].weight.zero_()
            stage[0].weight[0, 0, 1, 1] = 1
            stage[1].running_var.fill_(1 - 1e-5)  # so that it does nothing, but for eps
        network.coarse.score.weight.zero_()
        network.coarse.score.weight[0, 0] = 1
        network.coarse.score.bias.zero_()
    network.eval()
    positive = (scores - scores.min()).astype(np.float32)  # past the ReLU
    engine = Engine.of(network, shape, PixelScale((0.0, 1.0)))
    found = engine.run(positive.reshape(1, *shape).astype(np.float64), maps=True)
    np.testing.assert_array_equal(found["scores"][0], positive)
    np.testing.assert_array_equal(found["pixels"], highest(found["scores"], found["pixels"].shape[1]))


# ---- when there is none ----


def changed(change):
    network = make_network((8, 8, 1), 5)
    change(network)
    return network


@pytest.mark.parametrize(
    "change",
    [
        lambda n: setattr(n, "choose", lambda images, scores: None),
        lambda n: setattr(n, "hidden_tokens", lambda *parts: None),
        lambda n: setattr(n.coarse.early[1], "eps", 0.1),
        lambda n: setattr(n, "fine_norm", nn.Tanh()),
        lambda n: setattr(n, "coarse", nn.Sequential(n.coarse)),
        lambda n: setattr(n.coarse, "score", nn.Conv2d(16, 1, 3)),
        lambda n: setattr(n.coarse.early[0], "stride", (3, 3)),
        lambda n: n.fine.key.register_forward_hook(print),
        lambda n: setattr(n.fusion, "first", nn.Linear(64, 128)),
        lambda n: n.to("meta"),
    ],
    ids=["choose", "tokens", "eps", "norm", "coarse", "score", "stride", "hook", "fusion", "elsewhere"],
)
def test_a_changed_network_has_no_engine(change):
    assert Engine.of(changed(change), (8, 8, 1), BYTES) is None


def test_images_too_large_to_be_counted_have_no_engine():
    assert Engine.of(make_network((8, 8, 1), 5), (2**16, 2**15, 1), BYTES) is None


def test_without_compiled_code_there_is_no_engine_and_the_answer_is_the_same(monkeypatch):
    shape = (20, 24, 1)
    network = make_network(shape, 60)
    images = ImageRows(make_images("noise", 4, shape), shape)
    engine = Engine.of(network, shape, BYTES)
    fast = run_all(engine, network, images, maps=True)
    monkeypatch.setattr(MODULE, "_LIBRARY", None)
    assert Engine.of(network, shape, BYTES) is None
    exact = run_all(None, network, images)
    np.testing.assert_allclose(fast[0], exact[0], rtol=0, atol=1e-4)


def test_code_built_from_other_sources_is_refused(monkeypatch):
    class Other(ctypes.Structure):
        _fields_ = [("n", ctypes.c_int32)]

    monkeypatch.setattr(MODULE, "_Plan", Other)
    with pytest.raises(ImportError, match="built from other sources"):
        MODULE._load_library()


@pytest.mark.parametrize("shape", [(8, 6, 1), (9, 5, 1), (9, 6, 2), (9, 6)])
def test_images_of_another_shape_are_refused(shape):
    engine = Engine.of(make_network((9, 6, 1), 5), (9, 6, 1), BYTES)
    with pytest.raises(ValueError, match=r"\(9, 6, 1\)"):
        engine.run(np.zeros((2, *shape), dtype=np.uint8))


def test_what_happens_to_the_weights_later_is_not_seen():
    shape = (8, 8, 1)
    network = make_network(shape, 5)
    engine = Engine.of(network, shape, BYTES)
    images = make_images("noise", 2, shape)
    before = engine.run(images)["logits"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(engine.run(images)["logits"], before)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_error_in_a_thread_comes_out_and_stops_the_rest(n_threads):
    shape = (16, 16, 1)
    read = []

    class Broken(ImageRows):
        def read(self, rows):
            read.append(rows)
            raise OSError("the disk is gone")

    network = make_network(shape, 20)
    images = Broken(np.zeros((400, *shape), np.uint8), shape)
    with pytest.raises(OSError, match="the disk is gone"):
        list(run(Engine.of(network, shape, BYTES), network, images, BYTES, n_threads=n_threads))
    assert len(read) <= 6


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_large_scores_are_as_exact_as_float32_holds_them(seed):
    """Of noise, on which scores are far larger than on any cell; a float32 near 95 is rounded by 3.8e-6."""
    image_shape = (135, 135, 1)
    network, images = make_network(image_shape, 2146, seed=seed), make_images("noise", 20, image_shape)
    with torch.no_grad():
        network.coarse.early[1].running_var.fill_(1e-3)  # as after a short fit to dark images
        found = Engine.of(network, image_shape, BYTES).run(images, maps=True)
        largest = reference(network, images, found["pixels"]).scores.abs().max()
        network.coarse.score.weight.mul_(95 / largest)
    found = Engine.of(network, image_shape, BYTES).run(images, maps=True)
    expected = reference(network, images, found["pixels"]).scores.flatten(1).numpy()
    assert 80 < np.abs(expected).max() < 110
    np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-5)


def test_memory_is_kept_between_calls_unless_it_is_much(monkeypatch):
    image_shape = (20, 20, 1)
    images, network = make_images("noise", 3, image_shape), make_network(image_shape, 40)
    engine = Engine.of(network, image_shape, BYTES)
    rows = ImageRows(images, image_shape)
    first = [output.logits for _, output in run(engine, network, rows, BYTES)]
    scratch = engine._own.scratch
    again = [output.logits for _, output in run(engine, network, rows, BYTES)]
    assert engine._own.scratch is scratch
    assert all(map(torch.equal, first, again))
    monkeypatch.setattr(MODULE, "_MOST_KEPT", 1000)
    list(run(engine, network, rows, BYTES))
    assert not hasattr(engine._own, "scratch")
