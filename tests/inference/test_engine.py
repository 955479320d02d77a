"""The compiled engine, held to the PyTorch forward in float64 and to itself in other company."""

import copy
import ctypes
import importlib
import math
import mmap
import shutil
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sklearn_sparseattn.images import CLIP, ImageRows, PixelScale
from sklearn_sparseattn.inference import Engine, evaluate, library, run
from sklearn_sparseattn.inference.engine import PARTS, is_plain
from sklearn_sparseattn.network import SparseAttnNet, select_pixels, strides_for

BYTES, UNIT = PixelScale((0.0, 255.0)), PixelScale((0.0, 1.0))
FORMS = importlib.import_module("sklearn_sparseattn.network.sparse_attn_net").SIZES


def make_network(image_shape, k=1.0, *, seed=0, n_classes=3, strides=None, **options):
    """As a fit leaves it: float32, in evaluation mode, its statistics moved by data."""
    height, width, channels = image_shape
    generator = torch.Generator().manual_seed(seed)
    network = SparseAttnNet(channels, n_classes, k, strides=strides or strides_for(height, width), **options)
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


def reference(network, images, tiles, scale=BYTES):
    """The PyTorch forward in float64, with these tiles instead of its own choice."""
    exact = copy.deepcopy(network).double()
    exact.choose = lambda images, scores: torch.from_numpy(tiles.astype(np.int64))
    with torch.inference_mode():
        return exact(torch.from_numpy(scale(images)).double())


def probabilities(logits):
    return torch.softmax(torch.as_tensor(logits).double(), 1).numpy()


def assert_as_reference(network, images, found, scale=BYTES):
    n = found["tiles"].shape[1]
    best = select_pixels(torch.from_numpy(found["scores"]), n).numpy()
    np.testing.assert_array_equal(found["tiles"], best)
    expected = reference(network, images, found["tiles"], scale)
    # Where all keys of a column are 0 but for rounding, that is divided by little more than n * epsilon.
    tolerances = {"scores": 1e-5, "attention": 1e-3, "contribution": 1e-3, "features": 1e-4}
    for name, tolerance in tolerances.items():
        other = getattr(expected, name).numpy().reshape(found[name].shape)
        # Relative to the largest of an image: weights are drawn, and their sums may be large.
        size = np.maximum(1, np.abs(other).max(axis=1, keepdims=True))
        np.testing.assert_allclose(found[name] / size, other / size, rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(
        probabilities(found["logits"]), probabilities(expected.logits), rtol=0, atol=1e-5
    )
    assert not found["failed"].any()


def test_the_engine_is_there():
    """CI has a compiler: were it not built, everything below would be about nothing."""
    assert Engine.of(make_network((8, 8, 1)), (8, 8, 1), BYTES) is not None


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    n_channels=st.integers(1, 5),
    share=st.floats(0, 1),
    kind=st.sampled_from(["zeros", "constant", "few values", "noise", "areas"]),
    seed=st.integers(0, 5),
    size=st.sampled_from(sorted(FORMS)),
    strides=st.sampled_from([None, (1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2)]),
)
@example(135, 135, 1, 0.082, "noise", 0, "default", None)
@example(135, 135, 1, 1, "areas", 1, "large", None)
@example(1, 300, 2, 0.5, "noise", 0, "default", None)
@example(64, 65, 3, 0, "zeros", 0, "default", None)
@settings(max_examples=60, deadline=None)
def test_it_is_the_network(height, width, n_channels, share, kind, seed, size, strides):
    shape = height, width, n_channels
    network = make_network(shape, seed=seed, size=size, strides=strides)
    images, k = make_images(kind, 3, shape, seed), 1 + share * (height * width - 1)
    assert_as_reference(network, images, Engine.of(network, shape, BYTES).run(images, k=k, maps=True))


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 8, "n_heads": 1},
        {"embed_dim": 13, "n_heads": 3},
        {"embed_dim": 64, "n_heads": 4},
        {"embed_dim": 48, "n_heads": 48},
        {"embed_dim": 1, "n_heads": 1},
        {"hidden_dim": 5},
        {"hidden_dim": 512, "n_classes": 40},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(41, 34, 2), (2, 3, 1)], ids=str)
