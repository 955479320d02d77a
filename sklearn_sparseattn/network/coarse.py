"""Coarse attention: one cheap look at the whole image (eq. 2-3).

A small convolutional network works at reduced resolution, scores its cells or every pixel, and pools its
features. It knows nothing of tiles chosen, tokens or classes.
"""

import itertools
import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _convolution(in_channels: int, out_channels: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class CoarseLook(NamedTuple):
    """All that the coarse network sees in a batch of images.

    Attributes
    ----------
    scores : Tensor of shape (B, H, W), or (B, h, w) of the cells
        Coarse attention before the sigmoid.
    z_coarse : Tensor of shape (B, n_features)
        Pooled features.
    maps : tuple of Tensor (B, channels, h, w)
        Features after each stage.
    """

    scores: Tensor
    z_coarse: Tensor
    maps: tuple[Tensor, ...]


class CoarseAttention(nn.Module):
    """Score an image, and describe it as a whole.

    The attention of eq. 2-3 in [1]_ is ``A_coarse = sigmoid(scores)``. The scores themselves are returned,
    since their order and the losses need no sigmoid.

    Parameters
    ----------
    in_channels : int, default=1
        Channels of the image, C.
    channels : tuple of two or three int, default=(8, 16, 24)
        Feature channels of the stages: early, middle and, if there are three, deep.
    strides : tuple of int, default=(2, 2, 2)
        Step of each stage; what is there beyond the stages is not looked at. `strides_for` has those that
        suit an image size.
    kernel_size : {3, 5, 7}, default=3
        Side of the kernels of the first convolution; those of the others are 3x3.
    interpolate : bool, default=True
        Give a score for every pixel. False: one for every cell of the second stage.

    Raises
    ------
    ValueError
        If there are not two or three stages, or fewer strides than stages, or for another `kernel_size`.

    Attributes
    ----------
    n_features : int
        Length F of the pooled features: the mean and the maximum of each channel of the last stage.
    steps : tuple of int
        Pixels from one cell of each stage's map to the next. Cell (i, j) lies over pixel (i, j) * step.
    background : Tensor of shape ()
        The level that images go on with beyond their borders, a buffer; 0 at first.

    Notes
    -----
    The second stage is scored. With `interpolate`, the scores of its cells are interpolated linearly between
    the pixels that they lie over; beyond the last cell its score goes on.

    The convolutions are padded with zeros. Where the background is not black that makes a frame of edges,
    more striking than many a cell: so `background` is taken from the images first.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.network import CoarseAttention
    >>> scores, z_coarse = CoarseAttention()(torch.zeros(2, 1, 135, 90))
    >>> scores.shape, z_coarse.shape
    (torch.Size([2, 135, 90]), torch.Size([2, 48]))
    """

    background: Tensor

    def __init__(
        self,
        in_channels: int = 1,
        channels: tuple[int, ...] = (8, 16, 24),
        strides: tuple[int, ...] = (2, 2, 2),
        kernel_size: int = 3,
        interpolate: bool = True,
    ) -> None:
        super().__init__()
        if not 2 <= len(channels) <= min(3, len(strides)):
            raise ValueError(
                f"channels={channels}, strides={strides} must be two or three stages, each with its stride."
            )
        if kernel_size not in (3, 5, 7):
            raise ValueError(f"kernel_size={kernel_size!r} must be 3, 5 or 7.")
        self.register_buffer("background", torch.zeros(()))
        self.early = _convolution(in_channels, channels[0], strides[0], kernel_size)
        self.middle = _convolution(channels[0], channels[1], strides[1])
        self.score = nn.Conv2d(channels[1], 1, 1)
        self.deep = None
        if len(channels) == 3:
            self.deep = nn.Sequential(
                _convolution(channels[1], channels[2], strides[2]),
                _convolution(channels[2], channels[2]),
            )
        self.steps = tuple(itertools.accumulate(strides[: len(channels)], operator.mul))
        self.n_features = 2 * channels[-1]
        self.interpolate = interpolate

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score the image and pool its features.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            Images scaled to about [0, 1]; any H, W >= 1.

        Returns
        -------
        scores : Tensor of shape (B, H, W), or (B, h, w) of the cells
            Coarse attention before the sigmoid.
        z_coarse : Tensor of shape (B, n_features)
            Pooled coarse features.
        """
        return self.look(images)[:2]

    def look(self, images: Tensor) -> CoarseLook:
        """Score the image, pool its features, and keep the maps.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            As in `forward`.

        Returns
        -------
        CoarseLook
            Scores, pooled features and the map of each stage.
        """
        early = self.early(images - self.background)
        middle = self.middle(early)
        scores = self.score(middle)
        if self.interpolate:
            height, width = images.shape[-2:]
            scores = _between_cells(scores, self.steps[1])[..., :height, :width]
        maps = (early, middle) if self.deep is None else (early, middle, self.deep(middle))
        return CoarseLook(scores[:, 0], _pooled(maps[-1]), maps)


def _pooled(cells: Tensor) -> Tensor:
    """Mean and maximum of each channel, (B, 2 * channels)."""
    flat = cells.flatten(2)
    return torch.cat([flat.mean(-1), flat.amax(-1)], dim=1)


def _between_cells(cells: Tensor, step: int) -> Tensor:
    """Cells over every `step`-th pixel -> pixels, at least those of the image."""
    if step == 1:
        return cells
    size = [(n - 1) * step + 1 for n in cells.shape[-2:]]
    inner = F.interpolate(cells, size, mode="bilinear", align_corners=True)
    return F.pad(inner, (0, step - 1, 0, step - 1), mode="replicate")


def strides_for(height: int, width: int) -> tuple[int, int, int]:
    """Strides for an image size: 2 a stage from 32 pixels on, less for small images.

    After three stages about 4 cells or more remain along the longer side.

    Parameters
    ----------
    height, width : int
        Size of the images.

    Returns
    -------
    tuple of three int
        For `CoarseAttention`.
    """
    n_halvings = min(3, max(0, int(math.log2(max(height, width) / 4))))
    early, middle, late = (2 if n_halvings >= needed else 1 for needed in (3, 2, 1))
    return early, middle, late
