"""One fit: a network, training rows and settings in; a trained network and its history out."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback, EarlyStopping, LRScheduler, PassthroughScoring
from skorch.helper import predefined_split
from skorch.utils import noop
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils._pytree import tree_map

from ..network import SparseAttnNet
from .augmentation import Augmentation
from .batches import Batches, LabelledImages, count_batches
from .checkpoint import Checkpoint, LastEpoch
from .dynamic_k import DynamicK
from .monitors import refuse_without_validation
from .net import LOSS_TERMS, LearningRate, ProgressBar, SparseAttnLoss, SparseAttnTrainer, keeping_up

# Columns of the history, and what skorch calls them.
_COLUMNS = {
    **{name: name for name in ("epoch", "train_loss", *LOSS_TERMS, "k", "loss_at_half_k", "loss_at_k", "lr")},
    "duration": "dur",
    **{name: name for name in ("valid_loss", "valid_score")},
}
# What skorch counts for itself; all else of an epoch was recorded by the user's callbacks.
_INTERNAL = {"batches", "train_batch_count", "valid_batch_count"} | {f"{name}_best" for name in _COLUMNS}


# By so much, in the logarithm, weights without gradient shrink at the highest learning rate throughout a fit.
_SHRINKAGE = 3.0
_FEWEST_STEPS = 300  # of fewer, each would undo what it learns


@dataclass(frozen=True)
class TrainingSettings:
    """The parameters of a fit that concern training, named as in `SparseAttnClassifier`.

    `n_passes` is the `max_epochs` of the estimator, also in `partial_fit`, which makes one pass.
    """

    max_epochs: int
    n_passes: int
    batch_size: int
    lr: float
    weight_decay: float | None
    lr_schedule: str | None
    focal_gamma: float
    contrastive_weight: float
    temperature: float
    distillation_weight: float
    consistency_weight: float
    early_stopping: bool
    patience: int
    callbacks: Sequence[Any] | None
    verbose: int

    @classmethod
    def from_params(cls, params: Mapping[str, Any], **changes: Any) -> "TrainingSettings":
        """Pick the fields out of an estimator's parameters.

        Parameters
        ----------
        params : mapping
            ``estimator.get_params(deep=False)``.
        **changes : dict
            Fields that differ from `params`.

        Returns
        -------
        TrainingSettings
            The settings.
        """
        params = {**params, "n_passes": params["max_epochs"]}
        picked = {field.name: params[field.name] for field in fields(cls)} | changes
        return cls(**{name: _plain(value) for name, value in picked.items()})

    def weight_decay_for(self, n_rows: int) -> float:
        """Give the weight decay of a fit.

        Parameters
        ----------
        n_rows : int
            Training rows.

        Returns
        -------
        float
            As given, or by the steps of the fit.
        """
        if self.weight_decay is not None:
            return self.weight_decay
        n_steps = self.n_passes * count_batches(n_rows, self.batch_size)
        return _SHRINKAGE / (self.lr * max(n_steps, _FEWEST_STEPS))


@dataclass(frozen=True)
class ResumeState:
    """What the next `partial_fit` takes up, besides the network; the optimiser's tensors are arrays here."""

    optimizer: dict[str, Any]
    dynamic_k: dict[str, float | None]
    rng: np.random.Generator


@dataclass(frozen=True)
class TrainingResult:
    """What a fit leaves behind, besides the trained network.

    Its history by column, how to go on, whether the keyboard ended it, and how a k is drawn for each image.
    """

    history: dict[str, np.ndarray]
    resume: ResumeState
    interrupted: bool
    draw: Callable[[float, int], torch.Tensor | None]


