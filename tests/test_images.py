"""X as users have it: which forms are taken and refused, that nothing is copied, and the scale."""

import math
import re
import warnings
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import sparse
from sklearn.base import BaseEstimator

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier
from sklearn_sparseattn.images import (
    CLIP,
    ImageRows,
    PixelScale,
    call_given,
    chunk_slices,
    validate_images,
)

INTEGERS = [np.dtype(f"{sign}{size}") for sign in "iu" for size in (1, 2, 4, 8)]
FLOATS = [np.dtype(f"f{size}") for size in (2, 4, 8)]
BIG_ENDIAN = [np.dtype(name) for name in (">i2", ">u4", ">f4", ">f8")]
DTYPES = [np.dtype(bool), *INTEGERS, *FLOATS, *BIG_ENDIAN]
SPARSE_DTYPES = [dtype for dtype in DTYPES if dtype != np.float16 and dtype.isnative]


class Reader(BaseEstimator):
    """The least that `validate_images` works on."""


def fit(X, **options):
    """A first look at X: the estimator with what it learned, and the rows."""
    reader = Reader()
    images, _ = validate_images(reader, X, reset=True, **options)
    assert images.image_shape == reader.image_shape_
    assert reader.n_features_in_ == math.prod(reader.image_shape_)
    return reader, images


def again(reader, X):
    return validate_images(reader, X, reset=False)[0]


def everything(images):
    return images.read(slice(None))


def numbers(shape, dtype=np.float64, seed=0):
    """Small whole numbers, 0 and 1 for bool: the same in every dtype."""
    highest = 1 if np.dtype(dtype).kind == "b" else 99
    return np.random.default_rng(seed).integers(0, highest, shape, endpoint=True).astype(dtype)


# ---- forms ----


