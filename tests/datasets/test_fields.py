"""Properties of the generated fields: one deciding cell, masks that fit, nothing global tells the class."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_sparseattn.datasets import fields as fields_module
from sklearn_sparseattn.datasets import make_fields

DECIDING = 2


def small(n_samples=8, **kwargs):
    return make_fields(n_samples, **{"image_size": 96, "random_state": 0, **kwargs})


def regions(mask):
    """Number of connected regions, neighbours across corners included."""
    return ndimage.label(mask, structure=np.ones((3, 3)))[1]


def global_figures(images):
    """What an image says without looking where: mean, spread, darkest, histogram."""
    pixels = images.reshape(len(images), -1)
    histogram = [np.bincount(one // 8, minlength=32) for one in pixels]
    return np.column_stack([pixels.mean(axis=1), pixels.std(axis=1), pixels.min(axis=1), histogram])


def cross_validated(features, target):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return cross_val_score(model, features, target, cv=5).mean()


# ---- the bunch ----


@pytest.mark.parametrize("image_size", [40, (40, 75), (120, 48), 96])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_shapes_and_dtypes(image_size, n_classes):
    data = small(image_size=image_size, n_classes=n_classes)
    shape = (image_size, image_size) if isinstance(image_size, int) else image_size
    for array in (data.images, data.masks):
        assert array.shape == (8, *shape)
        assert array.dtype == np.uint8
    assert data.target.shape == (8,)
    assert data.target.dtype == np.int64
    assert list(data.target_names) == ["ring", "pair", "crescent", "cross"][:n_classes]
    assert f"8 images of {shape[0]} x {shape[1]}" in data.DESCR


@pytest.mark.parametrize(("n_samples", "counts"), [(8, [3, 3, 2]), ([1, 0, 4], [1, 0, 4])])
def test_class_counts(n_samples, counts):
    assert np.bincount(small(n_samples, image_size=40).target, minlength=3).tolist() == counts


def test_classes_come_in_random_order():
    target = small(60, image_size=40).target
    assert not np.array_equal(target, np.sort(target))


# ---- randomness ----


def test_same_seed_same_data():
    first, second, other = (small(random_state=seed) for seed in (3, 3, 4))
    for key in ("images", "masks", "target"):
        np.testing.assert_array_equal(first[key], second[key])
    assert not np.array_equal(first.masks, other.masks)


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng])
def test_random_state_may_be_a_generator(make):
    generator = make(0)
    first, second = small(random_state=generator), small(random_state=generator)
    assert not np.array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.images, small(random_state=make(0)).images)


def test_global_generator_is_neither_read_nor_changed():
    before = np.random.get_state()  # noqa: NPY002
    first = small()
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert np.random.get_state()[2:] == before[2:]  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    try:
        np.testing.assert_array_equal(small().images, first.images)
    finally:
        np.random.set_state(before)  # noqa: NPY002


def test_no_random_state_gives_new_data():
    assert not np.array_equal(small(random_state=None).images, small(random_state=None).images)


def test_fields_do_not_depend_on_what_follows_in_later_chunks(monkeypatch):
    monkeypatch.setattr(fields_module, "CHUNK_IMAGES", 4)
    target = np.zeros(12, dtype=np.int64)
    whole, part = (fields_module._render(target[:n], (64, 64), (15, 40), 0) for n in (12, 8))
    for long, short in zip(whole, part, strict=True):
        np.testing.assert_array_equal(long[:8], short)
        assert len(np.unique(long.reshape(12, -1), axis=0)) == 12


# ---- cells ----


def test_one_deciding_cell_wholly_inside_the_image():
    masks = small(60, n_classes=4).masks
    assert set(np.unique(masks)) == {0, 1, DECIDING}
    assert [regions(mask == DECIDING) for mask in masks] == [1] * 60
    edge = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], axis=1)
    assert not edge.any()


def test_deciding_cell_is_as_large_as_the_others_and_anywhere():
    masks = small(200).masks
    area = (masks == DECIDING).sum(axis=(1, 2))
    assert np.all((area > np.pi * 8**2) & (area < np.pi * 15**2))
    n_others = np.array([regions(mask == 1) for mask in masks])
    others = (masks == 1).sum() / n_others.sum()
    assert abs(area.mean() / others - 1) < 0.1
    for axis in (1, 2):
        place = (masks == DECIDING).any(axis=axis).argmax(axis=1)
        assert place.min() < 15
        assert place.max() > 55


@pytest.mark.parametrize("image_size", [128, 256, (128, 384)])
def test_number_of_cells_grows_with_the_area(image_size):
    data = make_fields(20, image_size=image_size, random_state=0)
    n_cells = np.array([regions(mask > 0) for mask in data.masks])
    share = data.masks[0].size / 256**2
    # Cells that touch count as one region.
    assert np.all((n_cells >= 0.8 * np.floor(15 * share)) & (n_cells <= np.ceil(40 * share)))
    assert abs(n_cells.mean() / share - 27) < 5
    assert n_cells.std() > 0


@pytest.mark.parametrize("n_cells", [(1, 1), (20, 20), (45, 45)])
def test_number_of_cells_as_asked(n_cells):
    masks = make_fields(6, image_size=256, n_cells=n_cells, random_state=0).masks
    found = np.array([regions(mask > 0) for mask in masks])
    assert np.all((found >= 0.8 * n_cells[0]) & (found <= n_cells[1]))


def test_cells_hardly_touch():
    masks = make_fields(6, image_size=256, n_cells=(30, 30), random_state=0).masks
    assert sum(regions(mask > 0) for mask in masks) > 0.95 * 6 * 30


# ---- images ----


def test_cells_are_darker_than_the_background_and_fit_their_masks():
    data = small(30)
    for image, mask in zip(data.images.astype(float), data.masks, strict=True):
        background, inside = image[mask == 0], image[mask > 0]
        assert background.mean() - inside.mean() > 3 * background.std()
        guess = image < (background.mean() + np.median(inside)) / 2
        assert ((mask > 0) == guess).mean() > 0.95


def test_fields_differ_in_brightness_and_stain():
    data = small(40)
    means = [
        (image[mask == 0].mean(), image[mask > 0].mean())
        for image, mask in zip(data.images, data.masks, strict=True)
    ]
    background, inside = np.array(means).T
    assert background.std() > 4
    assert (inside / background).std() > 0.01


def test_deciding_cells_absorb_as_much_in_all_classes():
    data = small(600, n_classes=4)
    absorbed = np.empty(600)
    for i, (image, mask) in enumerate(zip(data.images.astype(float), data.masks, strict=True)):
        density = -np.log(image / image[mask == 0].mean())
        absorbed[i] = density[mask == DECIDING].sum() / density[mask > 0].mean()
    means = [absorbed[data.target == label].mean() for label in range(4)]
    assert np.ptp(means) < 0.05 * np.mean(means)


def test_global_figures_do_not_tell_the_class():
    data = small(600)
    assert cross_validated(global_figures(data.images), data.target) < 0.42
    area = np.column_stack([(data.masks == value).sum(axis=(1, 2)) for value in (1, DECIDING)])
    assert cross_validated(area, data.target) < 0.42


def test_the_deciding_cell_tells_the_class():
    """How the deciding cell's darkest pixels lie around their centre, which no turn changes."""
    data = small(400)
    features = []
    for image, mask in zip(data.images.astype(float), data.masks, strict=True):
        inside = ndimage.binary_erosion(mask == DECIDING, iterations=2)
        dark = np.argwhere(inside & (image <= np.quantile(image[inside], 0.15)))
        distance = np.linalg.norm(dark - np.median(dark, axis=0), axis=1)
        spread = np.linalg.eigvalsh(np.cov(dark.T))
        features.append([*np.quantile(distance, [0.1, 0.3, 0.5, 0.7, 0.9]), *spread])
    assert cross_validated(np.array(features), data.target) > 0.75


