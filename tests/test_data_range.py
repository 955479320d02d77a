"""The range of values that is learned: the extremes, unless a few pixels lie far outside of all others."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.data_range import (
    learn_data_range,
    spanned_range,
    warn_of_clipped,
    warn_of_other_range,
)
from sklearn_sparseattn.images import ImageRows, PixelScale, chunk_slices


def everything(images):
    return images.read(slice(None))


@pytest.mark.parametrize("high", [1e-37, 1e-310, 5e-324])
def test_images_in_very_small_units(high):
    """Seconds, moles, watts: what is large against the table for bytes must not disturb it."""
    images = ImageRows(np.array([[0.0, high]]), (1, 2, 1))
    data_range = learn_data_range(images)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = PixelScale(data_range)(everything(images))
        warn_of_other_range(images, data_range)
    assert np.isfinite(scaled).all()


def rows_of(values, dtype=np.float64, **options):
    data = np.array(values, dtype).reshape(1, -1)
    return ImageRows(sparse.csr_array(data) if options else data, (1, data.size, 1))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (rows_of([3, 9], np.uint8), (0, 255)),
        (rows_of([3, 9], np.uint8, sparse=True), (0, 255)),
        (rows_of([0, 0], bool), (0, 1)),
        (rows_of([1, 1], bool), (0, 1)),
        (rows_of([100, 4095], np.uint16), (100, 4095)),
        (rows_of([100, 127], np.int8), (100, 127)),
        (rows_of([0.25, 0.5], np.float16), (0.25, 0.5)),
        (rows_of([-3.0, 2.0]), (0, 3)),
        (rows_of([-3.0, 8.0]), (0, 8)),
        (rows_of([-3.0, -2.0]), (0, 3)),
        (rows_of([-128, 127], np.int8), (0, 128)),
        (rows_of([5.0, 7.0], sparse=True), (0, 7)),
        (rows_of([5, 0, 2], np.int16, sparse=True), (0, 5)),
        (rows_of([-9.0, 0, 2], sparse=True), (0, 9)),
        (rows_of([0, 2**64 - 1], np.uint64), (0, 2.0**64)),
        (rows_of([0, 1e300]), (0, 1e300)),
        (rows_of([-1.7e308, 1.7e308]), (0, 1.7e308)),
    ],
)
def test_range_that_is_learned(images, expected):
    found = learn_data_range(images)[0]
    assert found == expected
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 1e-9, 12345.0, 1e17, -4.0, -1e-300, 1e300])
@pytest.mark.parametrize("options", [{}, {"sparse": True}], ids=["dense", "sparse"])
def test_constant_images_have_a_range(value, options):
    images = rows_of([value] * 4, **options)
    low, high = learn_data_range(images)[0]
    assert low < high < math.inf
    scaled = PixelScale((low, high))(everything(images))
    assert np.isfinite(scaled).all()
    assert abs(scaled).max() <= 1


@given(
    values=hnp.arrays(
        st.sampled_from([np.float64, np.float32, np.int16, np.uint16]),
        st.integers(1, 8),
        elements=None,
    ).filter(lambda values: (abs(values.astype(float)) < 1e300).all()),
    as_sparse=st.booleans(),
)
@example(values=np.array([5e-324]), as_sparse=False)
@example(values=np.array([0.0, 5e-324]), as_sparse=False)
@example(values=np.array([1e-37, 1e-38]), as_sparse=False)
def test_any_training_images_come_to_about_one(values, as_sparse):
    images = rows_of(values, values.dtype, **({"sparse": True} if as_sparse else {}))
    low, high = learn_data_range(images)[0]
    scaled = PixelScale((low, high))(everything(images))
    assert np.isfinite([low, high]).all()
    assert low < high
    assert scaled.min() >= (-1 if as_sparse or values.min() < 0 else 0)
    assert scaled.max() <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_range(images, (low, high))


def test_range_given_by_the_user():
    found = learn_data_range(rows_of([3, 9], np.uint8), [np.float32(0.5), 4])[0]
    assert found == (0.5, 4.0)
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    "given_range",
    [(0, 255, 3), (1,), 5, "no", ("a", "b"), (1, 1), (2, 1), (0, np.inf), (np.nan, 1), (-1e308, 1e308)],
)
def test_no_range(given_range):
    with pytest.raises(ValueError, match="must be two finite numbers"):
        learn_data_range(rows_of([3, 9]), given_range)


@pytest.mark.parametrize(
    ("values", "data_range", "warns"),
    [
        ([0, 1], (0, 255), True),  # floats in [0, 1] after a fit on bytes
        ([0, 255], (0, 1), True),  # and the other way round
        ([0, 2.5], (0, 255), True),
        ([0, 2.6], (0, 255), False),
        ([0, 2550], (0, 255), False),
        ([0, 2551], (0, 255), True),
        ([-5, 5], (0, 1), False),
        ([-5.1, 5.1], (0, 1), True),
        ([7, 7], (0, 1e9), False),  # constant images tell nothing
        ([1e6, 1e6], (0, 1), False),
        ([1000, 1001], (0, 1), False),  # an offset is no other unit
        ([-1.7e308, 1.7e308], (0, 1.7e308), False),
        ([0, 1.7e308], (0, 1), True),
    ],
)
def test_warning_of_other_units(values, data_range, warns):
    images = rows_of(values)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_range(images, tuple(map(float, data_range)))
    assert len(caught) == warns
    if warns:
        assert caught[0].category is UserWarning
        assert "in the units of the training images" in str(caught[0].message)


def test_no_images_no_warning():
    warn_of_other_range(ImageRows(np.zeros((0, 4)), (2, 2, 1)), (0.0, 1.0))


# ---- what a few pixels cannot change ----


def images_of(n=40, side=12, dtype=np.uint16, seed=0):
    """Values between 100 and 199."""
    return np.random.default_rng(seed).integers(100, 200, (n, side, side, 1)).astype(dtype)


def rows(images):
    return ImageRows(images, images.shape[1:])


def spoil(images, fault):
    """A fault of the camera; which images it is in."""
    n, side = images.shape[:2]
    if fault == "hot pixel":
        images[7, 3, 3] = 60000
        return [7]
    if fault == "dead pixel":
        images[5, 0, 0] = -30000
        return [5]
    if fault == "hot pixel of the sensor":
        images[:, 2, side - 1] = 60000
        return [*range(n)]
    images[n // 2] = 60000  # one image overexposed
    return [n // 2]


@pytest.mark.parametrize("fault", ["hot pixel", "dead pixel", "hot pixel of the sensor", "overexposed image"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_faults_of_the_camera_do_not_count(fault, dtype):
    images = images_of(dtype=dtype)
    clean, spanned = learn_data_range(rows(images))
    assert clean == (100, 199)
    assert 100 <= spanned[0] < 110 < 190 < spanned[1] <= 199
    where = spoil(images, fault)
    with pytest.warns(
        UserWarning, match=rf"^{len(where)} of 40 training images have values far outside"
    ) as caught:
        found, still_spanned = learn_data_range(rows(images))
    assert f"rows {', '.join(map(str, where[:5]))}" in str(caught[0].message)
    assert 100 <= still_spanned[0] < 110 < 190 < still_spanned[1] <= 199
    if fault == "dead pixel":
        assert found == (still_spanned[0], 199)
    else:
        assert found == (100, still_spanned[1])


def test_one_far_value_among_sparse_rows():
    data = np.where(np.random.default_rng(0).uniform(size=(30, 64)) < 0.5, 5.0, 0.0)
    data[3, 8] = 1e6
    with pytest.warns(UserWarning, match="rows 3"):
        found, _ = learn_data_range(ImageRows(sparse.csr_array(data), (8, 8, 1)))
    assert found == (0, 5)


def test_what_is_not_so_far_out_belongs_to_the_images():
    """Up to three times the range beyond it, as a bright spot may be: the extremes, and no warning."""
    images = images_of(dtype=np.float64)
    low, high = spanned_range(rows(images))
    images[4, 4, 4] = high + 2.99 * (high - low)
    images[9, 1, 1] = low - 1.0  # not negative
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = learn_data_range(rows(images))
    assert found == (low - 1, images[4, 4, 4, 0])


def test_what_some_images_hold_counts():
    """Two of a hundred images that are much brighter are a kind of cell."""
    images = images_of(n=200, dtype=np.float64)
    images[::50] *= 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = learn_data_range(rows(images))
    assert found[1] > 3000


def test_a_given_range_is_kept_and_what_lies_far_outside_is_named():
    images = images_of()
    images[[3, 30], 5, 5] = 5000
    with pytest.warns(UserWarning, match=r"^2 of 40 .*\(100, 350\), such as 5000: rows 3, 30\.") as caught:
        found, _ = learn_data_range(rows(images), (100, 350))
    assert found == (100, 350)
    assert "below -650 or above 1100 is clipped" in str(caught[0].message)
    with pytest.warns(UserWarning, match="rows 30"):  # rows as the user counts them
        warn_of_clipped(rows(images).take(np.array([1, 30])), (100.0, 350.0))


def test_bytes_in_their_own_range_are_not_clipped():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_clipped(rows(np.full((2, 3, 3, 1), 255, np.uint8)), (0.0, 255.0))


def test_every_chunk_is_seen():
    data = np.zeros((40, 2**15), np.int16)  # more than one chunk
    assert len(list(chunk_slices(40, (1, 2**15, 1)))) > 1
    data[:, ::2] = 100
    data[-1, -1] = 30000
    with pytest.warns(UserWarning, match="rows 39"):
        assert learn_data_range(ImageRows(data, (1, 2**15, 1)))[0] == (0, 100)


@pytest.mark.parametrize("n", [1, 5, 10, 99, 2500])
@pytest.mark.parametrize("size", [1, 4, 8, 900, 3000])
def test_what_is_spanned_is_what_it_says(n, size):
    """Against the words of `spanned_range`."""
    values = np.random.default_rng(n * size).normal(size=(n, size))
    found = spanned_range(ImageRows(values, (1, size, 1)))
    some = values[np.linspace(0, n - 1, min(n, 1000)).astype(int)]
    left_out = min(1 + size // 1000, (size - 1) // 4) if size * len(some) >= 1000 else 0
    highest = sorted(sorted(image)[-1 - left_out] for image in some)
    lowest = sorted((sorted(image)[left_out] for image in some), reverse=True)
    dropped = 0 if n < 10 or size * len(some) < 1000 else -(-len(some) // 100)
    assert found == (lowest[-1 - dropped], highest[-1 - dropped])


# ---- fits ----


def disks(n, seed):
    """Small and large disks, of 16 bits."""
    rng, y = np.random.default_rng(seed), np.arange(n) % 2
    distance = np.hypot(*np.mgrid[-8:8, -8:8])
    radius = rng.uniform(3, 4, n) + 2 * y
    images = 100 + rng.poisson(20, (n, 16, 16)) + 200 * (distance < radius[:, None, None])
    return images.astype(np.uint16), y


def fit(X, y, **params):
    return SparseAttnClassifier(max_epochs=12, batch_size=16, random_state=0, **params).fit(X, y)


@pytest.mark.parametrize("params", [{}, {"data_range": (100, 350)}], ids=["learned", "given"])
@pytest.mark.parametrize("fault", ["hot pixel", "hot pixel of the sensor", "overexposed image"])
def test_a_fit_survives_faults_of_the_camera(fault, params):
    X, y = disks(96, 0)
    spoil(X[..., None], fault)
    with pytest.warns(UserWarning, match="far outside of data_range_"):
        clf = fit(X, y, **params)
    X_test, y_test = disks(200, 1)
    if fault == "hot pixel of the sensor":
        spoil(X_test[..., None], fault)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the test images are in the units of the fit
        assert clf.score(X_test, y_test) > 0.9
    spoil(X_test[..., None], "hot pixel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clf.score(X_test, y_test) > 0.9


def test_partial_fit_and_warm_start_name_what_is_clipped():
    X, y = disks(32, 0)
    hot = X.copy()
    hot[5, 5, 5] = 65535
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).partial_fit(X, y, classes=[0, 1])
    spanned = clf.spanned_range_
    with pytest.warns(UserWarning, match="rows 5"):
        clf.partial_fit(hot, y)
    assert clf.spanned_range_ == spanned
    with pytest.warns(UserWarning, match="rows 5"):
        clf.set_params(warm_start=True).fit(hot, y)


def test_a_fit_that_contradicts_its_loss_says_so(monkeypatch):
    """Batch norm's final statistics are spoiled here; those of training were not."""
    from sklearn_sparseattn import classifier

    X, y = disks(64, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(X, y).score(X, y) > 0.9
    exact = classifier.recompute_batch_norm

    def spoiled(network, *args):
        exact(network, *args)
        network.fusion.first[1].running_mean += 100

    monkeypatch.setattr(classifier, "recompute_batch_norm", spoiled)
    with pytest.warns(UserWarning, match="^The fit contradicts itself: the loss in training ended at 0"):
        fit(X, y)
