"""Fusion and classification: a residual MLP over pooled tokens and pooled coarse features (eq. 14-15)."""

from torch import Tensor, nn


def _layer(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False), nn.BatchNorm1d(out_features), nn.ReLU()
    )


class FusionClassifier(nn.Module):
    """Residual MLP with batch norm from the fused features to the logits (eq. 15 in [1]_).

    Parameters
    ----------
    in_features : int
        Length of f = [z_fine ; z_coarse].
    n_classes : int
        Number of classes.
    hidden_dim : int, default=128
        Hidden width. The paper's 512 leaves no room within 0.05 M parameters.
    normalize : bool, default=False
        Whether batch norm comes first, so that features of different origins have one scale. The paper has
        none.

    References
    ----------
    .. [1] Yoshai et al., arXiv 2505.07661 (2025).
    """

    def __init__(
        self, in_features: int, n_classes: int, hidden_dim: int = 128, *, normalize: bool = False
    ) -> None:
        super().__init__()
        # With a larger eps than the default, no rounding error of a feature is magnified much.
        self.norm = nn.BatchNorm1d(in_features, eps=2e-3) if normalize else None
        self.first = _layer(in_features, hidden_dim)
        self.residual = _layer(hidden_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Classify.

        Parameters
        ----------
        features : Tensor of shape (B, in_features)
            f = [z_fine ; z_coarse].

        Returns
        -------
        logits : Tensor of shape (B, n_classes)
            Before the softmax.
        """
        hidden = self.first(features if self.norm is None else self.norm(features))
        return self.out(hidden + self.residual(hidden))
