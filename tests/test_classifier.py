"""SparseAttnClassifier as a scikit-learn user meets it: what goes in, what comes out, what is refused."""

import pickle
import random
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
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_sparseattn import DynamicK, SparseAttnClassifier
from sklearn_sparseattn.training.dynamic_k import K_MIN

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
    assert fitted.k_ == fitted.network_.n_chosen(SIDE * SIDE)
    expected = {"epoch", "train_loss", "focal_loss", "contrastive_loss", "distillation_loss", "k", "lr"}
    assert expected <= set(fitted.history_)
    assert all(column.shape == (25,) for column in fitted.history_.values())
    assert len(pd.DataFrame(fitted.history_)) == 25


def test_history_adds_up(fitted):
    history = fitted.history_
    total = history["focal_loss"] + 0.1 * history["contrastive_loss"] + 0.02 * history["distillation_loss"]
    np.testing.assert_allclose(history["train_loss"], total, rtol=1e-5)


def test_k_falls_with_the_loss(fitted):
    k = fitted.history_["k"]
    assert k[0] == pytest.approx(8000 / 18225 * SIDE**2)
    assert k[-1] < 0.6 * k[0]
    assert np.all(k >= K_MIN * SIDE**2 - 1e-9)


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


@pytest.mark.parametrize(("variant", "n_coarse"), [("context", 32), ("paper", 48)])
def test_variants(fitted, variant, n_coarse):
    assert fitted.network_.context is not None
    clf = quick(max_epochs=25, variant=variant, embed_dim=20).fit(X, Y)
    assert (clf.network_.context is None) == (variant == "paper")
    assert clf.transform(X).shape == (90, 20 + n_coarse)
    assert clf.score(X, Y) > 0.9
    loaded = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(loaded.predict_proba(X), clf.predict_proba(X))
    again = clone(clf).fit(X, Y)
    np.testing.assert_array_equal(again.predict_proba(X), clf.predict_proba(X))


def test_attention_maps(fitted):
    maps = fitted.attention_maps(X)
    n = len(X)
    assert maps.coarse.shape == maps.fine.shape == maps.contribution.shape == (n, SIDE, SIDE)
    assert maps.pixels.shape == (n, fitted.k_)
    assert np.all((maps.coarse > 0) & (maps.coarse < 1))
    assert np.all(maps.fine >= 0)
    chosen = np.zeros((n, SIDE * SIDE), dtype=bool)
    np.put_along_axis(chosen, maps.pixels, True, axis=1)
    assert np.all(chosen.sum(axis=1) == fitted.k_)
    assert not maps.fine.reshape(n, -1)[~chosen].any()
    assert not maps.contribution.reshape(n, -1)[~chosen].any()
    # The chosen pixels are the best by coarse attention, and come best first.
    by_score = np.take_along_axis(maps.coarse.reshape(n, -1), maps.pixels, axis=1)
    assert np.all(np.diff(by_score, axis=1) <= 0)
    rest = np.where(chosen, -np.inf, maps.coarse.reshape(n, -1)).max(axis=1)
    assert np.all(by_score[:, -1] >= rest)


def test_an_image_alone_is_the_same_image(fitted):
    together = fitted.predict_proba(X)
    for rows in ([0], [89], [5, 3], list(range(89, -1, -1))):
        np.testing.assert_allclose(fitted.predict_proba(X[rows]), together[rows], rtol=0, atol=1e-9)


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


def test_paper_k_on_paper_size():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 135, 135), dtype=np.uint8)
    clf = SparseAttnClassifier(k_min=1500, max_epochs=1, random_state=0).fit(images, np.arange(8) % 2)
    assert clf.k_ == 8000
    few = SparseAttnClassifier(k_init=1, k_min=1500, max_epochs=1, random_state=0)
    assert few.fit(images, np.arange(8) % 2).k_ == 1500


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
        self.within_, self.between_ = set(), set()
        return self

    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.within_.add(torch.get_num_threads())

    def on_batch_end(self, net, **kwargs):
        self.between_.add(torch.get_num_threads())


