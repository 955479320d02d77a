"""Cells and their maps as small WebP pictures, in base64 text.

A layer lies over the image: where it says nothing it lets the image through. Maps are drawn a few cells at a
time, so that memory does not grow with their number.
"""

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.utils import _safe_indexing

LAYERS = ("image", "coarse", "chosen", "fine", "contribution")

# Of base64 text in all; with a thousand cells' captions the page stays below 15 MB.
_MAX_BYTES = 12_500_000
_CHUNK_PIXELS = 2**21
_N_SAMPLE = 40
_MIN_SIDE = 16
# Colours that fine attention and contribution may have: more are not told apart and take more room.
_N_LEVELS = 63
# Blue and vermilion of Okabe and Ito, told apart by the colour-blind too.
_NEGATIVE, _POSITIVE = (0, 114, 178), (213, 94, 0)
_CHOSEN = np.array([[0, 0, 0, 0], [230, 120, 0, 255]], dtype=np.uint8)


class Pictures(NamedTuple):
    """Pictures of all cells.

    Attributes
    ----------
    layers : dict of list of str
        Name of the layer -> base64 text of the WebP files, in the order of the cells.
    height, width : int
        In pixels.
    factor : int
        So many pixels of the image, to the side, are one of the picture.
    n_tiles : int
        Tiles chosen of each image.
    """

    layers: dict[str, list[str]]
    height: int
    width: int
    factor: int
    n_tiles: int