def test_widths_of_all_kinds(options, shape):
    network = make_network(shape, 300, **options)
    images = make_images("noise", 4, shape)
    assert_as_reference(network, images, Engine.of(network, shape, BYTES).run(images, maps=True))


@pytest.mark.parametrize("n_layers", range(5))
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("channels", [(8, 16), (16, 32), (5, 9), (24, 48)], ids=str)
def test_forms_of_all_kinds(n_layers, kernel_size, channels, monkeypatch):
    form = {"channels": channels, "kernel_size": kernel_size, "n_layers": n_layers}
    monkeypatch.setitem(FORMS, "default", form)
    shape = (37, 45, 1 + n_layers % 3)
    network = make_network(shape, 400)
    images = make_images("noise", 2, shape)
    assert_as_reference(network, images, Engine.of(network, shape, BYTES).run(images, maps=True))


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """Let another file be loaded as the library."""

    def use(file):
        monkeypatch.setattr(library, "FILE", Path(file))
        library.load.cache_clear()
        library._HAS_WARNED.clear()

    yield use
    monkeypatch.undo()
    library.load.cache_clear()
    library._HAS_WARNED.clear()


@pytest.mark.parametrize("n_lanes", [4, 8, 16])
def test_every_vector_extension_gives_the_answer(n_lanes, monkeypatch, fresh_library, tmp_path):
    monkeypatch.setenv("SPARSEATTN_MOST_LANES", str(n_lanes))
    fresh_library(shutil.copy(library.FILE, tmp_path))
    for shape, options in [
        ((135, 135, 1), {}),
        ((45, 60, 3), {"size": "large"}),
        ((30, 31, 2), {"embed_dim": 13, "n_heads": 3}),
    ]:
        network = make_network(shape, 0.1 * math.prod(shape), **options)
        images = make_images("noise", 2, shape)
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


def test_any_k_in_any_order_gives_what_an_engine_of_its_own_would():
    shape = (40, 44, 1)
    network, images = make_network(shape, 123.4), make_images("noise", 3, shape)
    engine = Engine.of(network, shape, BYTES)
    for k in (100, 1, 40 * 44, None, 16.4, 1e9, 100):
        found = engine.run(images, k=k, maps=True)
        assert found["tiles"].shape[1] == network.n_chosen(40, 44, k)
        other = make_network(shape, 123.4 if k is None else k)
        for name, part in Engine.of(other, shape, BYTES).run(images, maps=True).items():
            np.testing.assert_array_equal(found[name], part, err_msg=name)
        assert_as_reference(network, images, found)


def test_the_answer_does_not_depend_on_how_the_thread_rounds():
    shape = (64, 64, 1)
    network, images = make_network(shape, 300), make_images("areas", 3, shape)
    with torch.no_grad():
        network.coarse.score.bias.fill_(-95.0)  # gates below 1e-38
    engine = Engine.of(network, shape, BYTES)
    expected = engine.run(images)["logits"]

    def run_with(flushing):
        torch.set_flush_denormal(flushing)
        try:
            return engine.run(images)["logits"], torch.tensor([1e-39]) * 1
        finally:
            torch.set_flush_denormal(False)

    for flushing in (False, True):
        with ThreadPoolExecutor(1) as pool:
            found, product = pool.submit(run_with, flushing).result()
        np.testing.assert_array_equal(found, expected)
        assert (product == 0) == flushing  # the thread's own way was set back