@pytest.mark.parametrize(("params", "within"), [({}, 1), ({"variant": "paper"}, 2), ({"embed_dim": 24}, 2)])
def test_pytorch_has_one_thread_where_compiled_code_does_the_work(params, within):
    counts, before = CountThreads(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quick(callbacks=[counts], **params).fit(X, Y)
        assert (counts.within_, counts.between_) == ({within}, {2})
        assert torch.get_num_threads() == 2
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

    def apart(weight):
        clf = quick(max_epochs=15, augment="dihedral", consistency_weight=weight).fit(X, Y)
        new = disks(seed=1)[0]
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
    assert cold.history_["k"][0] > k


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
    assert clf.history_["k"][-1] < clf.history_["k"][0]
    assert set(clf.history_["lr"]) == {2e-3}


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


def test_grid_search_over_the_loss_weights():
    grid = {"contrastive_weight": [0.0, 0.1], "distillation_weight": [0.0, 0.02]}
    search = GridSearchCV(quick(), grid, cv=2, n_jobs=2, error_score="raise").fit(X, Y)
    assert len(search.cv_results_["params"]) == 4
    assert search.best_estimator_.predict(X).shape == (90,)


def test_cross_val_score_of_images():
    assert cross_val_score(quick(max_epochs=20), X, Y, cv=3, error_score="raise").mean() > 0.8


def test_pipeline_calibration_and_voting():
    flat = X.reshape(len(X), -1)
    pipeline = make_pipeline(FunctionTransformer(np.log1p), quick(max_epochs=15))
    assert pipeline.fit(flat, Y).score(flat, Y) > 0.8
    calibrated = CalibratedClassifierCV(quick(max_epochs=15), cv=2).fit(flat, Y)
    np.testing.assert_allclose(calibrated.predict_proba(flat).sum(axis=1), 1)
    members = [("sparse", quick(max_epochs=15)), ("linear", LogisticRegression(max_iter=2000))]
    assert VotingClassifier(members, voting="soft").fit(flat, Y).score(flat, Y) > 0.8
    features = make_pipeline(quick(max_epochs=15), LogisticRegression(max_iter=5000))
    assert features.fit(X, Y).score(X, Y) > 0.8


def test_clone_knows_the_parameters_only(fitted):
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "network_")


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
    "k_shrink": [-1, 1.1],
    "k_grow": [-0.5, "fast"],
    "ema_decay": [1.0, -0.1],
    "k_momentum": [1.0, None],
    "k_update": ["never", 1],
    "variant": ["deep", None],
    "gate_init": [0.0, 1.0, None],
    "depth": [1, 4, 3.0, None],
    "kernel_size": [1, 4, 5.0, None],
    "embed_dim": [0, 2.5],
    "n_heads": [0, None],
    "hidden_dim": [0],
    "focal_gamma": [-1, np.nan],
    "class_weight": ["equal", [1, 2, 3]],
    "contrastive_weight": [-0.1, None],
    "temperature": [0.0, -1],
    "distillation_weight": [-1],
    "distillation_emphasis": [0, "strong"],
    "consistency_weight": [-0.1, None, 1.0],  # the last as there is nothing to make views by
    "lr": [0, -1e-3],
    "weight_decay": [-1],
    "lr_schedule": ["cosine", 1],
    "max_epochs": [0, 1.5],
    "batch_size": [0, None],
    "augment": ["rotate", 3],
    "image_shape": [7, (SIDE,), (SIDE, 0), (SIDE, SIDE, 1, 1), (SIDE, 2.0)],
    "data_range": [1.0, (1, 0), (0, np.inf), (0,), ("a", "b"), (2, 2)],
    "validation_fraction": [0.0, 1.0],
    "early_stopping": ["yes", None],
    "patience": [0],
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


def test_bounds_of_k():
    with pytest.raises(ValueError, match=r"k_min=80 is above k_max=20"):
        quick(k_min=80, k_max=20).fit(X, Y)
    assert quick(k_max=5).fit(X, Y).k_ <= 5  # the default k_min, 12 pixels here, gives way
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
            lambda: (X.astype(str).astype("U5") + "x", Y),
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
    with pytest.warns(UserWarning, match="data_range_"):
        fitted.predict(X / 255)
    scaled = quick().fit(X / 255, Y)
    with pytest.warns(UserWarning, match="units"):
        scaled.predict(X)
    fitted.predict(np.zeros_like(X[:2]))  # a dark frame tells nothing about units


def test_values_beyond_all_range_are_refused(fitted):
    with pytest.warns(UserWarning, match="data_range_"), pytest.raises(ValueError, match="too far"):
        fitted.predict(X.astype(np.float64) * 1e300)


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
    assert clf.attention_maps(X).pixels.shape == (90, clf.k_)


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
        ({"data_range": (0, 1e-300)}, "data_range_"),
        ({"augment": lambda images, rng: images * np.inf}, "augment gave images that hold"),
        ({"class_weight": {0: np.nan}}, r"class_weight=.*weight of 0"),
        ({"class_weight": {0: -1.0}}, r"class_weight=.*weight of 0"),
        ({"class_weight": {0: "heavy"}}, r"class_weight=.*weight of 0"),
        ({"callbacks": [42]}, r"callbacks\[0\]=42"),
        ({"callbacks": [("a",)]}, r"callbacks\[0\]="),
        ({"k_init": True}, "'k_init' parameter .* Got True instead"),
        ({"k_grow": False}, "'k_grow' parameter .* Got False instead"),
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
    large = dict.fromkeys(["k_init", "k_max", "batch_size", "patience"], 10**400)
    expected = quick(k_init=1.0, k_max=1.0, batch_size=90, patience=90).fit(X, Y).predict_proba(X)
    np.testing.assert_array_equal(quick(**large).fit(X, Y).predict_proba(X), expected)


def test_fractions_are_numbers():
    expected = quick(k_init=0.5, lr=0.01).fit(X, Y).predict_proba(X)
    found = quick(k_init=Fraction(1, 2), lr=Fraction(1, 100)).fit(X, Y).predict_proba(X)
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
    with pytest.raises(ValueError, match=r"y has labels .* bytes is not supported"):
        quick().fit(X, Y.astype("S"))


def test_validation_images_far_out_of_range_are_named():
    with pytest.raises(ValueError, match="data_range_"):
        quick(early_stopping=True).fit(X / 255.0, Y, X_val=X * 1e300, y_val=Y)
    # Their scores overflow in the network, where nothing else does.
    with pytest.raises(ValueError, match=r"diverged in epoch 1, batch \d+: .* for validation images"):
        quick(early_stopping=True, lr=1e-5).fit(X / 255.0, Y, X_val=X * 1e35, y_val=Y)


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
    frozen = quick(callbacks=[DynamicK(shrink=0, grow=0)], max_epochs=4).fit(X, Y)
    assert np.all(frozen.history_["k"] == frozen.history_["k"][0])


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
        hidden = clf.network_.fusion.first[0](features)
    ratio = (norm.running_var / hidden.var(0)).median()
    assert 0.7 < ratio < 1.4
