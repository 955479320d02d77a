"""The results users ask for, gathered from the passes over chunks of images."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

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
        result[rows] = softmax(output.logits.double().numpy(), axis=1)
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
    passes: Passes, n_images: int, image_shape: ImageShape, k: int, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Coarse and fine attention, chosen pixels and their signed contributions.

    Parameters
    ----------
    passes : iterable of (rows, SparseAttnOutput)
        From `evaluate`.
    n_images : int
        Number of images.
    image_shape : tuple of (H, W, C)
        Of the images.
    k : int
        Pixels chosen of each.
    dtype : dtype
        Of the maps.

    Returns
    -------
    dict
        ``coarse``, ``fine``, ``contribution`` (n, H, W), the last two zero off the chosen pixels, and
        ``pixels`` (n, k), best first.
    """
    height, width, _ = image_shape
    coarse = np.empty((n_images, height * width), dtype=dtype)
    fine = np.zeros_like(coarse)
    contribution = np.zeros_like(coarse)
    pixels = np.empty((n_images, k), dtype=np.int64)
    for rows, output in passes:
        scores = output.scores.flatten(1)
        chosen = output.pixels.long()
        # In float32 high attention rounds to 1.
        coarse[rows] = (scores.double() if dtype == np.float64 else scores).sigmoid().numpy()
        np.put_along_axis(fine[rows], chosen.numpy(), output.attention.numpy().astype(dtype), axis=1)
        np.put_along_axis(
            contribution[rows], chosen.numpy(), output.contribution.numpy().astype(dtype), axis=1
        )
        # The network keeps its pixels in ascending order, so that a stable sort puts ties by index.
        order = scores.gather(1, chosen).argsort(dim=1, descending=True, stable=True)
        pixels[rows] = chosen.gather(1, order).numpy()
    shape = (n_images, height, width)
    return {
        "coarse": coarse.reshape(shape),
        "pixels": pixels,
        "fine": fine.reshape(shape),
        "contribution": contribution.reshape(shape),
    }
