"""What values the parameters of SparseAttnClassifier may have. Imports no other room of the package."""

import os
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from sklearn.utils._param_validation import Interval, Options, StrOptions


class Range(Interval):
    """An interval of numbers of all kinds, fractions too, but not of truth values."""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool):
            return False
        return super().__contains__(float(value) if isinstance(value, Fraction) else value)


_COUNT_OR_SHARE = [Range(Integral, 1, None, closed="left"), Range(Real, 0, 1, closed="right")]
_STEP = [Range(Integral, 0, None, closed="left"), Range(Real, 0, 1, closed="right")]
_POSITIVE = [Range(Real, 0, None, closed="neither")]
_NON_NEGATIVE = [Range(Real, 0, None, closed="left")]
_POSITIVE_INTEGER = [Range(Integral, 1, None, closed="left")]

CONSTRAINTS: dict = {
    "k_init": _COUNT_OR_SHARE,
    "k_min": _COUNT_OR_SHARE,
    "k_max": _COUNT_OR_SHARE,
    "k_shrink": _STEP,
    "k_grow": _STEP,
    "ema_decay": [Range(Real, 0, 1, closed="left")],
    "k_momentum": [Range(Real, 0, 1, closed="left")],
    "k_update": [StrOptions({"batch", "epoch"})],
    "variant": [StrOptions({"context", "paper"})],
    "depth": [Options(Integral, {2, 3})],
    "kernel_size": [Options(Integral, {3, 5, 7})],
    "gate_init": [Range(Real, 0, 1, closed="neither")],
    "embed_dim": _POSITIVE_INTEGER,
    "n_heads": _POSITIVE_INTEGER,
    "hidden_dim": _POSITIVE_INTEGER,
    "focal_gamma": _NON_NEGATIVE,
    "class_weight": [StrOptions({"balanced"}), dict, None],
    "contrastive_weight": _NON_NEGATIVE,
    "temperature": _POSITIVE,
    "distillation_weight": _NON_NEGATIVE,
    "distillation_emphasis": [*_POSITIVE, None],
    "consistency_weight": _NON_NEGATIVE,
    "lr": _POSITIVE,
    "weight_decay": _NON_NEGATIVE,
    "lr_schedule": [StrOptions({"onecycle", "plateau"}), None],
    "max_epochs": _POSITIVE_INTEGER,
    "batch_size": _POSITIVE_INTEGER,
    "augment": [StrOptions({"dihedral"}), callable, None],
    "image_shape": [tuple, list, None],
    "data_range": [tuple, list, None],
    "validation_fraction": [Range(Real, 0, 1, closed="neither")],
    "early_stopping": ["boolean"],
    "patience": _POSITIVE_INTEGER,
    "warm_start": ["boolean"],
    "callbacks": [list, tuple, None],
    "checkpoint_dir": [str, os.PathLike, None],
    "n_jobs": [Integral, None],
    "device": [str, torch.device],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
}
