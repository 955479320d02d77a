"""What answers become as parts of an image are covered: against the least squares written out, in float64."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import NotFittedError

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import ImageRows
from sklearn_sparseattn.inference.occlusion import (
    CoveredImage,
    _least_squares,
    background_of,
    contrast_of,
    fields_of,
    maskings,
    occlusion_maps,
)
from sklearn_sparseattn.network import SparseAttnOutput

CELLS = make_cells(60, n_classes=3, image_size=32, random_state=0)
NAMES = np.array(["healthy", "large", "small"])


@pytest.fixture(scope="module")
def clf():
    return SparseAttnClassifier(max_epochs=2, random_state=0).fit(CELLS.images, NAMES[CELLS.target])


def literal_map(clf, image, label, grid, n_masks):
    """Least squares as in the docstring, of an image in two dimensions, in which all fields are equal."""
    sides = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    colour = np.sort(sides)[(len(sides) - 1) // 2]
    height, width = (n // grid for n in image.shape)
    masks, rows, answers = maskings(grid * grid, n_masks), [], []
    for mask in masks:
        covered = image.copy()
        for field in np.flatnonzero(~mask):
            i, j = divmod(field, grid)
            covered[i * height : (i + 1) * height, j * width : (j + 1) * width] = colour
        p = clf.predict_proba(covered[None])[0]
        rows.append([1.0, *mask])
        answers.append(p[label])
    for field in range(grid * grid):  # the penalty, as further rows
        rows.append([0.0, *(np.sqrt(2.0) * (np.arange(grid * grid) == field))])
        answers.append(0.0)
    effects = np.linalg.lstsq(np.array(rows), np.array(answers), rcond=None)[0][1:]
    distance = np.abs(image - colour)
    return np.kron(effects.reshape(grid, grid), np.ones((height, width))) * distance / distance.max()


def test_it_is_the_linear_model_that_fits_best(clf):
    for image, name in zip(CELLS.images[:3], NAMES, strict=True):
        found = clf.occlusion_maps(image[None].astype(float), [name], grid=4, n_masks=60)
        expected = literal_map(clf, image.astype(float), list(NAMES).index(name), 4, 60)
        assert np.abs(expected).max() > 0.001
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def adding_up(weight):
    """A stand-in for the network: the probability of class 0 is 0.5 and a weighted sum over the image."""

    def run(images):
        for rows in (slice(0, 7), slice(7, len(images))):
            p = 0.5 + torch.from_numpy((images.read(rows).sum(3) * weight).sum((1, 2)))
            yield rows, SparseAttnOutput(torch.stack([p, 1 - p], 1).log(), *[torch.empty(0)] * 5)

    return run


def test_effects_that_add_up_are_found():
    rng = np.random.default_rng(0)
    image = np.zeros((12, 20, 1))
    image[1:-1, 1:-1] = 100
    weight = rng.normal(size=(12, 20)) / 1e5
    rows, run = ImageRows(image[None], (12, 20, 1)), adding_up(weight)
    found = occlusion_maps(run, rows, np.array([0]), n_classes=2, grid=3, n_masks=20000)[0]
    parts, columns = (image[..., 0] * weight).reshape(3, 4, 20), np.arange(20) * 3 // 20
    expected = np.stack([parts[:, :, columns == j].sum((1, 2)) for j in range(3)], axis=1)
    np.testing.assert_allclose(found[1:-1:4, [3, 10, 17]], expected, rtol=1e-2, atol=1e-5)
    assert np.abs(expected).max() > 3e-3
    of_others = occlusion_maps(run, rows, np.array([1]), n_classes=2, grid=3, n_masks=200)[0]
    own = occlusion_maps(run, rows, np.array([0]), n_classes=2, grid=3, n_masks=200)[0]
    np.testing.assert_allclose(of_others, -own, atol=1e-12)


def test_a_pixel_has_its_part_by_its_distance_from_the_background():
    image = np.full((8, 8, 2), 50.0)
    image[2, 3] = 150, 50  # of the channels, one is another
    image[2, 2] = 25, 25
    rows, run = ImageRows(image[None], (8, 8, 2)), adding_up(np.full((8, 8), 1e-5))
    found = occlusion_maps(run, rows, np.array([0]), n_classes=2, grid=2, n_masks=500)[0]
    effect = found[2, 3]
    assert effect == pytest.approx(50e-5, rel=0.05)
    assert found[2, 2] == pytest.approx(effect / 2)
    found[2, 2:4] = 0
    assert not found.any()
    assert not contrast_of(np.full((4, 4, 1), 7)).any()


def test_it_finds_the_disc_that_the_answer_rests_on():
    y, x = np.mgrid[:32, :32]
    places = np.random.default_rng(0).integers(10, 22, (120, 2))
    distance = np.hypot(y - places[:, :1, None], x - places[:, 1:, None])
    target = np.arange(120) % 2
    discs = distance < np.where(target, 7, 4)[:, None, None]
    images = np.where(discs, 200, 20).astype(np.uint8)
    clf = SparseAttnClassifier(max_epochs=8, random_state=0).fit(images, target)
    maps = clf.occlusion_maps(images[:12])
    assert (maps * discs[:12]).sum() > 0.7 * np.abs(maps).sum()


@pytest.mark.parametrize(
    ("shape", "grid", "n_fields"),
    [((16, 16), 8, 64), ((9, 20), 4, 16), ((3, 50), 8, 24), ((1, 5), 8, 5), ((6, 6), 1, 1)],
)
def test_fields_are_of_nearly_equal_size(shape, grid, n_fields):
    fields = fields_of((*shape, 1), grid)
    assert fields.shape == shape
    np.testing.assert_array_equal(np.unique(fields), np.arange(n_fields))
    least = [n // min(grid, n) for n in shape]
    for field in range(n_fields):
        places = np.argwhere(fields == field)
        sides = np.ptp(places, axis=0) + 1
        assert np.prod(sides) == len(places)  # a rectangle
        assert (sides >= least).all()
        assert (sides <= np.add(least, 1)).all()


def test_masks_come_in_pairs_and_leave_few_to_most():
    shown = maskings(64, 400)
    assert shown.shape == (400, 64)
    np.testing.assert_array_equal(shown[:200], ~shown[200:])
    np.testing.assert_array_equal(shown, maskings(64, 400))
    assert shown.mean(axis=1).min() < 0.15
    assert shown.mean(axis=1).max() > 0.85
    assert len(maskings(5, 7)) == 8


def test_background_is_the_median_along_the_sides():
    image = np.zeros((4, 5, 2), dtype=np.uint8)
    image[1:-1, 1:-1] = 250
    image[0, :, 0], image[-1, :, 1] = 9, np.arange(5)
    sides = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    expected = [sorted(sides[:, c])[(len(sides) - 1) // 2] for c in range(2)]
    np.testing.assert_array_equal(background_of(image), expected)
    assert background_of(image).dtype == np.uint8
    assert background_of(np.ones((1, 1, 1), dtype=bool)).tolist() == [True]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float32, np.float64])
def test_covered_images_keep_their_dtype_and_what_is_left(dtype):
    image = (np.random.default_rng(0).random((8, 8, 3)) * 1.9).astype(dtype)
    shown = maskings(4, 6)
    copies = CoveredImage(image, fields_of(image.shape, 2), shown)
    assert len(copies) == 6
    read = copies.read(slice(1, 4))
    assert read.dtype == dtype
    left = np.kron(shown[1:4].reshape(3, 2, 2), np.ones((1, 4, 4), dtype=bool))
    np.testing.assert_array_equal(read[left], np.broadcast_to(image, read.shape)[left])
    assert (read[~left] == background_of(image)).all()
    np.testing.assert_array_equal(copies.take(np.array([2, 0])).read(slice(0, 2)), copies.read([2, 0]))


def test_many_fields_by_few_masks_come_from_the_smaller_matrix():
    design = np.random.default_rng(0).random((5, 9)) < 0.5
    whole = np.linalg.solve(design.T.astype(float) @ design + 2 * np.eye(9), design.T)
    np.testing.assert_allclose(_least_squares(design.astype(float)), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n_channels", [1, 3])
def test_contrast_of_the_largest_numbers_there_are(n_channels):
    image = np.full((4, 4, n_channels), -1.7e308)
    image[1, 1], image[2, 2] = 1.7e308, 0
    contrast = contrast_of(image)
    assert contrast[1, 1] == 1
    assert contrast[2, 2] == pytest.approx(0.5)
    assert np.count_nonzero(contrast) == 2


# ---- the estimator's method ----


def test_it_explains_what_is_predicted(clf):
    images = CELLS.images[:4]
    found = clf.occlusion_maps(images, n_masks=40)
    assert found.shape == (4, 32, 32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, clf.occlusion_maps(images, clf.predict(images), n_masks=40))
    flat = clf.occlusion_maps(images.reshape(4, -1).astype(float), n_masks=40)
    assert flat.dtype == np.float64
    np.testing.assert_allclose(flat, found, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        clf.occlusion_maps(sparse.csr_array(images.reshape(4, -1)), n_masks=40), found
    )


def test_an_image_is_the_same_in_any_company_and_with_threads(clf):
    images = CELLS.images[:5]
    together = clf.occlusion_maps(images, ["large"] * 5, n_masks=50)
    np.testing.assert_array_equal(clf.occlusion_maps(images[3:4], ["large"], n_masks=50), together[3:4])
    clf.set_params(n_jobs=2)
    try:
        np.testing.assert_array_equal(clf.occlusion_maps(images, ["large"] * 5, n_masks=50), together)
    finally:
        clf.set_params(n_jobs=None)


def test_it_works_without_the_engine(clf):
    images = CELLS.images[:2]
    expected = clf.occlusion_maps(images, n_masks=30)
    engine, clf._engine = clf._engine, None
    try:
        np.testing.assert_allclose(clf.occlusion_maps(images, n_masks=30), expected, rtol=1e-3, atol=1e-4)
    finally:
        clf._engine = engine


@pytest.mark.parametrize(
    "X",
    [
        np.random.default_rng(0).integers(0, 255, (12, 9, 14, 3), dtype=np.uint8),
        np.random.default_rng(0).random((12, 11, 10)) < 0.3,
        np.random.default_rng(0).integers(0, 2**60, (12, 10, 10), dtype=np.uint64),
        np.random.default_rng(0).normal(size=(12, 30)),
        pd.DataFrame(np.random.default_rng(0).random((12, 64))),
        np.arange(12.0).reshape(12, 1, 1),
    ],
    ids=["RGB", "bool", "uint64", "rows", "frame", "one pixel"],
)
def test_all_kinds_of_images(X):
    y = np.arange(12) % 2
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(X, y)
    maps = clf.occlusion_maps(X, n_masks=20)
    assert maps.shape == (12, *clf.image_shape_[:2])
    assert np.isfinite(maps).all()
    if X.size > 12:
        assert maps.any(axis=(1, 2)).all()
        assert not clf.occlusion_maps(np.zeros_like(X), n_masks=20).any()


def test_with_one_class_there_is_nothing_to_explain():
    one = SparseAttnClassifier(max_epochs=1, random_state=0).fit(CELLS.images[:8], np.zeros(8))
    assert not one.occlusion_maps(CELLS.images[:2], n_masks=10).any()


@pytest.mark.parametrize("params", [{"grid": 0}, {"n_masks": 0}, {"grid": -3}])
def test_numbers_are_checked(clf, params):
    with pytest.raises(ValueError, match=f"{next(iter(params))} == .*must be >= 1"):
        clf.occlusion_maps(CELLS.images[:1], **params)
    with pytest.raises(TypeError, match="must be an instance of"):
        clf.occlusion_maps(CELLS.images[:1], grid=2.5)


def test_images_and_labels_are_checked(clf):
    with pytest.raises(ValueError, match="fitted to"):
        clf.occlusion_maps(np.zeros((2, 16, 16)))
    with pytest.raises(ValueError, match="not among"):
        clf.occlusion_maps(CELLS.images[:1], ["ill"])
    with pytest.raises(ValueError, match="inconsistent"):
        clf.occlusion_maps(CELLS.images[:2], ["large"])
    with pytest.raises(NotFittedError):
        SparseAttnClassifier().occlusion_maps(CELLS.images)
