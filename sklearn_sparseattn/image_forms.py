"""What forms images come in: containers that are stacked, and which axes are rows, columns and channels.

Imports no other room of the package.
"""

import math
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

ImageShape = tuple[int, int, int]

# Beyond these channel counts a last axis is taken for the width of an image.
_MOST_CHANNELS = 4
_MOST_KNOWN = 16  # channels of any camera: imaging flow cytometers have up to 12
_LEAST_SIDE = 8  # of colour images that were made rows


def stacked(X: Any) -> Any:
    """Stack images that come one by one: in a list, an array of objects, a column of a data frame.

    Parameters
    ----------
    X : object
        What the user gave.

    Returns
    -------
    object
        ndarray of shape (n, H, W) or (n, H, W, C) if X holds images of one size, otherwise X itself.

    Raises
    ------
    ValueError
        If they are of several sizes, or some pixels are masked.
    """
    if isinstance(X, np.ma.MaskedArray):
        if np.ma.is_masked(X):
            raise ValueError("X is a masked array with masked pixels: fill them first, as X.filled(0) does.")
        return X.data
    of_objects = getattr(getattr(X, "dtype", None), "kind", "") == "O" and len(getattr(X, "shape", ())) == 1
    if not (of_objects or isinstance(X, list | tuple)):
        return X
    images = [np.asarray(one) if _is_image(one) else one for one in X]
    shapes = {image.shape for image in images if isinstance(image, np.ndarray)}
    if len(shapes) > 1:
        examples = ", ".join(map(str, sorted(shapes)[:3]))
        raise ValueError(
            f"X holds images of {len(shapes)} different shapes ({examples}...); all must be the same. "
            "Crop or resize them first, for instance with sklearn_sparseattn.datasets."
            "load_image_folder(path, crop=..., image_size=...)."
        )
    whole = bool(shapes) and all(isinstance(image, np.ndarray) for image in images)
    return np.stack(images) if whole else X


def _is_image(one: Any) -> bool:
    """An array, or what gives itself as one, like a picture of Pillow."""
    return bool(getattr(one, "shape", ())) or hasattr(one, "__array_interface__")


def new_shape(shape: tuple[int, ...], image_shape: Sequence[int] | None) -> ImageShape:
    """Find the form of the images of a fit.

    Parameters
    ----------
    shape : tuple of int
        Of X.
    image_shape : sequence of int or None
        (H, W) or (H, W, C): the user's word for it.

    Returns
    -------
    tuple of (H, W, C)
        The form of each image.

    Raises
    ------
    ValueError
        If X has no such form, not that of `image_shape`, or seems to have its channels first.

    Warns
    -----
    UserWarning
        If rows are taken for lines of pixels that have as many numbers as square images with channels.
    """
    given = None if image_shape is None else _full_shape(image_shape)
    if len(shape) == 2:
        return _shape_of_rows(shape[1], given)
    if len(shape) > 4 or 0 in shape:
        raise ValueError(f"X has shape {shape}: (n, features), (n, H, W) or (n, H, W, C) is expected.")
    own = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
    if given is not None and own != given:
        raise ValueError(f"image_shape={tuple(image_shape or ())} does not fit X of shape {shape}.")
    if given is None and _channels_first(shape):
        raise ValueError(
            f"X has shape {shape}, which looks like channels first. Channels come last here: "
            "use np.moveaxis(X, 1, -1), or say image_shape=(H, W, C) if the shape is meant so."
        )
    return own  # type: ignore[return-value]


def _full_shape(image_shape: Sequence[int]) -> ImageShape:
    if len(image_shape) not in (2, 3) or not all(
        isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in image_shape
    ):
        raise ValueError(
            f"image_shape={image_shape!r} is no image shape: (H, W) or (H, W, C) of positive integers."
        )
    height, width, channels = (*map(int, image_shape), 1)[:3]
    return height, width, channels


def _shape_of_rows(n_features: int, given: ImageShape | None) -> ImageShape:
    if given is not None:
        if math.prod(given) != n_features:
            raise ValueError(
                f"image_shape={given} has {math.prod(given)} values, but the rows of X have {n_features} "
                "features."
            )
        return given
    side = math.isqrt(n_features)
    if side * side == n_features:
        return side, side, 1
    for channels in range(2, _MOST_KNOWN + 1):
        side = math.isqrt(n_features // channels)
        if side >= _LEAST_SIDE and side * side * channels == n_features:
            warnings.warn(
                f"The rows of X have {n_features} features, as {side} x {side} pixels in {channels} channels "
                f"have. They are taken for one line of {n_features} pixels: say "
                f"image_shape=({side}, {side}, {channels}), or (1, {n_features}) if that is meant.",
                UserWarning,
                stacklevel=6,
            )
            break
    return 1, n_features, 1


def _channels_first(shape: tuple[int, ...]) -> bool:
    if len(shape) != 4 or shape[3] <= _MOST_CHANNELS:
        return False
    first, height, width = shape[1:]
    return first in (1, 3) or (first <= _MOST_KNOWN and first < height and height == width)


def check_shape(shape: tuple[int, ...], expected: ImageShape, name: str) -> None:
    """Hold the shape of X against that of the fit.

    Parameters
    ----------
    shape : tuple of int
        Of X.
    expected : tuple of (H, W, C)
        Of the images of the fit.
    name : str
        Of the estimator.

    Raises
    ------
    ValueError
        If they differ.
    """
    if len(shape) == 2:
        n_features = math.prod(expected)
        if shape[1] != n_features:
            raise ValueError(
                f"X has {shape[1]} features, but {name} is expecting {n_features} features as input."
            )
        return
    own = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
    if own != expected:
        hint = " Channels come last: use np.moveaxis(X, 1, -1)." if _channels_first(shape) else ""
        raise ValueError(
            f"X has images of shape {own}, but {name} was fitted to (H, W, C) = {expected}.{hint}"
        )
