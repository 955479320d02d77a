"""Tokens of the chosen tiles, and sparse convolutions between them. Nothing is computed elsewhere.

A tile is a cell of the middle map with the pixels over it. Tiles are numbered in raster order.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TileTokens(nn.Module):
    r"""Make a token of each chosen tile, then let neighbouring chosen tiles see each other.

    Parameters
    ----------
    channels : tuple of (int, int)
        Of the early and the middle map.
    stride : int
        Early cells along the side of a tile.
    embed_dim : int, default=32
        Length D of a token.
    n_layers : int, default=2
        Sparse 3x3 convolutions between tokens.

    Notes
    -----
    With :math:`u_j` what is known of tile j and :math:`g_j` its gate, a token begins as

    .. math:: T_j = g_j\, \mathrm{relu}(\mathrm{BN}(W u_j)),
       \qquad u_j = [x_j, y_j ; 3 \times 3\ \text{middle cells} ; \text{early cells under the tile}] .

    Each layer adds a 3x3 convolution between the chosen tiles, for which those not chosen are zero:

    .. math::
        T_j \leftarrow T_j + g_j\, \mathrm{relu}\big(\mathrm{BN}(\textstyle\sum_{i \in N(j)} W_{i-j} T_i)\big)

    So tokens are non-negative, and one whose gate is closed is zero: it does not matter of which tile. The
    fine attention reads :math:`E_j = W_2 T_j + b_2`, by the linear layer `out`, which it folds into its own.

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.network import TileTokens
    >>> early, middle = torch.rand(2, 8, 16, 16), torch.rand(2, 16, 8, 8)
    >>> tiles = torch.tensor([[3, 10, 11], [0, 1, 9]])
    >>> TileTokens((8, 16), stride=2)(early, middle, tiles, gates=torch.ones(2, 3)).shape
    torch.Size([2, 3, 32])
    """

    def __init__(
        self, channels: tuple[int, int], stride: int, embed_dim: int = 32, n_layers: int = 2
    ) -> None:
        super().__init__()
        self.stride = stride
        n_known = 2 + 9 * channels[1] + stride**2 * channels[0]
        self.first = nn.Linear(n_known, embed_dim, bias=False)
        self.layers = nn.ModuleList(nn.Linear(9 * embed_dim, embed_dim, bias=False) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(embed_dim) for _ in range(n_layers + 1))
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, early: Tensor, middle: Tensor, tiles: Tensor, gates: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Make the tokens.

        Parameters
        ----------
        early, middle : Tensor of shape (B, channels, rows, columns)
            Maps of the coarse network.
        tiles : Tensor of shape (B, n), int64
            The chosen tiles of each image, each once, in any order.
        gates : Tensor of shape (B, n)
            Factors of the tokens, in [0, 1].
        kept : Tensor of shape (B, n), bool, default=None
            Which of the tiles count; nothing is computed of the others. None is all.

        Returns
        -------
        tokens : Tensor of shape (B, n, D)
            Non-negative; 0 for tiles not kept.
        """
        n_images, n = tiles.shape
        height, width = middle.shape[-2:]
        # All tokens of all images in one list.
        image = torch.arange(n_images, device=tiles.device).unsqueeze(1).expand_as(tiles)
        place = None if kept is None else kept.flatten().nonzero().squeeze(1)
        image, tile, gates = (
            part.flatten() if place is None else part.flatten()[place] for part in (image, tiles, gates)
        )
        row, column = tile // width, tile % width
        gates = gates.unsqueeze(-1)
        # In tables with the cells of all images, the middle ones with a border.
        around = _window(row + image * (height + 2), column, 3, 1, width + 2)
        under = _window(row + image * height, column, self.stride, self.stride, width * self.stride)
        # Converted first: integers divided would be float32.
        x, y = ((2 * at + 1).to(middle.dtype) / n - 1 for at, n in ((column, width), (row, height)))
        missing = [
            self.stride * n - size for n, size in zip((width, height), early.shape[:1:-1], strict=False)
        ]
        early = F.pad(early, (0, missing[0], 0, missing[1])) if any(missing) else early
        known = [
            torch.stack([x, y], dim=-1),
            _rows(_as_table(F.pad(middle, (1, 1, 1, 1))), around),
            _rows(_as_table(early), under),
        ]
        first, *norms = self.norms
        tokens = F.relu(first(self.first(torch.cat(known, dim=-1)))) * gates
        # Place in the table of tokens, whose row 0 is zero: that of the tiles that were not chosen.
        slots = around.new_zeros(n_images * (height + 2) * (width + 2))
        slots[around[:, 4]] = torch.arange(1, len(tokens) + 1, device=tiles.device)
        near = slots[around]
        for layer, norm in zip(self.layers, norms, strict=True):
            seen = layer(_rows(F.pad(tokens, (0, 0, 1, 0)), near))
            tokens = tokens + F.relu(norm(seen)) * gates
        if place is not None:
            tokens = tokens.new_zeros(n_images * n, tokens.shape[1]).index_copy(0, place, tokens)
        return tokens.view(n_images, n, tokens.shape[1])


def _window(row: Tensor, column: Tensor, size: int, step: int, width: int) -> Tensor:
    """Raster indices (M, size**2), in a map of `width` columns, of windows that begin at cell * step."""
    offset = torch.arange(size, device=row.device)
    rows, columns = (step * at.unsqueeze(-1) + offset for at in (row, column))
    return (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).flatten(1)


def _as_table(maps: Tensor) -> Tensor:
    """(B, channels, rows, columns) -> (B * cells, channels)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table (N, channels) at (M, m) -> (M, m * channels)."""
    # By one index for all channels: PyTorch has a quick way for this, forwards and backwards.
    found = table.gather(0, index.view(-1, 1).expand(-1, table.shape[1]))
    return found.view(len(index), index.shape[1] * table.shape[1])