@pytest.mark.parametrize(
    ("shape", "image_shape", "expected"),
    [
        ((3, 16), None, (4, 4, 1)),
        ((3, 12), None, (1, 12, 1)),
        ((3, 1), None, (1, 1, 1)),
        ((3, 12), (3, 4), (3, 4, 1)),
        ((3, 16), (2, 8), (2, 8, 1)),
        ((3, 12), (2, 2, 3), (2, 2, 3)),
        ((3, 12), [np.int64(2), np.uint8(6)], (2, 6, 1)),
        ((3, 4, 5), None, (4, 5, 1)),
        ((3, 4, 5), (4, 5), (4, 5, 1)),
        ((3, 4, 5), (4, 5, 1), (4, 5, 1)),
        ((3, 4, 5, 1), None, (4, 5, 1)),
        ((3, 4, 5, 1), (4, 5), (4, 5, 1)),
        ((3, 4, 5, 3), None, (4, 5, 3)),
        ((3, 4, 5, 7), None, (4, 5, 7)),
        ((3, 1, 1, 1), None, (1, 1, 1)),
        ((3, 3, 2, 3), None, (3, 2, 3)),  # three rows of pixels, not channels first
        ((3, 1, 9, 4), None, (1, 9, 4)),
        ((3, 3, 9, 12), (3, 9, 12), (3, 9, 12)),  # the user insists
    ],
)
def test_form_of_the_images(shape, image_shape, expected):
    X = numbers(shape)
    reader, images = fit(X, image_shape=image_shape)
    assert reader.image_shape_ == expected
    assert all(type(n) is int for n in reader.image_shape_)
    np.testing.assert_array_equal(everything(images), X.reshape(3, *expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_forms_are_interchangeable_after_a_fit(channels):
    full = numbers((4, 5, 6, channels))
    forms = [full, full.reshape(4, -1), sparse.csr_array(full.reshape(4, -1))]
    if channels == 1:
        forms.append(full[..., 0])
    for first in forms:
        shape = (5, 6, channels)
        reader, _ = fit(first, image_shape=shape)
        for second in forms:
            np.testing.assert_array_equal(everything(again(reader, second)), full)


@pytest.mark.parametrize("shape", [(6, 16), (6, 3, 5), (6, 3, 5, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_any_dtype_are_read_where_they_lie(dtype, shape):
    X = numbers(shape, dtype)
    X.flags.writeable = False
    _, images = fit(X)
    assert images.data.dtype == dtype
    assert np.shares_memory(images.data, X)
    assert np.shares_memory(images.read(slice(2, 4)), X)
    np.testing.assert_array_equal(everything(images).ravel(), X.ravel())


@pytest.mark.parametrize(
    "view",
    [lambda X: X[::2], lambda X: X[:, ::-1], np.asfortranarray, lambda X: np.moveaxis(X, 1, 2)],
    ids=["every other", "mirrored", "Fortran", "transposed"],
)
def test_views_are_not_copied(view):
    X = view(numbers((6, 4, 5), np.uint8))
    _, images = fit(X)
    assert np.shares_memory(images.data, X)
    np.testing.assert_array_equal(everything(images)[..., 0], X)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_memory_map_stays_on_disk(tmp_path, dtype):
    X = numbers((6, 4, 5), dtype)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    _, images = fit(mapped)
    assert np.shares_memory(images.data, mapped)
    base = images.data
    while not isinstance(base, np.memmap):
        base = base.base
    np.testing.assert_array_equal(everything(images)[..., 0], X)


def test_data_frame():
    X = pd.DataFrame(numbers((5, 9), np.float32), columns=[f"pixel{i}" for i in range(9)])
    reader, images = fit(X)
    assert list(reader.feature_names_in_) == list(X.columns)
    assert images.data.dtype == np.float32
    np.testing.assert_array_equal(everything(images).reshape(5, 9), X.to_numpy())
    with pytest.raises(ValueError, match="feature names"):
        again(reader, X.rename(columns={"pixel0": "other"}))


@pytest.mark.parametrize("dtype", SPARSE_DTYPES, ids=str)
@pytest.mark.parametrize("container", ["csr", "csc", "coo"])
@pytest.mark.parametrize("kind", ["matrix", "array"])
def test_sparse(dtype, container, kind):
    X = numbers((5, 12), dtype) * (numbers((5, 12), bool, seed=1))
    given_X = getattr(sparse, f"{container}_{kind}")(X)
    _, images = fit(given_X, image_shape=(3, 4))
    assert sparse.issparse(images.data)
    if container == "csr":
        assert np.shares_memory(images.data.data, given_X.data)
    found = images.read(slice(1, 4))
    assert type(found) is np.ndarray
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, X[1:4].reshape(3, 3, 4, 1))
    np.testing.assert_array_equal(images.take(np.array([4, 0])).read(slice(1, 2)), X[:1].reshape(1, 3, 4, 1))


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (0, 12), (2,), (2, 0), (2, 11), (2, 4, 3), (2, 3, 4, 2), (2, 3, 4, 1, 1), (12,)]
)
def test_bytes_are_refused_in_the_words_for_other_numbers(shape):
    """Of bytes little is checked: there is nothing in them to refuse."""
    reader, _ = fit(numbers((5, 3, 4), np.uint8))
    words = []
    for dtype in (np.float32, np.uint8):
        with pytest.raises(ValueError, match=r"array|X has|sample") as error:
            again(reader, numbers(shape, dtype))
        words.append(str(error.value))
    assert words[0] == words[1]


def test_bytes_lack_the_names_of_the_fit():
    reader, _ = fit(pd.DataFrame(numbers((5, 9), np.uint8), columns=[f"pixel{i}" for i in range(9)]))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        again(reader, numbers((2, 9), np.uint8))


def test_bytes_with_targets_of_another_length():
    X = numbers((5, 3, 4), np.uint8)
    reader, _ = fit(X)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        validate_images(reader, X, np.zeros(4), reset=False)


def test_lists():
    X = numbers((3, 2, 5))
    for container in (X.tolist(), list(X), tuple(X), [list(image) for image in X]):
        _, images = fit(container)
        np.testing.assert_array_equal(everything(images)[..., 0], X)


def test_y_is_checked_with_x():
    X, y = numbers((3, 4)), np.array(["a", "b", "a"])
    images, checked = validate_images(Reader(), X, y, reset=True)
    assert len(images) == 3
    np.testing.assert_array_equal(checked, y)
    with pytest.raises(ValueError, match=re.escape("inconsistent numbers of samples: [3, 2]")):
        validate_images(Reader(), X, y[:2], reset=True)


# ---- what is refused ----


@pytest.mark.parametrize(
    "shape",
    [
        (4, 1, 28, 28),
        (4, 3, 64, 48),
        (4, 3, 2, 5),
        *((4, n_channels, 20, 20) for n_channels in (2, 4, 5, 12, 16)),
        (4, 2, 5, 5),
    ],
)
def test_channels_first_is_refused_with_the_remedy(shape):
    with pytest.raises(ValueError, match=re.escape("np.moveaxis(X, 1, -1)")):
        fit(numbers(shape))
    last = np.moveaxis(numbers(shape), 1, -1)
    reader, images = fit(last)
    np.testing.assert_array_equal(everything(images), last)
    with pytest.raises(ValueError, match=re.escape("np.moveaxis(X, 1, -1)")):
        again(reader, numbers(shape))


@pytest.mark.parametrize("shape", [(3, 8, 8, 100), (3, 20, 30, 12), (3, 40, 20, 20), (3, 17, 20, 20)])
def test_what_cannot_be_channels_first_is_taken_as_it_is(shape):
    assert fit(numbers(shape))[0].image_shape_ == shape[1:]
    channels_first = (2, 4, 20, 20)
    assert fit(numbers(channels_first), image_shape=(4, 20, 20))[0].image_shape_ == (4, 20, 20)


@pytest.mark.parametrize(
    ("n_features", "said"),
    [(3072, (32, 32, 3)), (2 * 64, (8, 8, 2)), (11 * 81, (9, 9, 11)), (5 * 81, (9, 9, 5))],
)
def test_rows_that_may_be_images_with_channels_are_warned_of(n_features, said):
    with pytest.warns(UserWarning, match=re.escape(f"image_shape={said}, or (1, {n_features})")):
        reader, _ = fit(numbers((3, n_features)))
    assert reader.image_shape_ == (1, n_features, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for own in ((1, n_features), said):
            fit(numbers((3, n_features)), image_shape=own)
        again(reader, numbers((3, n_features)))
        for n in (1, 12, 64, 127, 4096, 3071):
            fit(numbers((3, n)))


def in_objects(images):
    X = np.empty(len(images), dtype=object)
    X[:] = images
    return X


def pictures(images):
    return [Image.fromarray(image) for image in images]


@pytest.mark.parametrize("shape", [(5, 9, 7), (5, 9, 7, 3)])
@pytest.mark.parametrize(
    "form",
    [list, tuple, in_objects, lambda X: pd.Series(list(X)), pictures, lambda X: pd.Series(pictures(X))],
    ids=["list", "tuple", "objects", "column", "pictures", "column of pictures"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_that_come_one_by_one_are_stacked(form, shape, dtype):
    X = numbers(shape, dtype)
    try:
        given = form(list(X))
    except TypeError:
        assert dtype == np.float32  # Pillow has no colours in floats
        return
    reader, images = fit(given)
    assert images.data.dtype == dtype
    np.testing.assert_array_equal(everything(images).reshape(shape), X)
    np.testing.assert_array_equal(everything(again(reader, given)).reshape(shape), X)


@pytest.mark.parametrize("form", [pictures, lambda X: pd.Series(X), lambda X: pd.Series(pictures(X))])
def test_pictures_of_several_sizes_are_named(form):
    images = [np.zeros((n, 6), np.uint8) for n in (4, 6, 5)]
    with pytest.raises(ValueError, match=r"3 different shapes \(\(4, 6\), \(5, 6\), \(6, 6\)"):
        fit(form(images))


def test_masked_pixels_are_refused():
    X = numbers((4, 5, 6))
    masked = np.ma.masked_array(X, mask=X[1, 2, 3] == X)
    with pytest.raises(ValueError, match=r"masked.*X\.filled\(0\)"):
        fit(masked)
    np.testing.assert_array_equal(everything(fit(np.ma.masked_array(X))[1])[..., 0], X)


def crops(as_objects):
    images = [np.zeros((4, 5)), np.zeros((6, 5)), np.zeros((4, 5)), np.zeros((4, 5, 3))]
    if not as_objects:
        return images
    X = np.empty(4, dtype=object)
    X[:] = images
    return X


@pytest.mark.parametrize("as_objects", [False, True])
@pytest.mark.parametrize("reset", [True, False])
def test_mixed_sizes_name_the_loader(as_objects, reset):
    reader, _ = fit(np.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match=r"3 different shapes \(\(4, 5\), .*load_image_folder\(.*crop.*size"):
        validate_images(reader, crops(as_objects), reset=reset)


@pytest.mark.parametrize(
    ("X", "image_shape", "message"),
    [
        (np.zeros(5), None, "Expected 2D, 3D or 4D array, got 1D array instead"),
        (np.zeros((2, 3, 4, 5, 6)), None, "X has shape (2, 3, 4, 5, 6): (n, features), (n, H, W) or"),
        (np.zeros((0, 4)), None, "0 sample(s)"),
        (np.zeros((0, 4, 4)), None, "0 sample(s)"),
        (np.zeros((4, 0)), None, "0 feature(s)"),
        (np.zeros((4, 0, 3)), None, "X has shape (4, 0, 3)"),
        (np.zeros((4, 5, 5, 0)), None, "X has shape (4, 5, 5, 0)"),
        (
            np.zeros((4, 12)),
            (3, 5),
            "image_shape=(3, 5, 1) has 15 values, but the rows of X have 12 features",
        ),
        (np.zeros((4, 12)), (3, 4, 3), "has 36 values"),
        (np.zeros((4, 3, 4)), (4, 3), "image_shape=(4, 3) does not fit X of shape (4, 3, 4)"),
        (np.zeros((4, 3, 4, 3)), (3, 4), "image_shape=(3, 4) does not fit X of shape (4, 3, 4, 3)"),
        (np.zeros((4, 12)), (12,), "image_shape=(12,) is no image shape"),
        (np.zeros((4, 12)), (1, 2, 3, 2), "is no image shape"),
        (np.zeros((4, 12)), (3.0, 4), "is no image shape"),
        (np.zeros((4, 12)), (True, 12), "is no image shape"),
        (np.zeros((4, 12)), (-3, -4), "is no image shape"),
        (np.zeros((4, 12)), (0, 12), "is no image shape"),
        (np.zeros((4, 12)), "3x4", "is no image shape"),
        (np.zeros((4, 12), complex), None, "Complex data not supported"),
        ([["a", "b"], ["c", "d"]], None, "not compatible with arrays of bytes/strings"),
    ],
)
def test_no_set_of_images(X, image_shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(X, image_shape=image_shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 29), "X has 29 features, but Reader is expecting 30 features as input"),
        ((2, 6, 5), "X has images of shape (6, 5, 1), but Reader was fitted to (H, W, C) = (5, 6, 1)"),
        ((2, 10, 12), "X has images of shape (10, 12, 1)"),
        ((2, 5, 6, 3), "X has images of shape (5, 6, 3)"),
        ((2, 5, 6, 1, 1), "X has images of shape (5, 6, 1, 1)"),
        ((30,), "Expected 2D, 3D or 4D array, got 1D array instead"),
        ((0, 5, 6), "0 sample(s)"),
    ],
)
def test_another_size_after_the_fit(shape, message):
    reader, _ = fit(np.zeros((3, 5, 6)))
    with pytest.raises(ValueError, match=re.escape(message)):
        again(reader, np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 8), (3, 2, 4), (3, 2, 2, 2)])
def test_what_is_not_finite(value, dtype, shape):
    X = np.zeros(shape, dtype)
    X[1, ..., -1] = value
    with pytest.raises(ValueError, match="NaN" if np.isnan(value) else "infinity"):
        fit(X)
    if dtype != np.float16 and len(shape) == 2:
        with pytest.raises(ValueError, match="NaN" if np.isnan(value) else "infinity"):
            fit(sparse.csr_array(X))


# ---- reading rows ----


@given(
    n=st.integers(1, 12),
    picks=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=9), max_size=3),
    as_sparse=st.booleans(),
)
def test_taking_rows_composes(n, picks, as_sparse):
    X = np.arange(n * 6, dtype=np.float64).reshape(n, 6)
    data = sparse.csr_array(X) if as_sparse else X
    images, expected = ImageRows(data, (2, 3, 1)), X.reshape(n, 2, 3, 1)
    for pick in picks:
        rows = np.array(pick) % len(expected)
        images, expected = images.take(rows), expected[rows]
        assert images.data is data
    assert len(images) == len(expected)
    np.testing.assert_array_equal(everything(images), expected)
    np.testing.assert_array_equal(images.read(np.array([len(expected) - 1, 0])), expected[[-1, 0]])
    np.testing.assert_array_equal(images.read(slice(1, 3)), expected[1:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_precision_of_results(dtype):
    images = ImageRows(np.zeros((2, 4), dtype), (2, 2, 1))
    assert images.float_dtype == (np.float64 if dtype.newbyteorder("=") == np.float64 else np.float32)
    assert images.float_dtype.isnative


@given(
    n_rows=st.integers(0, 200),
    image_shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    n_values=st.integers(1, 1000),
)
def test_chunks_cover_every_row_once(n_rows, image_shape, n_values):
    chunks = list(chunk_slices(n_rows, image_shape, n_values))
    rows = [i for chunk in chunks for i in range(chunk.start, chunk.stop)]
    assert rows == list(range(n_rows))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert all(size == 1 or 1 <= size * math.prod(image_shape) <= n_values for size in sizes)
    # And no more of them than needed.
    assert len(chunks) == math.ceil(n_rows / max(1, n_values // math.prod(image_shape)))


# ---- the scale ----


@pytest.mark.parametrize("data_range", [(0.0, 255.0), (3.0, 17.5), (-1.0, 1.0), (0.0, 0.1), (1e-3, 1e6)])
@pytest.mark.parametrize("highest", [1, 100, 255])
def test_the_same_numbers_give_the_same_bits(data_range, highest):
    values = np.random.default_rng(0).integers(0, highest + 1, (3, 5, 4, 2))
    dtypes = [dtype for dtype in DTYPES if np.array_equal(values.astype(dtype), values)]
    assert np.dtype(np.uint8) in dtypes
    assert (np.dtype(bool) in dtypes) == (highest == 1)
    scale = PixelScale(data_range)
    expected = scale(values.astype(np.float64))
    for dtype in dtypes:
        found = scale(values.astype(dtype))
        assert found.dtype == np.float32
        assert found.tobytes() == expected.tobytes(), dtype


@given(
    images=hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.uint64, np.float32, np.float64]),
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=4),
    ).filter(lambda images: np.isfinite(images).all()),
    low=st.floats(-1e3, 1e3),
    span=st.floats(1e-3, 1e4),
)
def test_the_scale_is_affine_and_clips_far_out(images, low, span):
    if images.dtype.kind == "f":  # far from the end of float32
        images = np.clip(images, -1e20, 1e20)
    before = images.copy()
    scaled = PixelScale((low, low + span))(images)
    expected = np.moveaxis((images.astype(np.longdouble) - low) / (np.float64(low + span) - low), -1, 1)
    expected = np.clip(expected, -3, 4)
    assert scaled.dtype == np.float32
    assert scaled.shape == expected.shape
    assert scaled.flags.c_contiguous
    assert scaled.flags.owndata
    assert scaled.flags.writeable
    assert not np.shares_memory(scaled, images)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_allclose(scaled, expected.astype(np.float64), rtol=2e-7, atol=1e-12 * (1 + abs(low)))


