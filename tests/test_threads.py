"""PyTorch's threads: nothing hangs after a fork, n_jobs holds without the engine, all is put back."""

import copy
import json
import multiprocessing
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from sklearn_sparseattn import SparseAttnClassifier, load_model, save_model
from sklearn_sparseattn.inference import library
from sklearn_sparseattn.threads import on_threads, safe_after_fork

N_THREADS = torch.get_num_threads()  # OMP_NUM_THREADS, or the processors
Y = np.arange(48) % 3
X = (np.random.default_rng(0).integers(0, 60, (48, 32, 32)) + 60 * Y[:, None, None]).astype(np.uint8)

# In an interpreter of its own, with threads whatever those of the tests are. Each call is made in a process
# that is forked after the parent's own calls, in all of which PyTorch has had two threads.
SCRIPT = """
import copy, io, json, multiprocessing, pickle, sys
from pathlib import Path

if sys.argv[2] == "late":  # the package comes to the forked process alone
    import torch
    torch.randn(1500, 1500) @ torch.randn(1500, 1500)
else:
    import torch
    from sklearn_sparseattn import SparseAttnClassifier, threads

import numpy as np
from skorch.callbacks import Callback

folder = Path(sys.argv[1])
Y = np.arange(48) % 3
X = (np.random.default_rng(0).integers(0, 60, (48, 32, 32)) + 60 * Y[:, None, None]).astype(np.uint8)

def new(**params):
    from sklearn_sparseattn import SparseAttnClassifier
    # So wide that PyTorch shares the copy of a weight among its threads.
    return SparseAttnClassifier(**{"max_epochs": 1, "hidden_dim": 600, "random_state": 0} | params)

def written(save, name):
    save(fitted["tiles"], folder / name)
    return (folder / name).stat().st_size

def loaded(name):
    from sklearn_sparseattn import load_model
    return load_model(folder / name).predict_proba(X).sum()

def explained():
    return fitted["tiles"].evidence_maps(X[:20]).sum()

def seen_in_a_call():
    # Of PyTorch's threads; a map beside it, which would hang with those of the parent.
    class Watch(Callback):
        def on_epoch_end(self, net, **kwargs):
            seen.append(torch.get_num_threads())

    seen = []
    new(callbacks=[Watch()]).fit(X, Y)
    explained()
    return seen + [torch.get_num_threads()]

def two_forks():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply_async(explained).get(timeout=40)

def in_a_thread():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(seen_in_a_call).result(40)

def cross_validated():
    from sklearn.model_selection import cross_val_score
    from joblib import parallel_config
    with parallel_config("multiprocessing", n_jobs=2):
        return cross_val_score(new(), X, Y, cv=2).sum()

CALLS = {
    "fit": lambda: new().fit(X, Y).score(X, Y),
    "fit of the paper's": lambda: new(variant="paper", embed_dim=8, k_init=100).fit(X, Y).score(X, Y),
    "partial_fit": lambda: copy.copy(fitted["partial"]).partial_fit(X, Y).score(X, Y),
    "predict": lambda: fitted["tiles"].predict(X).tolist(),
    "predict, n_jobs=2": lambda: copy.copy(fitted["tiles"]).set_params(n_jobs=2).predict(X).tolist(),
    "predict of the paper's": lambda: fitted["paper"].predict(X).tolist(),
    "paper's, n_jobs=2": lambda: copy.copy(fitted["paper"]).set_params(n_jobs=2).predict(X).tolist(),
    "transform": lambda: fitted["paper"].transform(X).sum(),
    "attention_maps": lambda: fitted["paper"].attention_maps(X).fine.sum(),
    "evidence_maps": explained,
    "occlusion_maps": lambda: fitted["paper"].occlusion_maps(X[:1], n_masks=50).sum(),
    "images that overflow": lambda: fitted["tiles"].predict(np.full((8, 32, 32), 1e36)).tolist(),
    "pickle": lambda: pickle.loads(pickle.dumps(fitted["tiles"])).score(X, Y),
    "deepcopy": lambda: copy.deepcopy(fitted["tiles"]).score(X, Y),
    "save_model": lambda: written(__import__("sklearn_sparseattn").save_model, "own"),
    "load_model": lambda: loaded("model"),
    "export_onnx": lambda: written(__import__("sklearn_sparseattn").export_onnx, "onnx"),
    "a fork of a fork": two_forks,
    "a thread of a fork": in_a_thread,
    "PyTorch's threads": seen_in_a_call,
    "joblib": cross_validated,
}
ONLY = sys.argv[3:] or list(CALLS)

def answer(name, queue):
    queue.put(CALLS[name]())

if __name__ == "__main__":
    assert torch.get_num_threads() == 2
    if sys.argv[2] != "late":
        fitted = {
            "tiles": new().fit(X, Y),
            "paper": new(variant="paper", embed_dim=8, k_init=100).fit(X, Y),
            "partial": new().partial_fit(X, Y, classes=[0, 1, 2]),
        }
        from sklearn_sparseattn import save_model
        save_model(fitted["tiles"], folder / "model")
    context = multiprocessing.get_context("fork")
    for name in ONLY:
        expected = CALLS[name]() if name != "joblib" and sys.argv[2] != "late" else None
        queue = context.Queue()
        child = context.Process(target=answer, args=(name, queue))
        child.start()
        try:
            found, hung = queue.get(timeout=60 if child.is_alive() else 5), False
        except Exception:
            found, hung = None, child.is_alive()
        child.kill()
        print(json.dumps([name, hung, expected, found], default=float), flush=True)
"""
CALLS = [line.split('"')[1] for line in SCRIPT.splitlines() if line.startswith('    "') and '": ' in line]
CALLS = [name for name in CALLS if name not in ("tiles", "paper", "partial")]

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)


