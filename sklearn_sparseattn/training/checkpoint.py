"""The state of a fit after its last whole epoch: in memory for Ctrl-C, in a file for kill -9.

A file belongs to one fit: its name is made from the parameters and the data. It holds tensors, numbers and
text, no code, and is read as such.
"""

import copy
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback, LRScheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..files import hold, remove_whole, write_whole
from ..images import chunk_slices
from .batches import LabelledImages
from .described import describe, digest_of_sources
from .net import diverged

# Other code may compute other bits, or keep other things.
_MADE_BY = (2, digest_of_sources(), torch.__version__)
_DIGEST_SIZE = 16
# They change how a fit is watched, not what it gives.
_BESIDE = {"checkpoint_dir", "n_jobs", "predict_k", "verbose"}
# What skorch's callbacks for early stopping and scores remember.
_REMEMBERED = ("misses_", "dynamic_threshold_", "best_epoch_", "best_model_weights_", "best_score_")


class Checkpoint:
    """The file of one fit; in a ``with`` block, in which no other may have it.

    Parameters
    ----------
    folder : str or path
        Where it lies; made if it is not there.
    fingerprint : str
        Of the fit.

    Attributes
    ----------
    path : Path
        Of the file.
    state : dict or None
        What the file held when the block began: the fit to be taken up. None if there was none.

    Raises
    ------
    ValueError
        When the block begins: if the folder cannot be written to, the file is damaged, or the same fit runs
        elsewhere.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = folder
        self.path = Path(folder) / f"fit-{fingerprint}.checkpoint"
        self.state: dict[str, Any] | None = None
        self._start: Mapping[str, Any] = {}

    def __enter__(self) -> "Checkpoint":
        with ExitStack() as held:
            content = self._taken(held)
            self.state = None if content is None else self._unpacked(content)
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def begin(self, rng: np.random.Generator) -> None:
        """Let a generator start where that of the fit to be taken up did; of a new fit, note where that is.

        Parameters
        ----------
        rng : numpy.random.Generator
            Before anything was drawn that the fit depends on.
        """
        if self.state is not None:
            rng.bit_generator.state = json.loads(self.state["start"])
        self._start = rng.bit_generator.state

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state of a fit, whole or not at all.

        Parameters
        ----------
        state : dict
            Of tensors, numbers and text.

        Raises
        ------
        OSError
            If it cannot be written; the last one is still there.
        """
        buffer = io.BytesIO()
        torch.save({**state, "start": json.dumps(self._start)}, buffer)
        content = buffer.getvalue()
        write_whole(self.path, _digest(content) + content)

    def remove(self) -> None:
        """Remove the file: the fit is done."""
        remove_whole(self.path)

    def _taken(self, held: ExitStack) -> bytes | None:
        """Content of the file, which is ours from now on."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError("it is not to be written to")
            held.enter_context(hold(self.path))
            return self.path.read_bytes() if self.path.exists() else None
        except BlockingIOError as error:
            raise ValueError(
                "checkpoint_dir: the same fit, to the last parameter and byte, is running already, in another"
                f" process or thread that holds {error.filename}. Let it end, or give another folder."
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint_dir={os.fspath(self.folder)!r} cannot be used: {error}.") from error

    def _unpacked(self, content: bytes) -> dict[str, Any]:
        try:
            if _digest(content[_DIGEST_SIZE:]) != content[:_DIGEST_SIZE]:
                raise ValueError("its checksum is wrong")
            return torch.load(io.BytesIO(content[_DIGEST_SIZE:]), map_location="cpu", weights_only=True)
        except (ValueError, RuntimeError, UnpicklingError) as error:
            raise ValueError(
                f"checkpoint_dir: {self.path} is damaged, {error}. Remove it, and the fit starts anew."
            ) from error


class LastEpoch(Callback):
    """Keep the state of the last whole epoch, and take up that of a checkpoint. Must be the last callback.

    Parameters
    ----------
    rng : numpy.random.Generator
        From which the fit draws.
    checkpoint : Checkpoint, default=None
        To be taken up and written after each epoch.

    Attributes
    ----------
    n_epochs_ : int
        Whole epochs so far.
    """

    def __init__(self, rng: np.random.Generator, checkpoint: Checkpoint | None = None) -> None:
        self.rng = rng
        self.checkpoint = checkpoint
        state = None if checkpoint is None else checkpoint.state
        self.n_epochs_ = 0 if state is None else len(state["history"])

    def on_train_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        """Take up the fit of the checkpoint."""
        if self.checkpoint is not None and self.checkpoint.state is not None:
            _take_up(net, self.checkpoint.state)
            self.rng.bit_generator.state = json.loads(self.checkpoint.state["rng"])
        self._note(net)

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Keep what the epoch led to."""
        if not all(bool(weight.isfinite().all()) for weight in net.module_.parameters()):
            raise diverged(net, "a step has led to weights that are not finite")
        self.n_epochs_ = len(net.history)
        self._note(net)
        if self.checkpoint is not None:
            self.checkpoint.save({**_state_of(net), "rng": json.dumps(self._draws)})

    def go_back(self, net: NeuralNet) -> None:
        """Restore weights and generator as they were after the last whole epoch.

        Parameters
        ----------
        net : NeuralNet
            Interrupted.
        """
        net.module_.load_state_dict(self._weights)
        self.rng.bit_generator.state = self._draws

    def _note(self, net: NeuralNet) -> None:
        self._weights = copy.deepcopy(net.module_.state_dict())
        self._draws = self.rng.bit_generator.state


