"""`show_versions`: what a bug report needs."""

import importlib.metadata

import pytest

from sklearn_sparseattn import versions
from sklearn_sparseattn.inference import library


def test_it_names_the_package_its_dependencies_and_the_engine(capsys):
    versions.show_versions()
    printed = capsys.readouterr().out
    for name in ("sklearn-sparseattn", "torch", "scikit-learn", "skorch"):
        assert f"{name}: {importlib.metadata.version(name)}" in printed
    extension = library.load().library.sparseattn_extension().decode()
    assert "runs: yes" in printed
    assert f"vectors: {extension}" in printed


def test_it_says_why_there_is_no_engine(capsys, monkeypatch):
    monkeypatch.setattr(versions, "load", lambda: library.Loaded(None, "it is missing."))
    versions.show_versions()
    assert "because: it is missing." in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "model name : A processor\n"])
def test_the_processor_has_a_name_on_every_system(text, tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "_CPU_INFO", tmp_path / "cpuinfo")
    assert versions._processor()
    versions._CPU_INFO.write_text(text)
    assert versions._processor()


def test_a_dependency_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["surely-not-there>=1", 'x; extra == "dev"']
    )
    found = versions._versions()
    assert found["surely-not-there"] == "not installed"
    assert "x" not in found
