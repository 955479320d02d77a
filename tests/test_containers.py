"""Images that lie elsewhere, as in HDF5, Zarr or Dask, are read a batch at a time."""

import warnings

import h5py
import numpy as np
import pandas
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier
from sklearn_sparseattn.images import ImageRows, is_lazy

Y = np.arange(60) % 3
X = (np.random.default_rng(0).integers(0, 60, (60, 12, 12)) + 60 * Y[:, None, None]).astype(np.uint8)


class Elsewhere:
    """The least that is asked for: a shape, a dtype, and blocks or rising rows. What was read is kept."""

    def __init__(self, data):
        self.shape, self.dtype, self.ndim = data.shape, data.dtype, data.ndim
        self.data, self.most = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        if not isinstance(rows, slice):
            assert np.diff(rows).min(initial=1) > 0, "rows must rise"
        self.most = max(self.most, len(self.data[rows]))
        return self.data[rows]


def in_hdf5(data, folder):
    return h5py.File(folder / "x.h5", "w").create_dataset(
        "x", data=data, chunks=(min(7, len(data)), *data.shape[1:])
    )


def in_zarr(data, folder):
    array = zarr.open(
        str(folder / "x.zarr"), mode="w", shape=data.shape, chunks=(7, *data.shape[1:]), dtype=data.dtype
    )
    array[:] = data
    return array


KINDS = {"HDF5": in_hdf5, "Zarr": in_zarr, "own": lambda data, folder: Elsewhere(data)}


@pytest.fixture(params=KINDS)
def put(request, tmp_path):
    return lambda data: KINDS[request.param](data, tmp_path)


def tiny(**params):
    return SparseAttnClassifier(max_epochs=2, batch_size=16, random_state=0, **params)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(12, 12), (144,), (6, 8, 3)], ids=str)
def test_all_answers_are_those_of_the_array(put, dtype, shape):
    data = X.reshape(60, *shape).astype(dtype)
    there = put(data)
    assert is_lazy(there)
    expected, found = tiny().fit(data, Y), tiny().fit(there, Y)
    assert found.data_range_ == expected.data_range_
    assert found.image_shape_ == expected.image_shape_
    for name in ("predict", "predict_proba", "predict_log_proba", "transform", "evidence_maps"):
        one, two = (getattr(found, name)(there), getattr(expected, name)(data))
        np.testing.assert_array_equal(one, two, err_msg=name)
    np.testing.assert_array_equal(found.attention_maps(there).tiles, expected.attention_maps(data).tiles)
    assert found.score(there, Y) == expected.score(data, Y)
    parts = [clf.partial_fit(some, Y, classes=[0, 1, 2]) for clf, some in ((tiny(), data), (tiny(), there))]
    np.testing.assert_array_equal(*(clf.predict_proba(data) for clf in parts))


def test_occlusion_maps(put):
    clf = tiny().fit(X, Y)
    np.testing.assert_array_equal(
        clf.occlusion_maps(put(X[:2]), n_masks=50), clf.occlusion_maps(X[:2], n_masks=50)
    )


def test_weights_validation_rows_and_early_stopping(put):
    there, weight = put(X), Y + 0.0  # a third of the rows has no weight
    params = {"early_stopping": True, "patience": 2}
    expected, found = (tiny(**params).fit(some, Y, sample_weight=weight) for some in (X, there))
    np.testing.assert_array_equal(found.predict_proba(there), expected.predict_proba(X))
    expected, found = (tiny(**params).fit(some, Y, X_val=some, y_val=Y) for some in (X, there))
    np.testing.assert_array_equal(found.predict_proba(there), expected.predict_proba(X))


def test_searches_and_folds(tmp_path):
    """scikit-learn reads the rows of each fold."""
    there, folds = in_hdf5(X, tmp_path), KFold(3)
    found, expected = (cross_val_score(tiny(), images, Y, cv=folds) for images in (there, X))
    np.testing.assert_array_equal(found, expected)
    search = GridSearchCV(tiny(), {"contrastive_weight": [0, 0.1]}, cv=folds, error_score="raise")
    assert np.isfinite(search.fit(there, Y).cv_results_["mean_test_score"]).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, 59), max_size=20))
def test_rows_in_any_order(rows):
    images = ImageRows(Elsewhere(X), (12, 12, 1))
    rows = np.array(rows, dtype=np.intp)
    np.testing.assert_array_equal(images.read(rows)[..., 0], X[rows])
    np.testing.assert_array_equal(images.take(np.arange(59, -1, -1)).read(rows)[..., 0], X[::-1][rows])


