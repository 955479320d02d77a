"""SparseAttnNet: coarse attention, selection, fine attention and fusion, in this order."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .coarse import CoarseAttention
from .fine import FineAttention, PixelEmbedding
from .fusion import FusionClassifier
from .selection import openness, pixel_tokens, select_pixels
from .tiles import TileTokens

EPSILON = 1e-3  # of the keys of tiles: with the paper's 1e-6 float32 is not enough where a column has died
# Channels of the stages, side of the first kernel, sparse layers between tiles.
SIZES: dict[str, dict[str, Any]] = {
    "default": {"channels": (8, 16), "kernel_size": 3, "n_layers": 2},
    "large": {"channels": (16, 32), "kernel_size": 5, "n_layers": 3},
}


class SparseAttnOutput(NamedTuple):
    """All that one pass of `SparseAttnNet` gives.

    Attributes
    ----------
    logits : Tensor of shape (B, n_classes)
        Before the softmax.
    features : Tensor of shape (B, n_features)
        What the classifier is given: f of eq. 14.
    scores : Tensor of shape (B, rows, columns)
        Coarse attention of the tiles before the sigmoid.
    tiles : Tensor of shape (B, n), int64
        Row-major indices of the chosen tiles, best first.
    attention : Tensor of shape (B, n)
        Fine attention of the chosen tiles, positive; 0 beyond those of an image that has a k of its own.
    contribution : Tensor of shape (B, n)
        Signed weights w_j of the chosen tiles in z_fine.
    """

    logits: Tensor
    features: Tensor
    scores: Tensor
    tiles: Tensor
    attention: Tensor
    contribution: Tensor


class SparseAttnNet(nn.Module):
    r"""Look once at everything, choose tiles, attend to those alone, classify [1]_.

    Parameters
    ----------
    n_channels : int
        Channels of the images, C.
    n_classes : int
        Number of classes.
    k : float
        Pixels to choose, see `n_chosen`.
    embed_dim : int, default=32
        Length D of a token.
    n_heads : int, default=2
        Heads of the fine attention.
    hidden_dim : int, default=128
        Hidden width of the classifier.
    strides : tuple of three int, default=(2, 2, 2)
        Of the stages of the coarse network, of which there are two with ``variant="tiles"``.
    variant : {"tiles", "paper"}, default="tiles"
        What a token is, see Notes.
    size : {"default", "large"}, default="default"
        Channels, first kernel and number of sparse layers with ``variant="tiles"``, see `SIZES`.

    Raises
    ------
    ValueError
        If `variant` or `size` is another, or ``size="large"`` is asked of the paper's form.

    Attributes
    ----------
    k : Tensor, float64 scalar on the CPU
        A buffer, so that it is saved and restored with the weights; `DynamicK` moves it.
    k_by_image : Tensor of shape (B,) or None
        Pixels to choose of each image of a batch, in place of k, for training: `DynamicK` draws them.
    form : dict
        The other arguments it was made with.
    tile : int
        Pixels along the side of a tile; 1 in the paper's form, where a tile is a pixel.

    Notes
    -----
    In the paper a token knows the position and the values of its pixel j,
    :math:`E_j = W_2\, \mathrm{relu}(W_1 (x, y, v)_j + b_1) + b_2`, the coarse network has a third stage,
    which is pooled over the whole image, and f = [z_fine ; z_coarse].

    With ``variant="tiles"`` a tile is a cell of the second stage with the pixels over it. Its token knows the
    features around it, and the deeper convolutions run between chosen tiles alone: see `TileTokens`. With
    :math:`a_j` the score of tile j and :math:`o_j` the `openness` of its choice, the gate is

    .. math:: g_j = \sigma(a_j)\, o_j .

    By its first factor the loss of the answer teaches the scores, where in the paper the distillation alone
    does. The second makes the answer a continuous function of the image. Then
    f = [z_fine ; maximum of the tokens ; z_coarse], with z_coarse pooled from the second stage; batch norm
    brings these features to one scale before the classifier. The epsilon
    of the keys is 1e-3, so that answers do not depend on rounding where all keys of a column are about 0.

    Hooks are called on the layers, but not on ``embedding.out`` and ``tokens.out``, whose weights are folded,
    nor on `coarse`, `embedding` and `fine`, of which other methods than `forward` are called.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.network import SparseAttnNet
    >>> net = SparseAttnNet(n_channels=1, n_classes=3, k=64).eval()
    >>> out = net(torch.rand(4, 1, 20, 30))
    >>> out.logits.shape, out.tiles.shape
    (torch.Size([4, 3]), torch.Size([4, 4]))
    """

    k: Tensor

    def __init__(
        self,
        n_channels: int,
        n_classes: int,
        k: float,
        *,
        embed_dim: int = 32,
        n_heads: int = 2,
        hidden_dim: int = 128,
        strides: tuple[int, int, int] = (2, 2, 2),
        variant: str = "tiles",
        size: str = "default",
    ) -> None:
        super().__init__()
        if variant not in ("tiles", "paper"):
            raise ValueError(f"variant={variant!r} must be 'tiles' or 'paper'.")
        if size not in SIZES:
            raise ValueError(f"size={size!r} must be 'default' or 'large'.")
        if variant == "paper" and size != "default":
            raise ValueError(f"size={size!r} has no effect with variant='paper': leave it at 'default'.")
        self.form: dict[str, Any] = {
            "n_channels": n_channels,
            "n_classes": n_classes,
            "embed_dim": embed_dim,
            "n_heads": n_heads,
            "hidden_dim": hidden_dim,
            "strides": strides,
            "variant": variant,
            "size": size,
        }
        self.fine = FineAttention(embed_dim, n_heads, 1e-6 if variant == "paper" else EPSILON)
        self.fine_norm = nn.LayerNorm(embed_dim)
        self.embedding = self.tokens = None
        if variant == "paper":
            self.tile, n_fine = 1, embed_dim
            self.coarse = CoarseAttention(n_channels, (8, 16, 24), strides)
            self.embedding = PixelEmbedding(n_channels, embed_dim)
        else:
            own = SIZES[size]
            self.coarse = CoarseAttention(
                n_channels, own["channels"], strides, own["kernel_size"], interpolate=False
            )
            self.tile, n_fine = self.coarse.steps[1], 2 * embed_dim
            self.tokens = TileTokens(own["channels"], strides[1], embed_dim, own["n_layers"])
        self.fusion = FusionClassifier(
            n_fine + self.coarse.n_features, n_classes, hidden_dim, normalize=variant != "paper"
        )
        self.k_by_image: Tensor | None = None
        self.register_buffer("k", torch.tensor(float(k), dtype=torch.float64, device="cpu"))

    def forward(self, images: Tensor) -> SparseAttnOutput:
        """Classify images.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            Images scaled to about [0, 1].

        Returns
        -------
        SparseAttnOutput
            Logits, features, and where they came from.
        """
        scores, z_coarse, maps = self.coarse.look(images)
        tiles = self.choose(images, scores)
        kept = self.kept(tiles, *images.shape[2:])
        if self.embedding is not None:
            hidden = self.embedding.hidden(pixel_tokens(images, tiles))
            z_fine, attention, contribution = self.fine.attend(hidden, self.embedding.out, kept)
            pooled = [z_coarse]
        else:
            assert self.tokens is not None  # one of the two variants
            tokens = self.tile_tokens(scores, maps, tiles, kept)
            z_fine, attention, contribution = self.fine.attend(tokens, self.tokens.out, kept)
            pooled = [tokens.amax(1), z_coarse]
        features = torch.cat([self.fine_norm(z_fine), *pooled], dim=1)
        return SparseAttnOutput(self.fusion(features), features, scores, tiles, attention, contribution)

    def choose(self, images: Tensor, scores: Tensor) -> Tensor:
        """Choose the tiles that go on.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            Of which only the size counts, but for controls that choose otherwise.
        scores : Tensor of shape (B, rows, columns)
            Coarse attention before the sigmoid.

        Returns
        -------
        tiles : Tensor of shape (B, n), int64
            Those of the highest scores, best first.
        """
        return select_pixels(scores, self.n_chosen(*images.shape[2:]))

    def kept(self, tiles: Tensor, height: int, width: int) -> Tensor | None:
        """Tell which tiles count, where each image has its own k.

        Parameters
        ----------
        tiles : Tensor of shape (B, n), int64
            Those chosen, as many as the image with the most has.
        height, width : int
            Of the images, in pixels.

        Returns
        -------
        kept : Tensor of shape (B, n), bool, or None
            The first ones of each image; None if all count.
        """
        if self.k_by_image is None:
            return None
        n = (self.k_by_image.to(tiles.device) / self.tile_area(height, width) + 0.5).floor()
        n = n.clamp(1, math.prod(self.grid_of(height, width)))
        return torch.arange(tiles.shape[1], device=tiles.device) < n.unsqueeze(1)

    def tile_tokens(
        self, scores: Tensor, maps: tuple[Tensor, ...], tiles: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Make the tokens of the chosen tiles.

        Parameters
        ----------
        scores : Tensor of shape (B, rows, columns)
            Coarse attention before the sigmoid.
        maps : tuple of Tensor
            Coarse features, see `CoarseLook`.
        tiles : Tensor of shape (B, n), int64
            The chosen tiles.
        kept : Tensor of shape (B, n), bool, default=None
            Which of them count; None is all.

        Returns
        -------
        tokens : Tensor of shape (B, n, D)
            Non-negative; 0 for tiles not kept.
        """
        assert self.tokens is not None  # the paper's form has other tokens
        flat = scores.flatten(1)
        gates = flat.gather(1, tiles).sigmoid() * self.openness(flat, tiles, kept)
        return self.tokens(*maps, tiles, gates, kept)

    def openness(self, scores: Tensor, tiles: Tensor, kept: Tensor | None = None) -> Tensor:
        """How far the choice of each tile is above those that were not chosen.

        Parameters
        ----------
        scores : Tensor of shape (B, N)
            Of all tiles.
        tiles : Tensor of shape (B, n), int64
            The chosen ones.
        kept : Tensor of shape (B, n), bool, default=None
            Which of them count; None is all.

        Returns
        -------
        Tensor of shape (B, n)
            See `selection.openness`; controls that choose otherwise replace it.
        """
        return openness(scores, tiles, kept)

    def n_chosen(self, height: int, width: int, k: float | None = None) -> int:
        """Count the tiles chosen of an image.

        Parameters
        ----------
        height, width : int
            Of the image, in pixels.
        k : float, default=None
            Pixels to choose; None takes the network's own.

        Returns
        -------
        int
            k divided by `tile_area` and rounded, half up, at least 1 and at most all.
        """
        if k is None:
            k = self.k.item() if self.k_by_image is None else self.k_by_image.max().item()
        n_tiles = math.prod(self.grid_of(height, width))
        return min(max(math.floor(k / self.tile_area(height, width) + 0.5), 1), n_tiles)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Count the rows and columns of tiles of an image.

        Parameters
        ----------
        height, width : int
            Of the image, in pixels.

        Returns
        -------
        tuple of (int, int)
            Tiles at the right and lower border may have fewer pixels.
        """
        return -(-height // self.tile), -(-width // self.tile)

    def tile_area(self, height: int, width: int) -> int:
        """Count the pixels of a whole tile of an image.

        Parameters
        ----------
        height, width : int
            Of the image, in pixels.

        Returns
        -------
        int
            ``tile**2``, less where a side of the image is shorter than a tile.
        """
        return min(self.tile, height) * min(self.tile, width)

    def area_of(self, height: int, width: int) -> int:
        """Count the pixels of all tiles of an image, as if those at the border were whole.

        Parameters
        ----------
        height, width : int
            Of the image, in pixels.

        Returns
        -------
        int
            The k with which all tiles are chosen.
        """
        return math.prod(self.grid_of(height, width)) * self.tile_area(height, width)

    def k_of(self, height: int, width: int) -> int:
        """Count the pixels chosen of an image.

        Parameters
        ----------
        height, width : int
            Of the image, in pixels.

        Returns
        -------
        int
            Those of the chosen tiles, as if each were whole; at most all.
        """
        return min(self.n_chosen(height, width) * self.tile_area(height, width), height * width)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, leaving k as it is.

        Parameters
        ----------
        generator : torch.Generator, default=None
            Source of the numbers; None is PyTorch's global one.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                _reset_linear(module, generator)
            elif isinstance(module, FineAttention):
                module.reset_parameters(generator)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()  # ones and zeros: nothing is drawn

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseAttnNet":
        # k steers Python code, not tensors: moved to a device, every pass would wait for it, and
        # half precision could not hold it.
        k = self.k
        super()._apply(fn, recurse)
        self._buffers["k"] = k
        return self


def _reset_linear(layer: nn.Linear, generator: torch.Generator | None) -> None:
    """PyTorch's own default for a linear layer, from a given generator."""
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if layer.bias is not None:
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
