"""PixelSetTransformer: an image as its k best pixels, for any classifier, and back again.

Pixels are scored, the k best are kept with their positions, the rest is dropped. Images are read a few at a
time; nothing here trains, except that a classifier given as `score` is fitted by its own `fit`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy import sparse
from skimage.filters import sobel
from sklearn import get_config
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing, check_array
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted

from .images import ImageRows, ImageShape, call_given, chunk_slices, validate_images
from .parameters import Range

_NO_FRAME = "layout='set' is 3-D: it has no column names and is no DataFrame. Use 'flat'."

# Some rows, the pixels chosen of each (b, k), row-major, and what they hold (b, k, C).
Chosen = tuple[slice, np.ndarray, np.ndarray]


def _intensity(images: np.ndarray) -> np.ndarray:
    """Score (B, H, W): |v|, mean over the channels."""
    # In float64 |-128| of an int8 is 128, and no sum of integers wraps.
    with np.errstate(over="ignore"):  # infinite is still best
        return np.abs(images.astype(np.float64, order="C")).mean(axis=-1)


def _gradient(images: np.ndarray) -> np.ndarray:
    """Score (B, H, W): Sobel magnitude, mean over the channels."""
    values = images.astype(np.float64, order="C")
    # A power of two for each image changes no order, and no square overflows or vanishes.
    _, exponent = np.frexp(np.abs(values).max(axis=(1, 2, 3), keepdims=True))
    values = np.ldexp(values, -exponent)
    edges = [[sobel(image[..., c]) for c in range(image.shape[-1])] for image in values]
    return np.mean(edges, axis=1)


_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"intensity": _intensity, "gradient": _gradient}


def _checked_scores(scores: Any, images: np.ndarray, source: str) -> np.ndarray:
    """(B, H, W) float64 from what a user's function gave."""
    try:
        scores = np.asarray(scores)
    except ValueError as error:
        raise ValueError(f"{source} gave no array: {error}.") from error
    if scores.shape != images.shape[:3] or scores.dtype.kind not in "biuf" or np.isnan(scores).any():
        raise ValueError(
            f"{source} gave scores of shape {scores.shape} and dtype {scores.dtype} for images of shape "
            f"(B, H, W, C) = {images.shape}: shape {images.shape[:3]}, real numbers without NaN are expected."
        )
    return scores.astype(np.float64)


def _best_pixels(scores: np.ndarray, k: int, *, tile: int, best_first: bool) -> np.ndarray:
    """Row-major indices (B, k) of the k highest of (B, H, W) scores: best first, or row by row.

    Of equal ones those of the tile with the lower index are better, in it the pixel with the lower index.
    """
    n_images, height, width = scores.shape
    tile_by_tile = _tile_by_tile(height, width, tile)
    flat = scores.reshape(n_images, -1)
    if tile > 1:  # else it would be a copy of the same
        flat = flat[:, tile_by_tile]
    # Sorting all scores would take several times as long.
    threshold = np.partition(flat, -k, axis=1)[:, [-k]]
    above, tied = flat > threshold, flat == threshold
    room = k - above.sum(axis=1, keepdims=True)
    places = np.nonzero(above | (tied & (tied.cumsum(axis=1) <= room)))[1].reshape(n_images, k)
    if not best_first:
        return np.sort(tile_by_tile[places], axis=1)
    order = np.argsort(-np.take_along_axis(flat, places, axis=1), axis=1, kind="stable")
    return tile_by_tile[np.take_along_axis(places, order, axis=1)]