def test_neither_a_fit_nor_a_prediction_reads_all_at_once():
    data = np.random.default_rng(0).integers(0, 255, (5000, 32, 32), dtype=np.uint8)
    for images in (data, data.astype(np.float32)):
        there = Elsewhere(images[:600])
        clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(there, np.arange(600) % 2)
        assert 0 < there.most <= 512
        there = Elsewhere(images)
        clf.predict(there)
        assert 0 < there.most <= 2048


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros(60), "Expected 2D, 3D or 4D array, got 1D"),
        (np.zeros((60, 2, 3, 4, 5)), "5"),
        (np.zeros((0, 12, 12)), r"0 sample\(s\)"),
        (np.full((60, 12, 12), np.nan), "X contains NaN"),
        (np.where(np.arange(60)[:, None, None] == 59, np.inf, np.zeros((60, 12, 12))), "X contains infinity"),
        (np.full((60, 12, 12), "a"), "dtype <U1, which are no numbers"),
        (np.zeros((60, 12, 12), complex), "dtype complex128, which are no numbers"),
        (np.zeros((59, 12, 12)), "inconsistent numbers of samples"),
    ],
)
def test_bad_containers_are_refused_in_words(data, message):
    with pytest.raises(ValueError, match=message):
        tiny().fit(Elsewhere(data), Y)


def test_labels_beside_a_container_are_checked():
    there = Elsewhere(X)
    with pytest.raises(ValueError, match="requires y to be passed"):
        tiny().fit(there, None)
    with pytest.raises(ValueError, match="NaN"):
        tiny().fit(there, np.where(Y == 0, np.nan, Y))
    clf = tiny().fit(X, Y)
    with pytest.raises(ValueError, match="was fitted to"):
        clf.predict(Elsewhere(X[:, :6]))
    with pytest.raises(ValueError, match=r"single image: pass X\[None\]"):
        clf.predict(Elsewhere(X[0]))


def test_names_of_columns_are_forgotten(put):
    rows = X.reshape(60, -1)
    clf = tiny().fit(pandas.DataFrame(rows, columns=[f"p{i}" for i in range(144)]), Y)
    assert hasattr(clf, "feature_names_in_")
    clf.fit(put(rows), Y)
    assert not hasattr(clf, "feature_names_in_")


def test_the_pixel_set_reads_them_too(put):
    expected = PixelSetTransformer(k=20).fit(X).transform(X)
    np.testing.assert_array_equal(PixelSetTransformer(k=20).fit(put(X)).transform(put(X)), expected)


# ---- single images, logarithms ----


@pytest.mark.parametrize(
    "image", [X[0], X[0].astype(float), X[0][..., None]], ids=["uint8", "float", "channel"]
)
def test_a_single_image_gets_a_hint(image):
    clf = tiny().fit(X, Y)
    with pytest.raises(ValueError, match=r"single image|was fitted to|features"):
        clf.predict(image)
    if image.ndim == 2:
        with pytest.raises(ValueError, match=r"X of shape \(12, 12\) is a single image: pass X\[None\]"):
            clf.predict_proba(image)
    colours = np.repeat(X[..., None], 3, axis=3)
    with pytest.raises(ValueError, match=r"pass X\[None\]"):
        tiny().fit(colours, Y).predict(colours[0])


def test_logarithms_of_probabilities():
    clf = tiny().fit(X, Y)
    np.testing.assert_array_equal(clf.predict_log_proba(X), np.log(clf.predict_proba(X)))
    clf.predict_proba = lambda X: np.array([[0.0, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(clf.predict_log_proba(X), [[-np.inf, 0]])


def test_classes_may_be_a_set():
    clf = tiny().partial_fit(X, Y, classes={2, 0, 1, 7})
    assert clf.classes_.tolist() == [0, 1, 2, 7]
    clf.partial_fit(X, Y, classes=frozenset([0, 1, 2, 7]))


def test_nan_is_named_where_scikit_learn_does_not_look():
    bad = X.astype(float)
    bad[7, 3, 3] = np.nan
    clf = tiny().fit(X, Y)
    with config_context(assume_finite=True):
        with pytest.raises(ValueError, match="X contains NaN"):
            clf.predict(bad)
        with pytest.raises(ValueError, match="X contains NaN"):
            tiny().fit(bad, Y)