def _portable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return value.item() if isinstance(value, np.generic) else value


def _state_of(net: NeuralNet) -> dict[str, Any]:
    """All that the next epoch depends on, but for the generator."""
    rows = [{name: _portable(value) for name, value in row.items()} for row in net.history]
    state = {
        "history": [{k: v for k, v in row.items() if isinstance(v, int | float | str)} for row in rows],
        "module": net.module_.state_dict(),
        "optimizer": net.optimizer_.state_dict(),
        "callbacks": {name: found for name, cb in net.callbacks_ if (found := _callback_state(cb))},
    }
    return tree_map(_portable, state)


def _keeper(callback: Callback) -> Any:
    """What of a callback gives and takes a state."""
    return callback.lr_scheduler_ if isinstance(callback, LRScheduler) else callback


def _callback_state(callback: Callback) -> dict[str, Any]:
    keeper = _keeper(callback)
    if hasattr(keeper, "load_state_dict"):
        return keeper.state_dict()
    return {name: vars(callback)[name] for name in _REMEMBERED if name in vars(callback)}


def _take_up(net: NeuralNet, state: Mapping[str, Any]) -> None:
    """Bring a net to the state of another; all its callbacks have begun."""
    state = copy.deepcopy(state)
    for row in state["history"]:
        net.history.new_epoch()
        for name, value in row.items():
            net.history.record(name, value)
    net.module_.load_state_dict(state["module"])
    net.optimizer_.load_state_dict(state["optimizer"])
    for name, callback in net.callbacks_:
        found, keeper = state["callbacks"].get(name, {}), _keeper(callback)
        if hasattr(keeper, "load_state_dict"):
            keeper.load_state_dict(found)
        else:
            vars(callback).update(found)


# ---- which fit it is ----


def fingerprint(
    params: Mapping[str, Any],
    classes: np.ndarray,
    data: Sequence[LabelledImages | None],
    network: nn.Module | None = None,
) -> str:
    """Name a fit by its parameters and all of its data.

    Parameters
    ----------
    params : mapping
        Of the estimator, described by `describe`. The code of this package and the version of PyTorch count,
        too.
    classes : ndarray of shape (n_classes,)
        The labels.
    data : sequence of LabelledImages or None
        Rows to train on, rows to validate on; every byte counts.
    network : nn.Module, default=None
        What the fit goes on from, with ``warm_start=True``.

    Returns
    -------
    str
        32 hexadecimal digits.

    Raises
    ------
    ValueError
        If a parameter cannot be described.
    """
    counted = {name: describe(name, value) for name, value in params.items() if name not in _BESIDE}
    digest = hashlib.blake2b(
        repr([_MADE_BY, sorted(counted.items()), classes.tolist()]).encode(), digest_size=16
    )
    for rows in data:
        if rows is None:
            digest.update(b"none")
            continue
        images = rows.images
        form = (len(images), images.image_shape, images.data.dtype.str, rows.scale.low, rows.scale.high)
        digest.update(repr(form).encode())
        for some in chunk_slices(len(images), images.image_shape):
            digest.update(np.ascontiguousarray(images.read(some)).data)
        for tensor in (rows.target, rows.weight):
            digest.update(tensor.numpy().data)
    for name, tensor in () if network is None else network.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).digest()
