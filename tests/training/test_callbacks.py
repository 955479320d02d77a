"""skorch's callbacks as `callbacks` of the estimator: all of them work, and what they record is kept."""

import inspect
from unittest import mock

import numpy as np
import pytest
import skorch.callbacks
from sklearn.metrics import f1_score
from skorch.callbacks import BatchScoring, Callback, Checkpoint, EarlyStopping, EpochScoring, LRScheduler

from sklearn_sparseattn import SparseAttnClassifier, load_model, save_model

Y = np.arange(36) % 3
X = (np.random.default_rng(0).integers(0, 80, (36, 8, 8)) + 60 * Y[:, None, None]).astype(np.uint8)


def quick(**params):
    tiny = {"max_epochs": 2, "batch_size": 10, "random_state": 0, "embed_dim": 8, "hidden_dim": 16}
    return SparseAttnClassifier(**{**tiny, **params})


# Arguments of those that need some.
GIVEN = {
    "BatchScoring": lambda folder: {"scoring": "accuracy"},
    "Checkpoint": lambda folder: {"dirname": folder, "f_pickle": "net.pkl"},
    "EpochScoring": lambda folder: {"scoring": "accuracy"},
    "Freezer": lambda folder: {"patterns": "coarse.*"},
    "GradientNormClipping": lambda folder: {"gradient_clip_value": 1.0},
    "Initializer": lambda folder: {"patterns": "fusion.*bias"},
    "ParamMapper": lambda folder: {"patterns": "coarse.*"},
    "PassthroughScoring": lambda folder: {"name": "valid_score"},
    "TensorBoard": lambda folder: {"writer": mock.MagicMock()},
    "TrainEndCheckpoint": lambda folder: {"dirname": folder},
    "Unfreezer": lambda folder: {"patterns": "coarse.*"},
    "WandbLogger": lambda folder: {"wandb_run": mock.MagicMock(), "save_model": False},
}
LEFT_OUT = {
    "Callback": "the base class",
    "InputShapeSetter": "it sizes a module that is not made yet; ours is made for the images",
    "LoadInitState": "tried together with the Checkpoint it loads",
    "MlflowLogger": "needs mlflow",
    "NeptuneLogger": "needs neptune",
    "SacredLogger": "needs an experiment of sacred",
    "WarmRestartLR": "a schedule, not a callback",
}


@pytest.mark.parametrize("name", sorted(set(skorch.callbacks.__all__) - set(LEFT_OUT)))
def test_every_callback_of_skorch_works(name, tmp_path):
    make = getattr(skorch.callbacks, name)
    assert inspect.isclass(make)
    assert issubclass(make, Callback)
    callback = make(**GIVEN.get(name, lambda folder: {})(str(tmp_path)))
    clf = quick(callbacks=[callback], early_stopping=True).fit(X, Y)
    assert clf.n_iter_ == 2
    assert clf.predict(X).shape == Y.shape


def test_a_state_saved_by_a_callback_is_loaded_by_another(tmp_path):
    saved = Checkpoint(dirname=str(tmp_path))
    quick(callbacks=[saved], early_stopping=True).fit(X, Y)
    quick(callbacks=[skorch.callbacks.LoadInitState(saved)], max_epochs=1).fit(X, Y)


@pytest.mark.parametrize("use_caching", [True, False])
@pytest.mark.parametrize(
    ("make", "scoring"),
    [
        *(
            (EpochScoring, scoring)
            for scoring in ("accuracy", "f1_macro", "neg_log_loss", "roc_auc_ovr", None)
        ),
        *((BatchScoring, name) for name in ("accuracy", "f1_macro", None)),  # not all classes a batch
    ],
)
def test_scores_of_validation_rows(make, scoring, use_caching):
    callback = make(scoring, lower_is_better=False, name="own", use_caching=use_caching)
    history = quick(callbacks=[callback], max_epochs=3).fit(X, Y, X_val=X[:9], y_val=Y[:9]).history_
    assert history["own"].shape == history["own_best"].shape == (3,)
    if scoring in ("accuracy", None):
        np.testing.assert_allclose(history["own"], history["valid_score"])


def test_scorers_are_given_indices_probabilities_and_the_images():
    seen = {}

    def score(net, images, y):
        p = net.predict_proba(images)
        seen.update(y=y, p=p, answer=p.argmax(1), n=len(images))
        return f1_score(y, seen["answer"], average="macro")

    names = np.array(["a", "b", "c"])[Y]
    clf = quick(callbacks=[EpochScoring(score, name="own")])
    history = clf.fit(X, names, X_val=X[:9], y_val=names[:9]).history_
    np.testing.assert_array_equal(seen["y"], Y[:9])
    assert seen["n"] == 9
    assert seen["p"].shape == (9, 3)
    np.testing.assert_allclose(seen["p"].sum(1), 1, rtol=1e-5)
    assert history["own"][-1] == f1_score(Y[:9], seen["answer"], average="macro")


def test_a_score_of_training_rows_needs_no_others_and_changes_no_fit(tmp_path):
    callback = EpochScoring("accuracy", name="acc", on_train=True)
    clf = quick(callbacks=[callback]).fit(X, Y)
    plain = quick().fit(X, Y)
    assert set(clf.history_) - set(plain.history_) == {"acc", "acc_best"}
    np.testing.assert_array_equal(clf.predict_proba(X), plain.predict_proba(X))
    save_model(clf.set_params(callbacks=None), tmp_path / "model")
    np.testing.assert_array_equal(load_model(tmp_path / "model").history_["acc"], clf.history_["acc"])


def test_columns_of_some_epochs_and_of_later_calls():
    class Record(Callback):
        def on_epoch_end(self, net, **kwargs):
            if len(net.history) == 2:
                net.history.record("own", np.float32(5))
            net.history.record("text", "not a number")

    clf = quick(callbacks=[Record()], max_epochs=3).fit(X, Y)
    np.testing.assert_array_equal(clf.history_["own"], [np.nan, 5, np.nan])
    assert "text" not in clf.history_
    history = clf.set_params(callbacks=None).partial_fit(X, Y).history_
    np.testing.assert_array_equal(history["own"], [np.nan, 5, np.nan, np.nan])


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping(),
        EpochScoring("accuracy"),
        BatchScoring("accuracy"),
        skorch.callbacks.PassthroughScoring("valid_score"),
        Checkpoint(),
        LRScheduler("ReduceLROnPlateau", monitor="valid_loss"),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_what_needs_validation_rows_says_so_before_training(callback):
    message = rf"{type(callback).__name__} \('mine'\).*no validation rows.*X_val and y_val.*early_stopping"
    with mock.patch("sklearn_sparseattn.training.fit.SparseAttnTrainer") as trainer:
        with pytest.raises(ValueError, match=message):
            quick(callbacks=[("mine", callback)]).fit(X, Y)
        with pytest.raises(ValueError, match="partial_fit never has"):
            quick(callbacks=[callback]).partial_fit(X, Y, classes=[0, 1, 2])
    trainer.assert_not_called()


def test_monitors_of_training_need_none():
    callbacks = [EpochScoring("accuracy", name="valid_own", on_train=True), EarlyStopping("valid_own")]
    quick(callbacks=callbacks).fit(X, Y)
    quick(callbacks=[EarlyStopping("train_loss")]).fit(X, Y)
    quick(callbacks=[LRScheduler("StepLR", monitor="valid_loss", step_size=1)]).fit(X, Y)
