"""The results users ask for, gathered from the passes over chunks of images."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..images import ImageShape
from ..network import SparseAttnOutput

Passes = Iterable[tuple[slice, SparseAttnOutput]]


def probabilities(passes: Passes, n_images: int, n_classes: int) -> npt.NDArray[np.float64]:
    """Softmax of the logits, in float64.

    Parameters
    ----------
    passes : iterable of (rows, SparseAttnOutput)
        From `evaluate`.
    n_images, n_classes : int
        Shape of the result.

    Returns
    -------
    ndarray of shape (n_images, n_classes)
        Rows sum to 1.
    """
    result = np.empty((n_images, n_classes))
    for rows, output in passes:
        result[rows] = output.logits.numpy()
    # In place and by hand: scipy's softmax takes a tenth of the time of a single image.
    result -= result.max(axis=1, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=1, keepdims=True)
    return result


def fused_features(passes: Passes, n_images: int, n_features: int, dtype: np.dtype) -> np.ndarray:
    """Gather f = [z_fine ; z_coarse].

    Parameters
    ----------
    passes : iterable of (rows, SparseAttnOutput)
        From `evaluate`.
    n_images, n_features : int
        Shape of the result.
    dtype : dtype
        Of the result.

    Returns
    -------
    ndarray of shape (n_images, n_features)
        The features.
    """
    result = np.empty((n_images, n_features), dtype=dtype)
    for rows, output in passes:
        result[rows] = output.features.numpy()
    return result


def attention_maps(
    passes: Passes, n_images: int, image_shape: ImageShape, tile: int, n_chosen: int, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Coarse and fine attention, chosen tiles and their signed contributions.

    Parameters
    ----------
    passes : iterable of (rows, SparseAttnOutput)
        From `evaluate`.
    n_images : int
        Number of images.
    image_shape : tuple of (H, W, C)
        Of the images.
    tile : int
        Pixels along the side of a tile.
    n_chosen : int
        Tiles chosen of each image.
    dtype : dtype
        Of the maps.

    Returns
    -------
    dict
        ``coarse``, ``fine``, ``contribution`` (n, H, W) and ``chosen`` (n, H, W), bool, the middle two zero
        off the chosen pixels; and ``tiles`` (n, n_chosen), best first.
    """
    height, width, _ = image_shape
    grid = -(-height // tile), -(-width // tile)
    of_tile = np.arange(grid[0] * grid[1]).reshape(grid).repeat(tile, 0).repeat(tile, 1)[:height, :width]
    n_pixels = np.bincount(of_tile.ravel())
    result: dict[str, np.ndarray] = {
        name: np.empty((n_images, height, width), dtype) for name in ("coarse", "fine", "contribution")
    }
    result["chosen"] = np.empty((n_images, height, width), np.bool_)
    result["tiles"] = np.empty((n_images, n_chosen), np.int64)
    for rows, output in passes:
        # By NumPy: PyTorch would start threads.
        tiles = output.tiles.numpy().astype(np.int64)
        result["tiles"][rows] = tiles
        # In float32 high attention rounds to 1.
        coarse = output.scores.flatten(1).numpy().astype(dtype)
        _sigmoid(coarse, out=coarse)
        result["coarse"][rows] = coarse[:, of_tile]
        table = np.zeros(coarse.shape, dtype)
        for name, values in (("fine", output.attention), ("contribution", output.contribution)):
            np.put_along_axis(table, tiles, (values.numpy() / n_pixels[tiles]).astype(dtype), axis=1)
            result[name][rows] = table[:, of_tile]
        chosen = np.zeros(coarse.shape, np.bool_)
        np.put_along_axis(chosen, tiles, True, axis=1)
        result["chosen"][rows] = chosen[:, of_tile]
    return result


def _sigmoid(scores: np.ndarray, *, out: np.ndarray) -> None:
    """1 / (1 + exp(-scores)) in the dtype of `out`; in place, several times faster than scipy's expit.

    Beyond the limit the exponential would overflow; there it is 0 or 1 but for a rounding error.
    """
    limit = np.log(np.finfo(out.dtype).max) - 2
    np.negative(scores, out=out)
    np.clip(out, -limit, limit, out=out)
    np.exp(out, out=out)
    out += 1
    np.reciprocal(out, out=out)
