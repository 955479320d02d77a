"""Why a network answered: what each pixel added to the log-odds of a class, to first order."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ..images import ImageRows, PixelScale, chunk_slices
from ..network import SparseAttnNet
from .evaluate import exact_copy

_TIED = 1e-9  # relative: cells that differ by rounding share the maximum, whichever of them is above


def evidence_maps(
    network: SparseAttnNet, images: ImageRows, scale: PixelScale, classes: npt.NDArray[np.int64]
) -> np.ndarray:
    """Find what each pixel added to the log-odds of a class, in chunks of bounded memory and in float64.

    Parameters
    ----------
    network : SparseAttnNet
        Fitted; it is not changed. It works where it is, on MPS (which has no float64) on the CPU instead.
    images : ImageRows
        Validated.
    scale : PixelScale
        The map learned in the fit.
    classes : ndarray of shape (n,), int64
        Number of the class to explain, for each image.

    Returns
    -------
    ndarray of shape (n, H, W)
        Signed; float64 or float32 as the images are, float32 for other dtypes.

    Raises
    ------
    ValueError
        If values of X are so far outside the range of the fit that they overflow when scaled.
    """
    maps = np.empty((len(images), *images.image_shape[:2]), dtype=images.float_dtype)
    with torch.inference_mode(False):  # in it nothing has gradients
        exact = exact_copy(network)
        device = next(exact.parameters()).device
        for rows in chunk_slices(len(images), images.image_shape):
            batch = torch.from_numpy(scale.finite(images.read(rows))).to(device=device, dtype=torch.float64)
            of_tokens, of_cells = evidence(exact, batch, torch.from_numpy(classes[rows]).to(device))
            maps[rows] = (of_tokens + of_cells).cpu().numpy()
    return maps


def evidence(network: SparseAttnNet, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Find what each token and each cell added, laid over the pixels.

    One pass forwards, and one backwards through the classifier alone; the rest are products.

    Parameters
    ----------
    network : SparseAttnNet
        In evaluation mode.
    images : Tensor of shape (B, C, H, W)
        Scaled.
    classes : Tensor of shape (B,), int64
        Number of the class to explain, for each image.

    Returns
    -------
    of_tokens : Tensor of shape (B, H, W)
        Zero off the chosen pixels.
    of_cells : Tensor of shape (B, H, W)
        Of the features that are pooled: each cell's part is shared among the pixels around it.
    """
    out = network.embedding.out
    with torch.no_grad():
        scores, z_coarse, maps = network.coarse.look(images)
        pixels = network.choose(images, scores)
        hidden = network.hidden_tokens(images, pixels, scores, maps)
        z_fine, _, weight = network.fine.attend(hidden, out)
    by_fine, by_coarse = _slopes(network, z_fine, z_coarse, classes)
    with torch.no_grad():
        # w_j E_j W_v by the slope, without an E_j or a value for each token.
        slope = by_fine @ network.fine.value.weight
        per_token = torch.einsum("bkd,bd->bk", hidden, slope @ out.weight) + (slope @ out.bias).unsqueeze(1)
        of_tokens = torch.zeros_like(scores).flatten(1).scatter_(1, pixels, weight * per_token)
        of_cells = _over_pixels(_of_cells(maps[-1], by_coarse), scores.shape[1:], network.coarse.steps[-1])
    return of_tokens.view_as(scores), of_cells


def _slopes(
    network: SparseAttnNet, z_fine: Tensor, z_coarse: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the log-odds of a class, by the pooled tokens and by the pooled features."""
    if network.fusion.out.out_features == 1:  # certain, whatever the image
        return torch.zeros_like(z_fine), torch.zeros_like(z_coarse)
    with torch.enable_grad():
        z_fine, z_coarse = z_fine.detach().requires_grad_(), z_coarse.detach().requires_grad_()
        logits = network.fusion(torch.cat([network.fine_norm(z_fine), z_coarse], dim=1))
        own = F.one_hot(classes, logits.shape[1]).bool()
        log_odds = logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)
        by_fine, by_coarse = torch.autograd.grad(log_odds.sum(), (z_fine, z_coarse))
    return by_fine, by_coarse


def _of_cells(cells: Tensor, by_coarse: Tensor) -> Tensor:
    """What each cell (B, channels, h, w) adds by the means and maxima of which it is a part, (B, h, w)."""
    side = torch.ones(cells.shape[2:], dtype=torch.bool, device=cells.device)
    side[1:-1, 1:-1] = False
    excess = cells - cells[:, :, side].median(dim=2).values[..., None, None]
    most = cells.amax((2, 3), keepdim=True)
    is_most = (cells >= most - _TIED * most.abs()).to(cells.dtype)
    by_mean, by_most = by_coarse[..., None, None].chunk(2, dim=1)
    share = by_mean / side.numel() + by_most * is_most / is_most.sum((2, 3), keepdim=True)
    return (excess * share).sum(1)


def _over_pixels(cells: Tensor, size: torch.Size, step: int) -> Tensor:
    """Share each cell's value among the pixels, linearly less to the next cells: (B, h, w) -> (B, H, W)."""
    rows, columns = (
        _shares(n_pixels, n_cells, step).to(cells)
        for n_pixels, n_cells in zip(size, cells.shape[1:], strict=True)
    )
    return rows @ cells @ columns.T


def _shares(n_pixels: int, n_cells: int, step: int) -> Tensor:
    """Share of each pixel of a line in each cell, (n_pixels, n_cells), float64; the columns sum to 1."""
    place = (torch.arange(n_pixels, dtype=torch.float64) / step).clamp(max=n_cells - 1)
    near = (1 - (place.unsqueeze(1) - torch.arange(n_cells)).abs()).clamp(min=0)
    return near / near.sum(0)
