"""SparseAttnClassifier as a scikit-learn user meets it: what goes in, what comes out, what is refused."""

import copy
import pickle
import random
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import joblib
import numpy as np
import pandas as pd
import pytest
import skorch
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.ensemble import StackingClassifier, VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import EpochTimer

from sklearn_sparseattn import DynamicK, SparseAttnClassifier
from sklearn_sparseattn.training.loss_trend_k import LossTrendK

SIDE = 12


def disks(n=90, n_classes=3, side=SIDE, seed=0):
    """uint8 images: a noisy background and one disk, whose radius tells the class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    radius = 1.0 + 1.2 * y + rng.uniform(-0.2, 0.2, n)
    centre = rng.uniform(0.4 * side, 0.6 * side, (2, n))
    i, j = np.mgrid[:side, :side]
    distance = np.hypot(i - centre[0][:, None, None], j - centre[1][:, None, None])
    images = 60 + 120 * (distance < radius[:, None, None]) + rng.integers(0, 40, (n, side, side))
    return images.astype(np.uint8), y


X, Y = disks()


def quick(**params):
    return SparseAttnClassifier(**{"max_epochs": 3, "random_state": 0, **params})


@pytest.fixture(scope="module")
def fitted():
    return quick(max_epochs=25).fit(X, Y)


# ---- what a fit gives ----


def test_it_learns(fitted):
    X_new, y_new = disks(seed=1)
    assert fitted.score(X_new, y_new) > 0.9


def test_fitted_attributes(fitted):
    np.testing.assert_array_equal(fitted.classes_, [0, 1, 2])
    assert fitted.n_features_in_ == SIDE * SIDE
    assert fitted.image_shape_ == (SIDE, SIDE, 1)
    assert fitted.data_range_ == (0.0, 255.0)
    assert fitted.n_iter_ == 25
    assert fitted.k_ == fitted.network_.n_chosen(SIDE, SIDE)  # tiles of one pixel in images so small
    assert list(fitted.history_) == [
        *("epoch", "train_loss", "focal_loss", "contrastive_loss", "distillation_loss", "consistency_loss"),
        *("k", "loss_at_half_k", "loss_at_k", "lr", "duration"),
    ]
    assert all(column.shape == (25,) for column in fitted.history_.values())
    assert len(pd.DataFrame(fitted.history_)) == 25


def test_history_adds_up(fitted):
    history = fitted.history_
    total = history["focal_loss"] + 0.1 * history["contrastive_loss"] + 0.02 * history["distillation_loss"]
    np.testing.assert_allclose(history["train_loss"], total, rtol=1e-5)


def test_k_begins_where_it_is_told_and_stays_within_its_bounds(fitted):
    k = fitted.history_["k"]
    assert k[0] == pytest.approx(8000 / 18225 * SIDE**2)
    assert np.ptp(k) > 0
    assert 1 <= k.min() <= k.max() <= SIDE**2


def test_history_has_the_losses_by_which_k_was_found(fitted):
    at_k, at_half_k = fitted.history_["loss_at_k"], fitted.history_["loss_at_half_k"]
    assert np.isfinite(at_k).all()
    assert np.isfinite(at_half_k).all()
    assert (at_k != at_half_k).any()
    # They are losses of the answer on training batches, which fall as the network learns.
    for losses in (at_k, at_half_k):
        assert losses[-5:].mean() < 0.5 * losses[:5].mean()


def test_more_tolerance_gives_no_more_pixels():
    """What no gain in loss can reach lets k fall in every epoch; it rises where any gain is enough."""
    lenient, strict = (quick(max_epochs=12, k_tolerance=tolerance).fit(X, Y) for tolerance in (1e6, 0))
    assert np.all(np.diff(lenient.history_["k"]) < 0)
    assert lenient.k_ < strict.k_


@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (63, 3), (3, 40, 2)])
def test_k_counts_the_pixels_of_images_that_are_lower_than_a_tile(shape):
    """A tile of four pixels a side has four in an image of one row: half the pixels are half the tiles."""
    images, y = np.random.default_rng(0).integers(0, 256, (30, *shape), dtype=np.uint8), np.arange(30) % 3
    n_pixels, n_tiles = shape[0] * shape[1], -(-max(shape[:2]) // 4)
    area = 4 * min(shape[:2])
    clf = quick(max_epochs=1, k_init=n_pixels // 2).fit(images, y)
    assert clf.network_.tile == 4
    assert clf.k_ == int(n_pixels // 2 / area + 0.5) * area
    assert quick(max_epochs=1, k_init=1).fit(images, y).k_ == area
    assert quick(max_epochs=1, k_init=n_pixels).fit(images, y).k_ == n_pixels
    by_pytorch = copy.copy(clf)
    by_pytorch._engine = None
    for share in (0.25, 0.5, 0.75):
        n = int(share * n_pixels / area + 0.5)
        for one in (clf, by_pytorch):
            one.set_params(predict_k=round(share * n_pixels))
            assert one.attention_maps(images).tiles.shape == (30, n)
            assert 1 < n < n_tiles


@pytest.mark.parametrize(("side", "tile"), [(12, 1), (20, 2), (33, 4)])
def test_k_counts_the_pixels_of_whole_tiles(side, tile):
    images, y = disks(30, side=side)
    clf = quick(max_epochs=1, k_init=50).fit(images, y)
    assert clf.network_.tile == tile
    assert clf.k_ == int(50 / tile**2 + 0.5) * tile**2
    assert clf.history_["k"].tolist() == [50]
    assert clf.attention_maps(images).tiles.shape == (30, clf.k_ / tile**2)
    for every in (1.0, side**2, 10**9):  # also where tiles at the border are cut
        assert clf.set_params(predict_k=every).attention_maps(images).chosen.all()
    assert quick(max_epochs=1, k_init=1.0).fit(images, y).k_ == side**2
    assert quick(max_epochs=1, k_init=1).fit(images, y).k_ == tile**2


def test_probabilities(fitted):
    proba = fitted.predict_proba(X)
    assert proba.dtype == np.float64
    assert proba.shape == (90, 3)
    np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-7)
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[proba.argmax(axis=1)])


def test_transform_gives_what_the_classifier_reads(fitted):
    features = fitted.transform(X)
    assert features.dtype == np.float32
    assert features.shape[1] == len(fitted.get_feature_names_out())
    assert fitted.transform(X.astype(np.float64)).dtype == np.float64
    with torch.inference_mode():
        fusion = fitted.network_.fusion
        logits = fusion(torch.from_numpy(features)).numpy()
    np.testing.assert_array_equal(logits.argmax(axis=1), fitted.predict(X))


def test_transform_as_a_data_frame():
    clf = quick().set_output(transform="pandas").fit(X, Y)
    frame = clf.transform(X)
    assert list(frame.columns) == list(clf.get_feature_names_out())


@pytest.mark.parametrize(
    ("params", "n_features"),
    [({}, 20 + 20 + 32), ({"size": "large"}, 20 + 20 + 64), ({"variant": "paper"}, 20 + 48)],
    ids=["tiles", "large", "paper"],
)
def test_forms_of_the_network(params, n_features):
    clf = quick(max_epochs=25, embed_dim=20, **params).fit(X, Y)
    assert clf.transform(X).shape == (90, n_features)
    assert clf.score(X, Y) > 0.9
    loaded = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))
    again = clone(clf).fit(X, Y)
    np.testing.assert_array_equal(again.predict_proba(X), clf.predict_proba(X))


@pytest.mark.parametrize(("side", "tile"), [(12, 1), (33, 4)])
@pytest.mark.parametrize("variant", ["tiles", "paper"])
def test_attention_maps(side, tile, variant):
    images, y = disks(30, side=side)
    clf = quick(variant=variant, k_max=0.4).fit(images, y)
    maps, n = clf.attention_maps(images), len(images)
    tile = 1 if variant == "paper" else tile
    assert set(maps) == {"coarse", "tiles", "chosen", "fine", "contribution"}
    for name in ("coarse", "chosen", "fine", "contribution"):
        assert maps[name].shape == (n, side, side)
    assert maps.chosen.dtype == bool
    assert maps.tiles.dtype == np.int64
    assert np.all((maps.coarse > 0) & (maps.coarse < 1))
    assert np.all(maps.fine >= 0)
    assert maps.contribution.min() < 0 or maps.contribution.max() > 0
    for name in ("fine", "contribution"):
        assert not maps[name][~maps.chosen].any()
    # By tile: all of its pixels are chosen or none is, and they have one value in every map.
    rows, columns = clf.network_.grid_of(side, side)
    of_pixel = np.add.outer(np.arange(side) // tile * columns, np.arange(side) // tile)
    by_tile = np.zeros((n, rows * columns), bool)
    np.put_along_axis(by_tile, maps.tiles, True, axis=1)
    np.testing.assert_array_equal(by_tile.sum(axis=1), maps.tiles.shape[1])  # each tile once
    np.testing.assert_array_equal(maps.chosen, by_tile[:, of_pixel])
    first = np.unique(of_pixel, return_index=True)[1]
    for name in ("coarse", "fine", "contribution"):
        np.testing.assert_array_equal(maps[name].reshape(n, -1)[:, first][:, of_pixel], maps[name])
    # The chosen tiles are the best by coarse attention, and come best first.
    coarse = maps.coarse.reshape(n, -1)[:, first]
    by_score = np.take_along_axis(coarse, maps.tiles, axis=1)
    assert np.all(np.diff(by_score, axis=1) <= 0)
    assert np.all(by_score[:, -1] >= np.where(by_tile, -np.inf, coarse).max(axis=1))


def test_an_image_alone_is_the_same_image(fitted):
    together = fitted.predict_proba(X)
    for rows in ([0], [89], [5, 3], list(range(89, -1, -1))):
        np.testing.assert_allclose(fitted.predict_proba(X[rows]), together[rows], rtol=0, atol=1e-9)


# ---- how many pixels it predicts with ----


def with_k(clf, predict_k):
    """The same fitted estimator, of another `predict_k`."""
    return copy.copy(clf).set_params(predict_k=predict_k)


def test_predict_k_is_read_at_prediction(fitted):
    """Without a new fit, and at every call anew."""
    clf = copy.copy(fitted)
    before = clf.predict_proba(X)
    np.testing.assert_array_equal(clf.set_params(predict_k=fitted.k_).predict_proba(X), before)
    for predict_k, n in [(20, 20), (0.25, 36), (1.0, 144), (1, 1), (10**400, 144), (np.int64(7), 7)]:
        clf.set_params(predict_k=predict_k)
        maps = clf.attention_maps(X)
        np.testing.assert_array_equal(maps.chosen.sum(axis=(1, 2)), n)
        assert maps.tiles.shape == (90, n)
        np.testing.assert_allclose(clf.predict_proba(X).sum(axis=1), 1)
    assert clf.k_ == fitted.k_  # what the data asked for stays
    np.testing.assert_array_equal(clf.set_params(predict_k=None).predict_proba(X), before)


@pytest.mark.parametrize("method", ["predict_proba", "transform", "evidence_maps", "occlusion_maps"])
def test_predict_k_changes_every_answer(fitted, method):
    options = {"n_masks": 20} if method == "occlusion_maps" else {}
    few, many = (getattr(with_k(fitted, k), method)(X[:9], **options) for k in (4, 144))
    assert not np.allclose(few, many, atol=1e-3 * np.abs(many).max())


def test_a_share_is_the_pixels_of_that_share(fitted):
    by_share, by_count = (with_k(fitted, k).predict_proba(X) for k in (0.125, 18))
    np.testing.assert_array_equal(by_share, by_count)


@pytest.mark.parametrize("side", [12, 33])
@pytest.mark.parametrize("predict_k", [None, 1, 40, 0.5, 1.0])
def test_engine_and_pytorch_choose_as_many(side, predict_k, monkeypatch):
    rng = np.random.default_rng(0)
    images, y = rng.normal(size=(24, side, side)), np.arange(24) % 3  # no two scores tie
    clf = quick(predict_k=predict_k).fit(images, y)
    assert clf._engine is not None
    compiled = clf.attention_maps(images), clf.predict_proba(images)
    monkeypatch.setattr(clf, "_engine", None)
    plain = clf.attention_maps(images), clf.predict_proba(images)
    np.testing.assert_allclose(compiled[1], plain[1], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(compiled[0].chosen, plain[0].chosen)
    np.testing.assert_allclose(compiled[0].coarse, plain[0].coarse, rtol=0, atol=1e-5)


def test_predict_k_survives_a_pickle_and_is_cloned(fitted):
    clf = with_k(fitted, 9)
    loaded = pickle.loads(pickle.dumps(clf))
    assert loaded.predict_k == clone(clf).predict_k == 9
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))


def test_predict_k_says_nothing_to_the_fit():
    one, other = (quick(predict_k=k).fit(X, Y) for k in (None, 5))
    assert one.k_ == other.k_
    np.testing.assert_array_equal(other.set_params(predict_k=None).predict_proba(X), one.predict_proba(X))


@pytest.mark.parametrize("predict_k", [0, -3, 0.0, 1.5, np.nan, "all", True, [5]])
@pytest.mark.parametrize(
    "method", ["predict", "predict_proba", "transform", "attention_maps", "evidence_maps", "occlusion_maps"]
)
def test_a_bad_predict_k_is_named_at_prediction(fitted, method, predict_k):
    with pytest.raises(ValueError, match=r"predict_k="):
        getattr(with_k(fitted, predict_k), method)(X)


# ---- the published configuration ----


def test_paper_is_the_published_configuration_in_one_call():
    clf = SparseAttnClassifier.paper()
    expected = {"variant": "paper", "k_init": 8000, "hidden_dim": 512, "focal_gamma": 2.0, "lr": 1e-3}
    expected |= {"weight_decay": 1e-4, "lr_schedule": "plateau", "batch_size": 64}
    expected |= {"contrastive_weight": 0.1, "temperature": 0.07, "distillation_weight": 0.02, "n_heads": 2}
    found = clf.get_params()
    assert {name: found[name] for name in expected} == expected
    assert found["k_min"] == 1500
    assert found["k_max"] == 1.0
    [rule] = clf.callbacks
    assert (rule.shrink, rule.grow, rule.ema_decay, rule.momentum, rule.update) == (50, 80, 0.2, 0.2, "batch")


def test_paper_is_fitted_and_cloned():
    clf = SparseAttnClassifier.paper(k_init=60, k_min=20, max_epochs=4, random_state=0)
    first = clf.fit(X, Y).predict_proba(X)
    assert clf.network_.tile == 1
    assert "valid_loss" in clf.history_
    assert "loss_at_k" not in clf.history_
    assert set(np.diff(clf.history_["k"])) != {0.0}
    assert 20 <= clf.k_ <= SIDE**2
    np.testing.assert_array_equal(clone(clf).fit(X, Y).predict_proba(X), first)


@pytest.mark.parametrize(
    "params",
    [
        {"k_min": 500},
        {"hidden_dim": 64},
        {"lr_schedule": "onecycle"},
        {"callbacks": None},
        {"k_min": 20, "k_max": 90},
    ],
)
def test_parameters_given_to_paper_take_their_place(params):
    clf = SparseAttnClassifier.paper(max_epochs=1, random_state=0, **params)
    assert {name: clf.get_params()[name] for name in params} == params
    clf.fit(X, Y)
    assert clf.k_ <= clf.get_params()["k_max"] * SIDE**2


def test_two_estimators_of_the_paper_share_nothing():
    one, other = SparseAttnClassifier.paper(), SparseAttnClassifier.paper()
    assert one.callbacks is not other.callbacks
    assert one.callbacks[0] is not other.callbacks[0]


# ---- what may go in ----


def as_memmap(images, folder):
    path = folder / "images.npy"
    np.save(path, images)
    return np.load(path, mmap_mode="r")


FORMS = {
    "rows": lambda images, _: images.reshape(len(images), -1),
    "images": lambda images, _: images,
    "images with a channel": lambda images, _: images[..., None],
    "nested lists": lambda images, _: images.tolist(),
    "sparse": lambda images, _: sparse.csr_matrix(images.reshape(len(images), -1)),
    "sparse array": lambda images, _: sparse.coo_array(images.reshape(len(images), -1)),
    "read-only memmap": as_memmap,
    "strided": lambda images, _: np.repeat(images, 2, axis=2)[:, :, ::2],
    "float64": lambda images, _: images.astype(np.float64),
    "float32": lambda images, _: images.astype(np.float32),
    "int16": lambda images, _: images.astype(np.int16),
    "uint64": lambda images, _: images.astype(np.uint64),
    "big-endian": lambda images, _: images.astype(">u2"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_after_fit(fitted, form, tmp_path):
    converted = FORMS[form](X, tmp_path)
    np.testing.assert_array_equal(fitted.predict_proba(converted), fitted.predict_proba(X))


@pytest.mark.parametrize("form", ["rows", "images with a channel", "read-only memmap", "float64"])
def test_every_form_can_be_fitted(form, tmp_path):
    converted = FORMS[form](X, tmp_path)
    clf = quick(data_range=(0, 255)).fit(converted, Y)
    expected = quick().fit(X, Y).predict_proba(X)
    np.testing.assert_array_equal(clf.predict_proba(X), expected)


def test_sparse_and_dense_fits_are_one():
    counts = np.where(X > 180, X, 0)
    rows = sparse.csr_matrix(counts.reshape(len(X), -1).astype(np.float64))
    dense = quick(data_range=(0, counts.max())).fit(counts, Y)
    np.testing.assert_array_equal(quick().fit(rows, Y).predict_proba(rows), dense.predict_proba(counts))


def test_x_is_left_alone():
    images = X.astype(np.float32)
    kept = images.copy()
    quick(augment="dihedral").fit(images, Y).predict(images)
    np.testing.assert_array_equal(images, kept)


def test_data_frame_brings_its_names():
    names = [f"pixel {i}" for i in range(SIDE * SIDE)]
    frame = pd.DataFrame(X.reshape(len(X), -1), columns=names)
    clf = quick().fit(frame, Y)
    assert list(clf.feature_names_in_) == names
    np.testing.assert_array_equal(clf.predict_proba(frame), quick().fit(X, Y).predict_proba(X))
    with pytest.raises(ValueError, match="feature names"):
        clf.predict(frame[names[::-1]])


@pytest.mark.parametrize(
    "labels", [np.array(["b", "c", "a"]), np.array([10, -3, 7]), np.array([False, True, True]),
               np.array(["x", "y", "z"], dtype=object)], ids=str,
)  # fmt: skip
def test_labels_of_any_kind(labels):
    y = labels[Y]
    clf = quick(max_epochs=25).fit(X, y)
    np.testing.assert_array_equal(clf.classes_, np.unique(y))
    assert clf.predict(X).dtype == np.unique(y).dtype
    assert clf.score(X, y) > 0.9


def test_sixteen_bit_images_that_use_twelve():
    images = X.astype(np.uint16) * 16
    clf = quick(max_epochs=25).fit(images, Y)
    assert clf.data_range_ == (float(images.min()), float(images.max()))
    assert clf.score(images, Y) > 0.9


def test_signed_images_keep_zero():
    events = X.astype(np.int8) - 100
    assert events.min() < 0
    clf = quick().fit(events, Y)
    assert clf.data_range_ == (0.0, float(np.abs(events.astype(int)).max()))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (2, 2), (9, 30)], ids=str)
def test_images_of_any_size(shape):
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    images = rng.uniform(size=(40, *shape)) + y[:, None, None]
    clf = quick(max_epochs=20).fit(images, y)
    assert clf.score(images, y) > 0.9
    assert 1 <= clf.k_ <= shape[0] * shape[1]


@pytest.mark.parametrize("n_channels", [2, 3, 5])
def test_any_number_of_channels(n_channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (30, 8, 9, n_channels), dtype=np.uint8)
    clf = quick().fit(images, np.arange(30) % 3)
    assert clf.image_shape_ == (8, 9, n_channels)
    rows = images.reshape(30, -1)
    np.testing.assert_array_equal(clf.predict_proba(rows), clf.predict_proba(images))


def test_rows_of_images_that_are_not_square():
    images = X[:, :8]
    rows = images.reshape(len(X), -1)
    by_shape = quick(image_shape=(8, SIDE)).fit(rows, Y)
    np.testing.assert_array_equal(by_shape.predict_proba(rows), quick().fit(images, Y).predict_proba(images))


def test_one_row_and_one_class():
    clf = quick().fit(X[:1], ["only"])
    assert clf.predict(X[:3]).tolist() == ["only"] * 3
    np.testing.assert_array_equal(clf.predict_proba(X[:3]), 1)


@pytest.mark.parametrize(
    ("k_init", "k"), [(8000 / 18225, 507 * 16), (8000, 8000), (1, 94 * 16)], ids=["share", "count", "bound"]
)
def test_k_in_pixels_on_images_of_the_paper(k_init, k):
    """`SparseAttnClassifier(k_min=1500).fit(X, y)`: tiles of 16 pixels, shares of 34×34 tiles."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 135, 135), dtype=np.uint8)
    clf = SparseAttnClassifier(k_min=1500, k_init=k_init, max_epochs=1, random_state=0)
    assert clf.fit(images, np.arange(8) % 2).k_ == k


