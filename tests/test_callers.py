"""One fitted estimator, many callers: threads, processes of all kinds, joblib; the same bits, no hang."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV, cross_val_predict

from sklearn_sparseattn import SparseAttnClassifier

SIDE, N_CLASSES = 6, 12
Y = np.arange(60) % N_CLASSES
X = (np.random.default_rng(0).integers(0, 60, (60, SIDE, SIDE)) + 16 * Y[:, None, None]).astype(np.uint8)
MANY = np.concatenate([X] * 200)  # enough for PyTorch to take threads of its own, were it asked
METHODS = ("predict", "predict_proba", "transform", "attention_maps")


@pytest.fixture(scope="module")
def clf():
    return SparseAttnClassifier(max_epochs=2, random_state=0).fit(X, Y)


def answers(estimator, images=X):
    found = {method: getattr(estimator, method)(images) for method in METHODS[:3]}
    return found | dict(estimator.attention_maps(images))


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_eight_threads_on_one_estimator(clf):
    expected = answers(clf)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: same(answers(clf), expected), range(160)))


def test_threads_that_take_threads(clf):
    expected = clf.predict_proba(MANY)
    threaded = pickle.loads(pickle.dumps(clf)).set_params(n_jobs=3)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(threaded.predict_proba, [MANY] * 8):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib(clf, backend):
    expected = answers(clf)
    parallel = joblib.Parallel(n_jobs=2, backend=backend, timeout=120)
    for found in parallel(joblib.delayed(answers)(clf) for _ in range(6)):
        assert same(found, expected)


def test_search_and_cross_validation_in_two_processes():
    """The fits themselves are the same to the last bit, wherever they are made."""
    clf = SparseAttnClassifier(max_epochs=2, random_state=0)
    alone, together = (
        GridSearchCV(clf, {"lr": [1e-3, 1e-2]}, cv=2, n_jobs=n_jobs, error_score="raise").fit(X, Y)
        for n_jobs in (1, 2)
    )
    for fold in ("split0_test_score", "split1_test_score"):
        np.testing.assert_array_equal(together.cv_results_[fold], alone.cv_results_[fold])
    np.testing.assert_array_equal(together.predict_proba(X), alone.predict_proba(X))
    options = {"cv": 2, "method": "predict_proba"}
    np.testing.assert_array_equal(
        cross_val_predict(clf, X, Y, n_jobs=2, **options), cross_val_predict(clf, X, Y, n_jobs=1, **options)
    )


# In an interpreter of its own, where no other thread is, and one for all, as each takes seconds to start.
SCRIPT = """
import multiprocessing, os, pickle, sys, threading, time
import numpy as np

METHODS = ("predict", "predict_proba", "transform", "attention_maps")

def count():
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.exists(tasks) else threading.active_count()

def most_threads(clf, images):
    # The most that are there at once, above those of the imports.
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.0005):
            most = max(most, count())

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = count()
    for n_jobs in (None, 1, 3):
        clf.set_params(n_jobs=n_jobs)
        most = 0
        for method in METHODS:
            for kind in (images, images.astype(float)):
                getattr(clf, method)(kind)
                time.sleep(0.05)  # a thread that was joined is there a moment longer
        yield most - before
    done.set()
    watcher.join()

def work(clf, images, labels):
    fitted = pickle.loads(pickle.dumps(clf)).fit(images[:60], labels)
    maps = clf.attention_maps(images[:60])
    return clf.predict_proba(images), maps.tiles, maps.coarse, fitted.predict_proba(images[:60])

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        clf, images, labels = pickle.load(file)
    clf.predict(images[:2])
    print(*most_threads(clf, images))
    import torch
    torch.set_num_threads(1)  # fits take as many as PyTorch has, and those do not outlive a fork
    os.environ["OMP_NUM_THREADS"] = "1"
    expected = work(clf, images, labels)  # before the processes start: whatever has threads has them by now
    for method, n_processes in [("fork", 2), ("spawn", 1)]:
        with multiprocessing.get_context(method).Pool(n_processes) as pool:
            calls = [pool.apply_async(work, (clf, images, labels)) for _ in range(4)]
            for call in calls:
                for one, other in zip(call.get(timeout=100), expected):
                    np.testing.assert_array_equal(one, other)
        print(method, "gave the same")
"""


def test_forked_and_spawned_processes_and_no_more_threads_than_asked_for(clf, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # what PyTorch would take
    (tmp_path / "all.pickle").write_bytes(pickle.dumps((clf, MANY, Y)))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "all.pickle")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    threads, *processes = run.stdout.splitlines()
    by_default, by_one, by_three = map(int, threads.split())
    assert by_default <= 0
    assert by_one <= 0
    assert 1 <= by_three <= 3
    assert processes == ["fork gave the same", "spawn gave the same"]
