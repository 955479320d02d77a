"""Properties of the generated cells: shapes, determinism, physics, and how hard they are."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from sklearn_sparseattn.datasets import cells as cells_module
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.datasets.modalities import CARRIER

DTYPES = {"opd": np.float32, "hologram": np.uint8, "event": np.int8, "brightfield": np.uint8}
every_modality = pytest.mark.parametrize("modality", sorted(DTYPES))


def small(n_samples=12, **kwargs):
    return make_cells(n_samples, **{"image_size": 48, "random_state": 0, **kwargs})


@every_modality
@pytest.mark.parametrize("image_size", [8, (8, 21), (33, 9), 48])
def test_shapes_and_dtypes(modality, image_size):
    data = small(modality=modality, image_size=image_size, return_masks=True)
    shape = (image_size, image_size) if isinstance(image_size, int) else image_size
    colour = (3,) if modality == "brightfield" else ()
    assert data.images.shape == (12, *shape, *colour)
    assert data.images.dtype == DTYPES[modality]
    assert np.isfinite(data.images).all()
    assert data.target.shape == (12,)
    assert data.target.dtype == np.int64
    assert data.masks.shape == (12, *shape)
    assert data.masks.dtype == np.uint8
    assert data.modality == modality
    assert f"{shape[0]} x {shape[1]}" in data.DESCR


def test_masks_only_when_asked():
    assert "masks" not in small()


@every_modality
def test_same_seed_same_data(modality):
    first, second = (small(modality=modality, random_state=3) for _ in range(2))
    other = small(modality=modality, random_state=4)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.target, second.target)
    assert not np.array_equal(first.images, other.images)


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng])
def test_random_state_may_be_a_generator(make):
    generator = make(0)
    first, second = small(random_state=generator), small(random_state=generator)
    assert not np.array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.images, small(random_state=make(0)).images)


@pytest.mark.parametrize("random_state", [0, None])
def test_global_generator_is_untouched(random_state):
    before = np.random.get_state()  # noqa: NPY002
    small(random_state=random_state)
    after = np.random.get_state()  # noqa: NPY002
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2:] == after[2:]


def test_no_random_state_gives_new_data():
    assert not np.array_equal(small(random_state=None).images, small(random_state=None).images)


def test_masks_do_not_change_the_images():
    np.testing.assert_array_equal(small().images, small(return_masks=True).images)


@every_modality
def test_modalities_show_the_same_cells(modality):
    reference = small(modality="opd", return_masks=True)
    data = small(modality=modality, return_masks=True)
    np.testing.assert_array_equal(data.masks, reference.masks)
    np.testing.assert_array_equal(data.target, reference.target)


def test_images_do_not_depend_on_what_follows_in_later_chunks(monkeypatch):
    monkeypatch.setattr(cells_module, "CHUNK_IMAGES", 4)
    target = np.zeros(12, dtype=np.int64)
    args = ("event", (32, 32), 0.5, False, 0)
    whole = cells_module._render(target, *args)["images"]
    part = cells_module._render(target[:8], *args)["images"]
    np.testing.assert_array_equal(whole[:8], part)
    assert len(np.unique(whole.reshape(12, -1), axis=0)) == 12


@pytest.mark.parametrize(
    ("n_samples", "n_classes", "weights", "counts"),
    [
        (9, 3, None, [3, 3, 3]),
        (11, 4, None, [3, 3, 3, 2]),
        (20, 2, [0.9, 0.1], [18, 2]),
        (10, 5, [6, 1, 1, 1, 1], [6, 1, 1, 1, 1]),
        (10, 3, [1, 0, 1], [5, 0, 5]),
        ([4, 0, 7], 3, None, [4, 0, 7]),
        (1, 2, None, [1, 0]),
    ],
)
def test_class_counts(n_samples, n_classes, weights, counts):
    data = small(n_samples, n_classes=n_classes, weights=weights, image_size=8)
    assert np.bincount(data.target, minlength=n_classes).tolist() == counts
    assert len(data.target_names) == n_classes


def test_classes_come_in_random_order():
    target = small(60, image_size=8).target
    assert not np.array_equal(target, np.sort(target))


def test_masks_hold_one_cell_with_its_nucleus_inside():
    masks = small(40, image_size=64, return_masks=True).masks
    assert set(np.unique(masks)) == {0, 128, 255}
    body, nucleus = (masks > 0).mean(axis=(1, 2)), (masks == 255).mean(axis=(1, 2))
    assert ((body > 0.05) & (body < 0.5)).all()
    assert ((nucleus > 0.15 * body) & (nucleus < 0.75 * body)).all()
    edge = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], axis=1)
    assert not edge.any()


def test_cells_differ_in_place():
    masks = small(40, return_masks=True).masks > 0
    rows, cols = np.indices(masks.shape[1:])
    for axis in (rows, cols):
        centre = (masks * axis).sum(axis=(1, 2)) / masks.sum(axis=(1, 2))
        assert centre.std() > 1.5
        assert abs(centre.mean() - 23.5) < 2


def test_opd_is_high_in_the_cell_and_near_zero_around():
    data = small(40, return_masks=True)
    inside, outside = data.images[data.masks > 0], data.images[data.masks == 0]
    assert abs(outside.mean()) < 0.01
    assert 0.002 < outside.std() < 0.03
    assert 0.1 < inside.mean() < 0.4
    assert data.images[data.masks == 255].mean() > data.images[data.masks == 128].mean()


def test_hologram_has_its_carrier_where_documented():
    images = small(modality="hologram", image_size=100).images.astype(float)
    spectrum = np.abs(np.fft.rfft2(images - images.mean(axis=(1, 2), keepdims=True)))
    for one in spectrum:
        peak = np.unravel_index(one.argmax(), one.shape)
        assert peak == (round(100 * CARRIER[0]), round(100 * CARRIER[1]))


def test_demodulated_hologram_gives_the_path_difference():
    holograms = small(modality="hologram", image_size=128, difficulty=0.0).images
    opd = small(modality="opd", image_size=128, difficulty=0.0).images
    rows, cols = np.indices((128, 128))
    carrier = np.exp(-2j * np.pi * (CARRIER[0] * rows + CARRIER[1] * cols))
    low_pass = np.fft.fftfreq(128)
    low_pass = np.hypot(low_pass[:, None], low_pass) < 0.1
    for hologram, expected in zip(holograms, opd, strict=True):
        field = np.fft.ifft2(np.fft.fft2((hologram - hologram.mean()) * carrier) * low_pass)
        reference = np.exp(2j * np.pi * expected / 0.633)
        coherence = abs((field * reference.conj()).mean()) / np.abs(field).mean()
        assert coherence > 0.9


def test_hologram_shot_noise_grows_with_difficulty():
    # What is left of a corner, where no cell reaches, when its fringes are taken out.
    rows, cols = np.indices((16, 16)).reshape(2, -1)
    angle = 2 * np.pi * (CARRIER[0] * rows + CARRIER[1] * cols)
    fringes = np.column_stack([np.ones(256), np.cos(angle), np.sin(angle)])

    def noise(difficulty):
        data = small(modality="hologram", image_size=128, difficulty=difficulty)
        corner = data.images[:, :16, :16].reshape(12, -1).T.astype(float)
        return (corner - fringes @ np.linalg.lstsq(fringes, corner, rcond=None)[0]).std()

    assert noise(1.0) > 2 * noise(0.0)


def test_event_frames_are_sparse_and_signed():
    data = small(40, modality="event", return_masks=True)
    assert (data.images != 0).mean() < 0.25
    assert ((data.images > 0).any(axis=(1, 2)) & (data.images < 0).any(axis=(1, 2))).all()
    inside = (data.images[data.masks > 0] != 0).mean()
    assert inside > 5 * (data.images[data.masks == 0] != 0).mean()


def test_brightfield_is_darkest_in_the_nucleus():
    data = small(40, modality="brightfield", return_masks=True)
    for image, mask in zip(data.images.astype(float), data.masks, strict=True):
        nucleus, cytoplasm = image[mask == 255].mean(axis=0), image[mask == 128].mean(axis=0)
        assert (nucleus < cytoplasm).all()
    stained = data.images[data.masks == 255].astype(float).mean(axis=0)
    assert stained[2] > stained[0] > stained[1]  # blue-violet
    around = data.images[data.masks == 0].astype(float).mean(axis=0)
    assert around[0] > around[1] > around[2]  # a warm lamp and red cells


def test_resolution_does_not_change_the_cell():
    low, high = (small(image_size=size, return_masks=True) for size in (32, 128))
    shares = [(data.masks > 0).mean(axis=(1, 2)) for data in (low, high)]
    np.testing.assert_allclose(*shares, atol=0.03)


@every_modality
def test_logistic_regression_on_pixels_stays_behind(modality):
    data = small(600, modality=modality, image_size=32, random_state=1)
    pixels = data.images.reshape(600, -1).astype(np.float32)
    pixels = (pixels - pixels.mean()) / pixels.std()
    model = LogisticRegression(C=1e-3, max_iter=100).fit(pixels[:450], data.target[:450])
    assert model.score(pixels[450:], data.target[450:]) < 0.75


@every_modality
def test_brightness_and_size_do_not_tell_the_class(modality):
    data = small(600, modality=modality, image_size=32, random_state=1, return_masks=True)
    brightness = data.images.reshape(600, -1).mean(axis=1)
    features = np.column_stack([brightness, (data.masks > 0).mean(axis=(1, 2))])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    assert LogisticRegression().fit(features, data.target).score(features, data.target) < 0.65


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"modality": "xray"}, ValueError, "modality must be one of .*'opd'.*got 'xray'"),
        ({"n_classes": 1}, ValueError, "n_classes == 1, must be >= 2"),
        ({"n_classes": 6}, ValueError, "n_classes == 6, must be <= 5"),
        ({"n_classes": 2.5}, TypeError, "n_classes must be an instance of"),
        ({"difficulty": 1.5}, ValueError, "difficulty == 1.5, must be <= 1"),
        ({"difficulty": "hard"}, TypeError, "difficulty must be an instance of"),
        ({"return_masks": "yes"}, TypeError, "return_masks must be an instance of"),
        ({"image_size": 7}, ValueError, "image_size == 7, must be >= 8"),
        ({"image_size": (64, 4)}, ValueError, "image_size == 4, must be >= 8"),
        ({"image_size": (9, 9, 3)}, TypeError, r"image_size must be an int or a pair .*9, 9, 3"),
        ({"image_size": 9.0}, TypeError, "image_size must be an int or a pair"),
        ({"n_samples": 0}, ValueError, "n_samples == 0, must be >= 1"),
        ({"n_samples": [3, 4]}, ValueError, r"n_classes=3 non-negative ints, got \[3, 4\]"),
        ({"n_samples": [3, -4, 1]}, ValueError, "non-negative ints"),
        ({"n_samples": [0, 0, 0]}, ValueError, "n_samples must have at least one image"),
        ({"n_samples": [1, 2, 3], "weights": [1, 1, 1]}, ValueError, "cannot be combined"),
        ({"weights": [0.5, 0.5]}, ValueError, "weights must be n_classes=3"),
        ({"weights": [1, 1, -1]}, ValueError, "weights must be n_classes=3 non-negative"),
        ({"weights": [0, 0, 0]}, ValueError, "weights must have a positive sum"),
        ({"random_state": "seed"}, ValueError, "seed"),
    ],
)
def test_errors_name_parameter_and_value(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_cells(**kwargs)