# ---- weights ----


def test_rows_without_weight_do_not_exist():
    weight = np.where(np.arange(90) < 60, 1.0, 0.0)
    weighted = quick().fit(X, Y, sample_weight=weight)
    np.testing.assert_array_equal(weighted.predict_proba(X), quick().fit(X[:60], Y[:60]).predict_proba(X))


def test_only_the_proportion_of_weights_counts():
    weight = np.random.default_rng(0).uniform(1, 2, 90)
    one = quick().fit(X, Y, sample_weight=weight).predict_proba(X)
    np.testing.assert_allclose(
        quick().fit(X, Y, sample_weight=1024 * weight).predict_proba(X), one, atol=1e-6
    )


def test_weights_move_the_answer():
    rng = np.random.default_rng(0)
    images, y = (
        rng.uniform(size=(60, 6, 6)),
        np.arange(60) % 2,
    )  # nothing to learn but how frequent a class is
    heavy = quick(max_epochs=8).fit(images, y, sample_weight=np.where(y == 1, 50.0, 1.0))
    by_class = quick(max_epochs=8, class_weight={0: 1, 1: 50}).fit(images, y)
    for clf in (heavy, by_class):
        assert (clf.predict(images) == 1).mean() > 0.9


def test_balanced_classes_are_as_weighted_by_hand():
    rows = np.flatnonzero((Y != 2) | (np.arange(90) < 15))
    images, y = X[rows], Y[rows]
    counts = np.bincount(y)
    by_hand = dict(enumerate(len(y) / (3 * counts)))
    balanced = quick(class_weight="balanced").fit(images, y).predict_proba(images)
    np.testing.assert_array_equal(quick(class_weight=by_hand).fit(images, y).predict_proba(images), balanced)


