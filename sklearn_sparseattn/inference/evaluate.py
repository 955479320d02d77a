"""Run a fitted network over images, a few at a time: by the engine if there is one, else by PyTorch.

PyTorch computes in float64: what else is in the call then changes an image's result by less than 1e-9, where
in float32 it could change which of two nearly equal tiles is chosen. The engine runs each image by itself.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ..images import ImageRows, PixelScale, chunk_slices
from ..network import SparseAttnNet, SparseAttnOutput
from ..threads import on_threads
from .engine import Engine

Pass = tuple[slice, SparseAttnOutput]


def evaluate(
    network: SparseAttnNet,
    images: ImageRows,
    scale: PixelScale,
    k: float | None = None,
    n_threads: int | None = None,
) -> Iterator[Pass]:
    """Pass images through the network, in chunks of bounded memory.

    Parameters
    ----------
    network : SparseAttnNet
        Fitted; it is not changed. It works where it is, on MPS (which has no float64) on the CPU instead.
    images : ImageRows
        Validated.
    scale : PixelScale
        The map learned in the fit.
    k : float, default=None
        Pixels to choose; None takes the network's own.
    n_threads : int, default=None
        Of PyTorch; None leaves it those that it has.

    Yields
    ------
    rows : slice
        Which images.
    output : SparseAttnOutput
        Their results, float64 on the CPU.

    Raises
    ------
    ValueError
        If X contains NaN.
    """
    with on_threads(n_threads):
        exact = exact_copy(network, k)
    device = next(exact.parameters()).device
    for rows in chunk_slices(len(images), images.image_shape):
        with on_threads(n_threads), torch.inference_mode():  # not while the caller works on what was given
            batch = torch.from_numpy(scale.finite(images.read(rows))).to(device=device, dtype=torch.float64)
            output = SparseAttnOutput(*(part.cpu() for part in exact(batch)))
        yield rows, output


def exact_copy(network: SparseAttnNet, k: float | None = None) -> SparseAttnNet:
    """Copy a network in float64.

    Parameters
    ----------
    network : SparseAttnNet
        Fitted.
    k : float, default=None
        Pixels that the copy chooses; None takes those of the network.

    Returns
    -------
    SparseAttnNet
        In evaluation mode; where the network is, on the CPU instead of MPS, which has no float64.
    """
    device = next(network.parameters()).device
    if device.type == "mps":
        device = torch.device("cpu")
    exact = copy.deepcopy(network).to(device=device, dtype=torch.float64).eval()
    if k is not None:
        exact.k.fill_(k)
    return exact


def run(
    engine: Engine | None,
    network: SparseAttnNet,
    images: ImageRows,
    scale: PixelScale,
    *,
    k: float | None = None,
    maps: bool = False,
    n_threads: int = 1,
) -> Iterator[Pass]:
    """Pass images through the engine, or where there is none through the network.

    Parameters
    ----------
    engine : Engine or None
        Of the same network.
    network : SparseAttnNet
        Fitted; it also runs the images whose numbers overflow in the engine's float32.
    images : ImageRows
        Validated.
    scale : PixelScale
        The map learned in the fit.
    k : float, default=None
        Pixels to choose; None takes the network's own.
    maps : bool, default=False
        Whether scores, tiles, attention and contribution are wanted; without an engine they always come.
    n_threads : int, default=1
        Of the engine, or where there is none of PyTorch.

    Yields
    ------
    rows : slice
        Which images, in order.
    output : SparseAttnOutput
        Their results on the CPU; those that are not wanted are empty.

    Raises
    ------
    ValueError
        If X contains NaN.
    """
    if engine is None:
        yield from evaluate(network, images, scale, k, n_threads)
        return
    grid = network.grid_of(*images.image_shape[:2])

    def run_some(rows: slice) -> Pass:
        found = engine.run(images.read(rows), k=k, maps=maps)
        failed = np.flatnonzero(found.pop("failed"))
        if len(failed):
            with np.errstate(invalid="ignore"):  # what is left of these images may be anything
                found = {
                    name: part.astype(np.promote_types(part.dtype, np.float64))
                    for name, part in found.items()
                }
        for i in failed:
            [(_, exact)] = evaluate(network, images.take(np.array([rows.start + i])), scale, k, 1)
            for name, part in found.items():
                part[i] = getattr(exact, name)[0].flatten()
        shapes = {"scores": (-1, *grid)} if maps else {}
        parts = {
            name: torch.from_numpy(part.reshape(shapes.get(name, part.shape))) for name, part in found.items()
        }
        empty = torch.empty(0, device="cpu", dtype=torch.float32)
        return rows, SparseAttnOutput(*(parts.get(name, empty) for name in SparseAttnOutput._fields))

    # Enough pieces for all threads to end at about the same time; an image's result does not depend on them.
    n_threads = max(1, min(n_threads, len(images) // 4))  # to start one costs as much as some images
    n_pieces = 1 if n_threads == 1 else 4 * n_threads
    most = -(-len(images) // n_pieces) * math.prod(images.image_shape)
    pieces = chunk_slices(len(images), images.image_shape, min(2**21, most))
    try:
        yield from map(run_some, pieces) if n_threads == 1 else _in_threads(run_some, pieces, n_threads)
    finally:
        engine.release()


def _in_threads(function: Callable[[slice], Pass], pieces: Iterator[slice], n_threads: int) -> Iterator[Pass]:
    """As `map`, but ahead by two pieces a thread: memory stays bounded."""
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[Pass]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(function, piece))
                if len(waiting) > 2 * n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error what has not begun is left
            for future in waiting:
                future.cancel()
