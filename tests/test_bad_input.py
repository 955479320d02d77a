"""Whatever a user puts in: a right result, or a ValueError or TypeError that names the culprit.

Nothing else is raised, and no warning comes that is not meant. BAD_INPUT_CASES=1000 makes a thorough search.
"""

import contextlib
import math
import os
import re
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import sparse
from sklearn.exceptions import DataConversionWarning

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier

CASES = settings(max_examples=int(os.environ.get("BAD_INPUT_CASES", "30")), deadline=None)

SIDE = 4
Y = np.arange(12) % 3
X = (np.random.default_rng(0).integers(0, 60, (12, SIDE, SIDE)) + 60 * Y[:, None, None]).astype(np.uint8)
TINY = {"max_epochs": 1, "hidden_dim": 8, "embed_dim": 4, "batch_size": 6, "random_state": 0}
# Each warning that may come, and the words it says.
MEANT = {
    UserWarning: "data_range_=|in the units of the training images",
    DataConversionWarning: "column-vector y",
}


def outcome(culprits, call, *args, **options):
    """Result of a call, or None if it was refused in the right way."""
    refusal = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(*args, **options)
        except (ValueError, TypeError) as error:
            result, refusal = None, f"{type(error).__name__}: {error}"
    for warning in caught:
        words = MEANT.get(warning.category, "(?!)")  # matches nothing
        assert re.search(words, str(warning.message)), f"{warning.category}: {warning.message}"
    assert refusal is None or re.search(culprits, refusal), f"{refusal!r} names none of {culprits}"
    return result


def assert_probabilities(proba, n, n_classes=3):
    assert proba.shape == (n, n_classes)
    assert proba.dtype == np.float64
    assert np.isfinite(proba).all()
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-12)


def tiny(**params):
    return SparseAttnClassifier(**{**TINY, **params})


@pytest.fixture(scope="module")
def fitted():
    """For bytes and for floats: what is within the range of the one is far out of that of the other."""
    return [tiny().fit(X, Y), tiny().fit(X / 255.0, Y)]


# ---- arrays ----

DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?"),
    npst.complex_number_dtypes(),
    npst.datetime64_dtypes(max_period="D"),
    npst.byte_string_dtypes(max_len=3),
    npst.unicode_string_dtypes(max_len=3),
    st.just(np.dtype(np.longdouble)),
    st.just(np.dtype(object)),
)
RIGHT = st.sampled_from([(SIDE * SIDE,), (SIDE, SIDE), (SIDE, SIDE, 1)])
SHAPES = st.one_of(
    st.tuples(st.integers(0, 4), RIGHT).map(lambda pair: (pair[0], *pair[1])),
    npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5),
)
ANYTHING = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=2), st.lists(st.integers(), max_size=2)
)


@st.composite
def arrays(draw, shapes=SHAPES):
    """Arrays of any kind, some of them seen from the side or with holes."""
    dtype = draw(DTYPES)
    if dtype.kind == "f" and draw(st.booleans()):  # mostly finite ones would hardly come about by chance
        elements = st.floats(0, 1, width=16)
    else:
        elements = ANYTHING if dtype.kind == "O" else npst.from_dtype(dtype)
    array = draw(
        npst.arrays(dtype, draw(shapes), elements=elements, fill=st.nothing() if dtype.kind == "O" else None)
    )
    way = draw(st.sampled_from(["as it is", "reversed", "with holes", "Fortran", "broadcast", "read-only"]))
    if way == "reversed":
        array = array[::-1] if array.ndim else array
    elif way == "with holes" and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif way == "Fortran":
        array = np.asfortranarray(array)
    elif way == "broadcast" and array.ndim and len(array):
        array = np.broadcast_to(array[:1], array.shape)
    array = array.view()
    array.flags.writeable = way != "read-only" and array.flags.writeable
    return array


@st.composite
def containers(draw):
    """Arrays, lists of them, sparse matrices."""
    array = draw(arrays())
    way = draw(st.sampled_from(["array"] * 4 + ["list", "rows", "object rows", "csr", "coo"]))
    if way == "list":
        return array.tolist()
    if way == "rows" and array.ndim:
        return list(array)
    if way == "object rows" and array.ndim:
        rows = np.empty(len(array), dtype=object)
        rows[:] = list(array)
        return rows
    if way in ("csr", "coo") and array.ndim == 2 and array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
        with contextlib.suppress(
            ValueError, TypeError
        ):  # SciPy has no half precision, and no other endianness
            return sparse.csr_matrix(array) if way == "csr" else sparse.coo_array(array)
    return array


OF_X = (
    r"\bX\b|\barray|dtype|[Ff]ound|features|samples?|[Cc]omplex|convert|data_range|sparse|[Ss]trings?|float|shape|"
    "input"
)