TERMS = ("focal_loss", "contrastive_loss", "distillation_loss", "consistency_loss")


def terms_of_the_first_step(images=X, y=Y, weight=None, **params):
    """The terms of the loss before anything is learned, of all rows in one batch, with a k that stays."""
    rule = DynamicK.paper(k_min=None, k_max=None)
    clf = quick(max_epochs=1, batch_size=10**6, callbacks=[rule], **params)
    history = clf.fit(images, y, sample_weight=weight).history_
    return np.array([history[name][0] for name in TERMS])


def test_weights_reach_every_term_of_the_loss():
    """Each term is a mean by weight: linear in weights of mean 1."""
    views = {"augment": lambda images, rng: images * rng.uniform(0.5, 1, (len(images), 1, 1, 1)).astype("f4")}
    rng = np.random.default_rng(0)
    weights = [weight / weight.mean() for weight in rng.uniform(0.1, 2, (2, 90)) ** 6]
    one, other, mixed, none = (
        terms_of_the_first_step(weight=weight, consistency_weight=1, **views)
        for weight in (*weights, 0.3 * weights[0] + 0.7 * weights[1], None)
    )
    np.testing.assert_allclose(mixed, 0.3 * one + 0.7 * other, rtol=1e-5)
    for terms in (one, other):
        assert np.all(np.abs(terms - none) > 1e-3 * none)