def train(
    network: SparseAttnNet,
    training: LabelledImages,
    validation: LabelledImages | None,
    settings: TrainingSettings,
    *,
    k_defaults: Mapping[str, Any],
    class_weight: np.ndarray,
    augment: Augmentation | None,
    rng: np.random.Generator,
    device: torch.device,
    state: ResumeState | None = None,
    checkpoint: Checkpoint | None = None,
) -> TrainingResult:
    """Train `network` in place.

    Parameters
    ----------
    network : SparseAttnNet
        Initialised; moved to `device`.
    training : LabelledImages
        At least one row.
    validation : LabelledImages or None
        Watched by the schedule and by early stopping, if there are any.
    settings : TrainingSettings
        The rest.
    k_defaults : mapping
        ``k_min``, ``k_max``, ``tolerance`` and ``n_pixels`` for the DynamicK that moves ``network.k``: that
        of the user's callbacks, or a new one.
    class_weight : ndarray of shape (n_classes,)
        alpha by class.
    augment : callable or None
        Of the training images; needed if consistency has a weight.
    rng : numpy.random.Generator
        Shuffles the rows and drives `augment`.
    device : torch.device
        Where to train.
    state : ResumeState, default=None
        Of an earlier call, to be continued.
    checkpoint : Checkpoint, default=None
        Written after each epoch, and taken up if it holds some.

    Returns
    -------
    TrainingResult
        History, and the state to go on from.

    Warns
    -----
    UserWarning
        If it was interrupted from the keyboard after at least one epoch.

    Raises
    ------
    ValueError
        If it diverges, or a callback needs validation rows and there are none.
    OSError
        If the checkpoint cannot be written.
    """
    given = _given_callbacks(settings.callbacks)
    if validation is None:
        refuse_without_validation(given)
    dynamic_k = given_rule(settings.callbacks) or DynamicK()
    dynamic_k.use(**k_defaults, rng=rng)
    callbacks = _callbacks(settings, dynamic_k, validation is not None, len(training))
    callbacks += [(name, callback) for name, callback in given if callback is not dynamic_k]
    stopping = EarlyStopping(patience=settings.patience, threshold=0, load_best=True, sink=noop)
    if settings.early_stopping:  # after all that look at an epoch, since it ends the round of callbacks
        callbacks.append(("early_stopping", stopping))
    last = LastEpoch(rng, checkpoint)
    callbacks.append(("last_epoch", last))
    loss = _loss(settings, class_weight)
    weight_decay = settings.weight_decay_for(len(training))
    trainer = SparseAttnTrainer(
        network,
        criterion=loss,
        optimizer=AdamW,
        optimizer__weight_decay=weight_decay,
        # One kernel for all weights: with small networks most of a step is the optimiser's overhead.
        optimizer__fused=device.type in ("cpu", "cuda"),
        lr=settings.lr,
        max_epochs=settings.max_epochs,
        batch_size=settings.batch_size,
        iterator_train=Batches,
        iterator_train__rng=rng,
        iterator_train__augment=augment,
        iterator_train__n_views=loss.n_views,
        iterator_valid=Batches,
        train_split=None if validation is None else predefined_split(validation),
        callbacks=callbacks,
        callbacks__print_log=None,
        device=device,
        verbose=0,
    ).initialize()
    if state is not None:
        _restore(trainer.optimizer_, state.optimizer)
        # They come back as they were; set_params may have changed them since.
        trainer.optimizer_.param_groups[0].update(lr=settings.lr, weight_decay=weight_decay)
        dynamic_k.load_state_dict(state.dynamic_k)
    with keeping_up(network):
        trainer.partial_fit(training, epochs=settings.max_epochs - last.n_epochs_)

    finished = [row for row in trainer.history if "lr" in row]  # the last thing written of an epoch
    stopped = any(isinstance(c, EarlyStopping) and c.misses_ >= c.patience for _, c in callbacks)
    interrupted = len(finished) < settings.max_epochs and not stopped
    if interrupted:
        if len(finished) == last.n_epochs_:  # else all is as the last epoch left it
            last.go_back(trainer)
            if settings.early_stopping and finished:
                stopping.on_train_end(trainer)
        _interrupted(
            len(finished),
            settings.max_epochs,
            stopping.best_epoch_ if settings.early_stopping else 0,
            checkpoint,
        )
    optimizer = tree_map(_as_array, trainer.optimizer_.state_dict())
    resume = ResumeState(optimizer, dynamic_k.state_dict(), rng)
    return TrainingResult(_columns(finished), resume, interrupted, dynamic_k.draw)


def _plain(value: Any) -> Any:
    """Python's own numbers: NumPy's, from a parameter grid for one, would overflow, PyTorch refuses some."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return min(int(value), 2**62)  # more would mean the same, if it could be computed with
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value)
    return bool(value) if isinstance(value, np.bool_) else value


def _as_array(value: Any) -> Any:
    """A copy of a tensor that formats other than pickle, like that of skops, can hold."""
    return np.array(value.cpu().numpy()) if isinstance(value, torch.Tensor) else value


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Bring an optimiser to a state of arrays."""
    optimizer.load_state_dict(tree_map(_as_tensor, state))
    for weight, found in optimizer.state.items():
        for name, tensor in found.items():
            if tensor.shape == weight.shape:  # fused steps go by place in memory, which files do not keep
                found[name] = torch.empty_like(weight).copy_(tensor)


def _loss(settings: TrainingSettings, class_weight: np.ndarray) -> SparseAttnLoss:
    return SparseAttnLoss(
        settings.focal_gamma,
        torch.from_numpy(class_weight.astype(np.float32)),
        settings.contrastive_weight,
        settings.temperature,
        settings.distillation_weight,
        settings.consistency_weight,
    )


