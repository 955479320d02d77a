"""What every test run needs before the first import of SciPy, matplotlib or hypothesis' tests."""

import importlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# scikit-learn skips its array API checks where SciPy was imported without this.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
# No screen is needed, here or in the examples that the tests start.
os.environ.setdefault("MPLBACKEND", "Agg")

# Timings of single examples say nothing on a shared machine. In CI the examples are the same in
# every run, so that a red run can be repeated; at home they are drawn anew.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load_benchmark(monkeypatch):
    """Import a script of benchmarks/ where it finds its neighbours; all of them are gone after the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for script in BENCHMARKS.glob("*.py"):
        # Set, then deleted, so that what a test imports is gone after it.
        monkeypatch.setitem(sys.modules, script.stem, None)
        monkeypatch.delitem(sys.modules, script.stem)
    return importlib.import_module


def pytest_collection_modifyitems(items):
    """The longest tests first: one that begins last leaves the other processes without work."""
    items.sort(key=lambda item: "check_classifiers_train" not in item.name)
