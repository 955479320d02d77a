"""PyTorch's process-wide settings, a package without its metadata, a program without a console."""

import copy
import pickle
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier, export_onnx, load_model, save_model
from sklearn_sparseattn.files import package_version

Y = np.arange(24) % 3
X = (np.random.default_rng(0).integers(0, 60, (24, 8, 8)) + 60 * Y[:, None, None]).astype(np.uint8)


def new(**params):
    return SparseAttnClassifier(
        **{"max_epochs": 2, "random_state": 0, "hidden_dim": 16, "embed_dim": 8} | params
    )


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def written(save, clf, path):
    save(clf, path)
    return path


CALLS = {
    "fit": lambda clf, folder: new().fit(X, Y).predict_proba(X),
    "fit of the paper's": lambda clf, folder: new(variant="paper").fit(X, Y).predict_proba(X),
    "partial_fit": lambda clf, folder: new().partial_fit(X, Y, classes=[0, 1, 2]).predict_proba(X),
    "predict": lambda clf, folder: clf.predict(X),
    "predict_proba": lambda clf, folder: clf.predict_proba(X),
    "predict_log_proba": lambda clf, folder: clf.predict_log_proba(X),
    "transform": lambda clf, folder: clf.transform(X),
    "attention_maps": lambda clf, folder: clf.attention_maps(X).fine,
    "evidence_maps": lambda clf, folder: clf.evidence_maps(X[:3]),
    "occlusion_maps": lambda clf, folder: clf.occlusion_maps(X[:2]),
    "pickle": lambda clf, folder: pickle.loads(pickle.dumps(clf)).predict_proba(X),
    "deepcopy": lambda clf, folder: copy.deepcopy(clf).predict_proba(X),
    "model file": lambda clf, folder: load_model(written(save_model, clf, folder / "m")).predict_proba(X),
    "ONNX": lambda clf, folder: np.frombuffer(written(export_onnx, clf, folder / "m").read_bytes(), np.uint8),
    "pixel set": lambda clf, folder: PixelSetTransformer(k=5, score=clf).fit(X, Y).transform(X),
}


@pytest.fixture(scope="module")
def fitted():
    return new().fit(X, Y)


@pytest.fixture(scope="module")
def expected(fitted, tmp_path_factory):
    return {name: call(fitted, tmp_path_factory.mktemp("plain")) for name, call in CALLS.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_pytorch_changes_a_bit(setting, call, fitted, expected, tmp_path):
    with SETTINGS[setting]():
        found = CALLS[call](fitted, tmp_path)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected[call]))
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_it_is_imported_without_its_metadata():
    code = (
        "from importlib import metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = metadata.distribution = missing\n"
        "import sklearn_sparseattn\n"
        "from sklearn_sparseattn.files import package_version\n"
        "print(package_version())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "unknown", run.stderr
    assert package_version()[0].isdigit()


def test_a_program_without_a_console_has_no_bar(monkeypatch):
    expected = new().fit(X, Y).predict_proba(X)
    monkeypatch.setattr(sys, "stderr", None)
    np.testing.assert_array_equal(new(verbose=1).fit(X, Y).predict_proba(X), expected)