@pytest.mark.parametrize("data_range", [(0.0, 255.0), (0.0, 1.0), (3.0, 250.7), (-1e-3, 0.7)])
@pytest.mark.parametrize("shape", [(12, 15, 1), (40, 37, 1), (33, 64, 3)], ids=str)
def test_containers_and_dtypes_give_the_same_bits(data_range, shape):
    scale = PixelScale(data_range)
    engine = Engine.of(make_network(shape, 40), shape, scale)
    X = make_images("noise", 5, shape)
    expected = engine.run(X, maps=True)
    for other in (X.astype(np.float64), X.astype(">u2"), np.asfortranarray(X), X[::-1][::-1]):
        for name, part in engine.run(other, maps=True).items():
            np.testing.assert_array_equal(part, expected[name], err_msg=name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect")
@pytest.mark.parametrize("shape", [(135, 135, 1), (9, 7, 1), (33, 31, 3)], ids=str)
def test_nothing_beyond_the_images_is_read(shape):
    """They end with the last page before one that must not be read, else the process ends here."""
    n = math.prod(shape)
    pages = -(-n // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    forbidden = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages)
    image = np.frombuffer(memory, np.uint8, n, pages - n).reshape(1, *shape)
    engine = Engine.of(make_network(shape, 40), shape, BYTES)
    protect = ctypes.CDLL(None).mprotect
    assert protect(forbidden, mmap.PAGESIZE, 0) == 0
    try:
        np.testing.assert_array_equal(engine.run(image)["logits"], engine.run(image.copy())["logits"])
    finally:
        protect(forbidden, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_without_maps_the_answer_is_the_same():
    shape = (30, 20, 3)
    engine = Engine.of(make_network(shape, 100), shape, BYTES)
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
    assert len(engine.seconds) == len(PARTS)


# ---- which tiles ----


def scoring_network():
    """A network that is nothing but its score: middle features are the pixels, scored by 1."""
    network = SparseAttnNet(1, 2, 1, strides=(1, 1, 1))
    network.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for stage in (network.coarse.early, network.coarse.middle):
            stage[0].weight.zero_()
            stage[0].weight[0, 0, 1, 1] = 1
            stage[1].running_var.fill_(1 - 1e-5)  # so that it does nothing, but for eps
        network.coarse.score.weight.zero_()
        network.coarse.score.weight[0, 0] = 1
        network.coarse.score.bias.zero_()
    return network.eval()


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(1000),
        np.repeat([3.0, 1.0, 2.0], 400),
        np.random.default_rng(0).normal(size=5000),
        np.r_[np.zeros(3000), 1e-30 * np.arange(100), 1e6],
        np.r_[np.full(500, 1.0), np.nextafter(np.float32(1), np.float32(2))],
        np.linspace(-1, 1, 4097) ** 9,
        np.r_[1.0],
    ],
    ids=["equal", "three values", "normal", "an outlier", "neighbours", "dense at zero", "one"],
)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999, 1.0])
def test_selection_of_all_kinds_of_scores(scores, share):
    n = len(scores)
    positive = (scores - scores.min()).astype(np.float32)  # past the ReLU
    network = scoring_network()
    factor = 2.0 ** math.frexp(positive.max())[1]  # so that no value is clipped
    network.coarse.score.weight.data *= factor
    engine = Engine.of(network, (1, n, 1), UNIT)
    images = positive.reshape(1, 1, n, 1).astype(np.float64) / factor
    found = engine.run(images, k=1 + share * (n - 1), maps=True)
    np.testing.assert_array_equal(found["scores"][0], positive)
    if positive.max() < 1e5:  # larger tokens are as exact as float32 holds them
        assert_as_reference(network, images, found, UNIT)
    best = select_pixels(torch.from_numpy(found["scores"]), found["tiles"].shape[1])
    np.testing.assert_array_equal(found["tiles"], best)


def test_which_of_nearly_equal_tiles_is_chosen_hardly_matters():
    """The engine may choose others than float64 does; its answer is close to that all the same."""
    shape = (64, 64, 1)
    for seed in range(8):
        network = make_network(shape, 64 * 8, seed=seed)
        images = make_images("areas", 8, shape, seed)
        images += make_images("few values", 8, shape, seed) // 255  # nearly equal cells
        engine = Engine.of(network, shape, BYTES)
        found = engine.run(images, maps=True)
        exact = copy.deepcopy(network).double()
        with torch.inference_mode():
            expected = exact(torch.from_numpy(BYTES(images)).double())
        np.testing.assert_allclose(
            probabilities(found["logits"]), probabilities(expected.logits), rtol=0, atol=1e-3
        )


