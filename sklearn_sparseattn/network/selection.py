"""Which pixels go on: the k of the highest scores or ranks, and the tokens made of them.

No parameters are learned here, and nothing here is differentiated through the choice itself.
"""

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import branch


def select_pixels(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of each image, best first, a tie to the lower index.

    Parameters
    ----------
    scores : Tensor of shape (B, H, W) or (B, N)
        One score a pixel, without NaN.
    k : int
        Pixels to choose, 1 <= k <= N.

    Returns
    -------
    indices : Tensor of shape (B, k), int64
        Row-major pixel indices, i * W + j.

    Raises
    ------
    ValueError
        If k lies outside [1, N].

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.network import select_pixels
    >>> select_pixels(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 3)
    tensor([[1, 3, 2]])
    """
    flat = _flat_scores(scores, k)
    return flat.sort(dim=1, descending=True, stable=True).indices[:, :k]


def select_pixel_set(scores: Tensor, k: int) -> Tensor:
    """Choose the same pixels as `select_pixels`, in ascending order of index: no full sort is needed.

    Parameters
    ----------
    scores : Tensor of shape (B, H, W) or (B, N)
        One score a pixel, without NaN.
    k : int
        Pixels to choose, 1 <= k <= N.

    Returns
    -------
    indices : Tensor of shape (B, k), int64
        Row-major pixel indices, ascending.

    Raises
    ------
    ValueError
        If k lies outside [1, N].
    FloatingPointError
        If the scores hold NaN.
    """
    flat = _flat_scores(scores, k)
    n_images, n_pixels = flat.shape
    if k == n_pixels:
        return torch.arange(k, device=flat.device).expand(n_images, k)
    chosen_by_code = branch.select(flat, k)
    if chosen_by_code is not None:
        return chosen_by_code
    threshold = flat.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above = flat > threshold
    tied = flat == threshold
    # Of the pixels at the threshold itself, only the first few fit.
    room = k - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= room))
    indices = chosen.nonzero()[:, 1]
    if len(indices) != n_images * k:
        raise FloatingPointError("the scores of the pixels hold NaN")
    return indices.view(n_images, k)


def _flat_scores(scores: Tensor, k: int) -> Tensor:
    flat = scores.detach().flatten(1)
    if not 1 <= k <= flat.shape[1]:
        raise ValueError(f"k={k} pixels cannot be chosen of {flat.shape[1]}: 1 <= k <= H * W.")
    return flat


@functools.cache
def turns(step: int) -> npt.NDArray[np.float64]:
    """The order in which the pixels over a cell have their turn: that of a Bayer matrix, as in dithering.

    Parameters
    ----------
    step : int
        Pixels along the side of a cell, a power of 2.

    Returns
    -------
    ndarray of shape (step, step), float64
        0, 1 / step**2, ... up to less than 1; the first ones lie far from each other. Not to be written.
    """
    order = np.zeros((1, 1))
    while len(order) < step:
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    result = order / order.size
    result.flags.writeable = False
    return result


def pixel_tokens(images: Tensor, indices: Tensor) -> Tensor:
    """Position and brightness of the chosen pixels.

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W)
        The images.
    indices : Tensor of shape (B, k), int64
        Row-major pixel indices.

    Returns
    -------
    pixels : Tensor of shape (B, k, 2 + C)
        x = (2j + 1) / W - 1, y = (2i + 1) / H - 1, then the C values at row i, column j.
    """
    height, width = images.shape[-2:]
    dtype = images.dtype
    row = indices.div(width, rounding_mode="floor")
    column = indices - row * width
    x = (2 * column + 1).to(dtype) / width - 1
    y = (2 * row + 1).to(dtype) / height - 1
    values = [channel.flatten(1).gather(1, indices) for channel in images.unbind(1)]
    return torch.stack([x, y, *values], dim=-1)
