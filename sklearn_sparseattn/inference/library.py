"""The compiled engine as a library: `sparseattn.h` for ctypes, and loading it without ever failing."""

import ctypes
import functools
import os
import re
import threading
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

MOST_LAYERS = 8  # as in sparseattn.h
KINDS = ("uint8", "uint16", "float32", "float64")  # of the values of images, in the order of its enum
FILE = Path(__file__).with_name("libsparseattn.dll" if os.name == "nt" else "libsparseattn.so")

_HAS_WARNED = threading.Event()


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Plan(ctypes.Structure):
    """``sparseattn_plan``."""

    _fields_ = [
        *_fields(ctypes.c_int32, "height", "width", "n_channels"),
        *_fields(ctypes.c_int32, "kernel_size", "stride_early", "stride_middle", "n_early", "n_middle"),
        *_fields(ctypes.c_int32, "embed_dim", "n_keys", "n_layers", "hidden_dim", "n_classes"),
        *_fields(ctypes.c_double, "exact_low", "exact_span", "least", "most"),
        *_fields(ctypes.c_float, "low", "span", "background", "key_epsilon", "norm_epsilon"),
        *_fields(ctypes.c_void_p, "bytes", "early", "early_bias", "middle", "middle_bias", "score"),
        *_fields(ctypes.c_void_p, "token", "token_bias"),
        ("layers", ctypes.c_void_p * MOST_LAYERS),
        ("layer_biases", ctypes.c_void_p * MOST_LAYERS),
        *_fields(ctypes.c_void_p, "key", "key_bias", "cls_key", "query", "value", "value_bias", "cls_value"),
        *_fields(ctypes.c_void_p, "norm_weight", "norm_bias"),
        *_fields(ctypes.c_void_p, "first", "first_bias", "residual", "residual_bias", "last", "last_bias"),
    ]


class Results(ctypes.Structure):
    """``sparseattn_results``."""

    _fields_ = _fields(
        ctypes.c_void_p,
        *("failed", "logits", "features", "scores", "tiles", "attention", "contribution", "seconds"),
    )


class Loaded(NamedTuple):
    """The library, or why there is none.

    Attributes
    ----------
    library : ctypes.CDLL or None
        With the types of its functions set.
    problem : str
        A sentence; empty if there is a library.
    """

    library: Any
    problem: str = ""


@functools.cache
def load() -> Loaded:
    """Load the library, once for the process.

    Returns
    -------
    Loaded
        Without a library if the file is missing, is of another machine, or was built from other sources.
    """
    if not FILE.is_file():
        return Loaded(None, f"{FILE} is missing.")
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        return Loaded(None, f"{FILE} cannot be loaded ({error}).")
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    types = {
        "sizes": (None, [pointer, pointer]),
        "scratch": (int64, [pointer, int32, pointer]),
        "run": (None, [pointer, int32, pointer, int32, int64, pointer, pointer]),
        "extension": (ctypes.c_char_p, []),
        "sources": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, f"sparseattn_{name}", None)
        if function is None:
            return Loaded(None, f"{FILE} has no function sparseattn_{name}.")
        function.restype, function.argtypes = result, arguments
    sizes = [int64(), int64()]
    library.sparseattn_sizes(*(ctypes.byref(size) for size in sizes))
    if [size.value for size in sizes] != [ctypes.sizeof(Plan), ctypes.sizeof(Results)] or _is_stale(library):
        return Loaded(None, f"{FILE} was built from other sources.")
    return Loaded(library)


def _is_stale(library: ctypes.CDLL) -> bool:
    """Whether a source, as far as it is there, has another content than the one that was compiled."""
    for name, digest in re.findall("([^,]+):([0-9a-f]+)", library.sparseattn_sources().decode()):
        file = FILE.with_name(name)
        if file.is_file() and blake2b(file.read_bytes(), digest_size=8).hexdigest() != digest:
            return True
    return False


def load_or_warn() -> Any:
    """Load the library; if there is none, say so the first time.

    Returns
    -------
    ctypes.CDLL or None
        The library.

    Warns
    -----
    UserWarning
        Once in the process.
    """
    library, problem = load()
    if library is None and not _HAS_WARNED.is_set():
        _HAS_WARNED.set()
        warnings.warn(
            f"The compiled engine is not available, and PyTorch predicts in its place, several times slower. "
            f"{problem} To build it, install sklearn-sparseattn again from its sources where there is a C "
            "compiler (GCC 12 or Clang, or newer).",
            stacklevel=2,
        )
    return library
