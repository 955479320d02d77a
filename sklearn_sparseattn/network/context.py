"""What the coarse network saw around a chosen pixel, for the token of that pixel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenContext(nn.Module):
    """3x3 convolutions of coarse features, at the cells of the chosen pixels and nowhere else.

    Each stage of the coarse network has a map; a pixel belongs to the cell nearest to it. Cells to which no
    chosen pixel belongs are not convolved, so that the multiply-adds follow k, not the size of the image.

    Parameters
    ----------
    channels : tuple of int
        Channels of each map.
    steps : tuple of int
        Pixels from one cell of each map to the next, see `CoarseAttention`.
    embed_dim : int
        Length D of what comes out.
    separable : bool, default=True
        Whether a convolution is one of each channel by itself, 3x3, and then one of all channels, 1x1.
    """

    def __init__(
        self, channels: tuple[int, ...], steps: tuple[int, ...], embed_dim: int, separable: bool = True
    ) -> None:
        super().__init__()
        self.steps = steps
        self.separable = separable
        make = _separable if separable else _whole
        self.convolve = nn.ModuleList(make(n, embed_dim) for n in channels)

    def forward(self, maps: tuple[Tensor, ...], pixels: Tensor, width: int) -> Tensor:
        """Convolve around some pixels.

        Parameters
        ----------
        maps : tuple of Tensor (B, channels, h, w)
            Features of each stage.
        pixels : Tensor of shape (B, k), int64
            Row-major pixel indices.
        width : int
            W of the images.

        Returns
        -------
        context : Tensor of shape (B, k, D)
            Sum over the maps.
        """
        row = pixels.div(width, rounding_mode="floor")
        column = pixels - row * width
        context = torch.zeros((), dtype=maps[0].dtype, device=maps[0].device)
        for cells, step, convolve in zip(maps, self.steps, self.convolve, strict=True):
            n_rows, n_columns = cells.shape[-2:]
            i = ((row + step // 2) // step).clamp(max=n_rows - 1)
            j = ((column + step // 2) // step).clamp(max=n_columns - 1)
            patches, patch_of = _patches(cells, i, j)
            if self.separable:
                depthwise, pointwise = convolve.parameters()
                convolved = (patches * depthwise.flatten(1).T).sum(1) @ pointwise.flatten(1).T
            else:
                (weight,) = convolve.parameters()
                convolved = patches.flatten(1) @ weight.permute(2, 3, 1, 0).flatten(0, 2)
            context = context + F.embedding(patch_of, convolved)
        return context

    def kernels(self) -> list[Tensor]:
        """Each map's convolution as a single one, 3x3 of all channels.

        Returns
        -------
        list of Tensor (D, channels, 3, 3)
            With the gradients of the layers.
        """
        if not self.separable:
            return list(self.convolve.parameters())
        parts = (convolve.parameters() for convolve in self.convolve)
        return [pointwise * depthwise.squeeze(1) for depthwise, pointwise in parts]


def _separable(n_channels: int, n_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(n_channels, n_channels, 3, padding=1, groups=n_channels, bias=False),
        nn.Conv2d(n_channels, n_outputs, 1, bias=False),
    )


def _whole(n_channels: int, n_outputs: int) -> nn.Module:
    return nn.Conv2d(n_channels, n_outputs, 3, padding=1, bias=False)


def _patches(cells: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """What lies around cells (i, j), each (B, k), of maps (B, n, h, w), with zeros around those.

    Gives patches (m, 9, n), one for each cell that is among them, and which is whose, (B, k).
    """
    n_images, n_channels, n_rows, n_columns = cells.shape
    # A cell's features side by side, in a frame of zeros: cells and their neighbours are rows of a table, and
    # are taken by `embedding`: the gradients of plain indexing are added in an order that differs from run to
    # run with several threads.
    height, width = n_rows + 2, n_columns + 2
    table = F.pad(cells, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, n_channels)
    image = torch.arange(n_images, device=i.device).unsqueeze(1)
    at = (image * height + i + 1) * width + j + 1
    is_wanted = torch.zeros(len(table), dtype=torch.bool, device=i.device).index_fill_(0, at.flatten(), True)
    around = torch.tensor(
        [width * down + right for down in (-1, 0, 1) for right in (-1, 0, 1)], device=i.device
    )
    wanted = is_wanted.nonzero()
    return F.embedding(wanted + around, table), is_wanted.cumsum(0)[at] - 1