@CASES
@given(
    images=containers(), method=st.sampled_from(["predict_proba", "predict", "transform", "attention_maps"])
)
def test_images_to_be_answered(fitted, images, method):
    for clf in fitted:
        result = outcome(OF_X, getattr(clf, method), images)
        if result is None:
            continue
        dense = images.toarray() if sparse.issparse(images) else np.asarray(images)
        values = np.array(dense.tolist() if dense.dtype == object else dense, dtype=np.float64)
        n = len(values)
        parts = result if isinstance(result, dict) else {"result": result}
        assert all(len(part) == n for part in parts.values())
        if method == "predict":
            assert set(result) <= {0, 1, 2}
            continue
        assert all(np.isfinite(part).all() for part in parts.values())
        if method == "predict_proba":
            assert_probabilities(result, n)
            # The same numbers, from plain memory.
            plain = outcome(OF_X, clf.predict_proba, np.ascontiguousarray(values.reshape(n, SIDE, SIDE)))
            np.testing.assert_array_equal(plain, result)


@CASES
@given(images=containers(), data=st.data())
def test_images_to_be_fitted(images, data):
    n = (
        images.shape[0]
        if hasattr(images, "shape") and len(images.shape)
        else len(images)
        if isinstance(images, list)
        else 1
    )
    y = np.arange(n) % data.draw(st.integers(1, 3))
    clf = outcome(OF_X + r"|\by\b|diverged in epoch 1", tiny().fit, images, y)
    if clf is not None:
        assert_probabilities(outcome(OF_X, clf.predict_proba, images), n, len(set(y)))


@CASES
@given(
    images=containers(), k=st.sampled_from([1, 0.3, 1.0]), layout=st.sampled_from(["flat", "set", "sparse"])
)
def test_images_to_be_turned_into_pixels(images, k, layout):
    transformer = PixelSetTransformer(k=k, layout=layout)
    result = outcome(OF_X, transformer.fit_transform, images)
    if result is not None:
        assert result.shape[0] == (images.shape[0] if hasattr(images, "shape") else len(images))


# ---- labels and weights ----

LABELS = st.one_of(
    st.lists(st.integers(-2, 2), min_size=12, max_size=12),
    st.lists(st.sampled_from(["a", "b", ""]), min_size=12, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.lists(st.one_of(st.floats(), st.integers(0, 1)), min_size=12, max_size=12),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=1), st.floats()), max_size=14),
    arrays(
        st.one_of(
            st.sampled_from([(12,), (12, 1)]),
            npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12),
        )
    ),
    st.one_of(st.none(), st.integers(), st.text()),
)
OF_Y = r"\by\b|[Ll]abels?|class|[Ii]nput|samples?|[Tt]arget|array|convert|dtype|[Cc]omplex"


@CASES
@given(labels=LABELS)
def test_labels(labels):
    clf = outcome(OF_Y, tiny().fit, X, labels)
    if clf is not None:
        flat = np.asarray(labels).ravel()
        assert set(clf.classes_.tolist()) == set(flat.tolist())
        assert_probabilities(clf.predict_proba(X), 12, len(set(flat.tolist())))


@CASES
@given(labels=LABELS)
def test_labels_of_validation_rows_and_of_partial_fits(fitted, labels):
    clf = outcome(OF_Y + "|X_val", tiny().fit, X, Y, X_val=X, y_val=labels)
    if clf is not None:
        assert_probabilities(clf.predict_proba(X), 12)
    outcome(OF_Y, tiny().partial_fit, X, Y, classes=labels)
    outcome(OF_Y, tiny().partial_fit, X, labels, classes=[0, 1, 2])


WEIGHTS = st.one_of(
    arrays(st.one_of(st.just((12,)), npst.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=12))),
    npst.arrays(np.float64, 12, elements=st.floats(0, allow_nan=False, allow_infinity=False)),
    st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=1)), max_size=13),
    st.one_of(st.integers(), st.floats(), st.text(max_size=3)),
)


@CASES
@given(weights=WEIGHTS)
def test_weights(weights):
    culprits = r"weight|array|convert|samples?|dtype|[Cc]omplex|[Ii]nput|float|[Ss]calar|diverged in epoch 1"
    clf = outcome(culprits, tiny().fit, X, Y, sample_weight=weights)
    if clf is not None:
        assert_probabilities(clf.predict_proba(X), 12, len(clf.classes_))


# ---- parameters ----


