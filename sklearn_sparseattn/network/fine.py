"""Fine attention: tokens of the chosen pixels, pooled by a CLS token at a cost linear in k (eq. 4-13)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PixelEmbedding(nn.Module):
    """One shared network over the joint (x, y, v) of a pixel (eq. 4 in [1]_).

    Parameters
    ----------
    n_channels : int, default=1
        Channels of the image, C; a pixel has 2 + C numbers.
    embed_dim : int, default=32
        Length D of a token.

    References
    ----------
    .. [1] Yoshai et al., arXiv 2505.07661 (2025).
    """

    def __init__(self, n_channels: int = 1, embed_dim: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(2 + n_channels, embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def hidden(self, pixels: Tensor) -> Tensor:
        """Compute the hidden layer, all but the last linear one.

        Parameters
        ----------
        pixels : Tensor of shape (B, k, 2 + C)
            Position and values.

        Returns
        -------
        hidden : Tensor of shape (B, k, D)
            Non-negative.
        """
        return F.relu(self.first(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed each pixel by itself.

        Parameters
        ----------
        pixels : Tensor of shape (B, k, 2 + C)
            Position and values.

        Returns
        -------
        tokens : Tensor of shape (B, k, D)
            One token a pixel.
        """
        return self.out(self.hidden(pixels))


class FineAttention(nn.Module):
    r"""Linear-cost multi-head attention, read out by a CLS token (eq. 5-13 in [1]_).

    With E = [tokens ; cls] of k + 1 rows, and for every head h,

    .. math::
        K^+ = \mathrm{relu}(E W_k^h) + \epsilon, \quad
        A^h = K^+ / \textstyle\sum_{rows} K^+, \quad
        C^h = (A^h)^T (E W_v), \quad
        z = \mathrm{mean}_h\, (cls\, W_q^h)\, C^h.

    Parameters
    ----------
    embed_dim : int, default=32
        Length D of a token.
    n_heads : int, default=2
        Heads, at most `embed_dim`; each has ``embed_dim // n_heads`` columns.
    epsilon : float, default=1e-6
        Added to the keys, > 0. In a column whose keys are as small as this, rounding decides the shares.

    Raises
    ------
    ValueError
        If `n_heads` lies outside [1, embed_dim].

    Notes
    -----
    Everything is linear in the values, so with :math:`w_j = \mathrm{mean}_h A^h_j \cdot (cls\, W_q^h)` the
    same result is :math:`z = (\sum_j w_j E_j) W_v`: no C, no value per token, O(k D) beside the keys.

    References
    ----------
    .. [1] Yoshai et al., arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.network import FineAttention
    >>> z_fine, attention = FineAttention(32, 2)(torch.randn(4, 100, 32))
    >>> z_fine.shape, attention.shape
    (torch.Size([4, 32]), torch.Size([4, 100]))
    """

    def __init__(self, embed_dim: int = 32, n_heads: int = 2, epsilon: float = 1e-6) -> None:
        super().__init__()
        if not 1 <= n_heads <= embed_dim:
            raise ValueError(
                f"n_heads={n_heads} does not fit embed_dim={embed_dim}: 1 <= n_heads <= embed_dim."
            )
        self.n_heads = n_heads
        self.epsilon = epsilon
        width = n_heads * (embed_dim // n_heads)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.query = nn.Linear(embed_dim, width, bias=False)
        self.key = nn.Linear(embed_dim, width, bias=False)
        self.value = nn.Linear(embed_dim, embed_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the CLS token anew.

        Parameters
        ----------
        generator : torch.Generator, default=None
            Source of the numbers; None is PyTorch's global one.
        """
        nn.init.normal_(self.cls_token, generator=generator)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pool the tokens.

        Parameters
        ----------
        tokens : Tensor of shape (B, k, D)
            The pixels' tokens, in any order.

        Returns
        -------
        z_fine : Tensor of shape (B, D)
            The pooled tokens.
        attention : Tensor of shape (B, k)
            A^h averaged over heads and columns: non-negative, its sum below 1 by the share of the CLS token.
        """
        z_fine, attention, _ = self.attend(tokens)
        return z_fine, attention

    def attend(
        self, tokens: Tensor, projection: nn.Linear | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pool the tokens, and say with what signed weight each entered.

        Parameters
        ----------
        tokens : Tensor of shape (B, k, D)
            The pixels' tokens, or what `projection` would turn into them.
        projection : nn.Linear, default=None
            The last linear layer of the embedding. It is folded into the keys and applied once to the pooled
            tokens instead of to each.
        kept : Tensor of shape (B, k), bool, default=None
            Which tokens there are; None is all.

        Returns
        -------
        z_fine : Tensor of shape (B, D)
            The pooled tokens.
        attention : Tensor of shape (B, k)
            A^h averaged over heads and columns.
        contribution : Tensor of shape (B, k)
            The signed weights w_j.
        """
        weight, bias, query, cls_key = self.fold(projection)
        # Without eps, which enters every sum below in closed form instead of in a pass over all tokens.
        key = F.relu(F.linear(tokens, weight, bias))
        n: Any = tokens.shape[1]
        if kept is not None:
            key, n = key * kept.unsqueeze(-1), kept.to(key.dtype).sum(1, keepdim=True)
        total = key.sum(1) + (n * self.epsilon + cls_key)

        readout = torch.stack([query.expand_as(total), torch.full_like(total, 1 / total.shape[1])], dim=-1)
        readout = readout / total.unsqueeze(-1)
        weights = key @ readout + self.epsilon * readout.sum(1, keepdim=True)
        if kept is not None:
            weights = weights * kept.unsqueeze(-1)
        contribution, attention = weights.unbind(-1)
        cls_weight = (cls_key * readout[..., 0]).sum(1, keepdim=True)

        pooled = (contribution.unsqueeze(1) @ tokens).squeeze(1)
        z_fine = self.finish(pooled, contribution.sum(1, keepdim=True), cls_weight, projection)
        return z_fine, attention, contribution

    def fold(self, projection: nn.Linear | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Join the weights before and in the keys, and what does not depend on the tokens.

        Parameters
        ----------
        projection : nn.Linear or None
            As in `attend`.

        Returns
        -------
        weight : Tensor of shape (width, D)
            From tokens to keys.
        bias : Tensor of shape (width,) or None
            Added to the keys.
        query : Tensor of shape (1, width)
            Of the CLS token, divided by the number of heads.
        cls_key : Tensor of shape (1, width)
            K+ of the CLS token.
        """
        cls = self.cls_token[0]
        weight, bias = self.key.weight, None
        if projection is not None:
            weight, bias = weight @ projection.weight, weight @ projection.bias
        return weight, bias, self.query(cls) / self.n_heads, F.relu(self.key(cls)) + self.epsilon

    def finish(
        self, pooled: Tensor, weight: Tensor, cls_weight: Tensor, projection: nn.Linear | None
    ) -> Tensor:
        """Make z_fine of the pooled tokens.

        Parameters
        ----------
        pooled : Tensor of shape (B, D)
            Sum of the tokens by their signed weights w_j.
        weight, cls_weight : Tensor of shape (B, 1)
            Sum of w_j over the tokens, and that of the CLS token.
        projection : nn.Linear or None
            As in `attend`.

        Returns
        -------
        z_fine : Tensor of shape (B, D)
            (sum_j w_j E_j) W_v.
        """
        if projection is not None:
            pooled = F.linear(pooled, projection.weight) + weight * projection.bias
        return self.value(pooled + cls_weight * self.cls_token[0])
