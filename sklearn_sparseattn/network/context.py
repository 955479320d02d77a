"""What the coarse network saw around a chosen pixel, for the token of that pixel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenContext(nn.Module):
    """Coarse features at the chosen pixels, projected to the width of a token.

    Each stage of the coarse network has a map; a pixel takes the features of the cell nearest to it.
    Projected before they are taken, the features cost as much as there are cells, not pixels.

    Parameters
    ----------
    channels : tuple of int
        Channels of each map.
    steps : tuple of int
        Pixels from one cell of each map to the next, see `CoarseAttention`.
    embed_dim : int
        Length D of what comes out.
    """

    def __init__(self, channels: tuple[int, ...], steps: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.steps = steps
        self.project = nn.ModuleList(nn.Conv2d(n, embed_dim, 1, bias=False) for n in channels)

    def forward(self, maps: tuple[Tensor, ...], pixels: Tensor, width: int) -> Tensor:
        """Take the features at some pixels.

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
            Sum of the projections.
        """
        row = pixels.div(width, rounding_mode="floor")
        column = pixels - row * width
        context = torch.zeros((), dtype=maps[0].dtype, device=maps[0].device)
        for cells, step, project in zip(maps, self.steps, self.project, strict=True):
            n_images, _, n_rows, n_columns = cells.shape
            i = ((row + step // 2) // step).clamp(max=n_rows - 1)
            j = ((column + step // 2) // step).clamp(max=n_columns - 1)
            image = torch.arange(n_images, device=pixels.device).unsqueeze(1)
            # A cell's features side by side: as rows, they are copied, and their gradients added, whole.
            # Those of plain indexing are added in an order that differs from run to run with several threads.
            rows = project(cells).permute(0, 2, 3, 1).flatten(0, 2)
            context = context + F.embedding((image * n_rows + i) * n_columns + j, rows)
        return context