class Odd:
    """Something that is nothing."""


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([10**30, 10**400, -(10**400), 2**31, 2**63, 1 << 40]),
    st.floats(),
    st.floats(0, 1),
    st.floats(0, 1).map(np.float32),
    st.floats(0, 1, width=16).map(np.float16),
    st.floats(0, 1).map(np.longdouble),
    st.integers(0, 255).map(np.uint8),
    st.integers(-5, 5).map(np.int64),
    st.fractions(-1, 2),
    st.sampled_from([Decimal("0.5"), Fraction(1, 2), 1j, np.nan, np.inf, -0.0, 5e-324, 1e308]),
)
JUNK = st.one_of(
    NUMBERS,
    st.booleans(),
    st.sampled_from(
        [np.True_, None, Odd(), Odd, len, b"bytes", np.array([1, 2]), np.array(0.5), torch.tensor(0.5)]
    ),
    st.text(max_size=4),
    st.lists(NUMBERS, max_size=4),
    st.lists(st.one_of(st.integers(0, 5), st.floats()), max_size=4).map(tuple),
    st.dictionaries(
        st.one_of(st.integers(-1, 3), st.text(max_size=1)), st.one_of(NUMBERS, st.none()), max_size=3
    ),
)
NAMED = {
    "predict_k": [1, 5, 0.3, 1.0, np.int64(3), np.float32(0.5)],
    "variant": ["tiles", "paper"],
    "size": ["default", "large"],
    "lr_schedule": ["onecycle", "plateau"],
    "class_weight": [
        "balanced",
        {0: 1, 1: 2, 2: 0},
        {0: 0, 1: 0, 2: 0},
        {0: 1e300},
        {0: 1e-300, 1: 1},
        {7: 1},
        {},
    ],
    "augment": ["dihedral"]
    + [lambda images, rng, made=made: made for made in (None, "text", [[1], [1, 2]], np.zeros(3), Odd(), 1j)]
    + [
        lambda images, rng: images.astype(complex),
        lambda images, rng: images.astype(object),
        lambda images: images,
    ],
    "image_shape": [
        (4, 4),
        [4, 4, 1],
        (2, 8),
        (16, 1),
        (np.int64(4), 4),
        (True, 16),
        (10**30, 1),
        ("4", 4),
        (4.0, 4),
    ],
    "data_range": [
        (0, 255),
        [0, 1],
        (-1e308, 1e308),
        (0, 5e-324),
        (10**400, 1),
        ("0", "1"),
        (None, 1),
        (0, np.nan),
    ],
    "device": [
        "cpu",
        "cpu:0",
        "cpu:1",
        "cuda",
        "cuda:-1",
        "mps",
        "meta",
        "auto",
        "",
        "xpu",
        torch.device("meta"),
    ],
    "random_state": [0, 2**32 - 1, 2**32, np.random.RandomState(0), np.random.default_rng(0), np.random],
    "checkpoint_dir": ["\0", "/proc/nothing", "/dev/null", b"bytes"],
}
# A fit that takes for ever is what such a call asks for.
ENDLESS = {"max_epochs"}
LARGE = {"embed_dim", "n_heads", "hidden_dim"}  # what just fits would take all memory


def values_of(name):
    values = st.one_of(JUNK, st.sampled_from(NAMED[name])) if name in NAMED else JUNK
    if name in ENDLESS:
        return values.filter(lambda v: not isinstance(v, int | np.integer) or v <= 3)
    if name in LARGE:
        return values.filter(lambda v: not isinstance(v, int | np.integer) or v <= 64 or v >= 2**31)
    if name == "verbose":  # would draw its bar
        return values.filter(lambda v: not (isinstance(v, int | np.integer) and v > 0))
    if name == "checkpoint_dir":  # would be made
        return values.filter(lambda v: not (isinstance(v, str) and v not in NAMED[name]))
    return values


PARAMETERS = sorted(SparseAttnClassifier().get_params())


@CASES
@given(data=st.data(), name=st.sampled_from(PARAMETERS))
def test_parameters_of_the_classifier(data, name):
    given_value = data.draw(values_of(name))
    base = {"k_min": 1, "lr_schedule": data.draw(st.sampled_from(["onecycle", "plateau", None]))}
    clf = tiny(**{**base, name: given_value})
    culprits = (
        rf"\b{name}\b|diverged in epoch 1" if name != "data_range" else "data_range|diverged in epoch 1"
    )
    if outcome(culprits, clf.fit, X, Y) is None:
        return
    proba = outcome(culprits, clf.predict_proba, X)
    if proba is not None:
        assert_probabilities(proba, 12)
        assert 1 <= clf.k_ <= SIDE * SIDE
        assert all(np.isfinite(column).all() for column in clf.history_.values())


def of_pixels(images):
    return images.sum(axis=-1)


SCORES = [
    "intensity", "gradient", "variance", "entropy", "contrast", "random", of_pixels, tiny(),
    *[lambda images, made=made: made for made in (None, "text", [[1], [1, 2]], np.zeros(3), Odd(), np.nan)],
    lambda images: images.sum(axis=-1) * np.nan,
    lambda images: images.sum(axis=-1) * 1j,
    lambda images: images.sum(axis=-1).astype(object),
    lambda images: images,
    lambda: None,
]  # fmt: skip
PIXEL_VALUES = {
    "k": st.nothing(),
    "score": st.sampled_from(SCORES),
    "layout": st.sampled_from(["flat", "set", "sparse"]),
    "order": st.sampled_from(["raster", "score"]),
    "image_shape": st.sampled_from(NAMED["image_shape"]),
}


@CASES
@given(data=st.data(), name=st.sampled_from(sorted(PIXEL_VALUES)))
def test_parameters_of_the_transformer(data, name):
    value = data.draw(st.one_of(JUNK, PIXEL_VALUES[name]))
    transformer = PixelSetTransformer(**{name: value})
    result = outcome(rf"\b{name}\b", transformer.fit_transform, X, Y)
    if result is not None:
        assert result.shape[0] == 12
        dense = result.toarray() if sparse.issparse(result) else result
        assert np.isfinite(dense).all()
        assert math.prod(dense.shape) > 0
