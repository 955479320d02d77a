"""Coarse attention: one cheap look at the whole image (eq. 2-3).

A small convolutional network works at reduced resolution, scores every pixel at full resolution and
pools its deepest features. It knows nothing of pixels chosen, tokens or classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class CoarseAttention(nn.Module):
    """Score every pixel of an image, and describe the image as a whole.

    The attention of eq. 2-3 in [1]_ is ``A_coarse = sigmoid(scores)``; the scores themselves are returned,
    since the order of the pixels and the losses need no sigmoid.

    Parameters
    ----------
    in_channels : int, default=1
        Channels of the image, C.
    channels : tuple of three int, default=(8, 16, 24)
        Feature channels of the three stages.
    strides : tuple of three int, default=(2, 2, 2)
        Step of each stage. `strides_for` has those that suit an image size.

    Attributes
    ----------
    n_features : int
        Length F of the pooled features: the mean and the maximum of each channel of the last stage.

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

    def __init__(
        self,
        in_channels: int = 1,
        channels: tuple[int, int, int] = (8, 16, 24),
        strides: tuple[int, int, int] = (2, 2, 2),
    ) -> None:
        super().__init__()
        self.middle = nn.Sequential(
            _convolution(in_channels, channels[0], strides[0]),
            _convolution(channels[0], channels[1], strides[1]),
            _convolution(channels[1], channels[1]),
        )
        self.score_stride = strides[0] * strides[1]
        self.score = nn.Conv2d(channels[1], self.score_stride**2, 1)
        self.deep = nn.Sequential(
            _convolution(channels[1], channels[2], strides[2]),
            _convolution(channels[2], channels[2]),
        )
        self.n_features = 2 * channels[2]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score the pixels and pool the features.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            Images scaled to about [0, 1]; any H, W >= 1.

        Returns
        -------
        scores : Tensor of shape (B, H, W)
            Coarse attention before the sigmoid.
        z_coarse : Tensor of shape (B, n_features)
            Pooled coarse features.
        """
        height, width = images.shape[-2:]
        features = self.middle(images)
        # Each cell of the reduced map carries the scores of all its pixels.
        scores = F.pixel_shuffle(self.score(features), self.score_stride)[:, 0, :height, :width]
        deep = self.deep(features).flatten(2)
        return scores, torch.cat([deep.mean(-1), deep.amax(-1)], dim=1)


def strides_for(height: int, width: int) -> tuple[int, int, int]:
    """Strides for an image size: 8 in all from 32 pixels on, less for small images.

    About 4 cells remain along the longer side.

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