def test_a_weight_of_two_is_a_row_that_comes_twice_where_all_rows_do():
    """Else batch norm and, for the contrastive loss, the pairs know the difference."""
    once, weighted = (terms_of_the_first_step(weight=weight) for weight in (None, np.full(90, 2.0)))
    twice = terms_of_the_first_step(np.concatenate([X, X]), np.concatenate([Y, Y]))
    np.testing.assert_array_equal(once, weighted)
    np.testing.assert_allclose(twice[[0, 2]], weighted[[0, 2]], rtol=1e-3)  # sums in another order


def test_balanced_classes_count_rows_by_their_weights():
    weight = np.where(Y == 2, 2.0, 1.0)
    by_hand = {0: 120 / (3 * 30), 1: 120 / (3 * 30), 2: 120 / (3 * 60)}
    balanced, expected = (
        quick(class_weight=given).fit(X, Y, sample_weight=weight).predict_proba(X)
        for given in ("balanced", by_hand)
    )
    np.testing.assert_allclose(balanced, expected, rtol=0, atol=1e-5)


# ---- the training loop ----


def test_same_seed_same_bits():
    first, second = (quick(augment="dihedral").fit(X, Y).predict_proba(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(quick(random_state=1).fit(X, Y).predict_proba(X), first)


def test_random_state_instance_is_drawn_from():
    state = np.random.RandomState(0)
    first, second = (quick(random_state=state).fit(X, Y).predict_proba(X) for _ in range(2))
    assert not np.array_equal(first, second)


def global_state():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - it must not have been written
        random.getstate(),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        list(warnings.filters),
        np.geterr(),
    )


@pytest.mark.parametrize("random_state", [0, None])
def test_nothing_global_is_touched(random_state):
    before = global_state()
    clf = quick(random_state=random_state, augment="dihedral", early_stopping=True).fit(X, Y)
    clf.predict(X)
    clf.attention_maps(X)
    assert global_state() == before


class CountThreads(skorch.callbacks.Callback):
    """PyTorch's threads within a step of training and between two."""

    def initialize(self):
        self.counts_ = set()
        return self

    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.counts_.add(torch.get_num_threads())

    def on_batch_end(self, net, **kwargs):
        self.counts_.add(torch.get_num_threads())


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_fit_has_the_threads_of_pytorch(n_threads):
    watch, before = CountThreads(), torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        quick(callbacks=[watch], max_epochs=1).fit(X, Y)
        assert watch.counts_ == {n_threads}
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)


def test_an_exception_in_the_middle_leaves_the_world_alone():
    calls = []

    def fail_later(images, rng):
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return images

    before = global_state()
    clf = quick(augment=fail_later, max_epochs=5)
    with pytest.raises(RuntimeError, match="out of luck"):
        clf.fit(X, Y)
    assert global_state() == before
    assert not hasattr(clf, "network_")
    with pytest.raises(NotFittedError):
        clf.predict(X)


def test_two_threads_fit_as_one_after_the_other():
    def fit(seed):
        return quick(random_state=seed, max_epochs=5, augment="dihedral").fit(X, Y).predict_proba(X)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(fit, [0, 1]))
    for seed, proba in enumerate(together):
        np.testing.assert_array_equal(proba, fit(seed))


def test_early_stopping_goes_back_to_the_best_epoch():
    seen = {}

    class Watch(skorch.callbacks.Callback):
        def on_epoch_end(self, net, **kwargs):
            seen[net.history[-1, "valid_loss"]] = net.module_.fusion.out.weight.detach().clone()

    images, y = X.copy(), np.random.default_rng(0).permutation(Y)  # labels at random: it can only overfit
    clf = quick(max_epochs=60, early_stopping=True, patience=4, callbacks=[Watch()]).fit(images, y)
    assert clf.n_iter_ < 60
    best = clf.history_["valid_loss"].argmin()
    assert best == clf.n_iter_ - 5
    best_weights = seen[clf.history_["valid_loss"][best]]
    assert torch.equal(clf.network_.fusion.out.weight, best_weights)
    assert clf.k_ == int(clf.history_["k"][best] + 0.5)


def test_validation_only_where_something_uses_it():
    assert "valid_loss" not in quick().fit(X, Y).history_
    assert "valid_loss" in quick(lr_schedule="plateau").fit(X, Y).history_
    assert "valid_score" in quick().fit(X, Y, X_val=X[:9], y_val=Y[:9]).history_
    # Too few rows of a class: the schedule follows the training loss instead.
    y = np.where(np.arange(90) == 0, 3, Y)
    assert "valid_loss" not in quick(lr_schedule="plateau").fit(X, y).history_


def test_given_validation_rows_are_not_trained_on():
    both = quick(early_stopping=True).fit(X[:60], Y[:60], X_val=X[60:], y_val=Y[60:])
    alone = quick().fit(X[:60], Y[:60])
    assert len(alone.history_["epoch"]) > 1
    for name in ("train_loss", "k", "lr"):  # by epoch: early stopping brings the best one back, not the last
        np.testing.assert_array_equal(both.history_[name], alone.history_[name])
    unused = quick().fit(X[:60], Y[:60], X_val=X[60:], y_val=Y[60:])
    np.testing.assert_array_equal(unused.predict_proba(X), alone.predict_proba(X))


def test_learning_rate_schedules():
    lr = quick(max_epochs=20).fit(X, Y).history_["lr"]
    assert 0 < lr.argmax() < 10
    assert lr[-1] < 0.01 * lr.max() <= 1e-2
    assert np.all(quick(lr_schedule=None, lr=1e-3).fit(X, Y).history_["lr"] == 1e-3)
    y = np.random.default_rng(0).permutation(Y)
    lr = quick(lr_schedule="plateau", lr=1e-3, max_epochs=30).fit(X, y).history_["lr"]
    assert set(np.round(np.log(lr / 1e-3) / np.log(0.9), 6)) >= {0.0, 1.0}


@pytest.mark.parametrize("lr", [1e-2, 2e-3])
def test_weight_decay_is_scaled_by_the_steps_of_the_fit(lr):
    """None shrinks weights without gradient by a factor of e^3 over the fit, were the rate always `lr`."""
    images, y = X[:, ::2, ::2], Y
    n_steps = 8 * 45
    fits = [
        quick(max_epochs=8, batch_size=2, lr=lr, weight_decay=decay).fit(images, y).predict_proba(images)
        for decay in (None, 3 / (lr * n_steps), 0.0)
    ]
    np.testing.assert_allclose(fits[0], fits[1], rtol=0, atol=1e-6)
    assert not np.allclose(fits[0], fits[2], atol=1e-3)


@pytest.mark.parametrize("max_epochs", [1, 3])
@pytest.mark.parametrize("lr_schedule", ["onecycle", None])
def test_weight_decay_of_few_steps_leaves_the_weights_in_place(max_epochs, lr_schedule):
    """One batch a pass: however few the steps, none shrinks the weights to nothing or turns their sign."""
    untrained, trained = (
        quick(max_epochs=max_epochs, batch_size=90, lr_schedule=lr_schedule, lr=1e-4, weight_decay=decay)
        .fit(X, Y)
        .network_.fusion.first[0]
        .weight.detach()
        for decay in (0.0, None)
    )
    ratio = torch.linalg.vector_norm(trained) / torch.linalg.vector_norm(untrained)
    assert 0.5 < ratio < 1.01
    assert torch.dot(trained.flatten(), untrained.flatten()) > 0