# ---- errors ----


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_classes": 1}, ValueError, "n_classes == 1, must be >= 2"),
        ({"n_classes": 5}, ValueError, "n_classes == 5, must be <= 4"),
        ({"n_classes": 2.0}, TypeError, "n_classes must be an instance of"),
        ({"image_size": 39}, ValueError, "image_size == 39, must be >= 40"),
        ({"image_size": (64, 20)}, ValueError, "image_size == 20, must be >= 40"),
        ({"image_size": "256"}, TypeError, "image_size must be an int or a pair .*'256'"),
        ({"n_cells": 20}, TypeError, r"n_cells must be a pair \(fewest, most\), got 20"),
        ({"n_cells": (1, 2, 3)}, TypeError, "n_cells must be a pair .*1, 2, 3"),
        ({"n_cells": (0, 5)}, ValueError, "n_cells == 0, must be >= 1"),
        ({"n_cells": (5, 46)}, ValueError, "n_cells == 46, must be <= 45"),
        ({"n_cells": (5, 6.5)}, TypeError, "n_cells must be an instance of"),
        ({"n_cells": (9, 5)}, ValueError, r"n_cells must be .* in this order, got \(9, 5\)"),
        ({"n_samples": 0}, ValueError, "n_samples == 0, must be >= 1"),
        ({"n_samples": [3, 4]}, ValueError, r"n_classes=3 non-negative ints, got \[3, 4\]"),
        ({"random_state": "seed"}, ValueError, "seed"),
    ],
)
def test_errors_name_parameter_and_value(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_fields(**kwargs)
