"""What is installed, for a bug report."""

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

from .inference.library import FILE, load

PACKAGE = "sklearn-sparseattn"
_CPU_INFO = Path("/proc/cpuinfo")


def show_versions() -> None:
    """Print what a bug report should say: versions, the processor, and whether the compiled engine runs.

    Examples
    --------
    >>> from sklearn_sparseattn import show_versions
    >>> show_versions()  # doctest: +SKIP
    System:
        python: 3.11.9 (main, Apr  2 2024, 08:25:04) [GCC 12.2.0]
    executable: /usr/bin/python3
       machine: Linux-6.1.0-x86_64-with-glibc2.36
     processor: Intel(R) Xeon(R) Processor
    ...
    """
    system = {
        "python": sys.version.replace("\n", " "),
        "executable": sys.executable,
        "machine": platform.platform(),
        "processor": _processor(),
    }
    for title, entries in {
        "System": system,
        "Python dependencies": _versions(),
        "Compiled engine": _engine(),
    }.items():
        print(f"\n{title}:")  # noqa: T201
        width = max(map(len, entries))
        for name, value in entries.items():
            print(f"{name:>{width}}: {value}")  # noqa: T201


def _processor() -> str:
    """Name of the processor, as far as it can be found out."""
    if _CPU_INFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(errors="replace"), re.MULTILINE)
        if found is not None:
            return found[1]
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Versions of this package and of what it needs, whether or not it is there."""
    return {name: _version(name) for name in (PACKAGE, "pip", "setuptools", *_dependencies())}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _dependencies() -> list[str]:
    """Names of the packages that this one says it needs, without those of the extras."""
    try:
        required = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if "extra ==" not in line]


def _engine() -> dict[str, str]:
    library, problem = load()
    if library is None:
        return {"runs": "no, PyTorch predicts", "because": problem}
    return {"runs": "yes", "vectors": library.sparseattn_extension().decode(), "file": str(FILE)}