def test_batch_norm_statistics_are_those_of_the_training_rows():
    clf = quick().fit(X, Y)
    norm = clf.network_.coarse.early[1]
    weight = clf.network_.coarse.early[0]
    with torch.no_grad():
        images = torch.from_numpy(X[:, None] / np.float32(255))
        features = weight(images - clf.network_.coarse.background)
    mean = features.mean((0, 2, 3))
    np.testing.assert_allclose(norm.running_mean.numpy(), mean.numpy(), rtol=1e-3, atol=1e-5)


def test_augment_sees_scaled_images_and_our_generator():
    seen = []

    def look(images, rng):
        seen.append((images.dtype, images.shape[1:], float(images.max()), type(rng)))
        return images

    quick(max_epochs=1, augment=look).fit(X, Y)
    dtype, shape, highest, generator = seen[0]
    assert dtype == np.float32
    assert shape == (1, SIDE, SIDE)
    assert 0.5 < highest <= 1
    assert generator is np.random.Generator


def test_consistency_gives_views_of_an_image_one_answer():
    """Against the same fit without: mirrored images, also new ones, are answered more alike."""
    # Without noise all views are answered alike anyway.
    noise = np.random.default_rng(0).normal(0, 80, (2, *X.shape))

    def apart(weight):
        clf = quick(max_epochs=15, augment="dihedral", consistency_weight=weight).fit(X + noise[0], Y)
        new = disks(seed=1)[0] + noise[1]
        log_p, log_q = (np.log(clf.predict_proba(images)) for images in (new, new[:, ::-1]))
        return ((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)).sum(1).mean() / 2, clf.history_

    (without, plain), (with_it, history) = apart(0.0), apart(5.0)
    assert with_it < 0.5 * without
    assert not plain["consistency_loss"].any()
    assert (history["consistency_loss"] > 0).all()
    total = history["focal_loss"] + 0.1 * history["contrastive_loss"] + 0.02 * history["distillation_loss"]
    np.testing.assert_allclose(history["train_loss"], total + 5 * history["consistency_loss"], rtol=1e-5)


def test_consistency_in_single_passes_and_from_the_same_seed():
    first, second = (
        quick(augment="dihedral", consistency_weight=1).partial_fit(X, Y, classes=[0, 1, 2]).partial_fit(X, Y)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    with pytest.raises(ValueError, match="consistency_weight=1 needs augment"):
        quick(consistency_weight=1).partial_fit(X, Y, classes=[0, 1, 2])


def test_callbacks_are_called():
    class Count(skorch.callbacks.Callback):
        n_epochs = 0

        def on_epoch_end(self, net, **kwargs):
            self.n_epochs += 1

    counter = Count()
    quick(callbacks=[counter]).fit(X, Y)
    quick(callbacks=[("counter", counter)]).fit(X, Y)
    assert counter.n_epochs == 6


def test_silent_unless_verbose(capfd):
    quick().fit(X, Y).predict(X)
    assert capfd.readouterr() == ("", "")
    quick(verbose=1).fit(X, Y)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "loss" in err
    assert "k=" in err


def test_interrupted_fit_keeps_what_it_has():
    class Interrupt(skorch.callbacks.Callback):
        def __init__(self, epoch):
            self.epoch = epoch

        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == self.epoch:
                raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 1 of 3 epochs; .* epoch 1, the last whole one"):
        clf = quick(callbacks=[Interrupt(2)]).fit(X, Y)
    assert clf.n_iter_ == 1
    clf.predict(X)
    with pytest.raises(KeyboardInterrupt):
        quick(callbacks=[Interrupt(1)]).fit(X, Y)


def test_warm_start_goes_on():
    clf = quick(warm_start=True, max_epochs=10).fit(X, Y)
    before = clf.history_["train_loss"][-1]
    k = clf.network_.k.item()
    clf.set_params(max_epochs=2, lr=1e-4).fit(X, Y)
    assert clf.n_iter_ == 12
    assert clf.history_["train_loss"][-1] < 1.5 * before
    assert clf.history_["k"][10] == pytest.approx(k)
    cold = clf.set_params(warm_start=False).fit(X, Y)
    assert cold.n_iter_ == 2
    assert cold.history_["k"][0] == pytest.approx(8000 / 18225 * SIDE**2)


def test_warm_start_puts_k_within_new_bounds():
    clf = quick(warm_start=True).fit(X, Y)
    assert clf.set_params(k_max=10).fit(X, Y).k_ <= 10
    with pytest.raises(ValueError, match="labels"):
        clf.fit(X, np.where(Y == 0, 7, Y))
    with pytest.raises(ValueError, match="shape"):
        clf.fit(X[:, :5], Y)


def test_partial_fit_goes_on_where_it_stopped():
    clf = quick(lr=2e-3)
    for _ in range(15):
        clf.partial_fit(X, Y, classes=[0, 1, 2])
    assert clf.n_iter_ == 15
    assert clf.history_["train_loss"][-1] < 0.7 * clf.history_["train_loss"][0]
    assert set(clf.history_["lr"]) == {2e-3}
    # k moves by worth from pass to pass, by at most 12 % at a time, and does not start anew.
    steps = np.abs(np.diff(np.log(clf.history_["k"])))
    assert 0 < steps.max() <= 0.12 + 1e-6
    assert np.ptp(np.log(clf.history_["k"])) > 0.12


def test_partial_fit_keeps_the_controller_the_optimiser_and_the_generator():
    """Many passes in one call each are what one fit over them is, with the same rate and weight decay."""
    options = {"lr": 2e-3, "weight_decay": 0.0, "lr_schedule": None}
    whole = quick(max_epochs=5, **options).fit(X, Y)
    parts = quick(max_epochs=1, **options)
    for _ in range(5):
        parts.partial_fit(X, Y, classes=[0, 1, 2])
    for name in ("train_loss", "k", "loss_at_k", "loss_at_half_k", "lr"):
        np.testing.assert_array_equal(parts.history_[name], whole.history_[name], err_msg=name)
    for one, other in zip(parts.network_.parameters(), whole.network_.parameters(), strict=True):
        np.testing.assert_array_equal(one.detach().numpy(), other.detach().numpy())


def test_partial_fit_of_many_small_parts_learns():
    clf = quick(lr=2e-3)
    for _ in range(12):
        for rows in np.array_split(np.random.default_rng(0).permutation(90), 6):
            clf.partial_fit(X[rows], Y[rows], classes=[0, 1, 2])
    assert clf.score(X, Y) > 0.8


def test_partial_fit_survives_a_pickle_in_between():
    straight, broken = quick(), quick()
    for i in range(4):
        straight.partial_fit(X, Y, classes=[0, 1, 2])
        broken.partial_fit(X, Y, classes=[0, 1, 2])
        if i == 1:
            broken = pickle.loads(pickle.dumps(broken))
    np.testing.assert_array_equal(straight.predict_proba(X), broken.predict_proba(X))


def test_partial_fit_takes_batches_of_few_classes_and_rows():
    clf = quick().partial_fit(X[:1], Y[:1], classes=[0, 1, 2])
    clf.partial_fit(X[Y == 2], Y[Y == 2], sample_weight=np.ones((Y == 2).sum()))
    assert clf.predict_proba(X).shape == (90, 3)
    assert np.isfinite(clf.predict_proba(X)).all()


def test_fit_after_partial_fit_starts_anew():
    clf = quick().partial_fit(X, Y, classes=[0, 1, 2]).fit(X, Y)
    np.testing.assert_array_equal(clf.predict_proba(X), quick().fit(X, Y).predict_proba(X))


# ---- in scikit-learn's company ----


def test_digits_as_the_readme_says():
    """`cross_val_score` with the defaults, on the first of the rows, for the sake of time."""
    images, y = load_digits(return_X_y=True)
    clf = SparseAttnClassifier(random_state=0)
    assert cross_val_score(clf, images[:300], y[:300], cv=2, error_score="raise").mean() > 0.9


def test_grid_search_over_the_loss_weights():
    grid = {"contrastive_weight": [0.0, 0.1], "distillation_weight": [0.0, 0.02]}
    search = GridSearchCV(quick(), grid, cv=2, n_jobs=2, error_score="raise").fit(X, Y)
    assert len(search.cv_results_["params"]) == 4
    assert search.best_estimator_.predict(X).shape == (90,)


def test_cross_val_score_of_images():
    assert cross_val_score(quick(max_epochs=20), X, Y, cv=3, error_score="raise").mean() > 0.8


def test_pipeline_calibration_voting_and_stacking():
    flat = X.reshape(len(X), -1)
    pipeline = make_pipeline(FunctionTransformer(np.log1p), quick(max_epochs=15))
    assert pipeline.fit(flat, Y).score(flat, Y) > 0.8
    calibrated = CalibratedClassifierCV(quick(max_epochs=15), cv=2).fit(flat, Y)
    np.testing.assert_allclose(calibrated.predict_proba(flat).sum(axis=1), 1)
    members = [("sparse", quick(max_epochs=15)), ("linear", LogisticRegression(max_iter=2000))]
    assert VotingClassifier(members, voting="soft").fit(flat, Y).score(flat, Y) > 0.8
    stacked = StackingClassifier(members, LogisticRegression(), cv=2).fit(flat, Y)
    assert stacked.transform(flat).shape == (90, 3 * len(members))
    assert stacked.score(flat, Y) > 0.8
    features = make_pipeline(quick(max_epochs=15), LogisticRegression(max_iter=5000))
    assert features.fit(X, Y).score(X, Y) > 0.8


def test_clone_knows_the_parameters_only(fitted):
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params()
    assert not hasattr(fresh, "network_")


@pytest.mark.parametrize("how", ["pickle", "joblib"])
def test_round_trip(fitted, how, tmp_path):
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(fitted))
    else:
        joblib.dump(fitted, tmp_path / "model.joblib")
        loaded = joblib.load(tmp_path / "model.joblib")
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    assert loaded.k_ == fitted.k_