def _callbacks(
    settings: TrainingSettings, dynamic_k: DynamicK, validates: bool, n_rows: int
) -> list[tuple[str, Callback]]:
    """Our own, in the order in which they need each other's results."""
    callbacks: list[tuple[str, Callback]] = [
        (name, PassthroughScoring(name, on_train=True)) for name in LOSS_TERMS
    ]
    if validates:
        callbacks.append(("valid_score", PassthroughScoring("valid_score", lower_is_better=False)))
    callbacks += [("dynamic_k", dynamic_k), ("learning_rate", LearningRate())]
    if settings.lr_schedule == "onecycle":
        n_steps = settings.max_epochs * count_batches(n_rows, settings.batch_size)
        schedule = LRScheduler(
            OneCycleLR, max_lr=settings.lr, total_steps=n_steps, step_every="batch", event_name=None
        )
        callbacks.append(("schedule", schedule))
    elif settings.lr_schedule == "plateau":
        monitor = "valid_loss" if validates else "train_loss"
        schedule = LRScheduler(ReduceLROnPlateau, monitor=monitor, factor=0.9, patience=5, event_name=None)
        callbacks.append(("schedule", schedule))
    if settings.verbose and sys.stderr is not None:  # a program without a console has none
        callbacks.append(("progress", ProgressBar(settings.max_epochs)))
    return callbacks


def _given_callbacks(callbacks: Sequence[Any] | None) -> list[tuple[str, Callback]]:
    """The user's callbacks, each with a name."""
    named = []
    for i, given in enumerate(callbacks or ()):
        name, callback = given if isinstance(given, tuple) and len(given) == 2 else (f"callbacks_{i}", given)
        if not (isinstance(name, str) and isinstance(callback, Callback)):
            raise ValueError(
                f"callbacks[{i}]={given!r} must be an instance of a skorch callback or a pair (name, one)."
            )
        named.append((name, callback))
    return named


def given_rule(callbacks: Sequence[Any] | None) -> DynamicK | None:
    """Find the rule of k among the user's callbacks.

    Parameters
    ----------
    callbacks : sequence or None
        As given to the estimator.

    Returns
    -------
    DynamicK or None
        If there is one.

    Raises
    ------
    ValueError
        If there are several: they would move the same k.
    """
    rules = [callback for _, callback in _given_callbacks(callbacks) if isinstance(callback, DynamicK)]
    if len(rules) > 1:
        raise ValueError(f"callbacks={list(callbacks or ())!r} hold {len(rules)} DynamicK: give one.")
    return rules[0] if rules else None


def _interrupted(n_epochs: int, max_epochs: int, best: int, checkpoint: Checkpoint | None) -> None:
    if n_epochs == 0:
        raise KeyboardInterrupt
    warnings.warn(
        f"The fit was interrupted after {n_epochs} of {max_epochs} epochs; the estimator is that of "
        + (f"epoch {best}, the best so far." if best else f"epoch {n_epochs}, the last whole one.")
        + ("" if checkpoint is None else " The same fit goes on from its checkpoint."),
        UserWarning,
        stacklevel=4,
    )


def _columns(rows: list[Any]) -> dict[str, np.ndarray]:
    """Epochs as rows -> one array a column: ours, then the numbers that callbacks recorded."""
    columns = {
        name: np.array([row.get(theirs, np.nan) for row in rows])
        for name, theirs in _COLUMNS.items()
        if theirs in rows[0]
    }
    numbers = [{name: _number(value) for name, value in row.items()} for row in rows]
    found = [name for row in numbers for name, value in row.items() if value is not None]
    for name in dict.fromkeys(found):
        if name not in _INTERNAL and name not in _COLUMNS and name not in _COLUMNS.values():
            values = [row.get(name) for row in numbers]
            columns[name] = np.array([np.nan if value is None else value for value in values])
    return columns


def _number(value: Any) -> float | None:
    """One number of a callback, None of anything else."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real | np.bool_) else None


def join_histories(past: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put one history behind another, epochs numbered on; what only one of them has is NaN in the other.

    Parameters
    ----------
    past, new : dict of ndarray
        Columns of equal length each.

    Returns
    -------
    dict of ndarray
        Columns of the joint length.
    """
    lengths = len(past["epoch"]), len(new["epoch"])
    missing = [np.full(length, np.nan) for length in lengths]
    joint = {
        name: np.concatenate([past.get(name, missing[0]), new.get(name, missing[1])])
        for name in dict.fromkeys([*_COLUMNS, *past, *new])
        if name in past or name in new
    }
    return joint | {"epoch": np.arange(1, sum(lengths) + 1)}
