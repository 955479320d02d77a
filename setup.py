"""Build the C library of `sklearn_sparseattn/inference`; all else is in pyproject.toml."""

import hashlib
import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext


def digest(file):
    """Name and digest of a source."""
    return f"{file.name}:{hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()}"


class BuildLibrary(build_ext):
    """Build a plain library, which no Python version or module is part of."""

    def get_ext_filename(self, fullname):
        """Name the file as `inference/library.py` looks for it, without the tag of a Python version."""
        return str(Path(*fullname.split("."))) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext):
        """Return none: the header says what is exported, and there is no PyInit function."""
        return ext.export_symbols

    def build_extension(self, ext):
        """Hand the digests of all sources to the compiler, by which a library out of date is known."""
        digests = ",".join(map(digest, map(Path, [*ext.sources, *ext.depends])))
        ext.define_macros = [*ext.define_macros, ("SPARSEATTN_SOURCES", f'"{digests}"')]
        self.force = True  # even if by its time it needs not be built
        super().build_extension(ext)


setup(cmdclass={"build_ext": BuildLibrary})