# ---- numbers that are too large ----


SMALL = 1e-36  # images in these units come through `overflowing` as others through another network


def overflowing(shape, k, factor=5e37, **options):
    """A network whose coarse maps overflow in float32, unless the values are tiny."""
    network = make_network(shape, k, **options)
    network.coarse.background.zero_()
    with torch.no_grad():
        network.coarse.early[0].weight.mul_(factor)
    return network


@pytest.mark.parametrize("maps", [False, True])
def test_what_overflows_in_float32_is_answered_in_float64(maps):
    shape = (16, 16, 1)
    network = overflowing(shape, 50)
    X = SMALL * np.random.default_rng(0).uniform(size=(5, *shape))
    X[2] *= CLIP[1] / SMALL
    images = ImageRows(X, shape)
    engine = Engine.of(network, shape, UNIT)
    assert engine.run(X)["failed"].tolist() == [False, False, True, False, False]
    [(_, found)] = run(engine, network, images, UNIT, maps=maps)
    [(_, exact)] = evaluate(network, images, UNIT)
    assert torch.isfinite(found.logits).all()
    torch.testing.assert_close(found.logits[2], exact.logits[2], rtol=1e-12, atol=0)
    plain = engine.run(X)["logits"]
    np.testing.assert_array_equal(found.logits[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])
    if maps:
        assert torch.equal(found.tiles[2].long(), exact.tiles[2])
        torch.testing.assert_close(found.scores[2], exact.scores[2], rtol=1e-12, atol=0)


def test_what_is_left_of_an_image_that_overflowed_is_not_looked_at():
    """It was not written, and may be a NaN that signals where it is converted."""
    shape = (16, 16, 1)
    network = overflowing(shape, 50)
    X = SMALL * np.random.default_rng(0).uniform(size=(4, *shape))
    X[1] *= CLIP[1] / SMALL
    engine = Engine.of(network, shape, UNIT)
    images, exact_run = ImageRows(X, shape), engine.run

    def leave_signals(images, **options):
        found = exact_run(images, **options)
        for part in found.values():
            if part.dtype == np.float32:
                part[found["failed"]] = np.array(0x7FA00000, np.uint32).view(np.float32)
        return found

    engine.run = leave_signals
    [(_, found)] = run(engine, network, images, UNIT, maps=True)
    [(_, exact)] = evaluate(network, images, UNIT)
    torch.testing.assert_close(found.logits[1], exact.logits[1], rtol=1e-12, atol=0)


def test_an_image_after_one_that_overflowed_is_as_ever():
    shape = (48, 48, 1)
    engine = Engine.of(overflowing(shape, 500), shape, UNIT)
    X = SMALL * np.random.default_rng(0).uniform(size=(6, *shape))
    expected = engine.run(X, maps=True)
    broken = X.copy()
    broken[::2] *= CLIP[1] / SMALL
    found = engine.run(broken, maps=True)
    assert found["failed"].tolist() == [True, False] * 3
    for name, part in expected.items():
        np.testing.assert_array_equal(found[name][1::2], part[1::2], err_msg=name)


@pytest.mark.parametrize("largest", [1e20, 1e37, 5e37, -5e37])
def test_no_wrong_answer_where_float32_ends(largest):
    """Wherever in the network it overflows, in some of the cells: what was not left to float64 is right."""
    n_failed = 0
    for seed in range(12):
        network = overflowing((16, 16, 1), 50, largest, seed=seed)
        X = CLIP[1] * np.random.default_rng(seed).uniform(size=(20, 16, 16, 1))
        found = Engine.of(network, (16, 16, 1), UNIT).run(X, maps=True)
        ran = ~found["failed"]
        n_failed += 20 - ran.sum()
        assert np.isfinite(found["scores"][ran]).all()
        if ran.any():
            logits = reference(network, X[ran], found["tiles"][ran], UNIT).logits
            np.testing.assert_allclose(
                probabilities(found["logits"][ran]), probabilities(logits), rtol=0, atol=1e-4
            )
    assert n_failed > 0 or largest < 1e30


