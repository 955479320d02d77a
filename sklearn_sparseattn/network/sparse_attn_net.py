"""SparseAttnNet: coarse attention, selection, fine attention and fusion, in this order."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branch import TokenBranch, is_compiled
from .coarse import CoarseAttention
from .compiled import has_hooks
from .context import TokenContext
from .fine import FineAttention, PixelEmbedding
from .fusion import FusionClassifier
from .selection import pixel_tokens, select_pixel_set, turns


class SparseAttnOutput(NamedTuple):
    """All that one pass of `SparseAttnNet` gives.

    Attributes
    ----------
    logits : Tensor of shape (B, n_classes)
        Before the softmax.
    features : Tensor of shape (B, D + F)
        f = [z_fine ; z_coarse], eq. 14.
    scores : Tensor of shape (B, H, W)
        Coarse attention before the sigmoid.
    pixels : Tensor of shape (B, k), int64
        Row-major indices of the chosen pixels, ascending.
    attention : Tensor of shape (B, k)
        Fine attention of the chosen pixels, non-negative.
    contribution : Tensor of shape (B, k)
        Signed weights w_j of the chosen pixels in z_fine.
    """

    logits: Tensor
    features: Tensor
    scores: Tensor
    pixels: Tensor
    attention: Tensor
    contribution: Tensor


class SparseAttnNet(nn.Module):
    r"""Look once at everything, choose k pixels, attend to those alone, classify [1]_.

    Parameters
    ----------
    n_channels : int
        Channels of the images, C.
    n_classes : int
        Number of classes.
    k : float
        Pixels to choose; used as ``floor(k + 0.5)``, at least 1 and at most H * W.
    embed_dim : int, default=32
        Length D of a token.
    n_heads : int, default=2
        Heads of the fine attention.
    hidden_dim : int, default=128
        Hidden width of the classifier.
    strides : tuple of three int, default=(2, 2, 2)
        Of the stages of the coarse network, of which there are two with ``variant="context"``.
    normalize_fine : bool, default=True
        Layer norm on z_fine before the fusion: the two halves of f come at the same scale. The paper does
        not mention one.
    variant : {"context", "paper"}, default="context"
        What a token knows, see Notes.
    separable : bool, default=True
        With ``variant="context"``, the form of the convolutions at the chosen pixels, see `TokenContext`. The
        first model files have whole ones.
    spread : float, default=3.0
        With ``variant="context"``, how much the rank of neighbouring pixels differs, see Notes. 0: neighbours
        have almost the same rank, and the chosen pixels are one or two blots, as in the first model files.
    margin : float, default=0.4
        With ``variant="context"``, how far the rank of a pixel must be above those that were not chosen for
        its gate to be all open, see Notes; 0: no matter how far, as in the first model files.
    kernel_size : {3, 5, 7}, default=3
        Side of the first convolution.
    depth : {2, 3}, default=2
        Convolutions before the pixels are scored, see `CoarseAttention`.
    margins : bool, default=False
        The gates of model files of version 2 instead, which nothing else has and only PyTorch computes:
        :math:`\sigma(a_j)\, m_j / (m_j + \bar m)` with :math:`m_j = a_j - \min_i a_i + 10^{-6}`.

    Raises
    ------
    ValueError
        If `variant`, `kernel_size` or `depth` is another, or `spread` or `margin` is not from 0 to 1000.

    Attributes
    ----------
    k : Tensor, float64 scalar on the CPU
        A buffer, so that it is saved and restored with the weights; `DynamicK` moves it.
    form : dict
        The other arguments it was made with.
    compiled : bool
        Whether compiled code may stand in for `hidden_tokens` and `fine`; False if one of them is changed. It
        does so where `is_compiled` says it can.
        It does not where layers have hooks.

    Notes
    -----
    In the paper a token knows the position and the values of its pixel j,
    :math:`E_j = W_2\, \mathrm{relu}(W_1 (x, y, v)_j + b_1) + b_2`, and deep coarse features, pooled over the
    whole image, go straight to the answer: that can do without the tokens, and does. With
    ``variant="context"`` the coarse network ends after two stages, the second is pooled, and the next
    convolution is made where pixels were chosen, nowhere else. With :math:`(U_s * c_s)_j` a 3x3 convolution
    of the features of stage s at the cell of pixel j, and :math:`g_j` the pixel's gate,

    .. math::
        E_j = W_2 \left[g_j\, \mathrm{relu}\Big(W_1 (x, y, v)_j + b_1
        + \textstyle\sum_s (U_s * c_s)_j\Big)\right] + b_2 .

    Scores are smooth. So that what is chosen covers what matters, and not all pixels of a few cells of the
    maps, pixels are chosen by rank: with :math:`a_j` the pixel's score and :math:`t_j` from 0 up to less than
    1, by the pixel's place over the cell in the order of a Bayer matrix, as in dithering,
    :math:`r_j = a_j - \mathrm{spread}\; t_j`. With r' the highest rank that was not chosen,

    .. math::
        g_j = \sigma(a_j)\, \min\Big(1, \frac{r_j - r'}{\mathrm{margin}}\Big) .

    The first factor lets the loss of the answer teach the scores, where in the paper the distillation alone
    does. The second, without gradient, makes the answer a continuous function of the image: a pixel that has
    only just been chosen has no weight yet, and it does not matter which of two equal ones was.

    Hooks are called on the layers, but not on `coarse`, `embedding` and `fine`, of which other methods than
    `forward` are called, nor on ``embedding.out`` and the convolutions of `context`, whose weights are folded
    or used by themselves.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.network import SparseAttnNet
    >>> net = SparseAttnNet(n_channels=1, n_classes=3, k=50).eval()
    >>> out = net(torch.rand(4, 1, 20, 30))
    >>> out.logits.shape, out.pixels.shape
    (torch.Size([4, 3]), torch.Size([4, 50]))
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
        normalize_fine: bool = True,
        variant: str = "context",
        separable: bool = True,
        spread: float = 3.0,
        margin: float = 0.4,
        kernel_size: int = 3,
        depth: int = 2,
        margins: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("context", "paper"):
            raise ValueError(f"variant={variant!r} must be 'context' or 'paper'.")
        for name, value in (("spread", spread), ("margin", margin)):
            if not 0 <= value <= 1000:
                raise ValueError(f"{name}={value!r} must be a number from 0 to 1000.")
        self.form: dict[str, Any] = {
            "n_channels": n_channels,
            "n_classes": n_classes,
            "embed_dim": embed_dim,
            "n_heads": n_heads,
            "hidden_dim": hidden_dim,
            "strides": strides,
            "normalize_fine": normalize_fine,
            "variant": variant,
            "separable": separable,
            "spread": spread,
            "margin": margin,
            "kernel_size": kernel_size,
            "depth": depth,
            "margins": margins,
        }
        self.compiled = True
        channels = (8, 16) if variant == "context" else (8, 16, 24)
        self.coarse = CoarseAttention(n_channels, channels, strides, kernel_size, depth)
        self.context = None
        if variant == "context":
            self.context = TokenContext(channels, self.coarse.steps, embed_dim, separable)
        self.embedding = PixelEmbedding(n_channels, embed_dim)
        self.fine = FineAttention(embed_dim, n_heads)
        self.fine_norm = nn.LayerNorm(embed_dim) if normalize_fine else nn.Identity()
        self.fusion = FusionClassifier(embed_dim + self.coarse.n_features, n_classes, hidden_dim)
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
        pixels = self.choose(images, scores)
        z_fine, attention, contribution = self.attend(images, pixels, scores, maps)
        features = torch.cat([self.fine_norm(z_fine), z_coarse], dim=1)
        return SparseAttnOutput(self.fusion(features), features, scores, pixels, attention, contribution)

    def choose(self, images: Tensor, scores: Tensor) -> Tensor:
        """Choose the pixels that go on.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            Not looked at: for controls that choose otherwise.
        scores : Tensor of shape (B, H, W)
            Coarse attention before the sigmoid.

        Returns
        -------
        pixels : Tensor of shape (B, k), int64
            The k of the highest rank, ascending.
        """
        return select_pixel_set(self.ranks(scores), self.n_chosen(scores.shape[1:].numel()))

    def ranks(self, scores: Tensor) -> Tensor:
        """By what pixels are chosen.

        Parameters
        ----------
        scores : Tensor of shape (B, H, W)
            Coarse attention before the sigmoid.

        Returns
        -------
        Tensor of shape (B, H, W)
            The scores themselves, or spread, see Notes.
        """
        if self.context is None or self.form["spread"] == 0:
            return scores
        step, (height, width) = self.context.steps[1], scores.shape[1:]
        tile = torch.from_numpy(self.form["spread"] * turns(step)).to(scores)
        return scores - tile.repeat(-(-height // step), -(-width // step))[:height, :width]

    def attend(
        self, images: Tensor, pixels: Tensor, scores: Tensor, maps: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make the tokens of the chosen pixels, and pool them.

        In compiled code where that can be; then attention and contribution have no gradients.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            The images.
        pixels : Tensor of shape (B, k), int64
            The chosen pixels.
        scores : Tensor of shape (B, H, W)
            Coarse attention before the sigmoid.
        maps : tuple of Tensor
            Coarse features, see `CoarseLook`.

        Returns
        -------
        z_fine, attention, contribution : Tensor
            As from `FineAttention.attend`.
        """
        fine, out, context = self.fine, self.embedding.out, self.context
        if context is None or not self.is_compiled(images) or maps[0].dtype != torch.float32:
            return fine.attend(self.hidden_tokens(images, pixels, scores, maps), out)
        first = self.embedding.first
        gates = self.gates(scores, pixels)
        weights = (*context.parameters(), first.weight, first.bias, *fine.fold(out))
        *sums, attention, contribution = TokenBranch.apply(
            images, pixels, context.steps, gates, *maps, *weights
        )
        pooled, weight, cls_weight = sums
        return fine.finish(pooled, weight, cls_weight, out), attention, contribution

    def is_compiled(self, images: Tensor) -> bool:
        """Whether compiled code makes the tokens of these images and pools them.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            The images.

        Returns
        -------
        bool
            If not, PyTorch does it.
        """
        context, first, key = self.context, self.embedding.first, self.fine.key.weight
        if context is None or not (self.compiled and context.separable and len(images) > 0):
            return False
        channels = [len(depthwise) for depthwise in list(context.parameters())[::2]]
        is_here = key.device.type == "cpu" and not has_hooks(context, first)
        return is_here and is_compiled(images, channels, *key.shape[::-1])

    def hidden_tokens(
        self, images: Tensor, pixels: Tensor, scores: Tensor, maps: tuple[Tensor, ...]
    ) -> Tensor:
        """Make the tokens, but for the last linear layer of the embedding.

        Parameters
        ----------
        images : Tensor of shape (B, C, H, W)
            The images.
        pixels : Tensor of shape (B, k), int64
            The chosen pixels.
        scores : Tensor of shape (B, H, W)
            Coarse attention before the sigmoid.
        maps : tuple of Tensor
            Coarse features, see `CoarseLook`.

        Returns
        -------
        hidden : Tensor of shape (B, k, D)
            The bracket in Notes.
        """
        tokens = pixel_tokens(images, pixels)
        if self.context is None:
            return self.embedding.hidden(tokens)
        gates = self.gates(scores, pixels)
        context = self.context(maps, pixels, images.shape[-1])
        return self.embedding.hidden(tokens, context) * gates.unsqueeze(-1)

    def gates(self, scores: Tensor, pixels: Tensor) -> Tensor:
        """Factors of the tokens.

        Parameters
        ----------
        scores : Tensor of shape (B, H, W)
            Coarse attention before the sigmoid.
        pixels : Tensor of shape (B, k), int64
            The chosen pixels.

        Returns
        -------
        Tensor of shape (B, k)
            From 0 to 1, see Notes.
        """
        chosen, margin = scores.flatten(1).gather(1, pixels), self.form["margin"]
        gates = chosen.sigmoid()
        if self.form["margins"]:
            above = chosen - chosen.amin(1, keepdim=True) + 1e-6
            return gates * above / (above + above.mean(1, keepdim=True))
        ranks = self.ranks(scores.detach()).flatten(1)
        if margin == 0 or pixels.shape[1] == ranks.shape[1]:
            return gates
        others = ranks.scatter(1, pixels, -torch.inf).amax(1, keepdim=True)
        return gates * ((ranks.gather(1, pixels) - others) / margin).clamp(0, 1)

    def n_chosen(self, n_pixels: int) -> int:
        """Pixels chosen of an image that has `n_pixels`.

        Parameters
        ----------
        n_pixels : int
            H * W.

        Returns
        -------
        int
            ``floor(k + 0.5)`` within [1, n_pixels].
        """
        return min(max(math.floor(self.k.item() + 0.5), 1), n_pixels)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, leaving k as it is.

        Parameters
        ----------
        generator : torch.Generator, default=None
            Source of the numbers; None is PyTorch's global one.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight,
                    nonlinearity="relu" if module.groups == 1 else "linear",
                    generator=generator,
                )
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
