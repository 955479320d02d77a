"""The source archive has all that git has: who builds from it can compile, test and measure."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "sklearn_sparseattn", "tests")
BUILT = {".so", ".dll", ".pyc"}
OF_GIT = {".gitignore"}  # it means nothing in the archive


def tracked():
    """Files of the checkout; in an unpacked archive, where git knows nothing, those of its folders."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {name for name in listed.split("\0") if name and (ROOT / name).is_file()} - OF_GIT
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found += [ROOT / name for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")]
    return {
        path.relative_to(ROOT).as_posix() for path in found if path.is_file() and path.suffix not in BUILT
    }


def test_the_archive_has_every_file_of_the_checkout(tmp_path):
    files = tracked()
    assert {"tests/conftest.py", "sklearn_sparseattn/inference/_engine.c", "examples/demo.py"} <= files
    for name in files:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "checkout" / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "checkout", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        members = {name.partition("/")[2] for name in opened.getnames()}
    assert files - members == set()
    assert not [name for name in members if Path(name).suffix in BUILT]