def test_scores_that_are_no_numbers_are_not_passed_over():
    """Infinite features of both weights make a score that is no number; further on it may leave no trace."""
    shape = (32, 32, 1)
    network = overflowing(shape, 50)
    with torch.no_grad():
        for stage in (network.coarse.early, network.coarse.middle):
            stage[0].weight.abs_()
        network.coarse.middle[0].weight.mul_(100)
    X = SMALL / 100 * np.random.default_rng(0).uniform(size=(1, *shape))
    X[0, 16, 16] = CLIP[1]
    assert Engine.of(network, shape, UNIT).run(X, maps=True)["failed"].all()
    cells = network.coarse.look(torch.from_numpy(X[..., 0])[:, None].float()).maps[1]
    assert set(cells.isinf().sum(1).unique().tolist()) == {0, cells.shape[1]}


# ---- values as they are given ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(13, 18, 1), (135, 133, 1), (33, 31, 3)], ids=str)
@pytest.mark.parametrize("data_range", [(0.0, 1.0), (20.0, 50.3), (100.0, 4000.0)])
def test_values_are_scaled_and_clipped_as_elsewhere(dtype, shape, data_range):
    """Given as they are, or scaled before by PixelScale: the same bits."""
    scale = PixelScale(data_range)
    network = make_network(shape, 40)
    X = np.random.default_rng(0).uniform(0, 5 * data_range[1], (4, *shape)).astype(dtype)
    scaled = np.moveaxis(scale(X), 1, -1)
    assert scaled.max() == CLIP[1] or (scaled.max() < CLIP[1] and dtype == np.uint8)
    found = Engine.of(network, shape, scale).run(X, maps=True)
    expected = Engine.of(network, shape, UNIT).run(scaled, maps=True)
    for name, part in found.items():
        np.testing.assert_array_equal(part, expected[name], err_msg=name)


@pytest.mark.parametrize("value", [1e39, -1e300, 1.7e308, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_value_out_of_all_range_is_clipped(value, dtype):
    shape = (21, 22, 1)
    network = make_network(shape, 50)
    X = np.random.default_rng(0).uniform(size=(3, *shape)).astype(dtype)
    expected = X.copy()
    expected[1, 5, 6] = CLIP[1] if value > 0 else CLIP[0]
    with np.errstate(over="ignore"):
        X[1, 5, 6] = value
    engine = Engine.of(network, shape, UNIT)
    found = engine.run(X)
    assert not found["failed"].any()
    np.testing.assert_array_equal(found["logits"], engine.run(expected)["logits"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(21, 22, 1), (12, 9, 3)], ids=str)
def test_nan_is_named(dtype, shape):
    network = make_network(shape, 50)
    X = np.zeros((3, *shape), dtype)
    X[1, -1, -1, -1] = np.nan
    engine = Engine.of(network, shape, UNIT)
    assert engine.run(X)["failed"].tolist() == [False, True, False]
    with pytest.raises(ValueError, match="X contains NaN"):
        list(run(engine, network, ImageRows(X, shape), UNIT))


@pytest.mark.parametrize("data_range", [(0.0, 1e-320), (1e-40, 2e-40), (-1e306, 1e306)])
def test_extreme_ranges_are_left_to_pytorch(data_range, fresh_library):
    fresh_library("missing")  # that would warn
    assert Engine.of(make_network((4, 4, 1), 4), (4, 4, 1), PixelScale(data_range)) is None


# ---- when there is none ----


@pytest.mark.parametrize(
    "change",
    [
        lambda n: setattr(n, "choose", lambda images, scores: None),
        lambda n: setattr(n, "openness", lambda scores, tiles: None),
        lambda n: setattr(n.coarse.early[1], "eps", 0.1),
        lambda n: setattr(n, "fine_norm", nn.Tanh()),
        lambda n: setattr(n, "coarse", nn.Sequential(n.coarse)),
        lambda n: setattr(n.coarse, "score", nn.Conv2d(16, 1, 3)),
        lambda n: setattr(n.coarse.early[0], "stride", (3, 3)),
        lambda n: n.fine.key.register_forward_hook(print),
        lambda n: setattr(n.fusion, "first", nn.Linear(64, 128)),
        lambda n: n.to("meta"),
    ],
    ids=["choose", "openness", "eps", "norm", "coarse", "score", "stride", "hook", "fusion", "elsewhere"],
)
def test_a_changed_network_has_no_engine(change):
    network = make_network((8, 8, 1))
    assert is_plain(network)
    change(network)
    assert not is_plain(network)
    assert Engine.of(network, (8, 8, 1), BYTES) is None


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (make_network((8, 8, 1), variant="paper"), (8, 8, 1)),
        (make_network((8, 8, 1), strides=(3, 2, 2)), (8, 8, 1)),
        (make_network((8, 8, 1)), (2**16, 2**15, 1)),
    ],
    ids=["paper", "strides", "large"],
)
def test_what_the_engine_does_not_know_has_none(network, shape, fresh_library):
    fresh_library("missing")  # that would warn
    assert is_plain(network)
    assert Engine.of(network, shape, BYTES) is None


