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
        # By NumPy: PyTorch would start threads.
        scores = output.scores.flatten(1).numpy()
        chosen = output.pixels.numpy().astype(np.int64)
        # In float32 high attention rounds to 1.
        _sigmoid(scores, out=coarse[rows])
        np.put_along_axis(fine[rows], chosen, output.attention.numpy().astype(dtype), axis=1)
        np.put_along_axis(contribution[rows], chosen, output.contribution.numpy().astype(dtype), axis=1)
        # The network keeps its pixels in ascending order, so that ties go by index.
        order = _descending(np.take_along_axis(scores, chosen, axis=1))
        pixels[rows] = np.take_along_axis(chosen, order, axis=1)
    shape = (n_images, height, width)
    return {
        "coarse": coarse.reshape(shape),
        "pixels": pixels,
        "fine": fine.reshape(shape),
        "contribution": contribution.reshape(shape),
    }


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


def _descending(values: np.ndarray) -> np.ndarray:
    """Order of each row from its greatest value down, ties as they come.

    In float32, value and place are one integer: to sort these is several times faster than a stable sort.
    """
    if values.dtype != np.float32:
        return np.argsort(-values, axis=1, kind="stable")
    bits = (0 - values).view(np.int32)  # 0 - 0 and 0 - (-0) are the same zero
    rising = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
    keys = rising << 32 | np.arange(values.shape[1])
    keys.sort(axis=1)
    return keys & 0xFFFFFFFF
