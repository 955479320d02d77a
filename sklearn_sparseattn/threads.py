"""How many threads PyTorch computes on during a call. After it, and in other threads, all is as it was.

GNU OpenMP's threads do not survive a fork, and its next parallel region in a thread that forked waits for
them for ever. So in a forked process PyTorch has one thread for a call.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController

_FORKED: list[int] = []  # the thread that forked, whose OpenMP threads may be gone; empty if none did


def _is_after_fork() -> None:
    _FORKED[:] = [threading.get_ident()]


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_is_after_fork)
    if multiprocessing.parent_process() is not None and multiprocessing.get_start_method(allow_none=True) in (
        None,
        "fork",
    ):
        _is_after_fork()  # before this import, in which case the parent may have used PyTorch all the same

# By OpenMP's own count, which each thread has for itself; that of PyTorch is also for threads to come.
_OPENMP = ThreadpoolController().select(user_api="openmp")


@contextmanager
def safe_after_fork() -> Iterator[None]:
    """Let PyTorch compute in a forked process: on one thread, since with more it could hang.

    In other processes nothing is changed.

    Yields
    ------
    None
        Afterwards PyTorch has the threads that it had.
    """
    if not _FORKED:
        yield
        return
    if threading.get_ident() not in _FORKED:
        with _OPENMP.limit(limits=1):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_threads(n_threads: int | None) -> Iterator[None]:
    """Let PyTorch compute on so many threads, in this thread alone.

    Parameters
    ----------
    n_threads : int or None
        None leaves the number as it is. In a forked process it is 1, whatever is asked for.

    Yields
    ------
    None
        Afterwards PyTorch has the threads that it had.
    """
    with safe_after_fork():
        if n_threads is None or _FORKED:
            yield
            return
        with _OPENMP.limit(limits=n_threads):
            yield