def _tile_by_tile(height: int, width: int, tile: int) -> np.ndarray:
    """Row-major indices (N,) of all pixels, those of each tile of `tile` by `tile` pixels together."""
    row, column = np.divmod(np.arange(height * width), width)
    return np.lexsort((column // tile, row // tile))


def _coordinates(image_shape: ImageShape, dtype: np.dtype) -> np.ndarray:
    """Position (x, y) of every pixel, (N, 2), as the network has it."""
    height, width, _ = image_shape
    y, x = ((2 * np.arange(n) + 1) / n - 1 for n in (height, width))
    return np.stack([np.tile(x, height), np.repeat(y, width)], axis=1).astype(dtype)


def _pixel_indices(coordinates: np.ndarray, image_shape: ImageShape) -> np.ndarray:
    """Row-major indices (B, k) of the pixels at positions (B, k, 2)."""
    height, width, _ = image_shape
    size = np.array([width, height])
    exact = ((coordinates.astype(np.float64) + 1) * size - 1) / 2
    nearest = np.rint(exact)
    # In pixels: what float32 may be off, and a little for files of text in between.
    tolerance = 1e-3 + np.finfo(np.float32).eps * size
    wrong = (np.abs(exact - nearest) > tolerance) | (nearest < 0) | (nearest >= size)
    if wrong.any():
        x, y = coordinates[wrong.any(axis=-1)][0]
        raise ValueError(
            f"X has coordinates (x, y) = ({x:.6g}, {y:.6g}), where a {height} × {width} image has no pixel: "
            "x = (2j + 1) / W - 1, y = (2i + 1) / H - 1. Before inverse_transform only values may change."
        )
    indices = (nearest[..., 1] * width + nearest[..., 0]).astype(np.int64)
    if np.any(np.diff(np.sort(indices, axis=1), axis=1) == 0):
        raise ValueError("X has the same coordinates twice in one image: each pixel can have one value only.")
    return indices


def _sparse_images(chosen: Iterable[Chosen], image_shape: ImageShape, container: Any) -> Any:
    """Chosen pixels as CSR rows (n, H * W * C), without zeros, in the type of `container` if that is CSR."""
    channel = np.arange(image_shape[2])
    data, columns, counts = [], [], [np.zeros(1, dtype=np.int64)]
    for _, indices, values in chosen:
        stored = values != 0
        data.append(values[stored])
        columns.append((indices[..., None] * image_shape[2] + channel)[stored])
        counts.append(stored.sum(axis=(1, 2)))
    starts = np.cumsum(np.concatenate(counts))
    parts = np.concatenate(data), np.concatenate(columns), starts
    make = sparse.csr_matrix if issubclass(container, np.ndarray) else container
    rows = make(parts, shape=(len(starts) - 1, math.prod(image_shape)))
    rows.sort_indices()
    return rows


class PixelSetTransformer(TransformerMixin, BaseEstimator):
    """Keep the k best pixels of each image, with their positions.

    What the fine attention of SparseAttnNet [1]_ reads, as features for any other classifier: each kept pixel
    is its position and its value, (x, y, v). What is best is the user's choice.

    Parameters
    ----------
    k : int or float, default=0.15
        Pixels to keep. An int is a number of pixels, above H * W it means all; a float in (0, 1] is a share
        of the pixels of an image, rounded half up, at least one.
    score : {"intensity", "gradient"}, callable or classifier, default="intensity"
        What makes a pixel good.

        - "intensity": magnitude abs(v), so that negative events count; mean over the channels.
        - "gradient": magnitude of :func:`skimage.filters.sobel`, mean over the channels.
        - A callable is given images (B, H, W, C) in the dtype of X, a few at a time and not to be written,
          and returns scores (B, H, W). NaN is refused, infinities are not.
        - A classifier with `attention_maps`, such as :class:`SparseAttnClassifier`: its coarse attention.
          A clone of it is fitted with y in `fit`; inside :class:`sklearn.frozen.FrozenEstimator` it is used
          as it was fitted, to images of the same size. All pixels of a tile have the same attention and are
          kept together; the last tile may be kept in part, from its first pixel on.
    layout : {"flat", "set", "sparse"}, default="flat"
        Form of the result; "flat" is (n, k * (2 + C)), "set" is (n, k, 2 + C), "sparse" is a CSR matrix
        (n, H * W * C) of the images with the other pixels dropped.
    order : {"raster", "score"}, default="raster"
        Order of the kept pixels in "flat" and "set": row by row, so that columns keep about their meaning
        from image to image; or best first.
    image_shape : (H, W) or (H, W, C), default=None
        Form of the images if X is 2-D. None takes rows as square images if their length is a square,
        otherwise as images of one row.

    Attributes
    ----------
    k_ : int
        Pixels kept of each image.
    image_shape_ : tuple of (H, W, C)
        Form of the images.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns, if X was a DataFrame.
    score_estimator_ : classifier or None
        The classifier that gives the coarse attention: the fitted clone, or the frozen one itself.

    Notes
    -----
    The pixel in row i, column j lies at x = (2j + 1) / W - 1, y = (2i + 1) / H - 1, inside (-1, 1); v is the
    value in X, unscaled, one for each channel. A row of "flat" is x0, y0, v0_0, v0_1, ..., x1, y1, v1_0, ...
    Scores are compared in float64; of equal ones the pixel with the lower index i * W + j is better. If the
    score is that of a classifier whose ``network_.tile`` is above 1, pixels are ranked by score, then by the
    index of their tile, then by their own index. The k best are then those of the tiles that the classifier
    chooses, if k is their number of pixels.

    X may be (n, features), dense or sparse, (n, H, W) or (n, H, W, C); after `fit` the forms may be
    interchanged. The result is float64 or float32 as X is, and float32 for other dtypes, which holds integers
    exactly up to 2**24 only: give larger ones as float64. "sparse" stores no zeros, kept pixel or not.

    `score` is read by ``get_params()["score"]`` and is no attribute, since scikit-learn takes an attribute
    of this name for the method that rates a fitted estimator.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_sparseattn import PixelSetTransformer
    >>> images = np.array([[[0.0, 7.0], [-9.0, 1.0]]])
    >>> pixels = PixelSetTransformer(k=2)
    >>> pixels.fit_transform(images)
    array([[ 0.5, -0.5,  7. , -0.5,  0.5, -9. ]])
    >>> pixels.inverse_transform(pixels.transform(images))
    array([[[ 0.,  7.],
            [-9.,  0.]]])
    """

    _parameter_constraints: dict = {
        "k": [Range(Integral, 1, None, closed="left"), Range(Real, 0, 1, closed="right")],
        "score": [StrOptions(set(_SCORES)), callable, HasMethods(["fit", "attention_maps"])],
        "layout": [StrOptions({"flat", "set", "sparse"})],
        "order": [StrOptions({"raster", "score"})],
        "image_shape": [tuple, list, None],
    }

    def __init__(self, *, k=0.15, score="intensity", layout="flat", order="raster", image_shape=None):
        self.k = k
        self.score = score
        self.layout = layout
        self.order = order
        self.image_shape = image_shape

    @property
    def score(self):
        """No attribute, see Notes: it would be called as a method by scikit-learn."""
        raise AttributeError("score is a parameter, not a method: read it with get_params()['score'].")

    @score.setter
    def score(self, value):
        self.__dict__["score"] = value

    def get_params(self, deep=True):
        """Parameters by name, as scikit-learn's own method gives them."""
        params = {name: vars(self)[name] for name in self._get_param_names()}
        nested = params["score"]
        if deep and hasattr(nested, "get_params") and not isinstance(nested, type):
            params |= {f"score__{name}": value for name, value in nested.get_params().items()}
        return params

    def fit(self, X, y=None):
        """Learn the form of the images, and fit the classifier that `score` is, if it is one.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images; booleans, integers or floats.
        y : array-like of shape (n,), default=None
            Class labels; only for a classifier as `score` that is not frozen.

        Returns
        -------
        self : PixelSetTransformer
            The fitted transformer.
        """
        self._validate_params()
        score = vars(self)["score"]
        if isinstance(score, type):
            raise ValueError(f"score={score.__name__} is a class: give an instance of it.")
        target = y if _to_be_fitted(score) else "no_validation"
        images, target = validate_images(self, X, target, reset=True, image_shape=self.image_shape)
        self.score_estimator_ = self._fit_score(score, images, target)
        # The form that inverse_transform goes back to.
        self._row_shape, self._row_type = tuple(images.data.shape[1:]), type(images.data)
        n_pixels = math.prod(self.image_shape_[:2])
        count = self.k if isinstance(self.k, Integral) else math.floor(self.k * n_pixels + 0.5)
        self.k_ = min(max(int(count), 1), n_pixels)
        return self

    def transform(self, X):
        """Keep the best pixels.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        ndarray of shape (n, k * (2 + C)) or (n, k, 2 + C), or CSR matrix of shape (n, H * W * C)
            By `layout`; float64 or float32 as X is, float32 for other dtypes.
        """
        check_is_fitted(self, "k_")
        self._validate_params()  # layout and order may be changed after the fit
        if (
            self.layout == "set" and self._gives_frames()
        ):  # not all of scikit-learn's releases ask for the names
            raise ValueError(_NO_FRAME)
        images, _ = validate_images(self, X, reset=False)
        if self.layout == "sparse":
            return _sparse_images(self._choose(images, X), self.image_shape_, type(images.data))
        tokens = np.empty((len(images), self.k_, 2 + self.image_shape_[2]), dtype=images.float_dtype)
        grid = _coordinates(self.image_shape_, tokens.dtype)
        for rows, indices, values in self._choose(images, X):
            tokens[rows, :, :2] = grid[indices]
            tokens[rows, :, 2:] = values
        return tokens if self.layout == "set" else tokens.reshape(len(tokens), -1)

    def inverse_transform(self, X):
        """Go back to images; pixels that were not kept are 0.

        Parameters
        ----------
        X : array-like of shape (n, k * (2 + C)) or (n, k, 2 + C), or sparse matrix of shape (n, H * W * C)
            What `transform` gave in any layout; of "flat" and "set", values may have changed and pixels may
            have changed places.

        Returns
        -------
        ndarray of shape (n, features), (n, H, W) or (n, H, W, C), or CSR matrix of shape (n, features)
            In the form that X had in `fit`; float64 or float32 as X is, float32 for other dtypes.

        Raises
        ------
        ValueError
            If X has another width, or coordinates that are not those of distinct pixels.
        """
        check_is_fitted(self, "k_")
        X = check_array(X, accept_sparse="csr", allow_nd=True, dtype=[np.float32, np.float64], input_name="X")
        self._check_width(X)
        to_sparse = not issubclass(self._row_type, np.ndarray)
        if sparse.issparse(X):
            return self._row_type(X, copy=True) if to_sparse else X.toarray().reshape(-1, *self._row_shape)
        if to_sparse:
            return _sparse_images(self._read_tokens(X), self.image_shape_, self._row_type)
        images = np.zeros((len(X), math.prod(self.image_shape_[:2]), self.image_shape_[2]), dtype=X.dtype)
        for rows, indices, values in self._read_tokens(X):
            np.put_along_axis(images[rows], indices[..., None], values, axis=1)
        return images.reshape(len(X), *self._row_shape)

    def get_feature_names_out(self, input_features=None):
        """Names of the columns of the result; an error in the layout "set", which has none.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Names of the columns of X; by default `feature_names_in_`, or "x0", "x1" and so on.

        Returns
        -------
        ndarray of str objects
            "flat": "pixel0_x", "pixel0_y", "pixel0_v0", ...; "sparse": the names of the columns of X.
        """
        check_is_fitted(self, "k_")
        names = _check_feature_names_in(self, input_features)
        if self.layout == "sparse":
            return names
        if self.layout == "set":
            raise ValueError(_NO_FRAME)
        parts = ["x", "y", *(f"v{c}" for c in range(self.image_shape_[2]))]
        return np.array([f"pixel{i}_{part}" for i in range(self.k_) for part in parts], dtype=object)

    def _gives_frames(self) -> bool:
        """Whether `set_output` or scikit-learn's configuration wants a data frame."""
        own = getattr(self, "_sklearn_output_config", {})
        return own.get("transform", get_config()["transform_output"]) != "default"

    def _fit_score(self, score: Any, images: ImageRows, y: Any) -> Any:
        """Classifier whose coarse attention is the score, fitted to images of this form; else None."""
        if not hasattr(score, "attention_maps"):
            return None
        if _to_be_fitted(score):
            score, data = clone(score), images.data
            if score.get_params(deep=False).get("image_shape", ...) is None:
                score.set_params(image_shape=self.image_shape_)
            # Splitting an axis makes a view, not a copy.
            score.fit(data if sparse.issparse(data) else data.reshape(-1, *self.image_shape_), y)
        check_is_fitted(score, msg="score is a frozen classifier that is not fitted: fit it first.")
        shape = getattr(score, "image_shape_", self.image_shape_)
        if shape != self.image_shape_:
            raise ValueError(
                f"score is a classifier of images of (H, W, C) = {shape}, but X has {self.image_shape_}."
            )
        return score

    def _choose(self, images: ImageRows, X: Any) -> Iterator[Chosen]:
        """Choose pixels, a few images at a time."""
        best_first = self.order == "score"
        tile = getattr(getattr(self.score_estimator_, "network_", None), "tile", 1)
        for rows in chunk_slices(len(images), self.image_shape_):
            chunk = images.read(rows)
            scores = self._score(chunk, rows, X)
            indices = _best_pixels(scores, self.k_, tile=tile, best_first=best_first)
            pixels = chunk.reshape(len(chunk), -1, self.image_shape_[2])
            values = np.take_along_axis(pixels, indices[..., None], axis=1)
            yield rows, indices, values.astype(images.float_dtype, copy=False)

    def _score(self, chunk: np.ndarray, rows: slice, X: Any) -> np.ndarray:
        """Score (B, H, W) of the images of a chunk, which are these rows of X."""
        chunk = chunk.view()
        chunk.flags.writeable = False  # it may be the user's own memory
        if (estimator := self.score_estimator_) is not None:
            # A classifier that was fitted to named columns is given them.
            named = hasattr(estimator, "feature_names_in_") and hasattr(X, "columns")
            part = _safe_indexing(X, rows) if named else chunk
            # Maps come in the precision of X: in float32 high attention would round to 1, and tie.
            maps = estimator.attention_maps(part.astype(np.float64))
            return _checked_scores(maps["coarse"], chunk, "attention_maps of the classifier given as score")
        if isinstance(score := vars(self)["score"], str):
            return _SCORES[score](chunk)
        return _checked_scores(call_given("score", score, chunk), chunk, f"score={score!r}")

    def _check_width(self, X: Any) -> None:
        """Refuse what `transform` cannot have given, by its shape."""
        size = 2 + self.image_shape_[2]
        dense = ((self.k_ * size,), (self.k_, size))
        if X.shape[1:] not in (((self.n_features_in_,),) if sparse.issparse(X) else dense):
            raise ValueError(
                f"X has shape {X.shape}, but {self.k_} pixels of images of (H, W, C) = {self.image_shape_} "
                f"are an array of shape (n, {self.k_ * size}) or (n, {self.k_}, {size}), or a sparse matrix "
                f"of shape (n, {self.n_features_in_})."
            )

    def _read_tokens(self, X: np.ndarray) -> Iterator[Chosen]:
        """Pixels of the layouts "flat" and "set", in chunks."""
        tokens = X.reshape(len(X), self.k_, -1)
        for rows in chunk_slices(len(X), (*tokens.shape[1:], 1)):
            indices = _pixel_indices(tokens[rows, :, :2], self.image_shape_)
            yield rows, indices, tokens[rows, :, 2:]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.three_d_array = True
        tags.target_tags.required = _to_be_fitted(vars(self)["score"])
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _to_be_fitted(score: Any) -> bool:
    """Whether `score` is a classifier that `fit` has to fit."""
    return hasattr(score, "attention_maps") and not isinstance(score, FrozenEstimator | type)
