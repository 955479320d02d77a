"""What values the parameters of SparseAttnClassifier may have. Imports no other room of the package."""

import os
import sys
from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from sklearn.utils._param_validation import Interval, StrOptions


class Range(Interval):
    """An interval of numbers of all kinds, fractions too, but not of truth values."""

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool):
            return False
        return super().__contains__(float(value) if isinstance(value, Fraction) else value)


def is_count_or_share(value: Any, *, least: int = 1) -> bool:
    """Tell whether this is a number of pixels or a share of them.

    Parameters
    ----------
    value : object
        Anything.
    least : int, default=1
        Pixels.

    Returns
    -------
    bool
        True for an int from `least` on and a float in (0, 1].
    """
    return value >= least if is_int(value) else _is_share(value)


def check_predict_k(value: Any) -> None:
    """Refuse what `predict_k` cannot be, as `set_params` lets anything in.

    Parameters
    ----------
    value : object
        Not None.

    Raises
    ------
    ValueError
        If it is neither a number of pixels nor a share of them.
    """
    if not is_count_or_share(value):
        raise ValueError(
            f"predict_k={value!r} must be None, a number of pixels (int >= 1) or a share of them (float in "
            "(0, 1])."
        )


def capped(count: float, n_pixels: int) -> float:
    """Turn a number of pixels that is all of them into the share 1.0; leave other counts as they are.

    Parameters
    ----------
    count : int or float
        Number of pixels, or a share in (0, 1].
    n_pixels : int
        H * W.

    Returns
    -------
    int or float
        For `to_pixels`, whose shares are of all tiles; those at the border may reach beyond the image.
    """
    return 1.0 if is_int(count) and count >= n_pixels else count


def to_pixels(count: float, n_pixels: int) -> float:
    """Turn a count into pixels: an int is one already, a float is a share of N.

    Parameters
    ----------
    count : int or float
        Number of pixels, or a share in (0, 1].
    n_pixels : int
        N.

    Returns
    -------
    float
        Pixels, neither rounded nor clipped.
    """
    return float(min(count, 2**53)) if is_int(count) else float(count) * n_pixels


def _is_share(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, Integral)
    return is_real and 0 < float(value) <= 1


def is_int(value: Any) -> bool:
    """Tell whether this is an integer, and no truth value.

    Parameters
    ----------
    value : object
        Anything.

    Returns
    -------
    bool
        Whether it is.
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


_COUNT_OR_SHARE = [Range(Integral, 1, None, closed="left"), Range(Real, 0, 1, closed="right")]
_POSITIVE = [Range(Real, 0, None, closed="neither")]
_NON_NEGATIVE = [Range(Real, 0, None, closed="left")]
_POSITIVE_INTEGER = [Range(Integral, 1, None, closed="left")]

CONSTRAINTS: dict = {
    "k_init": _COUNT_OR_SHARE,
    "k_min": _COUNT_OR_SHARE,
    "k_max": _COUNT_OR_SHARE,
    "k_tolerance": [Range(Real, 0, sys.float_info.max, closed="both")],
    "predict_k": [*_COUNT_OR_SHARE, None],
    "variant": [StrOptions({"tiles", "paper"})],
    "size": [StrOptions({"default", "large"})],
    "embed_dim": _POSITIVE_INTEGER,
    "n_heads": _POSITIVE_INTEGER,
    "hidden_dim": _POSITIVE_INTEGER,
    "focal_gamma": _NON_NEGATIVE,
    "class_weight": [StrOptions({"balanced"}), dict, None],
    "contrastive_weight": _NON_NEGATIVE,
    "temperature": _POSITIVE,
    "distillation_weight": _NON_NEGATIVE,
    "consistency_weight": _NON_NEGATIVE,
    "lr": _POSITIVE,
    "weight_decay": [*_NON_NEGATIVE, None],
    "lr_schedule": [StrOptions({"onecycle", "plateau"}), None],
    "max_epochs": _POSITIVE_INTEGER,
    "batch_size": _POSITIVE_INTEGER,
    "augment": [str, callable, list, tuple, None],
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

# What the paper says, besides its rule of k; where it says nothing the defaults stand.
PUBLISHED: dict = {
    "variant": "paper",
    "k_init": 8000,
    "k_min": 1500,
    "hidden_dim": 512,
    "focal_gamma": 2.0,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "lr_schedule": "plateau",
    "batch_size": 64,
}


def needs_validation(params: Mapping[str, Any]) -> bool:
    """Tell whether something in a fit uses validation rows.

    Parameters
    ----------
    params : mapping
        Parameters of the estimator.

    Returns
    -------
    bool
        True with early stopping and with "plateau".
    """
    return bool(params["early_stopping"] or params["lr_schedule"] == "plateau")


def check_together(
    params: Mapping[str, Any],
    defaults: Mapping[str, Any],
    of_the_rule: Iterable[str] = (),
    *,
    in_parts: bool = False,
) -> None:
    """Refuse what is right by itself, but has no effect beside the other parameters or cannot have one.

    Parameters
    ----------
    params : mapping
        Parameters of the estimator, each within its constraint.
    defaults : mapping
        Their defaults.
    of_the_rule : iterable of str, default=()
        Parameters in whose place a DynamicK among the callbacks has its own.
    in_parts : bool, default=False
        Whether only some of the rows are seen, in `partial_fit`.

    Raises
    ------
    ValueError
        If one is refused.
    """
    consistency_weight, class_weight = params["consistency_weight"], params["class_weight"]
    if consistency_weight and params["augment"] in (None, [], ()):
        raise ValueError(f"consistency_weight={consistency_weight!r} needs augment, as 'dihedral'.")
    if in_parts and isinstance(class_weight, str):
        raise ValueError(
            f"class_weight={class_weight!r} needs all rows at once, which partial_fit does not see: "
            "give a dict of the weights by class."
        )
    reasons: dict[str, str] = {}
    if params["variant"] == "paper":
        reasons["size"] = "with variant='paper'"
    if not params["early_stopping"]:
        reasons["patience"] = "without early_stopping=True"
    if not needs_validation(params):
        reasons["validation_fraction"] = "without early_stopping=True or lr_schedule='plateau'"
    reasons |= dict.fromkeys(of_the_rule, "beside the DynamicK in callbacks, whose own value counts")
    for name, reason in reasons.items():
        if params[name] != defaults[name]:
            raise ValueError(f"{name}={params[name]!r} has no effect {reason}: leave it out.")