def compiled(tmp_path, source):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no compiler")
    (tmp_path / "other.c").write_text(source)
    file = tmp_path / "other.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(file)], check=True)
    return file


STALE = """
#include <stdint.h>
void sparseattn_sizes(int64_t *plan, int64_t *results) { *plan = PLAN; *results = RESULTS; }
int64_t sparseattn_scratch(void *p, int32_t n, void *m) { return 0; }
void sparseattn_run(void) {}
const char *sparseattn_extension(void) { return "x"; }
const char *sparseattn_sources(void) { return "SOURCES"; }
"""


def stale(tmp_path, *, plan=library.Plan, sources=""):
    sizes = [str(ctypes.sizeof(structure)) for structure in (plan, library.Results)]
    text = STALE.replace("PLAN", sizes[0]).replace("RESULTS", sizes[1]).replace("SOURCES", sources)
    return compiled(tmp_path, text)


def broken(tmp_path):
    file = tmp_path / "broken.so"
    file.write_bytes(b"\x7fELF no library")
    return file


def missing(tmp_path):
    return tmp_path / "missing.so"


def other_structures(tmp_path):
    return stale(tmp_path, plan=ctypes.c_int64)


def other_sources(tmp_path):
    (tmp_path / "_engine.c").write_text("/* edited since */")
    return stale(tmp_path, sources="_engine.c:0123456789abcdef")


def other_functions(tmp_path):
    return compiled(tmp_path, "int nothing;")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (missing, "is missing"),
        (broken, "cannot be loaded"),
        (other_functions, "has no function sparseattn_sizes"),
        (other_structures, "built from other sources"),
        (other_sources, "built from other sources"),
    ],
)
def test_without_a_library_one_warning_says_why_and_pytorch_answers(make, problem, fresh_library, tmp_path):
    shape = (20, 24, 1)
    network = make_network(shape, 60)
    images = ImageRows(make_images("noise", 4, shape), shape)
    fast = run_all(Engine.of(network, shape, BYTES), network, images)
    fresh_library(make(tmp_path))
    with pytest.warns(UserWarning, match=rf"PyTorch predicts.*{problem}.*install sklearn-sparseattn again"):
        engine = Engine.of(network, shape, BYTES)
    assert engine is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Engine.of(network, shape, BYTES) is None
    np.testing.assert_allclose(run_all(engine, network, images)[0], fast[0], rtol=0, atol=1e-4)


