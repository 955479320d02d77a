"""PixelSetTransformer: which pixels it keeps, how it lays them out, and the way back to images."""

import copy
import io
import pickle
import tracemalloc

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from skimage.filters import sobel
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier
from sklearn_sparseattn.network import pixel_tokens, select_pixels
from sklearn_sparseattn.pixel_set import _best_pixels

SIDE = 12
RNG = np.random.default_rng(0)
X_CELLS = RNG.integers(0, 256, (16, SIDE, SIDE), dtype=np.uint8)
Y_CELLS = np.array(["large", "small"] * 8)


# ---- an independent reference ----


def reference_indices(scores, k, order):
    """The k best of each image by a stable sort of (B, H, W) scores."""
    best = np.argsort(-scores.reshape(len(scores), -1), axis=1, kind="stable")[:, :k]
    return best if order == "score" else np.sort(best, axis=1)


def reference_tokens(images, indices, dtype):
    """(n, k, 2 + C), pixel by pixel."""
    n, height, width, n_channels = images.shape
    tokens = np.empty((n, indices.shape[1], 2 + n_channels), dtype)
    for row, column in np.ndindex(indices.shape):
        i, j = divmod(int(indices[row, column]), width)
        position = (2 * j + 1) / width - 1, (2 * i + 1) / height - 1
        tokens[row, column] = [*position, *images[row, i, j]]
    return tokens


def masked(images, indices):
    """The images with everything but these pixels set to zero."""
    n, height, width, n_channels = images.shape
    kept = np.zeros((n, height * width, n_channels), bool)
    np.put_along_axis(kept, indices[..., None], True, axis=1)
    return np.where(kept.reshape(images.shape), images, 0)


def magnitude(images):
    return np.abs(images.astype(np.float64)).mean(axis=-1)


def edges(images):
    values = images.astype(np.float64)
    channels = [[sobel(image[..., c]) for c in range(image.shape[-1])] for image in values]
    return np.mean(channels, axis=1)


DTYPES = [np.float64, np.float32, np.uint8, np.int8, np.int16, np.bool_]


