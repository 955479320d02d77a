"""One fit: a network, training rows and settings in; a trained network and its history out."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback, EarlyStopping, LRScheduler, PassthroughScoring
from skorch.helper import predefined_split
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils._pytree import tree_map

from ..network import SparseAttnNet
from .batches import Augmentation, Batches, LabelledImages, count_batches
from .dynamic_k import DynamicK
from .net import LOSS_TERMS, LearningRate, ProgressBar, SparseAttnLoss, SparseAttnTrainer

_HISTORY = ("epoch", "train_loss", *LOSS_TERMS, "k", "lr", "dur", "valid_loss", "valid_score")


@dataclass(frozen=True)
class TrainingSettings:
    """The parameters of a fit that concern training, named as in `SparseAttnClassifier`."""

    max_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    lr_schedule: str | None
    focal_gamma: float
    contrastive_weight: float
    temperature: float
    distillation_weight: float
    distillation_emphasis: float | None
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
        picked = {field.name: params[field.name] for field in fields(cls)}
        return cls(**{**picked, **changes})


@dataclass(frozen=True)
class ResumeState:
    """What the next `partial_fit` takes up, besides the network."""

    optimizer: dict[str, Any]
    dynamic_k: dict[str, float | None]
    rng: np.random.Generator


@dataclass(frozen=True)
class TrainingResult:
    """What a fit leaves behind, besides the trained network: its history by column, and how to go on."""

    history: dict[str, np.ndarray]
    resume: ResumeState


def train(
    network: SparseAttnNet,
    training: LabelledImages,
    validation: LabelledImages | None,
    settings: TrainingSettings,
    *,
    dynamic_k: DynamicK,
    class_weight: np.ndarray,
    augment: Augmentation | None,
    rng: np.random.Generator,
    device: torch.device,
    state: ResumeState | None = None,
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
    dynamic_k : DynamicK
        Moves ``network.k``.
    class_weight : ndarray of shape (n_classes,)
        alpha by class.
    augment : callable or None
        Of the training images.
    rng : numpy.random.Generator
        Shuffles the rows and drives `augment`.
    device : torch.device
        Where to train.
    state : ResumeState, default=None
        Of an earlier call, to be continued.

    Returns
    -------
    TrainingResult
        History, and the state to go on from.

    Warns
    -----
    UserWarning
        If it was interrupted from the keyboard after at least one epoch.
    """
    stopping = EarlyStopping(patience=settings.patience, load_best=True, sink=lambda text: None)
    callbacks = _callbacks(settings, dynamic_k, validation is not None, len(training))
    if settings.early_stopping:
        callbacks.append(("early_stopping", stopping))
    trainer = SparseAttnTrainer(
        network,
        criterion=_loss(settings, class_weight),
        optimizer=AdamW,
        optimizer__weight_decay=settings.weight_decay,
        # One kernel for all weights: with small networks most of a step is the optimiser's overhead.
        optimizer__fused=device.type in ("cpu", "cuda"),
        lr=settings.lr,
        max_epochs=settings.max_epochs,
        batch_size=settings.batch_size,
        iterator_train=Batches,
        iterator_train__rng=rng,
        iterator_train__augment=augment,
        iterator_valid=Batches,
        train_split=None if validation is None else predefined_split(validation),
        callbacks=callbacks,
        callbacks__print_log=None,
        device=device,
        verbose=0,
    ).initialize()
    if state is not None:
        trainer.optimizer_.load_state_dict(state.optimizer)
        # They come back as they were; set_params may have changed them since.
        trainer.optimizer_.param_groups[0].update(lr=settings.lr, weight_decay=settings.weight_decay)
        dynamic_k.load_state_dict(state.dynamic_k)
    trainer.partial_fit(training)

    finished = [row for row in trainer.history if "lr" in row]  # the last thing written of an epoch
    stopped_early = settings.early_stopping and stopping.misses_ >= settings.patience
    if len(finished) < settings.max_epochs and not stopped_early:
        _interrupted(len(finished), settings.max_epochs)
    optimizer = tree_map(_on_cpu, trainer.optimizer_.state_dict())
    resume = ResumeState(optimizer, dynamic_k.state_dict(), rng)
    return TrainingResult(_columns(finished), resume)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _loss(settings: TrainingSettings, class_weight: np.ndarray) -> SparseAttnLoss:
    return SparseAttnLoss(
        settings.focal_gamma,
        torch.from_numpy(class_weight.astype(np.float32)),
        settings.contrastive_weight,
        settings.temperature,
        settings.distillation_weight,
        settings.distillation_emphasis,
    )


def _callbacks(
    settings: TrainingSettings, dynamic_k: DynamicK, validates: bool, n_rows: int
) -> list[tuple[str, Callback]]:
    """All but early stopping, which must come last: it ends the round of callbacks."""
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
    if settings.verbose:
        callbacks.append(("progress", ProgressBar(settings.max_epochs)))
    for i, callback in enumerate(settings.callbacks or ()):
        callbacks.append(callback if isinstance(callback, tuple) else (f"callbacks_{i}", callback))
    return callbacks


def _interrupted(n_epochs: int, max_epochs: int) -> None:
    if n_epochs == 0:
        raise KeyboardInterrupt
    warnings.warn(
        f"The fit was interrupted after {n_epochs} of {max_epochs} epochs; "
        "the estimator keeps the weights it had then.",
        UserWarning,
        stacklevel=4,
    )


def _columns(rows: list[Any]) -> dict[str, np.ndarray]:
    """Epochs as rows -> one array a column."""
    names = [name for name in _HISTORY if name in rows[0]]
    return {("duration" if name == "dur" else name): np.array([row[name] for row in rows]) for name in names}