def test_a_library_without_digests_is_used(fresh_library, tmp_path):
    """As one that was compiled by hand."""
    fresh_library(stale(tmp_path))
    assert library.load().library is not None


def test_importing_the_package_needs_no_library(tmp_path):
    code = "import pathlib, sys\n" + "\n".join(
        [
            "from sklearn_sparseattn.inference import library",
            "library.FILE = pathlib.Path(sys.argv[1])",
            "import sklearn_sparseattn",
            "print(library.load.cache_info().currsize)",
        ]
    )
    command = [sys.executable, "-W", "error", "-c", code, str(broken(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]  # and looks for none


def test_the_structures_have_the_sizes_of_the_header():
    sizes = [ctypes.c_int64(), ctypes.c_int64()]
    library.load().library.sparseattn_sizes(*map(ctypes.byref, sizes))
    assert [size.value for size in sizes] == [ctypes.sizeof(library.Plan), ctypes.sizeof(library.Results)]


def test_the_fields_are_those_of_the_header_in_its_order():
    text = library.FILE.with_name("sparseattn.h").read_text()
    for structure, name in ((library.Plan, "sparseattn_plan"), (library.Results, "sparseattn_results")):
        end = text.index(f"}} {name};")
        body = text[text.rindex("typedef struct {", 0, end) : end]
        declared = "".join(line.split("/*")[0] for line in body.splitlines())
        words = declared.replace("*", " ").replace(",", " ").replace(";", " ").replace("[", " ").split()
        known = {field[0] for field in structure._fields_}
        assert [word for word in words if word in known] == [field[0] for field in structure._fields_]


@pytest.mark.parametrize("shape", [(8, 6, 1), (9, 5, 1), (9, 6, 2), (9, 6)])
def test_images_of_another_shape_are_refused(shape):
    engine = Engine.of(make_network((9, 6, 1)), (9, 6, 1), BYTES)
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
    network.k.fill_(64)
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_what_ends_a_call_waits_for_its_threads(error):
    """Ctrl-C, an error of the caller, a generator that is dropped: then no thread reads X any more."""
    shape = (16, 16, 1)
    reading, begun = [], threading.Semaphore(0)

    class Slow(ImageRows):
        def read(self, rows):
            reading.append(rows)
            begun.release()
            time.sleep(0.2)
            reading.remove(rows)
            return super().read(rows)

    network = make_network(shape, 20)
    images = Slow(np.zeros((400, *shape), np.uint8), shape)
    passes = run(Engine.of(network, shape, BYTES), network, images, BYTES, n_threads=2)
    next(passes)
    for _ in range(3):  # the next two have begun
        begun.acquire()
    assert reading
    with pytest.raises(error):
        passes.throw(error())
    assert reading == []
    time.sleep(0.1)
    assert reading == []  # and none begins


@pytest.mark.parametrize(("largest", "tolerance"), [(20, 1e-5), (95, 2e-5)])
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_large_scores_are_exact_enough(seed, largest, tolerance):
    """Of noise: they are far larger than on any cell, and sums of still larger numbers of either sign."""
    image_shape = (135, 135, 1)
    network, images = make_network(image_shape, 2146, seed=seed), make_images("noise", 8, image_shape)
    with torch.no_grad():
        network.coarse.early[1].running_var.fill_(1e-3)  # as after a short fit to dark images
        found = Engine.of(network, image_shape, BYTES).run(images, maps=True)
        before = reference(network, images, found["tiles"]).scores.abs().max()
        network.coarse.score.weight.mul_(largest / before)
    found = Engine.of(network, image_shape, BYTES).run(images, maps=True)
    expected = reference(network, images, found["tiles"]).scores.flatten(1).numpy()
    error = np.abs(found["scores"] - expected) / np.maximum(1, np.abs(expected))
    assert error.max() < tolerance


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
    monkeypatch.setattr(importlib.import_module("sklearn_sparseattn.inference.engine"), "_MOST_KEPT", 1000)
    list(run(engine, network, rows, BYTES))
    assert not hasattr(engine._own, "scratch")