@st.composite
def image_sets(draw):
    """(n, H, W, C) images of few different values, so that there are ties."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.tuples(*[st.integers(1, 4)] + 2 * [st.integers(1, 7)] + [st.integers(1, 4)]))
    if dtype.kind == "f":
        values = np.array([-3.5, -1.0, -0.0, 0.0, 0.1, 1.0, 2.25, 1e-30, 1e30], dtype)
        elements = st.sampled_from(values.tolist())
    elif dtype.kind == "b":
        elements = st.booleans()
    else:
        elements = st.sampled_from([np.iinfo(dtype).min, np.iinfo(dtype).max, 0, 1, 2, 7])
    return draw(hnp.arrays(dtype, shape, elements=elements))


def in_form(images, form):
    if form == "4d":
        return images
    if form == "3d" and images.shape[-1] == 1:
        return images[..., 0]
    rows = images.reshape(len(images), -1)
    return sparse.csr_array(rows) if form == "csr" else rows


def dense(X):
    return X.toarray() if sparse.issparse(X) else X


def fitted(images, form="4d", **params):
    """Transformer fitted to images in some form, and the images in this form."""
    X = in_form(images, form)
    return PixelSetTransformer(image_shape=images.shape[1:], **params).fit(X), X


# ---- which pixels, and how they are laid out ----


@given(
    images=image_sets(),
    share=st.floats(0.01, 1.0),
    order=st.sampled_from(["raster", "score"]),
    score=st.sampled_from(["intensity", "gradient"]),
    form=st.sampled_from(["4d", "3d", "2d", "csr"]),
)
def test_against_a_stable_sort(images, share, order, score, form):
    pixels, X = fitted(images, form, k=share, order=order, score=score, layout="set")
    scores = (magnitude if score == "intensity" else edges)(images)
    indices = reference_indices(scores, pixels.k_, order)
    dtype = np.float64 if images.dtype == np.float64 else np.float32
    tokens = pixels.transform(X)
    assert tokens.dtype == dtype
    np.testing.assert_allclose(tokens, reference_tokens(images, indices, dtype), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(
        tokens[..., 2:], reference_tokens(images, indices, dtype)[..., 2:], strict=True
    )

    flat = pixels.set_params(layout="flat").transform(X)
    np.testing.assert_array_equal(flat, tokens.reshape(len(images), -1), strict=True)
    rows = pixels.set_params(layout="sparse").transform(X)
    expected = masked(images, indices).reshape(len(images), -1)
    assert rows.format == "csr"
    assert rows.dtype == dtype
    assert rows.has_canonical_format
    assert rows.nnz == np.count_nonzero(expected)
    np.testing.assert_array_equal(rows.toarray(), expected.astype(dtype))


@given(
    images=image_sets(),
    share=st.floats(0.01, 1.0),
    layout=st.sampled_from(["flat", "set", "sparse"]),
    order=st.sampled_from(["raster", "score"]),
    form=st.sampled_from(["4d", "3d", "2d", "csr"]),
)
def test_pixel_sets_go_there_and_back(images, share, layout, order, form):
    pixels, X = fitted(images, form, k=share, order=order, layout=layout)
    back = pixels.inverse_transform(pixels.transform(X))
    expected = masked(images, reference_indices(magnitude(images), pixels.k_, order))
    assert sparse.issparse(back) == (form == "csr")
    assert back.shape == X.shape
    assert back.dtype == (np.float64 if images.dtype == np.float64 else np.float32)
    np.testing.assert_array_equal(dense(back), dense(in_form(expected, form)).astype(back.dtype))


def test_the_network_has_the_same_pixels():
    images = RNG.random((3, 9, 5, 2))
    scores = torch.from_numpy(magnitude(images))
    expected = pixel_tokens(torch.from_numpy(images).movedim(-1, 1), select_pixels(scores, 11))
    pixels = PixelSetTransformer(k=11, layout="set", order="score")
    np.testing.assert_allclose(pixels.fit_transform(images), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        *[(1, 1), (7, 7), (20, 20), (10**9, 20), (np.int64(4), 4)],
        *[(0.15, 3), (0.125, 3), (0.12, 2), (1e-9, 1), (1.0, 20), (np.float32(0.5), 10)],
    ],
)
def test_k(k, kept):
    assert PixelSetTransformer(k=k).fit(np.ones((1, 4, 5))).k_ == kept


def test_ties_go_to_the_lower_index():
    image = np.array([[[1, 2, 2], [0, 2, 1]]], dtype=np.uint8)
    pixels = PixelSetTransformer(k=4, order="score", layout="set").fit(image)
    np.testing.assert_array_equal(pixels.transform(image)[0, :, 2], [2, 2, 2, 1])
    np.testing.assert_array_equal(pixels.inverse_transform(pixels.transform(image)), [[[1, 2, 2], [0, 2, 0]]])


def test_columns_of_flat():
    image = np.array([[[[0, 0], [5, 6]], [[-7, 9], [1, 0]]]], dtype=np.float64)
    flat = PixelSetTransformer(k=2).fit_transform(image)
    np.testing.assert_array_equal(flat, [[0.5, -0.5, 5, 6, -0.5, 0.5, -7, 9]])


def test_extreme_values_neither_overflow_nor_vanish():
    image = np.zeros((1, 6, 6))
    image[0, 2:4, 2:4] = 1
    image[0, 0, 5] = 0.3
    ordinary, huge, tiny = (
        PixelSetTransformer(k=9, score="gradient", layout="sparse").fit_transform(image * factor)
        for factor in (1, 2.0**1023, 2.0**-1000)
    )
    np.testing.assert_array_equal(huge.indices, ordinary.indices)
    np.testing.assert_array_equal(tiny.indices, ordinary.indices)
    channels = np.full((1, 2, 2, 3), 1e308)
    assert PixelSetTransformer(k=1).fit_transform(channels).shape == (1, 5)


def test_many_images_are_read_in_chunks():
    images = RNG.integers(0, 9, (70, 100, 90), dtype=np.uint8)  # more than one chunk
    pixels = PixelSetTransformer(k=40, layout="set").fit(images)
    together = pixels.transform(images)
    alone = np.concatenate([pixels.transform(image[None]) for image in images])
    np.testing.assert_array_equal(together, alone)
    kept = reference_indices(magnitude(images[..., None]), 40, "raster")
    expected = masked(images[..., None], kept)[..., 0]
    np.testing.assert_array_equal(pixels.inverse_transform(together), expected)
    np.testing.assert_array_equal(
        pixels.set_params(layout="sparse").transform(images).toarray(), expected.reshape(70, -1)
    )


# ---- what X may be ----


def test_forms_may_be_interchanged():
    pixels = PixelSetTransformer(k=5).fit(X_CELLS)
    expected = pixels.transform(X_CELLS)
    rows = X_CELLS.reshape(16, -1)
    for X in (X_CELLS[..., None], rows, sparse.csc_matrix(rows), rows.tolist(), np.asfortranarray(rows)):
        np.testing.assert_array_equal(pixels.transform(X), expected)
    assert pixels.inverse_transform(expected).shape == X_CELLS.shape


@pytest.mark.parametrize("layout", ["flat", "sparse"])
def test_read_only_memmap_is_neither_written_nor_copied(tmp_path, layout):
    shape = (1000, 128, 128)
    np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=shape)[:, 60, 60] = 9
    X = np.load(tmp_path / "images.npy", mmap_mode="r")
    pixels = PixelSetTransformer(k=1, layout=layout)
    tracemalloc.start()
    try:
        transformed = pixels.fit_transform(X)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < X.nbytes
    assert transformed.sum(axis=0).max() == 9000


def test_sparse_in_gives_the_same_kind_of_sparse_out():
    rows = sparse.random(10, 49, density=0.2, random_state=0, format="csr") * -1
    for container in (sparse.csr_matrix, sparse.csr_array):
        pixels = PixelSetTransformer(k=5, layout="sparse").fit(container(rows))
        kept = pixels.transform(container(rows))
        back = pixels.inverse_transform(kept)
        assert type(kept) is type(back) is container
        assert (kept != back).nnz == 0
        assert not np.shares_memory(kept.data, back.data)
        assert kept.nnz <= rows.nnz
    from_dense = PixelSetTransformer(k=5, layout="sparse").fit(rows.toarray())
    assert (from_dense.transform(rows) != kept).nnz == 0
    np.testing.assert_array_equal(from_dense.inverse_transform(kept), kept.toarray())


def test_dtypes():
    large = np.array([[2**24 + 1, 3, 2, 1]])
    assert PixelSetTransformer(k=1).fit_transform(large)[0, 2] == 2**24  # as documented
    assert PixelSetTransformer(k=1).fit_transform(large.astype(float))[0, 2] == 2**24 + 1
    lowest = np.array([[0, -128, 127, 1]], dtype=np.int8)
    assert PixelSetTransformer(k=1).fit_transform(lowest)[0, 2] == -128
    pixels = PixelSetTransformer(k=1).fit(X_CELLS)
    assert pixels.inverse_transform(pixels.transform(X_CELLS).astype(np.float64)).dtype == np.float64


# ---- scores ----


def test_a_callable_sees_the_images_as_they_are():
    seen = []

    def distance_from_mean(images):
        seen.append((images.shape, images.dtype, images.flags.writeable))
        return -np.abs(images[..., 0] - 100.0)

    tokens = PixelSetTransformer(k=3, score=distance_from_mean, layout="set", order="score").fit_transform(
        X_CELLS.reshape(16, -1)
    )
    assert seen == [((16, SIDE, SIDE, 1), np.uint8, False)]
    scores = -np.abs(X_CELLS - 100.0)
    expected = reference_tokens(X_CELLS[..., None], reference_indices(scores, 3, "score"), np.float32)
    np.testing.assert_allclose(tokens, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float16])
def test_scores_of_any_real_dtype(dtype):
    scores = np.zeros((2, 2, 3), dtype)
    scores[:, 1, 1] = 1
    scores.flags.writeable = False
    kept = PixelSetTransformer(k=1, score=lambda images: scores).fit_transform(np.ones((2, 2, 3)))
    np.testing.assert_array_equal(kept, [[0, 0.5, 1]] * 2)


def test_infinite_scores_are_an_order_like_any():
    scores = np.array([[[-np.inf, np.inf], [0.0, np.inf]]])
    pixels = PixelSetTransformer(k=3, score=lambda images: scores, layout="set", order="score")
    kept = pixels.fit_transform(np.array([[[1, 2], [3, 4]]]))
    np.testing.assert_array_equal(kept[0, :, 2], [2, 4, 3])


@pytest.fixture(scope="module")
def classifier():
    return SparseAttnClassifier(max_epochs=1, random_state=0).fit(X_CELLS, Y_CELLS)


@pytest.mark.parametrize("form", ["3d", "2d", "csr"])
def test_score_of_a_frozen_classifier(classifier, form):
    pixels = PixelSetTransformer(k=9, score=FrozenEstimator(classifier), order="score", layout="set")
    tokens = pixels.fit_transform(in_form(X_CELLS[..., None], form))
    coarse = classifier.attention_maps(X_CELLS).coarse
    expected = reference_tokens(X_CELLS[..., None], reference_indices(coarse, 9, "score"), np.float32)
    np.testing.assert_allclose(tokens, expected, atol=1e-6)
    assert pixels.score_estimator_.estimator is classifier
    assert not pixels.__sklearn_tags__().target_tags.required


def test_attention_that_rounds_to_one_is_no_tie(classifier):
    sure = copy.deepcopy(classifier)
    with torch.no_grad():
        sure.network_.coarse.score.bias += 25  # every sigmoid is 1 in float32, and the order the same
    sure = copy.deepcopy(sure)  # what predicts is made from the network when an estimator is made
    maps = sure.attention_maps(X_CELLS)
    assert np.all(maps.coarse == 1)
    assert sure.network_.tile == 1
    kept = PixelSetTransformer(k=9, score=FrozenEstimator(sure)).fit_transform(X_CELLS)
    expected = reference_tokens(X_CELLS[..., None], np.sort(maps.tiles[:, :9], axis=1), np.float32)
    np.testing.assert_allclose(kept, expected.reshape(len(kept), -1), atol=1e-6)


@pytest.fixture(scope="module", params=[(32, 32), (33, 30, 3)], ids=str)
def tiled(request):
    """Classifier with tiles of 4 x 4 pixels, fewer at the border of the second shape; images without 0."""
    images = RNG.integers(1, 256, (12, *request.param), dtype=np.uint8)
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(images, Y_CELLS[:12])
    assert clf.network_.tile == 4
    return clf, images


@pytest.mark.parametrize("order", ["raster", "score"])
def test_as_many_pixels_as_a_classifier_chooses_are_those_of_its_tiles(tiled, order):
    clf, images = tiled
    for image, chosen in zip(images, clf.attention_maps(images).chosen, strict=True):
        pixels = PixelSetTransformer(k=int(chosen.sum()), score=FrozenEstimator(clf), order=order)
        back = pixels.fit(image[None]).inverse_transform(pixels.transform(image[None]))
        np.testing.assert_array_equal((back[0] > 0).reshape(*chosen.shape, -1).all(axis=-1), chosen)


@pytest.mark.parametrize("k", [1, 7, 150, 1.0])
def test_pixels_of_a_classifier_are_ranked_by_score_then_tile_then_index(tiled, k):
    clf, images = tiled
    pixels = PixelSetTransformer(k=k, score=FrozenEstimator(clf), order="score", layout="set")
    tokens = pixels.fit_transform(images)
    height, width, n_channels = clf.image_shape_
    maps, n_columns = clf.attention_maps(images.astype(float)), -(-width // 4)
    ranked = np.empty((len(images), height * width), int)
    for row, coarse in zip(ranked, maps.coarse, strict=True):
        places = [
            (-coarse[i, j], i // 4 * n_columns + j // 4, i * width + j) for i, j in np.ndindex(height, width)
        ]
        row[:] = [index for *_, index in sorted(places)]
    expected = reference_tokens(
        images.reshape(-1, height, width, n_channels), ranked[:, : pixels.k_], np.float32
    )
    np.testing.assert_allclose(tokens, expected, atol=1e-6)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    tile=st.sampled_from([1, 2, 4]),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
    best_first=st.booleans(),
)
def test_ranks_with_ties_in_and_between_tiles(shape, tile, share, seed, best_first):
    scores = np.random.default_rng(seed).choice([-np.inf, 0.0, -0.0, 1.0, np.inf], shape)
    _, height, width = shape
    k = max(1, int(share * height * width))
    found = _best_pixels(scores, k, tile=tile, best_first=best_first)
    for row, own in zip(found, scores, strict=True):
        places = [(-own[i, j], i // tile, j // tile, i * width + j) for i, j in np.ndindex(height, width)]
        expected = [place[-1] for place in sorted(places)][:k]
        assert row.tolist() == (expected if best_first else sorted(expected))


@pytest.mark.parametrize("form", ["3d", "2d", "csr"])
def test_score_of_a_classifier_that_is_fitted_here(classifier, form):
    own = clone(classifier)
    pixels = PixelSetTransformer(k=9, score=own)
    assert pixels.__sklearn_tags__().target_tags.required
    X = in_form(X_CELLS[..., None], form)
    kept = pixels.fit(X, Y_CELLS).transform(X)
    assert not hasattr(own, "network_")
    assert pixels.score_estimator_.image_shape_ == (SIDE, SIDE, 1)
    frozen = FrozenEstimator(clone(own).fit(X, Y_CELLS))
    np.testing.assert_array_equal(kept, PixelSetTransformer(k=9, score=frozen).fit_transform(X))
    assert pixels.set_params(score="intensity").fit(X).score_estimator_ is None


def test_a_classifier_fitted_here_takes_over_the_image_shape():
    X = RNG.random((12, 3 * 8 * 8))
    clf = SparseAttnClassifier(max_epochs=1, random_state=0)
    pixels = PixelSetTransformer(score=clf, image_shape=(3, 8, 8), k=2).fit(X, np.arange(12) % 2)
    assert pixels.score_estimator_.image_shape_ == pixels.image_shape_ == (3, 8, 8)
    assert clf.image_shape is None
    assert pixels.transform(sparse.csr_array(X)).shape == (12, 20)


def test_names_are_handed_to_a_classifier_that_knows_them():
    frame = pd.DataFrame(X_CELLS.reshape(16, -1)).add_prefix("pixel")
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(frame, Y_CELLS)
    with_names = PixelSetTransformer(k=9, score=FrozenEstimator(clf)).fit(frame).transform(frame)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        without = PixelSetTransformer(k=9, score=FrozenEstimator(clf)).fit_transform(X_CELLS)
    np.testing.assert_array_equal(with_names, without)


def test_parameters_of_a_classifier_are_reached():
    pixels = PixelSetTransformer(score=SparseAttnClassifier())
    pixels.set_params(score__max_epochs=3)
    assert pixels.get_params()["score"].max_epochs == pixels.get_params()["score__max_epochs"] == 3
    assert "score__max_epochs" not in pixels.get_params(deep=False)


# ---- names of columns ----


def test_feature_names():
    frame = pd.DataFrame(np.arange(24.0).reshape(2, 12), columns=list("abcdefghijkl"))
    pixels = PixelSetTransformer(k=2, image_shape=(2, 3, 2)).fit(frame)
    np.testing.assert_array_equal(pixels.feature_names_in_, frame.columns)
    names = [f"pixel{i}_{part}" for i in range(2) for part in ("x", "y", "v0", "v1")]
    assert list(pixels.get_feature_names_out()) == names
    out = pixels.set_output(transform="pandas").transform(frame)
    assert list(out.columns) == names
    pixels.set_params(layout="sparse").set_output(transform="default")
    assert list(pixels.get_feature_names_out()) == list(frame.columns)
    pixels.fit(frame.to_numpy())
    assert list(pixels.get_feature_names_out()) == [f"x{i}" for i in range(12)]
    back = pixels.set_params(layout="flat").inverse_transform(out)
    np.testing.assert_array_equal(back[:, :8], 0)
    np.testing.assert_array_equal(back[:, 8:], frame.to_numpy()[:, 8:])


@pytest.mark.parametrize(("layout", "message"), [("set", "layout='set' is 3-D"), ("sparse", "sparse matrix")])
def test_layouts_that_are_no_data_frame(layout, message):
    pixels = PixelSetTransformer(layout=layout)
    assert pixels.fit_transform(X_CELLS).shape[0] == 16
    with config_context(transform_output="pandas"), pytest.raises(ValueError, match=message):
        pixels.fit_transform(X_CELLS)
    with pytest.raises(ValueError, match=message):
        pixels.set_output(transform="pandas").fit_transform(X_CELLS)
    with config_context(transform_output="pandas"):
        assert pixels.set_output(transform="default").fit_transform(X_CELLS).shape[0] == 16


# ---- among scikit-learn's tools ----


def test_score_is_a_parameter_and_no_method():
    pixels = PixelSetTransformer(score="gradient")
    assert pixels.get_params()["score"] == "gradient"
    assert not hasattr(pixels, "score")
    assert not hasattr(make_pipeline(pixels), "score")
    with pytest.raises(AttributeError, match="get_params"):
        _ = pixels.score
    assert "score='gradient'" in repr(clone(pixels))
    assert "gradient" in pixels._repr_html_()


@pytest.mark.parametrize("layout", ["flat", "sparse"])
def test_before_a_classifier(layout):
    X, y = load_digits(return_X_y=True)
    model = make_pipeline(PixelSetTransformer(k=0.3, layout=layout), LogisticRegression(max_iter=5000))
    assert cross_val_score(model, X[:600] / 16, y[:600], cv=3).mean() > 0.5


def test_grid_search_over_k():
    X, y = load_digits(n_class=3, return_X_y=True)
    model = make_pipeline(PixelSetTransformer(layout="sparse"), LogisticRegression())
    grid = {"pixelsettransformer__k": [1, 0.4], "pixelsettransformer__score": ["intensity", "gradient"]}
    search = GridSearchCV(model, grid, cv=2).fit(X[:150], y[:150])
    assert search.best_params_["pixelsettransformer__k"] == 0.4
    assert search.best_score_ > 0.9


def test_round_trips_through_files(classifier, tmp_path):
    pixels = PixelSetTransformer(score=FrozenEstimator(classifier), k=0.3).fit(X_CELLS)
    expected = pixels.transform(X_CELLS)
    joblib.dump(pixels, tmp_path / "pixels.joblib")
    stored = joblib.load(tmp_path / "pixels.joblib")
    np.testing.assert_array_equal(stored.transform(X_CELLS), expected)
    buffer = io.BytesIO(pickle.dumps(clone(stored)))
    np.testing.assert_array_equal(pickle.load(buffer).fit_transform(X_CELLS), expected)


# ---- what is refused ----


def shifted(tokens):
    tokens[0, 1, 0] += 0.4 / SIDE
    return tokens


def doubled(tokens):
    tokens[0, 1, :2] = tokens[0, 0, :2]
    return tokens


def outside(tokens):
    tokens[0, 1, 1] = 1 + 1 / SIDE
    return tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, r"a 12 × 12 image has no pixel"),
        (outside, r"a 12 × 12 image has no pixel"),
        (doubled, "same coordinates twice"),
        (lambda tokens: tokens[:, :-1], r"shape \(16, 4, 3\), but 5 pixels"),
        (lambda tokens: tokens.reshape(16, -1)[:, :-1], r"shape \(n, 15\) or \(n, 5, 3\)"),
        (lambda tokens: tokens.reshape(16, 3, 5), "shape"),
        (lambda tokens: sparse.csr_array(tokens.reshape(16, -1)), r"sparse matrix of shape \(n, 144\)"),
        (lambda tokens: tokens[0, 0], "2D"),
        (lambda tokens: np.where(tokens == tokens[0, 0, 2], np.nan, tokens), "NaN"),
    ],
)
def test_errors_of_inverse_transform(change, message):
    pixels = PixelSetTransformer(k=5, layout="set").fit(X_CELLS)
    with pytest.raises(ValueError, match=message):
        pixels.inverse_transform(change(pixels.transform(X_CELLS)))


def test_values_and_places_may_change_before_inverse_transform():
    pixels = PixelSetTransformer(k=5, layout="set").fit(X_CELLS)
    tokens = pixels.transform(X_CELLS)
    changed = tokens[:, ::-1] * [1, 1, 2]
    np.testing.assert_array_equal(pixels.inverse_transform(changed), 2 * pixels.inverse_transform(tokens))


def test_coordinates_of_wide_images_survive_float32():
    row = np.ones((1, 10**6), dtype=np.float32)
    pixels = PixelSetTransformer(k=1.0, image_shape=(1, 10**6)).fit(row)
    np.testing.assert_array_equal(pixels.inverse_transform(pixels.transform(row)), row)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k": 0}, "'k' parameter"),
        ({"k": 0.0}, "'k' parameter"),
        ({"k": 1.5}, "'k' parameter"),
        ({"score": "entropy"}, "'score' parameter"),
        ({"score": None}, "'score' parameter"),
        ({"score": LogisticRegression()}, "'score' parameter"),
        ({"score": FrozenEstimator(LogisticRegression())}, "'score' parameter"),
        ({"score": SparseAttnClassifier}, "score=SparseAttnClassifier is a class"),
        ({"score": SparseAttnClassifier()}, "requires y"),
        ({"layout": "dense"}, "'layout' parameter"),
        ({"order": "random"}, "'order' parameter"),
        ({"image_shape": (5, 5)}, "image_shape"),
    ],
)
def test_errors_of_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        PixelSetTransformer(**params).fit(X_CELLS)


def test_parameters_are_checked_again_after_the_fit():
    pixels = PixelSetTransformer().fit(X_CELLS).set_params(layout="dense")
    with pytest.raises(ValueError, match="'layout' parameter"):
        pixels.transform(X_CELLS)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda images: images, r"shape \(16, 12, 12, 1\)"),
        (lambda images: images[..., 0].astype(complex), "dtype complex128"),
        (lambda images: np.full(images.shape[:3], "a"), "dtype <U1"),
        (lambda images: np.where(images[..., 0] > 250, np.nan, 0), "without NaN"),
        (lambda images: [[1], [1, 2]], r"score=.* gave no array"),
    ],
)
def test_errors_of_scores(score, message):
    with pytest.raises(ValueError, match=message):
        PixelSetTransformer(score=score).fit_transform(X_CELLS)


def test_errors_of_frozen_classifiers(classifier):
    with pytest.raises(NotFittedError, match="frozen classifier that is not fitted"):
        PixelSetTransformer(score=FrozenEstimator(SparseAttnClassifier())).fit(X_CELLS)
    pixels = PixelSetTransformer(score=FrozenEstimator(classifier))
    with pytest.raises(ValueError, match=r"images of \(H, W, C\) = \(12, 12, 1\), but X has \(11, 12, 1\)"):
        pixels.fit(X_CELLS[:, 1:])
    with pytest.raises(NotFittedError):
        pixels.transform(X_CELLS)  # a fit that failed is none


def test_errors_of_images():
    pixels = PixelSetTransformer()
    for method in (pixels.transform, pixels.inverse_transform):
        with pytest.raises(NotFittedError):
            method(X_CELLS)
    with pytest.raises(NotFittedError):
        pixels.get_feature_names_out()
    pixels.fit(X_CELLS)
    with pytest.raises(ValueError, match="PixelSetTransformer was fitted to"):
        pixels.transform(X_CELLS[:, 1:])
    with pytest.raises(ValueError, match="NaN"):
        pixels.transform(np.full((1, SIDE, SIDE), np.nan))
    with pytest.raises(ValueError, match="moveaxis"):
        pixels.fit(np.zeros((2, 3, 8, 8)))


def test_global_generators_stay():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    PixelSetTransformer(score="gradient").fit_transform(X_CELLS)
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())
