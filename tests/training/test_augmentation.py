"""Augmentations: what each changes, against its equation in float64, and by which limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.training import augmentation
from sklearn_sparseattn.training.augmentation import (
    AUGMENTATIONS,
    blur,
    brightness,
    density,
    dihedral,
    noise,
    resampled,
    resolve_augment,
    zoom,
)


def draw(*shape, low=0.0, high=1.0, seed=0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


# ---- turns ----


def symmetries(image):
    """All the ways to lay down a picture (C, H, W) so that its shape stays; as sets of bytes."""
    turned = [np.rot90(image, turns, axes=(1, 2)) for turns in range(4)]
    both = turned + [way[:, :, ::-1] for way in turned]
    return {np.ascontiguousarray(way).tobytes() for way in both if way.shape == image.shape}


@pytest.mark.parametrize(
    ("shape", "n_ways"), [((1, 4, 4), 8), ((3, 5, 5), 8), ((2, 3, 5), 4), ((1, 5, 2), 4)]
)
def test_dihedral_reaches_every_symmetry_and_nothing_else(shape, n_ways):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    images = np.repeat(image[None], 100 * n_ways, axis=0)
    found = dihedral(images, np.random.default_rng(1))
    assert found.dtype == np.float32
    assert found.shape == images.shape
    counts = {}
    for one in found:
        counts[one.tobytes()] = counts.get(one.tobytes(), 0) + 1
    assert len(counts) == n_ways
    assert set(counts) == symmetries(image)
    assert min(counts.values()) > 60  # and all about as often: 100 are expected
    assert max(counts.values()) < 140


@settings(max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_dihedral_turns_each_image_by_itself(shape, seed):
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    before = images.copy()
    found = dihedral(images, np.random.default_rng(seed))
    np.testing.assert_array_equal(images, before)
    assert not np.shares_memory(found, images)
    for one, image in zip(found, images, strict=True):
        assert one.tobytes() in symmetries(image)
    np.testing.assert_array_equal(found, dihedral(images, np.random.default_rng(seed)))


# ---- light and stain ----


class Given:
    """A generator that gives what it is told: each draw the same quantile of its range."""

    def __init__(self, quantile):
        self.quantile = quantile

    def uniform(self, low, high, size):
        return np.full(size, low + self.quantile * (high - low))


@pytest.mark.parametrize("quantile", [0.0, 0.3, 1.0])
def test_brightness_is_gain_gamma_and_offset(quantile):
    images = draw(3, 2, 5, 6, low=-0.5, high=1.5)
    found = brightness(images, Given(quantile))
    gain, gamma = (math.exp((2 * quantile - 1) * math.log(most)) for most in (1.45, 1.5))
    exact = images.astype(np.float64)
    expected = gain * np.sign(exact) * np.abs(exact) ** gamma + 0.08 * (2 * quantile - 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_brightness_differs_by_image_and_not_by_channel():
    images = np.full((200, 3, 4, 4), 0.5, np.float32)
    found = brightness(images, np.random.default_rng(0))
    assert np.ptp(found, axis=(1, 2, 3)).max() == 0
    assert len(np.unique(found[:, 0, 0, 0])) == 200
    least, most = (
        0.5**gamma * gain + b for gamma, gain, b in ((1.5, 1 / 1.45, -0.08), (1 / 1.5, 1.45, 0.08))
    )
    assert least < found.min() < least + 0.1
    assert most - 0.1 < found.max() < most


def test_noise_is_of_the_strength_that_is_drawn():
    found = noise(np.full((400, 2, 32, 32), 0.3, np.float32), np.random.default_rng(0))
    deviations = found.std(axis=(1, 2, 3))
    assert abs(found.mean() - 0.3) < 1e-3
    assert deviations.min() < 0.001
    assert 0.038 < deviations.max() < 0.042
    assert abs(deviations.mean() - 0.02) < 0.002


def test_density_mixes_optical_densities():
    """exp(-s (I + M) D) times the gains, one pixel after the other."""
    images = draw(4, 3, 6, 5, low=0.05)
    found = density(images, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    mixing = np.eye(3) + rng.normal(0, 0.15, (4, 3, 3))
    strength = np.exp(rng.uniform(-math.log(1.6), math.log(1.6), 4))
    light = np.exp(rng.uniform(-math.log(1.45), math.log(1.45), 4))
    tint = np.exp(rng.uniform(-math.log(1.25), math.log(1.25), (4, 3)))
    for i in range(4):
        for y, x in np.ndindex(6, 5):
            exact = -np.log(images[i, :, y, x].astype(np.float64))
            expected = np.exp(-strength[i] * mixing[i] @ exact) * light[i] * tint[i]
            np.testing.assert_allclose(found[i, :, y, x], np.minimum(expected, 1.5), rtol=1e-5)


def test_density_of_what_has_none_is_finite():
    images = np.array([0.0, -3.0, 4.0, 1.0], np.float32).reshape(1, 1, 2, 2).repeat(3, axis=1)
    found = density(images, np.random.default_rng(0))
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1.5


# ---- scale and blur ----


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("shape", [(12, 12), (9, 14), (1, 7)])
def test_zoom_is_linear_interpolation_about_the_centre(factor, shape):
    images = draw(2, 3, *shape)
    centres = [(n - 1) / 2 for n in shape]
    lines = [
        np.clip((np.arange(n) - at) / factor + at, 0, n - 1) for n, at in zip(shape, centres, strict=True)
    ]
    places = np.meshgrid(*lines, indexing="ij")
    exact = images.astype(np.float64)
    expected = [[ndimage.map_coordinates(one, places, order=1) for one in image] for image in exact]
    np.testing.assert_allclose(resampled(images, [factor] * 2, [0, 0]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deviation", [0.4, 1.0, 1.3])
def test_blur_is_gaussian(deviation):
    images = draw(3, 2, 15, 18)
    found = resampled(images, [1, 1, 1], [0, deviation, deviation / 2])
    np.testing.assert_array_equal(found[0], images[0])
    for i, one in ((1, deviation), (2, deviation / 2)):
        radius = math.ceil(3 * deviation)
        expected = ndimage.gaussian_filter(
            images[i].astype(np.float64), (0, one, one), mode="nearest", radius=(0, radius, radius)
        )
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


def test_limits_of_zoom_and_blur(monkeypatch):
    seen = []
    monkeypatch.setattr(augmentation, "resampled", lambda images, *given: seen.append(given))
    images = np.zeros((3000, 1, 2, 2), np.float32)
    zoom(images, np.random.default_rng(0))
    blur(images, np.random.default_rng(0))
    (factors, none), (ones, blurs) = seen
    assert 1 / 1.3 <= factors.min() < 0.775 < 1.29 < factors.max() <= 1.3
    assert abs(np.log(factors).mean()) < 0.01
    assert not none.any()
    assert (ones == 1).all()
    assert 0.45 < (blurs == 0).mean() < 0.55
    assert 1.29 < blurs.max() <= 1.3


# ---- all of them ----


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_is_a_function_of_its_arguments(name):
    images = draw(16, 3, 20, 24, low=-3, high=4)
    before, function = images.copy(), AUGMENTATIONS[name]
    found = function(images, np.random.default_rng(0))
    assert found.dtype == np.float32
    assert found.shape == images.shape
    assert np.isfinite(found).all()
    assert not np.shares_memory(found, images)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(found, function(images, np.random.default_rng(0)))
    assert not np.array_equal(found, function(images, np.random.default_rng(1)))
    one = function(np.repeat(images[:1], 16, axis=0), np.random.default_rng(0))
    assert len(np.unique(one.reshape(16, -1), axis=0)) > (3 if name == "dihedral" else 7)  # each by itself


def test_a_list_is_applied_in_its_order():
    images, calls = draw(4, 3, 8, 8), []

    def own(images, rng):
        calls.append(images.copy())
        return 2 * images

    found = resolve_augment(["light", own, "dihedral"], (8, 8, 3))(images, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    lit = augmentation.light(images, rng)
    np.testing.assert_array_equal(calls[0], lit)
    np.testing.assert_array_equal(found, dihedral(2 * lit, rng))
    assert resolve_augment(None, (8, 8, 1)) is None
    assert resolve_augment([], (8, 8, 1)) is None
    assert resolve_augment("zoom", (8, 8, 1)) is zoom
    assert resolve_augment([own], (8, 8, 1)) is own


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("rotate", "'rotate' is neither a function nor one of dihedral, light, stain"),
        (["dihedral", 3], "3 is neither"),
        ("stain", "'stain' is for images in RGB, not with 1 channels"),
        (["light", "density"], "'density' is for images in RGB"),
    ],
)
def test_what_cannot_be_done_is_named_before_the_fit(augment, message):
    X = np.zeros((6, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=message):
        SparseAttnClassifier(augment=augment).fit(X, [0, 1] * 3)
    with pytest.raises(ValueError, match=message):
        SparseAttnClassifier(augment=augment).partial_fit(X, [0, 1] * 3, classes=[0, 1])


def test_a_fit_with_light_stands_other_light():
    rng, y = np.random.default_rng(0), np.arange(96) % 2
    distance = np.hypot(*np.mgrid[-8:8, -8:8])
    radius = rng.uniform(3, 4, 96) + 2 * y
    X = 0.5 + 0.3 * (distance < radius[:, None, None]) + rng.normal(0, 0.02, (96, 16, 16))
    scores = {}
    for augment in ("dihedral", "light"):
        clf = SparseAttnClassifier(max_epochs=15, augment=augment, data_range=(0, 1), random_state=0).fit(
            X, y
        )
        scores[augment] = [clf.score(gain * X, y) for gain in (0.75, 1.25)]
    assert min(scores["light"]) > 0.9
    assert min(scores["dihedral"]) < 0.8
