"""Which pixels or tiles go on: the k of the highest scores, and the tokens of pixels.

No parameters are learned here, and nothing here is differentiated through the choice itself.
"""

import torch
from torch import Tensor

RAMP = 10  # one in so many of the chosen tiles closes its gate
LEAST = 0.05  # width of the ramp in scores, at least


def select_pixels(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of each image, best first, a tie to the lower index.

    Parameters
    ----------
    scores : Tensor of shape (B, H, W) or (B, N)
        One score a pixel or tile, without NaN.
    k : int
        How many to choose, 1 <= k <= N.

    Returns
    -------
    indices : Tensor of shape (B, k), int64
        Row-major indices, i * W + j.

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
    flat = scores.detach().flatten(1)
    if not 1 <= k <= flat.shape[1]:
        raise ValueError(f"k={k} cannot be chosen of {flat.shape[1]}: 1 <= k <= H * W.")
    return flat.sort(dim=1, descending=True, stable=True).indices[:, :k]


def openness(scores: Tensor, chosen: Tensor, kept: Tensor | None = None) -> Tensor:
    r"""How far the gates of chosen tiles are open; the last tenth close towards the best one not chosen.

    Parameters
    ----------
    scores : Tensor of shape (B, N)
        Of all tiles.
    chosen : Tensor of shape (B, n), int64
        The n highest.
    kept : Tensor of shape (B, n), bool, default=None
        Which of them count as chosen, at least one of each image; None is all.

    Returns
    -------
    Tensor of shape (B, n)
        In [0, 1], without gradient; 1 if all tiles are chosen, 0 for those not kept.

    Notes
    -----
    With :math:`a_{(1)} \ge a_{(2)} \ge \dots` the scores in order and r a tenth of n, at least 1,

    .. math::
        o_j = \min\Big(1, \frac{a_j - a_{(n + 1)}}{\max(a_{(n - r)} - a_{(n + 1)},\ 0.05)}\Big),

    with :math:`a_{(1)}` where n - r < 1. A tile that has only just been chosen counts for nothing. So the
    answer is a continuous function of the image, and it does not matter which of two equal tiles was chosen.
    """
    scores = scores.detach()
    own = scores.gather(1, chosen)
    kept = torch.ones_like(chosen, dtype=torch.bool) if kept is None else kept
    n = kept.sum(1, keepdim=True)
    best_left = scores.scatter(1, chosen, own.masked_fill(kept, -torch.inf)).amax(1, keepdim=True)
    in_order = own.masked_fill(~kept, -torch.inf).sort(dim=1, descending=True).values
    full = in_order.gather(1, (n - 1 - ((n + RAMP // 2) // RAMP).clamp(min=1)).clamp(min=0))
    found = ((own - best_left) / (full - best_left).clamp(min=LEAST)).clamp(0, 1)
    return torch.where(n == scores.shape[1], 1.0, found) * kept


def n_closing(n_chosen: int) -> int:
    """Count the chosen tiles whose gates close.

    Parameters
    ----------
    n_chosen : int
        Tiles chosen, >= 1.

    Returns
    -------
    int
        A tenth of them, at least 1.
    """
    return max(1, (n_chosen + RAMP // 2) // RAMP)


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