def draw_cells(estimator: Any, X: Any, rows: np.ndarray) -> Pictures:
    """Draw images and attention maps, as large as the page can bear.

    Parameters
    ----------
    estimator : SparseAttnClassifier
        Fitted.
    X : array-like or sparse matrix
        Images as the estimator takes them.
    rows : ndarray of int
        Those to draw, in this order.

    Returns
    -------
    Pictures
        Of 12.5 MB at most together, unless even cells of 16 pixels to a side exceed that.
    """
    height, width, _ = estimator.image_shape_
    X = X.tocsr() if sparse.issparse(X) else X  # not again for each pass over it
    to_gray = _gray_scale(estimator, X, rows)
    colours = _colours()
    factor = 1
    sample = rows[:: max(1, len(rows) // _N_SAMPLE)]
    while min(height, width) // (factor + 1) >= _MIN_SIDE:
        drawn = [sum(map(len, cell)) for cell in _draw(estimator, X, sample, to_gray, colours, factor)]
        if 1.05 * np.mean(drawn) * len(rows) <= _MAX_BYTES:
            break
        factor += 1
    cells = list(_draw(estimator, X, rows, to_gray, colours, factor))
    layers = {name: [cell[i] for cell in cells] for i, name in enumerate(LAYERS)}
    [(first, _)] = _chunks(estimator, X, rows[:1])
    n_tiles = estimator.attention_maps(first).tiles.shape[1]
    return Pictures(layers, -(-height // factor), -(-width // factor), factor, n_tiles)


def _chunks(estimator: Any, X: Any, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Some rows of X after others, as they are and as images (b, H, W) or (b, H, W, 3)."""
    shape = estimator.image_shape_
    step = max(1, _CHUNK_PIXELS // (shape[0] * shape[1]))
    for start in range(0, len(rows), step):
        chunk = _safe_indexing(X, rows[start : start + step])
        dense = np.asarray(chunk.toarray() if sparse.issparse(chunk) else chunk).reshape(-1, *shape)
        yield chunk, dense if shape[2] == 3 else dense.mean(axis=-1, dtype=np.float64)


def _gray_scale(estimator: Any, X: Any, rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Map from values to bytes, the same for all cells.

    Bytes and booleans are shown as they are, other values from the 0.1th to the 99.9th percentile, so that
    a few bright pixels do not darken all cells.
    """
    low, high = estimator.data_range_
    some = rows[:: max(1, len(rows) // 200)]
    kinds, extremes = set(), []
    for chunk, images in _chunks(estimator, X, some):
        kinds.add(np.dtype(getattr(chunk, "dtype", None) or np.asarray(chunk).dtype))
        extremes.append(np.percentile(images, [0.1, 99.9]))
    if not kinds <= {np.dtype(np.uint8), np.dtype(bool)}:
        low, high = np.min(extremes, axis=0)[0], np.max(extremes, axis=0)[1]
    span = float(high - low) or 1.0
    return lambda images: (255 * np.clip((images - low) / span, 0, 1) + 0.5).astype(np.uint8)


def _colours() -> dict[str, np.ndarray]:
    """RGBA by level: 256 of the coarse attention, 1 + 63 of the others, the first of them transparent."""
    from matplotlib import colormaps

    viridis = colormaps["viridis"]
    fine = np.zeros((_N_LEVELS + 1, 4), dtype=np.uint8)
    fine[1:] = viridis(np.linspace(0, 1, _N_LEVELS), bytes=True)
    signed = np.zeros((_N_LEVELS + 1, 4), dtype=np.uint8)
    strength = np.arange(_N_LEVELS + 1) - (_N_LEVELS + 1) // 2
    signed[:, :3] = np.where(strength[:, None] < 0, _NEGATIVE, _POSITIVE)
    signed[:, 3] = (255 * np.sqrt(abs(strength) / abs(strength).max())).astype(np.uint8)
    return {"coarse": viridis(np.arange(256), bytes=True)[:, :3], "fine": fine, "contribution": signed}


def _draw(
    estimator: Any,
    X: Any,
    rows: np.ndarray,
    to_gray: Callable[[np.ndarray], np.ndarray],
    colours: dict[str, np.ndarray],
    factor: int,
) -> Iterator[tuple[str, ...]]:
    """Layers of one cell after the other, in the order of `LAYERS`."""
    for chunk, images in _chunks(estimator, X, rows):
        maps = estimator.attention_maps(chunk)
        for image, coarse, is_chosen, fine, contribution in zip(
            to_gray(images), maps.coarse, maps.chosen, maps.fine, maps.contribution, strict=True
        ):
            low, high = coarse.min(), coarse.max()
            levels = (255 * (coarse - low) / ((high - low) or 1) + 0.5).astype(np.uint8)
            chosen = _in_blocks(is_chosen, factor) > 0
            values = _in_blocks(fine, factor)
            top = np.percentile(values[chosen], 99) or 1.0
            fine_levels = np.where(chosen, 1 + (_N_LEVELS - 1) * np.minimum(values / top, 1) + 0.5, 0)
            values = _in_blocks(contribution, factor)
            top, middle = np.percentile(abs(values[chosen]), 99) or 1.0, (_N_LEVELS + 1) // 2
            signed_levels = middle + np.rint((middle - 1) * np.clip(values / top, -1, 1))
            yield (
                _webp(_reduced(image, factor), quality=90),
                _webp(colours["coarse"][_reduced(levels, factor)], quality=80),
                _webp(_CHOSEN[chosen.astype(int)], lossless=True),
                _webp(colours["fine"][fine_levels.astype(int)], lossless=True),
                _webp(colours["contribution"][signed_levels.astype(int)], lossless=True),
            )


def _in_blocks(values: np.ndarray, factor: int) -> np.ndarray:
    """Sum of a map over each block; the last ones may be smaller."""
    rows, columns = (np.arange(0, n, factor) for n in values.shape)
    return np.add.reduceat(np.add.reduceat(values, rows, axis=0, dtype=np.float64), columns, axis=1)


def _reduced(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean of each block."""
    from PIL import Image

    return image if factor == 1 else np.asarray(Image.fromarray(image).reduce(factor))


def _webp(image: np.ndarray, **options: Any) -> str:
    """Base64 text of an image as a WebP file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="WEBP", **options)
    return base64.b64encode(file.getvalue()).decode()
