"""What the values of the training images span, and which of them become 0 and 1.

A few wrong pixels, as a hot one of the camera, decide nothing: what lies far outside of the rest does not
count, and `images.PixelScale` clips it.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from .images import CLIP, ImageRows, chunk_slices, is_lazy

Range = tuple[float, float]

_ENOUGH = 1000  # images, evenly spaced, tell what all span
_NAMED = 5  # rows that a warning names


def learn_data_range(images: ImageRows, given: Sequence[float] | None = None) -> tuple[Range, Range]:
    """Find what becomes 0 and 1, from training images or from the user, and what the images span.

    Parameters
    ----------
    images : ImageRows
        The training images.
    given : sequence of two float, default=None
        (lo, hi) as the user says.

    Returns
    -------
    data_range : tuple of (lo, hi)
        As given; else (0, 255) for uint8, (0, 1) for bool, (0, max abs v) for sparse or partly negative data,
        so that zero stays zero, and otherwise the extremes. Where these lie beyond `spanned_range` by more
        than PixelScale keeps, that range takes their place.
    spanned : tuple of (lo, hi)
        See `spanned_range`.

    Raises
    ------
    ValueError
        If `given` is not two finite numbers, lo < hi.

    Warns
    -----
    UserWarning
        See `warn_of_clipped`.
    """
    if given is not None:
        given = _check_data_range(given)
    spanned = spanned_range(images)
    dtype = images.data.dtype
    if given is None and dtype == np.uint8:
        return (0.0, 255.0), spanned
    if given is None and dtype == np.bool_:
        return (0.0, 1.0), spanned
    bounds = _bounds(images)
    data_range = given or _range_of(bounds, spanned, from_zero=sparse.issparse(images.data))
    _warn_of_clipped(images, bounds, data_range)
    return data_range, spanned


def _check_data_range(data_range: Sequence[float]) -> Range:
    try:
        low, high = (float(value) for value in data_range)
    except (TypeError, ValueError, OverflowError):
        low, high = 0.0, 0.0
    if not (math.isfinite(high - low) and low < high):
        raise ValueError(f"data_range={data_range!r} must be two finite numbers (lo, hi), lo < hi, or None.")
    return low, high


def _range_of(bounds: npt.NDArray[np.float64], spanned: Range, *, from_zero: bool) -> Range:
    low, high = float(bounds[:, 0].min()), float(bounds[:, 1].max())
    least, most = _kept(spanned)
    if least < most:
        low, high = low if low >= least else spanned[0], high if high <= most else spanned[1]
    if from_zero or low < 0:
        low, high = 0.0, max(-low, high)
    if not high - low > 0:
        high = low + max(1.0, abs(low))
    return low, high


def _kept(data_range: Range) -> Range:
    """Between which values PixelScale does not clip."""
    low, high = data_range
    return low * (1 - CLIP[0]) + high * CLIP[0], low * (1 - CLIP[1]) + high * CLIP[1]


def spanned_range(images: ImageRows) -> Range:
    """Between which values the images lie, but for outliers.

    Of each image, a thousandth of the values and one more are left out at either end, and after that the
    lowest and the highest of a hundred images. Of fewer than a thousand values in all none is left out.

    Parameters
    ----------
    images : ImageRows
        At least one image; of many, a thousand are looked at.

    Returns
    -------
    (low, high) : tuple of float
        low <= high.
    """
    n = len(images)
    some = images.take(np.linspace(0, n - 1, min(n, _ENOUGH)).astype(np.intp))
    size = math.prod(images.image_shape)
    is_enough = size * len(some) >= 1000
    left_out = min(1 + size // 1000, (size - 1) // 4) if is_enough else 0
    parts = []
    for rows in chunk_slices(len(some), some.image_shape):
        values = some.read(rows).reshape(-1, size)
        values = np.partition(values, (left_out, size - 1 - left_out), axis=1)
        parts.append(values[:, [left_out, size - 1 - left_out]].astype(np.float64))
    ends = np.sort(np.concatenate(parts), axis=0)
    left_out = -(-len(ends) // 100) if is_enough and len(ends) >= 10 else 0
    return float(ends[left_out, 0]), float(ends[-1 - left_out, 1])


def _bounds(images: ImageRows) -> npt.NDArray[np.float64]:
    """(n, 2): least and greatest value of each image."""
    parts = []
    for rows in chunk_slices(len(images), images.image_shape):
        some = images.read(rows)
        axes = tuple(range(1, some.ndim))
        parts.append(np.stack([some.min(axes), some.max(axes)], axis=1).astype(np.float64))
    return np.concatenate(parts)


def warn_of_clipped(images: ImageRows, data_range: Range) -> None:
    """Warn if some training images have values that PixelScale clips.

    Parameters
    ----------
    images : ImageRows
        The training images.
    data_range : tuple of (lo, hi)
        What becomes 0 and 1.

    Warns
    -----
    UserWarning
        With the rows of the first of them.
    """
    if images.data.dtype != np.uint8 or data_range != (0.0, 255.0):
        _warn_of_clipped(images, _bounds(images), data_range)


def _warn_of_clipped(images: ImageRows, bounds: npt.NDArray[np.float64], data_range: Range) -> None:
    least, most = _kept(data_range)
    clipped = np.flatnonzero((bounds[:, 0] < least) | (bounds[:, 1] > most))
    if not len(clipped):
        return
    rows = clipped if images.rows is None else images.rows[clipped]
    named = ", ".join(str(row) for row in rows[:_NAMED]) + (", ..." if len(rows) > _NAMED else "")
    least_of_all, most_of_all = bounds[:, 0].min(), bounds[:, 1].max()
    farthest = most_of_all if most_of_all > most else least_of_all
    warnings.warn(
        f"{len(clipped)} of {len(bounds)} training images have values far outside of data_range_="
        f"({data_range[0]:.6g}, {data_range[1]:.6g}), such as {farthest:.6g}: rows {named}. What lies below "
        f"{least:.6g} or above {most:.6g} is clipped. If these values are right, give data_range.",
        UserWarning,
        stacklevel=5,
    )


def warn_of_other_range(images: ImageRows, spanned: Range, name: str = "X", *, stacklevel: int = 4) -> None:
    """Warn if the images seem to be in other units than those of the fit.

    Parameters
    ----------
    images : ImageRows
        The images to be classified; of a container that is read lazily, the first thousand count.
    spanned : tuple of (lo, hi)
        What the training images spanned.
    name : str, default="X"
        What the user calls them.
    stacklevel : int, default=4
        Of the warning.

    Warns
    -----
    UserWarning
        If the range of values is below 1 % or above 10 times that of the fit, outliers left out. Images that
        are constant throughout tell nothing and pass.
    """
    if is_lazy(images.data):  # to read all of it twice would take long
        images = images.take(np.arange(min(len(images), _ENOUGH)))
    if not len(images):
        return
    chunks = (images.read(rows) for rows in chunk_slices(len(images), images.image_shape))
    ends = [(float(chunk.min()), float(chunk.max())) for chunk in chunks]
    found = min(low for low, _ in ends), max(high for _, high in ends)
    if _is_other(found, spanned):
        found = spanned_range(images)
        if _is_other(found, spanned):
            (low, high), (least, most) = found, spanned
            warnings.warn(
                f"{name} ranges over [{low:.6g}, {high:.6g}], but the images of the fit ranged over "
                f"[{least:.6g}, {most:.6g}]: is {name} in the units of the training images?",
                UserWarning,
                stacklevel=stacklevel,
            )


def _is_other(found: Range, spanned: Range) -> bool:
    # In halves, a range cannot overflow.
    span, share = spanned[1] / 2 - spanned[0] / 2, found[1] / 2 - found[0] / 2
    return bool(span) and (share > 10 * span or 0 < share < 0.01 * span)
