"""Why a network answered: what each pixel added to the log-odds of a class, to first order."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ..images import ImageRows, PixelScale, chunk_slices
from ..network import SparseAttnNet, pixel_tokens
from ..threads import safe_after_fork
from .evaluate import exact_copy

_TIED = 1e-9  # relative: cells that differ by rounding share the maximum, whichever of them is above


@safe_after_fork()
def evidence_maps(
    network: SparseAttnNet,
    images: ImageRows,
    scale: PixelScale,
    classes: npt.NDArray[np.int64],
    k: float | None = None,
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
    k : float, default=None
        Pixels to choose; None takes the network's own.

    Returns
    -------
    ndarray of shape (n, H, W)
        Signed; float64 or float32 as the images are, float32 for other dtypes.

    Raises
    ------
    ValueError
        If X contains NaN.
    """
    maps = np.empty((len(images), *images.image_shape[:2]), dtype=images.float_dtype)
    with torch.inference_mode(False):  # in it nothing has gradients
        exact = exact_copy(network, k)
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
        Shared evenly among the pixels of each tile; zero off the chosen tiles.
    of_cells : Tensor of shape (B, H, W)
        Of the features that are pooled: each cell's part is shared among the pixels around it.
    """
    height, width = images.shape[2:]
    with torch.no_grad():
        scores, z_coarse, maps = network.coarse.look(images)
        tiles = network.choose(images, scores)
        if network.embedding is not None:
            tokens, out = network.embedding.hidden(pixel_tokens(images, tiles)), network.embedding.out
        else:
            assert network.tokens is not None  # one of the two variants
            tokens, out = network.tile_tokens(scores, maps, tiles), network.tokens.out
        z_fine, _, weight = network.fine.attend(tokens, out)
        # The maximum of the tokens is no feature of the paper's form.
        most = tokens.amax(1) if network.embedding is None else tokens.new_empty(len(tokens), 0)
    by_fine, by_most, by_coarse = _slopes(network, z_fine, most, z_coarse, classes)
    with torch.no_grad():
        # w_j E_j W_v by the slope, without an E_j or a value for each token.
        slope = by_fine @ network.fine.value.weight
        of_token = torch.einsum("bnd,bd->bn", tokens, slope @ out.weight) + (slope @ out.bias).unsqueeze(1)
        of_token = weight * of_token
        if by_most.shape[1]:
            of_token = of_token + (tokens * _share_of_maximum(tokens, 1) * by_most.unsqueeze(1)).sum(2)
        of_tile = torch.zeros_like(scores).flatten(1).scatter_(1, tiles, of_token).view_as(scores)
        of_tokens = _over_tiles(of_tile, height, width, network.tile)
        of_cells = _over_pixels(_of_cells(maps[-1], by_coarse), (height, width), network.coarse.steps[-1])
    return of_tokens, of_cells


def _slopes(
    network: SparseAttnNet, z_fine: Tensor, most: Tensor, z_coarse: Tensor, classes: Tensor
) -> list[Tensor]:
    """Gradients of the log-odds of a class, by each part of the features."""
    parts = [z_fine, most, z_coarse]
    if network.fusion.out.out_features == 1:  # certain, whatever the image
        return [torch.zeros_like(part) for part in parts]
    with torch.enable_grad():
        z_fine, *others = parts = [part.detach().requires_grad_() for part in parts]
        logits = network.fusion(torch.cat([network.fine_norm(z_fine), *others], dim=1))
        own = F.one_hot(classes, logits.shape[1]).bool()
        log_odds = logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)
        return list(torch.autograd.grad(log_odds.sum(), parts))


def _share_of_maximum(values: Tensor, axis: int | tuple[int, int]) -> Tensor:
    """What part of the maximum along some axes is of each value: all of it, or equal parts where some tie."""
    most = values.amax(axis, keepdim=True)
    is_most = (values >= most - _TIED * most.abs()).to(values.dtype)
    return is_most / is_most.sum(axis, keepdim=True)


def _of_cells(cells: Tensor, by_coarse: Tensor) -> Tensor:
    """What each cell (B, channels, h, w) adds by the means and maxima of which it is a part, (B, h, w)."""
    side = torch.ones(cells.shape[2:], dtype=torch.bool, device=cells.device)
    side[1:-1, 1:-1] = False
    excess = cells - cells[:, :, side].median(dim=2).values[..., None, None]
    by_mean, by_most = by_coarse[..., None, None].chunk(2, dim=1)
    share = by_mean / side.numel() + by_most * _share_of_maximum(cells, (2, 3))
    return (excess * share).sum(1)


def _over_tiles(tiles: Tensor, height: int, width: int, side: int) -> Tensor:
    """Share each tile's value evenly among its pixels, of which those at the border may have fewer."""
    rows, columns = (torch.arange(n, device=tiles.device) // side for n in (height, width))
    n_pixels = rows.bincount().unsqueeze(1) * columns.bincount()
    return (tiles / n_pixels)[:, rows][:, :, columns]


def _over_pixels(cells: Tensor, size: tuple[int, int], step: int) -> Tensor:
    """Share each cell's value among the pixels, linearly less to the next cells: (B, h, w) -> (B, H, W)."""
    rows, columns = (
        _shares(n_pixels, n_cells, step).to(cells)
        for n_pixels, n_cells in zip(size, cells.shape[1:], strict=True)
    )
    return rows @ cells @ columns.T


def _shares(n_pixels: int, n_cells: int, step: int) -> Tensor:
    """Share of each pixel of a line in each cell, (n_pixels, n_cells), float64; the columns sum to 1."""
    pixels, cells = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (n_pixels, n_cells))
    near = (1 - ((pixels / step).clamp(max=n_cells - 1).unsqueeze(1) - cells).abs()).clamp(min=0)
    return near / near.sum(0)