def test_a_model_of_a_missing_device_works_on_the_cpu(fitted):
    state = fitted.__getstate__() | {"device": "cuda:97"}
    loaded = SparseAttnClassifier.__new__(SparseAttnClassifier)
    with pytest.warns(UserWarning, match="cuda:97.*works on the CPU"):
        loaded.__setstate__(state)
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu():
    clf = quick(device="cuda", max_epochs=25).fit(X, Y)
    assert clf.score(X, Y) > 0.9
    loaded = pickle.loads(pickle.dumps(clf))
    assert {type(array) for array in clf.__getstate__()["network_"]["arrays"].values()} == {np.ndarray}
    np.testing.assert_allclose(loaded.predict_proba(X), clf.predict_proba(X), atol=1e-9)


def test_metadata_routing():
    weight = np.random.default_rng(0).uniform(1, 2, 90)
    with config_context(enable_metadata_routing=True):
        clf = quick().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        scores = cross_val_score(clf, X, Y, cv=2, params={"sample_weight": weight}, error_score="raise")
    assert scores.shape == (2,)


# ---- what is refused ----

BAD_PARAMETERS = {
    "k_init": [0, -1, 1.5, 0.0, "all", None],
    "k_min": [0, 2.0, np.nan],
    "k_max": [0, -0.1],
    "k_tolerance": [-0.1, None, np.nan, np.inf, 10**400, "small"],
    "predict_k": [0, 1.5, -2, "all", True],
    "variant": ["context", None],
    "size": ["small", 3, None],
    "embed_dim": [0, 2.5],
    "n_heads": [0, None],
    "hidden_dim": [0],
    "focal_gamma": [-1, np.nan],
    "class_weight": ["equal", [1, 2, 3]],
    "contrastive_weight": [-0.1, None],
    "temperature": [0.0, -1],
    "distillation_weight": [-1],
    "consistency_weight": [-0.1, None, 1.0],  # the last as there is nothing to make views by
    "lr": [0, -1e-3],
    "weight_decay": [-1],
    "lr_schedule": ["cosine", 1],
    "max_epochs": [0, 1.5],
    "batch_size": [0, None],
    "augment": ["rotate", 3],
    "image_shape": [7, (SIDE,), (SIDE, 0), (SIDE, SIDE, 1, 1), (SIDE, 2.0)],
    "data_range": [1.0, (1, 0), (0, np.inf), (0,), ("a", "b"), (2, 2)],
    "validation_fraction": [0.0, 1.0, 0.3],  # the last as there is nothing to validate for
    "early_stopping": ["yes", None],
    "patience": [0, 5],  # the last as there is no early stopping
    "warm_start": [None],
    "callbacks": [7],
    "checkpoint_dir": [3, b"folder", True],
    "n_jobs": [1.5, "all"],
    "device": ["gpu", "cuda:97", 3],
    "random_state": [-1, "seed"],
    "verbose": [-1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_PARAMETERS.items() for value in values]
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        quick(**{name: value}).fit(X, Y)


def test_every_parameter_is_checked():
    assert set(BAD_PARAMETERS) == set(SparseAttnClassifier().get_params())
    assert set(BAD_PARAMETERS) == set(SparseAttnClassifier._parameter_constraints)
    assert len(BAD_PARAMETERS) <= 36


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"patience": 5}, "patience=5 has no effect without early_stopping=True"),
        ({"validation_fraction": 0.3}, "validation_fraction=0.3 has no effect without early_stopping=True"),
        ({"variant": "paper", "size": "large"}, "size='large' has no effect with variant='paper'"),
        ({"consistency_weight": 0.5}, "consistency_weight=0.5 needs augment"),
        ({"k_min": 20, "callbacks": [DynamicK(k_min=9)]}, "k_min=20 has no effect beside the DynamicK"),
        (
            {"k_max": 0.5, "callbacks": [("k", DynamicK(k_max=9))]},
            "k_max=0.5 has no effect beside the DynamicK",
        ),
        (
            {"k_tolerance": 1, "callbacks": [DynamicK(tolerance=0)]},
            "k_tolerance=1 has no effect beside the Dyna",
        ),
        ({"k_min": 20, "callbacks": [DynamicK.paper()]}, "k_min=20 has no effect beside the DynamicK"),
        (
            {"k_tolerance": 1, "callbacks": [DynamicK.paper(k_min=None, k_max=None)]},
            "k_tolerance=1 has no effect beside the DynamicK",
        ),
    ],
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_parameter_without_effect_is_an_error(params, message, method):
    options = {"classes": [0, 1, 2]} if method == "partial_fit" else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(quick(**params), method)(X, Y, **options)


@pytest.mark.parametrize(
    "params",
    [
        {"patience": 2, "early_stopping": True},
        {"validation_fraction": 0.3, "early_stopping": True},
        {"validation_fraction": 0.3, "lr_schedule": "plateau"},
        {"patience": 10, "validation_fraction": 0.2, "variant": "paper", "size": "default"},  # the defaults
        {"k_min": 20, "callbacks": [DynamicK(k_max=90, tolerance=0.1)]},
        {"k_min": 20, "k_max": 90, "callbacks": [DynamicK.paper(k_min=None, k_max=None)]},
    ],
)
def test_a_parameter_that_has_its_effect_is_none(params):
    quick(**params).fit(X, Y)


def test_what_a_given_rule_leaves_open_is_taken_from_the_estimator():
    clf = quick(k_init=1.0, k_min=100, callbacks=[DynamicK(tolerance=1e6, step=1.0)], max_epochs=6).fit(X, Y)
    assert clf.k_ == 100
    of_the_rule = quick(k_init=1.0, callbacks=[DynamicK(k_min=90, tolerance=1e6, step=1.0)], max_epochs=6)
    assert of_the_rule.fit(X, Y).k_ == 90


