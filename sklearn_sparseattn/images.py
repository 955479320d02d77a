"""X as the user has it -> batches of images.

X is validated where it lies and never copied whole: rows are made dense, put into image form and scaled
when their batch is made. Imports no other room of the package but `image_forms`.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.utils.validation import assert_all_finite, check_consistent_length, column_or_1d, validate_data

from .image_forms import ImageShape as ImageShape
from .image_forms import check_shape, new_shape, stacked

CLIP = -3.0, 4.0  # of scaled values: farther out, a pixel is as wrong as at the end

_MOST = np.finfo(np.float64).max


class ImageRows:
    """n images in whatever container they came in, read a few rows at a time.

    Parameters
    ----------
    data : ndarray or CSR matrix
        Validated; rows along the first axis.
    image_shape : tuple of (H, W, C)
        The form of each row.
    rows : ndarray of int, default=None
        The rows of `data` that count, in this order; None is all of them.
    """

    def __init__(self, data: Any, image_shape: ImageShape, rows: npt.NDArray[np.intp] | None = None) -> None:
        self.data = data
        self.image_shape = image_shape
        self.rows = rows

    def __len__(self) -> int:
        return self.data.shape[0] if self.rows is None else len(self.rows)

    @property
    def float_dtype(self) -> np.dtype:
        """Of results that keep the precision of the images: float64 if they have it, else float32."""
        dtype = self.data.dtype
        return np.dtype(np.float64 if dtype.kind == "f" and dtype.itemsize >= 8 else np.float32)

    def take(self, rows: npt.NDArray[np.intp]) -> "ImageRows":
        """Select some of these rows, without copying any image.

        Parameters
        ----------
        rows : ndarray of int
            Positions among these rows.

        Returns
        -------
        ImageRows
            A view on the same data.
        """
        return ImageRows(self.data, self.image_shape, rows if self.rows is None else self.rows[rows])

    def read(self, rows: "slice | npt.NDArray[np.intp]") -> np.ndarray:
        """Read some rows as dense images, in their own dtype.

        Parameters
        ----------
        rows : slice or ndarray of int
            Positions among these rows.

        Returns
        -------
        images : ndarray of shape (b, H, W, C)
            Possibly a view of the user's memory: not to be written.
        """
        rows = rows if self.rows is None else self.rows[rows]
        chunk: Any = _read_lazily(self.data, rows) if is_lazy(self.data) else self.data[rows]
        if sparse.issparse(chunk):
            chunk = chunk.toarray()
        return np.asarray(chunk).reshape(-1, *self.image_shape)


def is_lazy(X: Any) -> bool:
    """Tell whether X is an array that lies elsewhere, of which rows are read by slices: of h5py, zarr, dask.

    Parameters
    ----------
    X : object
        As the user has it.

    Returns
    -------
    bool
        If it has a shape, a NumPy dtype and items, and is no container that scikit-learn takes as it is.
    """
    if isinstance(X, np.ndarray) or sparse.issparse(X) or hasattr(X, "iloc"):
        return False
    kind = type(X)
    return (
        hasattr(kind, "__getitem__")
        and isinstance(getattr(X, "dtype", None), np.dtype)
        and isinstance(getattr(X, "shape", None), tuple)
        and all(isinstance(n, Integral) for n in X.shape)
    )


def _read_lazily(data: Any, rows: "slice | npt.NDArray[np.intp]") -> np.ndarray:
    """Rows in any order, by a slice or by rising indices: some containers take no others."""
    if isinstance(rows, slice):
        return np.asarray(data[rows])
    if not len(rows):
        return np.asarray(data[:0])
    once, places = np.unique(rows, return_inverse=True)
    is_block = once[-1] - once[0] == len(once) - 1
    found = np.asarray(data[int(once[0]) : int(once[-1]) + 1] if is_block else data[once])
    return found[places]


class PixelScale:
    """The affine map from the user's numbers to about [0, 1]: (v - lo) / (hi - lo), clipped to `CLIP`.

    Parameters
    ----------
    data_range : tuple of (lo, hi)
        What becomes 0 and 1.

    Attributes
    ----------
    low, high, span : float
        lo, hi, and their difference.
    """

    def __init__(self, data_range: tuple[float, float]) -> None:
        self.low, self.high = data_range
        self.span = self.high - self.low
        # One map for every dtype, in float64. Bytes have a table, and float32 where that has the same bits.
        self._bytes = self._in_float64(np.arange(256.0))
        with np.errstate(all="ignore"):  # bytes may lie far outside a small range
            self._rounded = np.float32(self.low), np.float32(self.span)
            self._is_exact = not (self._in_float32(np.arange(256, dtype=np.uint8)) - self._bytes).any()

    def _in_float32(self, images: np.ndarray) -> npt.NDArray[np.float32]:
        return (images - self._rounded[0]) / self._rounded[1]

    def _in_float64(self, images: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):  # the former is clipped; NaN stays
            scaled = (images - self.low if self.low else images) / self.span
            return np.clip(scaled, *CLIP, out=scaled).astype(np.float32)

    def __call__(self, images: np.ndarray) -> npt.NDArray[np.float32]:
        """Scale images and put the channels first.

        Parameters
        ----------
        images : ndarray of shape (b, H, W, C)
            In the user's dtype.

        Returns
        -------
        ndarray of shape (b, C, H, W), float32
            A new array, contiguous.
        """
        images = np.moveaxis(images, -1, 1)
        if images.dtype == np.uint8:
            images = np.ascontiguousarray(images)
            return self._in_float32(images) if self._is_exact else self._bytes.take(images, mode="clip")
        return self._in_float64(np.ascontiguousarray(images, dtype=np.float64))

    def finite(self, images: np.ndarray) -> npt.NDArray[np.float32]:
        """Scale images, and refuse NaN, which validation lets pass under ``assume_finite=True``.

        Parameters
        ----------
        images : ndarray of shape (b, H, W, C)
            In the user's dtype.

        Returns
        -------
        ndarray of shape (b, C, H, W), float32
            A new array, contiguous and finite.

        Raises
        ------
        ValueError
            If there is NaN.
        """
        scaled = self(images)
        if np.isnan(scaled).any():
            raise ValueError("X contains NaN. Each image must be finite.")
        return scaled


def call_given(name: str, function: Callable, *args: Any) -> Any:
    """Call a function that the user gave.

    Parameters
    ----------
    name : str
        Of the parameter.
    function : callable
        Its value.
    *args : object
        What the function is given.

    Returns
    -------
    object
        What it returns.

    Raises
    ------
    TypeError
        If it does not take so many arguments; the message names the parameter.
    """
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        raise TypeError(f"{name}={function!r} is called with {len(args)} arguments: {error}.") from error
    except ValueError:  # not all of what is built in has a signature
        pass
    return function(*args)


def chunk_slices(n_rows: int, image_shape: ImageShape, n_values: int = 2**19) -> Iterator[slice]:
    """Cut rows into slices of about `n_values` numbers each: bounded memory, and little a chunk.

    Parameters
    ----------
    n_rows : int
        Rows to cut.
    image_shape : tuple of (H, W, C)
        The form of each row.
    n_values : int, default=2**19
        Numbers in a slice, about.

    Yields
    ------
    slice
        Consecutive rows, never empty.
    """
    step = max(1, n_values // math.prod(image_shape))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def validate_images(
    estimator: Any,
    X: Any,
    y: Any = "no_validation",
    *,
    reset: bool,
    image_shape: Sequence[int] | None = None,
) -> tuple[ImageRows, Any]:
    """Check X (and y) as scikit-learn does, and find the form of its images.

    With ``reset=True`` this sets ``n_features_in_``, ``image_shape_`` and, for a DataFrame,
    ``feature_names_in_``; otherwise X is held against them.

    Parameters
    ----------
    estimator : estimator
        On which the attributes are set or read.
    X : array-like or sparse matrix
        (n, features), (n, H, W) or (n, H, W, C).
    y : array-like, default="no_validation"
        Targets, checked with X if given.
    reset : bool
        Whether this is a fit.
    image_shape : sequence of int, default=None
        (H, W) or (H, W, C): the user's word for it, in a fit.

    Returns
    -------
    images : ImageRows
        The rows.
    y : ndarray or "no_validation"
        The checked targets.

    Raises
    ------
    ValueError
        If X is no set of images of one size, holds NaN or infinity, or differs from the fit.
    """
    if not reset:
        _check_no_single_image(X, estimator.image_shape_)
    is_plain = type(X) is np.ndarray and X.dtype == np.uint8 and X.ndim > 1 and X.size > 0
    is_alone = isinstance(y, str) and y == "no_validation"
    if is_plain and is_alone and not (reset or hasattr(estimator, "feature_names_in_")):
        check_shape(X.shape, estimator.image_shape_, type(estimator).__name__)  # nothing else is to refuse
        return ImageRows(X, estimator.image_shape_), y
    if is_lazy(X):
        data, y = X, _validate_lazily(estimator, X, y, reset=reset)
    else:
        data, y = _validate_in_memory(estimator, X, y, reset=reset)
    if data.dtype.kind not in "biuf":
        raise ValueError(f"X has values of dtype {data.dtype}, which are no numbers.")
    if data.ndim < 2:
        raise ValueError(
            f"Expected 2D, 3D or 4D array, got {data.ndim}D array instead. Reshape your data using "
            "X.reshape(1, -1) if it is a single image, X.reshape(-1, 1) if its images have one pixel."
        )
    if reset:
        shape = new_shape(data.shape, image_shape)
        estimator.image_shape_ = shape
        estimator.n_features_in_ = math.prod(shape)
    else:
        check_shape(data.shape, estimator.image_shape_, type(estimator).__name__)
    return ImageRows(data, estimator.image_shape_), y


def _check_no_single_image(X: Any, expected: ImageShape) -> None:
    shape = getattr(X, "shape", None)
    if not isinstance(shape, tuple) or 1 in shape:
        return
    if shape == expected or (expected[2] == 1 and shape == expected[:2]):
        raise ValueError(f"X of shape {shape} is a single image: pass X[None], a batch of one.")


def _validate_lazily(estimator: Any, X: Any, y: Any, *, reset: bool) -> Any:
    """Check X, which is not copied, and y; gives y."""
    if reset and hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_
    if X.shape and not X.shape[0]:
        raise ValueError(f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is required.")
    if X.dtype.kind == "f" and X.ndim > 1:
        for rows in chunk_slices(X.shape[0], (math.prod(X.shape[1:]), 1, 1)):
            assert_all_finite(np.asarray(X[rows]), input_name="X")
    if isinstance(y, str) and y == "no_validation":
        return y
    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None.")
    y = column_or_1d(y, warn=True)
    assert_all_finite(y, input_name="y")
    check_consistent_length(X, y)
    return y


def _validate_in_memory(estimator: Any, X: Any, y: Any, *, reset: bool) -> tuple[Any, Any]:
    """Check X and y as scikit-learn does."""
    X = stacked(X)
    if isinstance(X, list | tuple):
        with contextlib.suppress(ValueError):  # ragged: scikit-learn's to say
            X = np.asarray(X)  # of objects, scikit-learn turns an array into numbers, but not a list
    forms: dict[str, Any] = {"accept_sparse": "csr", "ensure_2d": False, "allow_nd": True}
    try:
        with np.errstate(invalid="ignore"):  # its sum of infinities of both signs, which it refuses in words
            checked = validate_data(estimator, X, y, reset=reset, **forms)
    except OverflowError as error:
        raise ValueError(f"X or y has numbers beyond all floats: {error}.") from error
    data, y = checked if isinstance(checked, tuple) else (checked, y)
    if data.dtype.kind == "f" and data.dtype.itemsize > 8 and data.size and np.abs(data).max() > _MOST:
        raise ValueError(f"X has numbers beyond all floats, {_MOST:.3g}.")
    return data, y
