"""What is common to the compiled code of training: loading it, and sharing images out among threads."""

import ctypes
import functools
import importlib.util
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

LANES = 8
_KEPT = threading.local()


def load_library(name: str, structure: type[ctypes.Structure]) -> Any:
    """Load compiled code.

    Parameters
    ----------
    name : str
        ``_name.c`` has a function ``sparseattn_name``.
    structure : subclass of ctypes.Structure
        What this function is given, the same in both languages.

    Returns
    -------
    ctypes.CDLL or None
        None if it was not built with the package.

    Raises
    ------
    ImportError
        If it was built from other sources.
    """
    spec = importlib.util.find_spec(f"._{name}", __package__)
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    size_of = getattr(library, f"sparseattn_{name}_size")
    size_of.restype = ctypes.c_int64
    if size_of() != ctypes.sizeof(structure) or is_stale(library):
        raise ImportError(f"{spec.origin} was built from other sources: install sklearn-sparseattn again.")
    getattr(library, f"sparseattn_{name}").argtypes = [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)
    ]
    return library


def is_stale(library: ctypes.CDLL) -> bool:
    """Tell whether sources were changed since compiled code was built from them, as far as they are there.

    Parameters
    ----------
    library : ctypes.CDLL
        Built by setup.py; of another one nothing is known.

    Returns
    -------
    bool
        Whether a file of the package has another content than the one that was compiled.
    """
    sources = getattr(library, "sparseattn_sources", None)
    if sources is None:
        return False
    sources.restype = ctypes.c_char_p
    for name, digest in re.findall("([^,]+):([0-9a-f]+)", sources().decode()):
        file = Path(__file__).parents[1] / name
        if file.is_file() and blake2b(file.read_bytes(), digest_size=8).hexdigest() != digest:
            return True
    return False


def has_hooks(*modules: nn.Module) -> bool:
    """Tell whether somebody watches or changes what some layers do, which compiled code would pass by.

    Parameters
    ----------
    *modules : nn.Module
        Layers that PyTorch would call.

    Returns
    -------
    bool
        Whether one of them has a hook, forward or backward.
    """
    return any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in modules
    )


def point(structure: ctypes.Structure, tensors: dict[str, Tensor], **lists: Sequence[Tensor | None]) -> None:
    """Set pointers.

    Parameters
    ----------
    structure : ctypes.Structure
        Which has them.
    tensors : dict of Tensor
        By the name of the field; they must live as long.
    **lists : sequence of Tensor or None
        The same for fields that are arrays.
    """
    for name, tensor in tensors.items():
        setattr(structure, name, tensor.data_ptr())
    for name, several in lists.items():
        getattr(structure, name)[:] = [None if one is None else one.data_ptr() for one in several]


@contextmanager
def keep_threads() -> Iterator[None]:
    """Let `threads` give the same threads again, on the thread that calls this, until the end of the block.

    To start some takes longer than they save on a small batch.
    """
    n_others = torch.get_num_threads() - 1
    if n_others < 1:
        yield
        return
    before = vars(_KEPT).copy()
    with ThreadPoolExecutor(n_others) as pool:
        vars(_KEPT).update(pool=pool, process=os.getpid(), n_threads=n_others + 1)
        try:
            yield
        finally:
            vars(_KEPT).clear()
            vars(_KEPT).update(before)


def _are_kept() -> bool:
    return vars(_KEPT).get("process") == os.getpid()  # a fork has none of them


@contextmanager
def pytorch_alone() -> Iterator[None]:
    """Have PyTorch compute on no other thread than that which calls this, if `keep_threads` keeps some.

    PyTorch starts threads for the smallest product of matrices. They go on turning for a while when they have
    nothing left to do, and take the processors from the threads that run compiled code.
    """
    if not _are_kept():
        yield
        return
    openmp, set_mkl = _thread_counts()
    with openmp.limit(limits=1):
        before = set_mkl(1)
        try:
            yield
        finally:
            set_mkl(before)


@functools.cache
def _thread_counts() -> tuple[ThreadpoolController, Callable[[int], int]]:
    """What sets, for the thread that calls it, how many threads OpenMP has, and MKL inside PyTorch."""
    file = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    library = ctypes.CDLL(str(file)) if file.is_file() else None
    set_mkl = getattr(library, "MKL_Set_Num_Threads_Local", lambda n_threads: 0)
    return ThreadpoolController().select(user_api="openmp"), set_mkl


def threads(n_images: int) -> AbstractContextManager[Executor | None]:
    """Open as many threads as PyTorch has, one of which is the caller.

    Parameters
    ----------
    n_images : int
        More threads than images are of no use.

    Returns
    -------
    context manager
        Of what `share_out` wants.
    """
    if _are_kept():
        return nullcontext(_KEPT.pool)
    n_others = min(torch.get_num_threads(), n_images) - 1
    return ThreadPoolExecutor(n_others) if n_others > 0 else nullcontext()


def share_out(pool: Executor | None, function: Callable[[int, int], int], n_images: int) -> bool:
    """Call compiled code for all images, in nearly equal shares.

    Parameters
    ----------
    pool : Executor or None
        From `threads`.
    function : callable
        Of the first image and the one after the last; 0 unless it failed.
    n_images : int
        Images in all.

    Returns
    -------
    bool
        Whether it did all.
    """
    if pool is None:
        return function(0, n_images) == 0
    n_threads = min(_KEPT.n_threads if _are_kept() else torch.get_num_threads(), n_images)
    cuts = [n_images * i // n_threads for i in range(n_threads + 1)]
    others = [pool.submit(function, *share) for share in itertools.pairwise(cuts[1:])]
    try:
        own = function(0, cuts[1])
    finally:  # Ctrl-C must not free what the others still write to
        wait(others)
    return not any([own, *(other.result() for other in others)])
