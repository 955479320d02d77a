"""What a fitted estimator answers with: an engine made in the fit, the same bits on any number of threads."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from joblib import parallel_config

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import PixelScale
from sklearn_sparseattn.inference import Engine, library

CELLS = make_cells(60, modality="event", n_classes=2, image_size=32, random_state=0)


@pytest.fixture(scope="module")
def clf():
    return SparseAttnClassifier(max_epochs=2, random_state=0).fit(CELLS.images, CELLS.target)


def exact_probabilities(clf, images):
    """By PyTorch in float64, of the same tiles: where scores tie, rounding decides which are chosen."""
    network = copy.deepcopy(clf.network_).double().eval()
    tiles = torch.from_numpy(clf.attention_maps(images).tiles)
    network.choose = lambda images, scores: tiles
    with torch.inference_mode():
        scaled = torch.from_numpy(PixelScale(clf.data_range_)(images[..., None])).double()
        return torch.softmax(network(scaled).logits, 1).numpy()


def test_it_answers_as_its_network(clf):
    for predict_k in (None, 60, 0.5, 1.0):
        found = copy.copy(clf).set_params(predict_k=predict_k)
        np.testing.assert_allclose(
            found.predict_proba(CELLS.images), exact_probabilities(found, CELLS.images), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("method", ["predict_proba", "transform", "attention_maps"])
def test_n_jobs_changes_no_bit(clf, method):
    one = getattr(clf, method)(CELLS.images)
    for n_jobs in (2, 3, -1):
        other = getattr(copy.deepcopy(clf).set_params(n_jobs=n_jobs), method)(CELLS.images)
        if method == "attention_maps":
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
        else:
            np.testing.assert_array_equal(one, other)


def test_n_jobs_of_joblib_counts(clf, monkeypatch):
    """None takes what `parallel_config` says, as everywhere in scikit-learn."""
    seen = []
    module = sys.modules["sklearn_sparseattn.fitted"]
    run = module.run

    def watched(*args, n_threads, **kwargs):
        seen.append(n_threads)
        return run(*args, n_threads=n_threads, **kwargs)

    monkeypatch.setattr(module, "run", watched)
    clf.predict(CELLS.images)
    with parallel_config("threading", n_jobs=3):
        clf.predict(CELLS.images)
    assert seen == [1, 3]


def test_the_engine_is_made_in_the_fit_and_when_it_is_loaded(clf, monkeypatch):
    made = []
    original = Engine.of.__func__

    def watched(cls, *args):
        made.append(1)
        return original(cls, *args)

    monkeypatch.setattr(Engine, "of", classmethod(watched))
    fresh = SparseAttnClassifier(max_epochs=1, random_state=0).fit(CELLS.images, CELLS.target)
    assert len(made) == 1
    fresh.predict(CELLS.images)
    fresh.predict_proba(CELLS.images)
    assert len(made) == 1
    loaded = pickle.loads(pickle.dumps(fresh))
    assert len(made) == 2
    np.testing.assert_array_equal(loaded.predict_proba(CELLS.images), fresh.predict_proba(CELLS.images))
    assert len(made) == 2
    fresh.partial_fit(CELLS.images, CELLS.target)
    assert len(made) == 3


def test_weights_are_kept_once(clf):
    n_weights = sum(p.numel() for p in clf.network_.parameters())
    assert len(pickle.dumps(clf)) < 4 * n_weights + 60_000
    assert "_engine" not in clf.__getstate__()


def test_without_compiled_code_it_says_so_once_and_answers_all_the_same(clf, monkeypatch):
    images = np.random.default_rng(0).normal(size=CELLS.images.shape)  # no two scores tie
    expected = clf.predict_proba(images)
    monkeypatch.setattr(library, "load", lambda: library.Loaded(None, "It was taken away."))
    monkeypatch.setattr(library, "_HAS_WARNED", threading.Event())
    with pytest.warns(UserWarning, match=r"PyTorch predicts in its place.* It was taken away\."):
        plain = copy.deepcopy(clf)
    again = copy.deepcopy(clf)  # a warning would be an error
    assert plain._engine is again._engine is None
    np.testing.assert_allclose(plain.predict_proba(images), expected, rtol=0, atol=1e-5)


def test_a_fit_without_compiled_code_is_the_same_fit(clf, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: library.Loaded(None, "It was taken away."))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plain = SparseAttnClassifier(max_epochs=2, random_state=0).fit(CELLS.images, CELLS.target)
    for one, other in zip(plain.network_.parameters(), clf.network_.parameters(), strict=True):
        assert torch.equal(one, other)


def test_k_counts_tiles_alike_in_the_engine_and_in_the_network(clf):
    """Also at the roundings: k pixels are k / 16 tiles, half up, at least one and at most all."""
    for k, n_tiles in [(1, 1), (23, 1), (24, 2), (25, 2), (1000, 63), (1016, 64), (1024, 64), (10**6, 64)]:
        chosen = copy.copy(clf).set_params(predict_k=k).attention_maps(CELLS.images[:3]).tiles
        assert chosen.shape == (3, n_tiles)
        assert clf.network_.n_chosen(32, 32, k) == n_tiles


FIRST_PREDICT = """
import pickle, sys, time
import numpy as np
clf = pickle.load(open(sys.argv[1], "rb"))
images = np.load(sys.argv[2])
seconds = []
for _ in range(2):
    start = time.perf_counter()
    clf.predict(images)
    seconds.append(time.perf_counter() - start)
print(seconds[0] - seconds[1])
"""


def test_the_first_predict_is_about_as_quick_as_the_second(clf, tmp_path):
    """In a fresh process: nothing is compiled or prepared in `predict`."""
    (tmp_path / "clf.pickle").write_bytes(pickle.dumps(clf))
    np.save(tmp_path / "images.npy", CELLS.images)
    command = [sys.executable, "-c", FIRST_PREDICT, tmp_path / "clf.pickle", tmp_path / "images.npy"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2
