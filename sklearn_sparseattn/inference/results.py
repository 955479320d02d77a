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
    fine = np.zeros(coarse.shape, dtype)
    contribution = np.zeros(coarse.shape, dtype)
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
        # The network keeps its pixels in ascending order, so that ties go by index.
        order = _descending(scores.gather(1, chosen).numpy())
        pixels[rows] = np.take_along_axis(chosen.numpy(), order, axis=1)
    shape = (n_images, height, width)
    return {
        "coarse": coarse.reshape(shape),
        "pixels": pixels,
        "fine": fine.reshape(shape),
        "contribution": contribution.reshape(shape),
    }


def _descending(values: np.ndarray) -> np.ndarray:
    """Order of each row from its greatest value down, ties as they come: a stable sort only where there are any."""
    order = np.argsort(-values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    has_ties = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    order[has_ties] = np.argsort(-values[has_ties], axis=1, kind="stable")
    return order