def test_bounds_of_k():
    with pytest.raises(ValueError, match=r"k_min=80 is above k_max=20"):
        quick(k_min=80, k_max=20).fit(X, Y)
    with pytest.raises(ValueError, match=r"k_min=80 is above k_max=20"):
        quick(k_min=80, callbacks=[DynamicK(k_max=20)]).partial_fit(X, Y, classes=[0, 1, 2])
    assert quick(k_max=5).fit(X, Y).k_ <= 5
    assert quick(k_min=10**9).fit(X, Y).k_ == SIDE * SIDE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: (X, None), "requires y to be passed"),
        (lambda: (X, Y[:-1]), "inconsistent numbers of samples"),
        (lambda: (X, np.linspace(0, 1, 90)), "continuous"),
        (lambda: (X[0, 0], Y[:SIDE]), "Reshape your data"),
        (lambda: (X[:0], Y[:0]), "0 sample"),
        (lambda: (np.where(X > 200, np.nan, X.astype(float)), Y), "NaN"),
        (lambda: (np.where(X > 200, np.inf, X.astype(float)), Y), "infinity"),
        (lambda: (X + 1j, Y), "Complex data not supported"),
        (lambda: (np.moveaxis(np.stack([X] * 3, -1), -1, 1), Y), "moveaxis"),
        (lambda: (X[:, None], Y), "moveaxis"),
        (lambda: (X[:, None, None, None], Y), "is expected"),
        (lambda: (X[:, :0], Y), "is expected"),
        (lambda: ([X[0], X[1, :5], *X[2:]], Y), "load_image_folder"),
        (
            lambda: (np.char.add(X.astype(str), "x"), Y),
            "not compatible with arrays of bytes/strings|could not convert",
        ),
    ],
)
def test_bad_data_is_refused(change, message):
    images, y = change()
    with pytest.raises((ValueError, TypeError), match=message):
        quick().fit(images, y)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros(90), "zero"),
        (-np.ones(90), "[Nn]egative"),
        (np.ones(89), "sample_weight"),
        (np.full(90, np.nan), "NaN"),
        (np.inf, "infinite"),
    ],
)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        quick().fit(X, Y, sample_weight=weight)


def test_bad_validation_rows_are_refused():
    with pytest.raises(ValueError, match="go together"):
        quick().fit(X, Y, X_val=X)
    with pytest.raises(ValueError, match="not among the classes"):
        quick().fit(X, Y, X_val=X, y_val=Y + 1)
    with pytest.raises(ValueError, match="fitted to"):
        quick().fit(X, Y, X_val=X[:, :5], y_val=Y)
    with pytest.raises(ValueError, match="early_stopping=True needs validation rows"):
        quick(early_stopping=True).fit(X[:4], [0, 0, 1, 2])


def test_bad_partial_fits_are_refused():
    with pytest.raises(ValueError, match="classes has labels that cannot be put in order"):
        quick().partial_fit(X, Y, classes=[None, None])
    with pytest.raises(ValueError, match="classes must be passed"):
        quick().partial_fit(X, Y)
    clf = quick().partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="differ from those of the first call"):
        clf.partial_fit(X, Y, classes=[0, 1])
    with pytest.raises(ValueError, match="not among the classes"):
        clf.partial_fit(X, Y + 1)
    with pytest.raises(ValueError, match="class_weight='balanced'"):
        quick(class_weight="balanced").partial_fit(X, Y, classes=[0, 1, 2])


def test_an_augmentation_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"augment turned images of shape"):
        quick(augment=lambda images, rng: images[:, :, ::2]).fit(X, Y)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "transform", "attention_maps"])
def test_nothing_before_fit(method):
    with pytest.raises(NotFittedError):
        getattr(quick(), method)(X)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "transform", "attention_maps"])
def test_other_sizes_are_refused_after_fit(fitted, method):
    for other in (X[:, :5], X[:, ::2, ::2], np.stack([X] * 3, axis=-1)):
        with pytest.raises(ValueError, match="was fitted to"):
            getattr(fitted, method)(other)
    with pytest.raises(ValueError, match="expecting 144 features"):
        getattr(fitted, method)(X.reshape(len(X), -1)[:, :100])


def test_other_units_get_a_warning(fitted):
    with pytest.warns(UserWarning, match="units"):
        fitted.predict(X / 255)
    scaled = quick().fit(X / 255, Y)
    with pytest.warns(UserWarning, match="units"):
        scaled.predict(X)
    fitted.predict(np.zeros_like(X[:2]))  # a dark frame tells nothing about units


def test_values_beyond_all_range_are_clipped(fitted):
    with pytest.warns(UserWarning, match="units"):
        found = fitted.predict_proba(X.astype(np.float64) * 1e300)
    expected = fitted.predict_proba(np.full(X.shape, 4 * 255.0))
    np.testing.assert_array_equal(found, expected)


# ---- a fit that fails, and what it leaves ----


@pytest.mark.parametrize(
    "spoil",
    [
        lambda clf: clf.set_params(data_range=(1, 0)).fit(X, np.array(["c", "b", "a"])[Y]),
        lambda clf: clf.fit(X * 2, Y, X_val=X),
        lambda clf: clf.set_params(k_min=30, k_max=20).fit(X[:, :6, :6], Y % 2),
        lambda clf: clf.set_params(lr=1e9).fit(X, Y),
        lambda clf: clf.set_params(lr=1e9, warm_start=True).fit(X, Y),
        lambda clf: clf.set_params(augment=lambda images, rng: images * np.nan).partial_fit(X, Y),
    ],
)
def test_a_fit_that_fails_leaves_the_old_one(spoil):
    clf = quick().fit(X, Y)
    before = clf.predict_proba(X)
    params = clf.get_params()
    with pytest.raises(ValueError, match=r"data_range|X_val|k_min|diverged|augment"):
        spoil(clf)
    np.testing.assert_array_equal(clf.set_params(**params).predict_proba(X), before)
    assert clf.attention_maps(X).tiles.shape == (90, clf.k_)


def test_a_partial_fit_that_fails_does_not_count():
    clf, undisturbed = quick(), quick()
    for other in (clf, undisturbed):
        other.partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="NaN"):
        clf.set_params(augment=lambda images, rng: images + np.nan * rng.random()).partial_fit(X, Y)
    with pytest.raises(ValueError, match="diverged in epoch 1"):
        clf.set_params(augment=None, lr=1e30).partial_fit(X, Y)
    clf.set_params(lr=undisturbed.lr).partial_fit(X, Y)
    np.testing.assert_array_equal(clf.predict_proba(X), undisturbed.partial_fit(X, Y).predict_proba(X))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": 1e9}, r"diverged in epoch \d, batch \d+: .* lower than 1e\+09"),
        ({"augment": lambda images, rng: images * np.inf}, "augment gave images that hold"),
        ({"class_weight": {0: np.nan}}, r"class_weight=.*weight of 0"),
        ({"class_weight": {0: -1.0}}, r"class_weight=.*weight of 0"),
        ({"class_weight": {0: "heavy"}}, r"class_weight=.*weight of 0"),
        ({"callbacks": [42]}, r"callbacks\[0\]=42"),
        ({"callbacks": [("a",)]}, r"callbacks\[0\]="),
        ({"k_init": True}, "'k_init' parameter .* Got True instead"),
        ({"k_tolerance": False}, "'k_tolerance' parameter .* Got False instead"),
    ],
)
def test_what_cannot_be_trained_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        quick(**params).fit(X, Y)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"class_weight": {0: 10**400}}, r"class_weight=.*weight of 0"),
        ({"class_weight": {0: 1e300}}, r"class_weight=.*weight of 0"),
        ({"data_range": (10**400, 1)}, "data_range="),
        ({"hidden_dim": 2**40}, rf"hidden_dim={2**40}: no network of this size"),
        ({"embed_dim": 10**400}, "embed_dim=10+, .*: no network of this size"),
        ({"lr": 10**400}, "diverged in epoch 1"),
    ],
)
def test_numbers_too_large_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        quick(**params).fit(X, Y)


def test_numbers_too_large_to_matter_do_not():
    large = dict.fromkeys(["k_init", "k_max", "batch_size", "patience", "predict_k"], 10**400)
    large["early_stopping"] = True
    small = {"k_init": 1.0, "k_max": 1.0, "batch_size": 90, "patience": 90, "predict_k": 1.0}
    expected = quick(early_stopping=True, **small).fit(X, Y).predict_proba(X)
    np.testing.assert_array_equal(quick(**large).fit(X, Y).predict_proba(X), expected)


