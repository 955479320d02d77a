"""The fitted network over images: float64, the same for an image whatever else is in the call."""

import importlib
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.special import expit
from torch import nn

from sklearn_sparseattn.images import CLIP, ImageRows, PixelScale
from sklearn_sparseattn.inference import (
    attention_maps,
    evaluate,
    fused_features,
    probabilities,
    resolve_device,
    results,
)
from sklearn_sparseattn.network import SparseAttnNet, select_pixels, strides_for

BYTES = PixelScale((0.0, 255.0))
N_CLASSES = 3


def make_network(image_shape, share, seed=0, **form):
    """As a fit leaves it: float32, in evaluation mode, its statistics moved by data."""
    height, width, channels = image_shape
    generator = torch.Generator().manual_seed(seed)
    network = SparseAttnNet(
        channels, N_CLASSES, share * height * width, strides=strides_for(height, width), **form
    )
    network.reset_parameters(generator)
    network.coarse.background.fill_(0.37)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return network.eval()


def cells(image_shape, n=10, seed=0):
    """Images full of ties: constant ones, large constant areas, few grey values, one like another."""
    height, width, _ = image_shape
    rng = np.random.default_rng(seed)
    images = np.zeros((n, *image_shape), np.uint8)
    images[1], images[2] = 128, 255
    images[3, height // 3 :, width // 2 :] = 90
    images[4, : height // 4] = 200
    images[5, height // 2, width // 2] = 77
    images[6] = rng.integers(0, 2, image_shape) * 200
    images[7] = rng.integers(0, 256, image_shape)
    images[8] = images[3]
    images[9, ::2] = 60
    return images


def outputs(network, images, scale=BYTES, k=None):
    """All of `evaluate`, joined."""
    passes = [output for _, output in evaluate(network, images, scale, k)]
    return type(passes[0])(*(torch.cat(parts).numpy() for parts in zip(*passes, strict=True)))


def assert_same(found, expected):
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        if name == "tiles":
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-9, err_msg=name)


IMAGE_SHAPES = [(135, 135, 1), (40, 24, 3), (12, 12, 1), (1, 30, 1), (1, 1, 1), (5, 3, 5)]


@pytest.mark.parametrize("image_shape", IMAGE_SHAPES, ids=str)
@pytest.mark.parametrize("share", [1e-9, 0.15, 0.44])
@pytest.mark.parametrize("form", [{}, {"size": "large"}, {"variant": "paper"}], ids=str)
def test_an_image_is_the_same_in_any_company(image_shape, share, form):
    network = make_network(image_shape, share, **form)
    images = ImageRows(cells(image_shape), image_shape)
    together = outputs(network, images)
    companies = [[i] for i in range(10)] + [[3, 8], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [7] * 9, [0, 7, 3]]
    for rows in companies:
        expected = type(together)(*(part[rows] for part in together))
        assert_same(outputs(network, images.take(np.array(rows)), BYTES), expected)
    # The same image twice has the same tiles, ties and all.
    np.testing.assert_array_equal(together.tiles[3], together.tiles[8])


@pytest.mark.parametrize("image_shape", IMAGE_SHAPES, ids=str)
def test_k_takes_the_place_of_the_networks_own(image_shape):
    height, width, _ = image_shape
    images = ImageRows(cells(image_shape), image_shape)
    network = make_network(image_shape, 0.15)
    own = network.k.item()
    for share in (1e-9, 0.3, 1.0):
        expected = outputs(make_network(image_shape, share), images)
        assert_same(outputs(network, images, k=share * height * width), expected)
        assert network.k.item() == own


def test_the_size_of_the_chunks_changes_nothing(monkeypatch):
    module = importlib.import_module("sklearn_sparseattn.inference.evaluate")
    image_shape = (40, 24, 3)
    network = make_network(image_shape, 0.15)
    images = ImageRows(cells(image_shape), image_shape)
    together = outputs(network, images)
    for size in (1, 2, 3, 7):
        cuts = [slice(start, min(start + size, 10)) for start in range(0, 10, size)]
        monkeypatch.setattr(module, "chunk_slices", lambda n, shape, cuts=cuts: iter(cuts))
        assert [rows for rows, _ in evaluate(network, images, BYTES)] == cuts
        assert_same(outputs(network, images), together)


def test_chunks_are_bounded():
    """Many images are never scaled all at once."""
    image_shape = (64, 64, 3)
    read = []

    class Watched(ImageRows):
        def read(self, rows):
            read.append(rows)
            return super().read(rows)

    images = Watched(np.zeros((100, *image_shape), np.uint8), image_shape)
    slices = [rows for rows, _ in evaluate(make_network(image_shape, 0.01), images, BYTES)]
    assert read == slices
    assert max(rows.stop - rows.start for rows in slices) * 64 * 64 * 3 <= 2**19
    assert [i for rows in slices for i in range(rows.start, rows.stop)] == list(range(100))


def test_it_is_computed_in_float64():
    image_shape = (20, 20, 1)
    network = make_network(image_shape, 0.15)
    images = ImageRows(cells(image_shape), image_shape)
    found = outputs(network, images)
    for name in ("logits", "features", "scores", "attention", "contribution"):
        part = getattr(found, name)
        assert part.dtype == np.float64, name
        assert (part.astype(np.float32) != part).any(), name
    exact = make_network(image_shape, 0.15).double()
    scaled = torch.from_numpy(BYTES(images.read(slice(None)))).double()
    with torch.no_grad():
        assert_same(found, type(found)(*(part.numpy() for part in exact(scaled))))


def test_the_network_is_left_alone():
    image_shape = (20, 20, 1)
    network = make_network(image_shape, 0.15).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = ImageRows(cells(image_shape), image_shape)
    in_training = outputs(network, images)
    assert network.training
    assert_same(
        in_training, outputs(make_network(image_shape, 0.15), images)
    )  # running statistics all the same
    assert all(p.dtype == torch.float32 and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_containers_and_dtypes_give_the_same_bits():
    image_shape = (12, 12, 1)
    network = make_network(image_shape, 0.3)
    X = cells(image_shape).reshape(10, -1)
    expected = outputs(network, ImageRows(X, image_shape))
    for other in (X.astype(np.int64), X.astype(np.float32), X.astype(">u2"), sparse.csr_array(X)):
        for one, two in zip(outputs(network, ImageRows(other, image_shape)), expected, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("value", [1e300, -1e300, 1e39, 1.7e308])
@pytest.mark.parametrize("data_range", [(0.0, 1.0), (5.0, 6.0), (0.0, 1e-3)])
def test_values_out_of_all_range_are_clipped(value, data_range):
    image_shape = (2, 3, 1)
    X = np.zeros((4, 6))
    clipped = X.copy()
    clipped[2, 1] = data_range[0] + CLIP[value > 0] * (data_range[1] - data_range[0])
    X[2, 1] = value
    network = make_network(image_shape, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = (
            outputs(network, ImageRows(images, image_shape), PixelScale(data_range))
            for images in (X, clipped)
        )
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_nan_is_named():
    X = np.zeros((4, 6))
    X[2, 1] = np.nan
    with pytest.raises(ValueError, match="X contains NaN"):
        outputs(make_network((2, 3, 1), 1), ImageRows(X, (2, 3, 1)), PixelScale((0.0, 1.0)))


# ---- results ----


SHAPE = (34, 21, 1)  # tiles of four pixels a side; those at the right and lower border have fewer


@pytest.fixture(scope="module")
def case():
    network = make_network(SHAPE, 0.2, seed=1)
    images = ImageRows(cells(SHAPE), SHAPE)
    return network, images, outputs(network, images)


def one_by_one(network, images):
    """Passes of single images, out of order: results must go by their rows."""
    for i in reversed(range(len(images))):
        for _, output in evaluate(network, images.take(np.array([i])), BYTES):
            yield slice(i, i + 1), output


def test_probabilities_are_the_softmax(case):
    network, images, expected = case
    proba = probabilities(one_by_one(network, images), 10, N_CLASSES)
    assert proba.dtype == np.float64
    power = np.exp(expected.logits)
    np.testing.assert_allclose(proba, power / power.sum(1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=0, atol=1e-12)


def test_probabilities_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    output = SparseAttnNet(1, 3, 1).eval()(torch.zeros(2, 1, 2, 2))._replace(logits=logits)
    proba = probabilities([(slice(0, 2), output)], 2, 3)
    np.testing.assert_array_equal(proba, [[1, 0, 0], [1 / 3] * 3])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_features(case, dtype):
    network, images, expected = case
    found = fused_features(one_by_one(network, images), 10, 32 + 32 + 32, np.dtype(dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found, expected.features, rtol=1e-6 if dtype == np.float32 else 1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_maps(case, dtype):
    network, images, expected = case
    height, width, _ = SHAPE
    assert network.grid_of(height, width) == (9, 6)
    n = network.n_chosen(height, width)
    maps = attention_maps(one_by_one(network, images), 10, SHAPE, 4, n, np.dtype(dtype))
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == np.float32 else {"rtol": 0, "atol": 1e-9}
    assert set(maps) == {"coarse", "tiles", "chosen", "fine", "contribution"}
    for name in ("coarse", "fine", "contribution"):
        assert maps[name].dtype == dtype
        assert maps[name].shape == (10, height, width)
    np.testing.assert_array_equal(maps["tiles"], select_pixels(torch.from_numpy(expected.scores), n))
    row, column = np.indices((height, width)) // 4
    np.testing.assert_allclose(maps["coarse"], expit(expected.scores)[:, row, column], **tolerance)
    of_pixel = row * 6 + column
    n_pixels = np.bincount(of_pixel.ravel())
    assert set(n_pixels) == {16, 8, 4, 2}
    for i in range(10):
        chosen = np.isin(of_pixel, expected.tiles[i])
        np.testing.assert_array_equal(maps["chosen"][i], chosen)
        for name, values in (("fine", expected.attention), ("contribution", expected.contribution)):
            assert not maps[name][i][~chosen].any()
            # The pixels of a tile have equal shares of what it has.
            for tile, value in zip(expected.tiles[i], values[i], strict=True):
                np.testing.assert_allclose(
                    maps[name][i][of_pixel == tile] * n_pixels[tile], value, **tolerance
                )
    assert (maps["fine"] >= 0).all()
    assert maps["contribution"].min() < 0  # signed


def test_attention_maps_of_pixels():
    """In the paper's form a tile is a pixel."""
    network = make_network(SHAPE, 0.2, variant="paper")
    images = ImageRows(cells(SHAPE), SHAPE)
    expected = outputs(network, images)
    n = network.n_chosen(34, 21)
    maps = attention_maps(one_by_one(network, images), 10, SHAPE, 1, n, np.dtype(np.float64))
    np.testing.assert_allclose(maps["coarse"], expit(expected.scores), rtol=0, atol=1e-9)
    flat = maps["fine"].reshape(10, -1)
    np.testing.assert_allclose(np.take_along_axis(flat, maps["tiles"], 1), expected.attention, atol=1e-9)
    assert (maps["chosen"].sum(axis=(1, 2)) == n).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_at_the_ends_of_the_scale(dtype):
    largest = np.finfo(dtype).max
    ends = np.array([0.0, 1e-30, 1.0, 30.0, 80.0, 100.0, 1e4, largest, np.inf], dtype=dtype)
    scores = np.array([*-ends, *ends, np.nan], dtype=dtype)
    found = np.empty(len(scores), dtype)
    with np.errstate(all="raise"):
        results._sigmoid(scores, out=found)
    tiny = 10 * np.finfo(dtype).tiny
    np.testing.assert_allclose(found, expit(scores), rtol=4 * np.finfo(dtype).eps, atol=tiny)


# ---- devices ----


def test_cpu_is_always_there():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu0"])
def test_unknown_device(device):
    with pytest.raises(ValueError, match=f"device='{device}' is unknown"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["cuda:99", "cuda:7", "meta", "cpu:1", "mps:3"])
def test_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"device='{device}' is not available here"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_what_there_is(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)
    there = {"cpu", *(["cuda", "cuda:1"] if cuda else []), *(["mps"] if mps else [])}
    for device in ("cpu", "cuda", "cuda:1", "mps"):
        if device in there:
            assert resolve_device(device) == torch.device(device)
        else:
            with pytest.raises(ValueError, match="not available"):
                resolve_device(device)