def run_script(folder, *arguments, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # waiting threads take no time from others
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(folder), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_script(tmp_path_factory.mktemp("forked"), "early", monkeypatch=monkeypatch)


@needs_fork
@pytest.mark.parametrize("call", CALLS)
def test_nothing_hangs_in_a_forked_process(call, answers):
    hung, expected, found = answers[call]
    assert not hung
    if call == "joblib":
        assert 0 <= found <= 2
    elif call in ("PyTorch's threads", "a thread of a fork"):
        assert expected == [2, 2]  # in the call, after it
        assert found == [1, 2]
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3)


@needs_fork
def test_a_process_that_imports_the_package_after_the_fork(tmp_path, monkeypatch):
    [(hung, _, score)] = run_script(tmp_path, "late", "fit", monkeypatch=monkeypatch).values()
    assert not hung
    assert 0 <= score <= 1


def test_in_other_processes_nothing_is_changed():
    with safe_after_fork():
        assert torch.get_num_threads() == N_THREADS


@pytest.mark.parametrize("n_threads", [1, 3, None])
def test_the_number_is_that_of_one_thread_for_a_while(n_threads):
    seen = []

    @on_threads(n_threads)
    def fails():
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        seen.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == [N_THREADS, n_threads or N_THREADS]
    assert torch.get_num_threads() == N_THREADS


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: library.Loaded(None, "There is none."))
    library._HAS_WARNED.set()  # as after the first warning
    yield
    library._HAS_WARNED.clear()


def by_file(clf, folder):
    save_model(clf, folder / "model")
    return load_model(folder / "model")


WAYS = {
    "fitted": lambda clf, folder: clf,
    "load_model": by_file,
    "pickle": lambda clf, folder: pickle.loads(pickle.dumps(clf)),
    "deepcopy": lambda clf, folder: copy.deepcopy(clf),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_jobs", [None, 1, 3])
def test_n_jobs_is_honoured_where_the_engine_is_missing(n_jobs, way, no_engine, tmp_path, monkeypatch):
    params = {"embed_dim": 8, "hidden_dim": 16, "max_epochs": 1, "random_state": 0, "n_jobs": n_jobs}
    clf = WAYS[way](SparseAttnClassifier(**params).fit(X, Y), tmp_path)
    assert clf._engine is None
    seen = []
    forward = type(clf.network_).forward

    def watched(self, images):
        seen.append(torch.get_num_threads())
        return forward(self, images)

    monkeypatch.setattr(type(clf.network_), "forward", watched)
    for method in ("predict", "predict_proba", "transform", "attention_maps"):
        for images in (X, X[:1]):
            getattr(clf, method)(images)
    clf.occlusion_maps(X[:1], n_masks=4)
    assert set(seen) == {n_jobs or 1}
    assert torch.get_num_threads() == N_THREADS


def test_threads_of_the_caller_are_left_alone_between_two_chunks(no_engine):
    """What `run` yields is worked on by its caller, with the caller's threads."""
    clf = SparseAttnClassifier(embed_dim=8, hidden_dim=16, max_epochs=1, random_state=0, n_jobs=3).fit(X, Y)
    images = clf._check_images(np.concatenate([X] * 30))
    seen = [torch.get_num_threads() for _ in clf._run(images)]
    assert len(seen) > 1
    assert set(seen) == {N_THREADS}
