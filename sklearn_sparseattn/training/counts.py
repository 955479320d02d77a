"""What the rules of k need besides: bounds in pixels, checks, and the k of a module."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..parameters import is_count_or_share, is_int, to_pixels


def resolve_bounds(k_min: float, k_max: float, n_pixels: int) -> tuple[float, float]:
    """Bounds of k in pixels, for images of N pixels.

    Parameters
    ----------
    k_min, k_max : int or float
        An int is a number of pixels, a float in (0, 1] a share of N.
    n_pixels : int
        N, >= 1.

    Returns
    -------
    k_min, k_max : float
        1 <= k_min <= k_max <= N.

    Raises
    ------
    ValueError
        If k_min lies above k_max.
    """
    low, high = (clip(to_pixels(bound, n_pixels), 1, n_pixels) for bound in (k_min, k_max))
    if low > high:
        raise ValueError(
            f"k_min={k_min!r} is above k_max={k_max!r}: {low:g} and {high:g} of the {n_pixels} "
            "pixels of an image. Lower k_min or raise k_max."
        )
    return low, high


def check_count(name: str, value: Any, *, least: int) -> None:
    """Refuse what is neither a number of pixels nor a share of them.

    Parameters
    ----------
    name : str
        Of the parameter.
    value : int or float
        As given.
    least : int
        Pixels.

    Raises
    ------
    ValueError
        If it is refused.
    """
    if not is_count_or_share(value, least=least):
        raise ValueError(
            f"{name}={value!r} in DynamicK: an int >= {least}, a number of pixels, or a "
            "float in (0, 1], a share of the pixels of an image."
        )


def check_n_pixels(value: Any) -> None:
    """Refuse what is no number of pixels.

    Parameters
    ----------
    value : int or None
        As given.

    Raises
    ------
    ValueError
        If it is refused.
    """
    if value is not None and not (is_int(value) and value >= 1):
        raise ValueError(f"n_pixels={value!r} in DynamicK: an int >= 1, or None.")


def is_real(value: Any) -> bool:
    """Tell whether this is a finite number, and no truth value.

    Parameters
    ----------
    value : object
        Anything.

    Returns
    -------
    bool
        Whether it is.
    """
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(float(value))


def clip(value: float, low: float, high: float) -> float:
    """Bring a number between bounds.

    Parameters
    ----------
    value, low, high : float
        The number and the bounds.

    Returns
    -------
    float
        In [low, high].
    """
    return min(max(value, low), high)


def images_of(batch: Any) -> Any:
    """Find the images of a batch.

    Parameters
    ----------
    batch : tuple (X, y)
        A skorch batch, X being images or a dict or tuple that begins with them.

    Returns
    -------
    array
        The first that has a shape.
    """
    images = batch
    while not hasattr(images, "shape"):
        images = next(iter(images.values())) if isinstance(images, Mapping) else images[0]
    return images


def pixels_of(batch: Any) -> int:
    """Count the pixels of an image.

    Parameters
    ----------
    batch : tuple (X, y)
        A skorch batch, X being images (B, ..., H, W) or a dict or tuple that begins with them.

    Returns
    -------
    int
        H * W.

    Raises
    ------
    ValueError
        If they have no such axes.
    """
    images = images_of(batch)
    if len(images.shape) < 3:
        raise ValueError(
            f"n_pixels=None in DynamicK, but a training batch of shape {tuple(images.shape)} has "
            "no axes (B, ..., H, W) to read it from: give n_pixels as an int."
        )
    return int(images.shape[-2] * images.shape[-1])


def read_k(module: nn.Module) -> float:
    """Read the k of a module.

    Parameters
    ----------
    module : nn.Module
        With a buffer or a number `k`.

    Returns
    -------
    float
        Pixels.

    Raises
    ------
    AttributeError
        If it has none.
    """
    if not hasattr(module, "k"):
        raise AttributeError(
            f"DynamicK moves the `k` of the module, and {type(module).__name__} has none: register "
            "a buffer `k` of one element, or set a number `self.k`, in its __init__."
        )
    k: Any = module.k
    return float(k.item() if isinstance(k, Tensor) else k)


def write_k(module: nn.Module, k: float) -> None:
    """Set the k of a module.

    Parameters
    ----------
    module : nn.Module
        With a buffer or a number `k`.
    k : float
        Pixels; rounded where the buffer is of integers.
    """
    if not isinstance(module.k, Tensor):
        module.k = k  # type: ignore[assignment]
        return
    with torch.no_grad():
        # Rounded as it will be used: fill_ would cut the fraction off, and k could only fall.
        module.k.fill_(k if module.k.is_floating_point() else math.floor(k + 0.5))