def test_channels_come_first():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    scaled = PixelScale((0.0, 64.0))(images)
    np.testing.assert_array_equal(64 * scaled, images.transpose(0, 3, 1, 2))


def test_zero_stays_zero_where_it_begins_at_zero():
    scaled = PixelScale((0.0, 7.0))(np.array([-14.0, 0.0, 3.5, 70.0]).reshape(1, 2, 2, 1))
    np.testing.assert_array_equal(scaled.ravel(), np.float32([-2, 0, 0.5, 4]))


def test_what_is_far_out_is_clipped_in_silence():
    for data_range in ((0.0, 1.0), (2.0, 3.0), (-1.0, 1e-300), (1.7e308, 1.75e308)):
        scaled = PixelScale(data_range)(np.array([1e308, -1.7e308]).reshape(1, 1, 2, 1))
        assert scaled.dtype == np.float32
        assert scaled.min() == CLIP[0]
        assert scaled.max() == (CLIP[1] if data_range[0] < 1e308 else CLIP[0])
    assert np.isnan(PixelScale((0.0, 1.0))(np.full((1, 1, 1, 1), np.nan)))


@pytest.mark.parametrize(
    "X",
    [
        [[None] * 16] * 2,
        [[Fraction(1, 2)] * 15 + [None]] * 2,
        [[[1.0, None], [0, 1]]] * 2,
        [[10**400] * 16] * 2,
        np.array([[10**400] * 16] * 2, dtype=object),
    ],
    ids=["None", "mixed", "one None", "large", "large objects"],
)
@pytest.mark.parametrize("estimator", [SparseAttnClassifier(), PixelSetTransformer()], ids=["clf", "pixels"])
def test_lists_of_what_is_no_number(X, estimator):
    with pytest.raises(ValueError, match=r"NaN|beyond all floats"):
        estimator.fit(X, [0, 1])


def test_lists_of_any_numbers_are_numbers():
    halves = [[Fraction(i, 2) for i in range(16)] for _ in range(2)]
    found, _ = validate_images(SparseAttnClassifier(), halves, reset=True)
    np.testing.assert_array_equal(found.read(slice(0, 1)).ravel(), np.arange(16) / 2)


def test_a_function_of_the_user_is_named_if_it_cannot_be_called():
    assert call_given("score", np.add, 1, 2) == 3
    assert call_given("score", max, 1, 2) == 2  # has no signature
    with pytest.raises(TypeError, match=r"^score=.*called with 2 arguments: too many"):
        call_given("score", lambda images: images, 1, 2)

    def wrong_inside(images):
        return len(images) + None

    with pytest.raises(TypeError, match=r"^unsupported operand"):  # the user's own error is not touched
        call_given("score", wrong_inside, [])