def test_fractions_are_numbers():
    expected = quick(k_init=0.5, lr=0.01, predict_k=0.25).fit(X, Y).predict_proba(X)
    fractions = {"k_init": Fraction(1, 2), "lr": Fraction(1, 100), "predict_k": Fraction(1, 4)}
    found = quick(**fractions).fit(X, Y).predict_proba(X)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_constant_images_are_fitted_soundly(value, dtype):
    """There is nothing to learn from them but how frequent the classes are."""
    images = np.full((90, SIDE, SIDE), value, dtype)
    proba = quick(max_epochs=20).fit(images, np.arange(90) % 10 // 7).predict_proba(images)
    assert np.ptp(proba, axis=0).max() == 0
    assert 0.65 < proba[0, 0] < 0.75


def test_classes_that_are_in_few_batches_or_not_among_the_validation_rows():
    many = np.arange(90) % 30  # a batch of two rows has two classes of thirty at most
    clf = quick(batch_size=2, max_epochs=1).fit(X, many)
    assert np.isfinite(clf.predict_proba(X)).all()
    rare = np.where(np.arange(90) < 2, 1, 0)
    clf = quick(early_stopping=True, validation_fraction=0.03).fit(X, rare)
    assert np.isfinite(clf.history_["valid_loss"]).all()
    clf = quick(early_stopping=True).fit(X, Y, X_val=X[Y == 1], y_val=Y[Y == 1])
    assert np.isfinite(clf.history_["valid_loss"]).all()


def test_labels_at_the_limits():
    with pytest.raises(ValueError, match="label"):  # and no warning of a cast to integers
        quick().fit(X, np.where(Y == 0, 2.0**63, 0.0))
    with pytest.raises(ValueError, match=r"y has labels that cannot be put in order|[Uu]nknown label"):
        quick().fit(X, [None, "a", *Y[2:]])
    with pytest.raises(ValueError, match="y has labels of several parts"):
        quick().fit(X, Y.astype([("number", int)]))
    with pytest.raises(
        ValueError, match=r"y has labels of dtype \|S\d+: bytes are not supported.*astype\(str\)"
    ):
        quick().fit(X, Y.astype("S"))


def test_validation_images_in_other_units_are_named():
    with pytest.warns(UserWarning, match="X_val ranges over .* the fit ranged over"):
        quick(early_stopping=True).fit(X / 255.0, Y, X_val=X, y_val=Y)


def test_numbers_of_numpy_are_numbers():
    numpy_params = {
        "max_epochs": np.uint8(3),
        "batch_size": np.int64(16),
        "k_init": np.float32(0.5),
        "lr": np.float32(0.01),
        "early_stopping": np.bool_(False),
        "embed_dim": np.uint8(16),
    }
    plain = {name: value.item() for name, value in numpy_params.items()}
    expected = quick(**plain).fit(X, Y).predict_proba(X)
    np.testing.assert_array_equal(quick(**numpy_params).fit(X, Y).predict_proba(X), expected)
    GridSearchCV(quick(), {"max_epochs": np.arange(1, 3)}, cv=2, error_score="raise").fit(X, Y)


def test_huge_weights_do_not_overflow():
    weight = np.random.default_rng(0).uniform(0.5, 1, 90)
    expected = quick().fit(X, Y, sample_weight=weight).predict_proba(X)
    huge = quick().fit(X, Y, sample_weight=weight * 1e308).predict_proba(X)
    np.testing.assert_allclose(huge, expected, atol=1e-6)


def test_a_given_dynamic_k_replaces_the_built_in_one():
    clf = quick(callbacks=[DynamicK.paper(k_min=1)], max_epochs=6, batch_size=8).fit(X, Y)
    # By batch, k has moved before the first epoch ends; by epoch it has not.
    start = 8000 / 18225 * SIDE**2
    assert clf.history_["k"][0] != pytest.approx(start)
    assert quick().fit(X, Y).history_["k"][0] == pytest.approx(start)
    frozen = quick(callbacks=[DynamicK.paper(k_min=1, shrink=0, grow=0)], max_epochs=4).fit(X, Y)
    assert np.all(frozen.history_["k"] == frozen.history_["k"][0])
    slow, quickly = (
        quick(callbacks=[DynamicK(step=step)], k_tolerance=1e6, max_epochs=4).fit(X, Y).k_
        for step in (0.01, 0.5)
    )
    assert quickly < slow


def test_learning_rate_is_that_of_the_last_step_of_an_epoch():
    used = []

    class Watch(skorch.callbacks.Callback):
        def on_batch_begin(self, net, training=False, **kwargs):
            used.append(net.optimizer_.param_groups[0]["lr"])

    clf = quick(batch_size=30, callbacks=[Watch()]).fit(X, Y)
    assert len(used) == 9
    np.testing.assert_allclose(clf.history_["lr"], used[2::3])


def test_history_grows_by_whole_columns():
    clf = quick(warm_start=True).fit(X, Y)
    clf.set_params(early_stopping=True).fit(X, Y)
    clf.partial_fit(X, Y)
    assert {len(column) for column in clf.history_.values()} == {7}
    np.testing.assert_array_equal(clf.history_["epoch"], np.arange(1, 8))
    np.testing.assert_array_equal(np.isnan(clf.history_["valid_loss"]), [1, 1, 1, 0, 0, 0, 1])
    assert clf.n_iter_ == 7


def test_whatever_the_default_dtype_and_grad_mode():
    expected = quick().fit(X, Y).predict_proba(X)
    with torch.inference_mode():
        np.testing.assert_array_equal(quick().fit(X, Y).predict_proba(X), expected)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_allclose(quick().fit(X, Y).predict_proba(X), expected, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_callback_that_stops_is_no_interruption():
    stop = skorch.callbacks.EarlyStopping(monitor="train_loss", patience=2, threshold=1.0)
    clf = quick(max_epochs=10, callbacks=[stop]).fit(X, Y)
    assert clf.n_iter_ < 10


def test_row_order_does_not_bias_batch_norm():
    order = np.argsort(Y, kind="stable")
    clf = quick(max_epochs=10).fit(X[order], Y[order])
    norm = clf.network_.fusion.first[1]
    features = torch.from_numpy(clf.transform(X.astype(np.float64))).float()
    with torch.no_grad():
        hidden = clf.network_.fusion.first[0](clf.network_.fusion.norm(features))
    ratio = (norm.running_var / hidden.var(0)).median()
    assert 0.7 < ratio < 1.4


def test_the_published_rule_stays_beside_other_callbacks():
    other, own = EpochTimer(), DynamicK()
    callbacks = SparseAttnClassifier.paper(callbacks=[other]).callbacks
    assert isinstance(callbacks[0], LossTrendK)
    assert callbacks[1] is other
    assert SparseAttnClassifier.paper(callbacks=[own]).callbacks == [own]


def test_two_rules_of_k_are_refused():
    with pytest.raises(ValueError, match="hold 2 DynamicK: give one"):
        quick(callbacks=[DynamicK(), ("second", DynamicK())]).fit(X, Y)


def test_k_leaves_its_lower_bound_where_more_pixels_are_worth_it():
    """There, too, a doubling is looked at; one tile is the least."""
    clf = quick(max_epochs=12, k_init=0.02, k_min=0.02, k_tolerance=0.0).fit(X, Y)
    assert (clf.history_["loss_at_half_k"] != clf.history_["loss_at_k"]).any()


def test_a_class_whose_rows_have_no_weight_stays_a_class():
    weight = np.where(Y == 2, 0.0, 1.0)
    clf = quick().fit(X, Y, sample_weight=weight)
    np.testing.assert_array_equal(clf.classes_, [0, 1, 2])
    p = clf.predict_proba(X)
    assert p.shape == (90, 3)
    assert p[Y != 2, 2].mean() < 0.2
    early = quick(early_stopping=True, class_weight="balanced").fit(X, Y, sample_weight=weight)
    assert len(early.classes_) == 3
