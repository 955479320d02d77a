"""The terms of the training loss: focal, contrastive, distillation and, with two views, consistency.

Plain functions of tensors, for float32 and float64 on any device. None of them waits for the
device: no value of a tensor decides a branch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Cross entropy that looks less at what is already right, eq. 16 of [1]_.

    Parameters
    ----------
    logits : Tensor of shape (B, n_classes), float32 or float64
        Class scores before the softmax, finite.
    target : Tensor of shape (B,), int64
        Class of each row, in [0, n_classes).
    gamma : float, default=2.0
        Focus, >= 0. 0 is cross entropy.
    class_weight : Tensor of shape (n_classes,), default=None
        alpha, >= 0, of the dtype and on the device of `logits`. None is 1 for every class.
    sample_weight : Tensor of shape (B,), default=None
        w, >= 0, of the dtype and on the device of `logits`. None is 1 for every row.

    Returns
    -------
    loss : Tensor, scalar
        >= 0, and 0 with a gradient of 0 if all sample weights are 0.

    Notes
    -----
    With p_y the softmax probability of the target y, the loss is

    .. math:: \sum_i w_i \alpha_{y_i} (1 - p_{y_i})^\gamma (-\log p_{y_i}) / \sum_i w_i .

    [1]_ prints a sum over the batch; a mean keeps the learning rate free of the batch size.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.training import focal_loss
    >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    >>> focal_loss(logits, target).item() < focal_loss(logits, target, gamma=0.0).item()
    True
    """
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    # 1 - p without cancellation. At p = 1 the power's slope is infinite for gamma < 1; times the
    # cross entropy, 0 there, it would be NaN. From `tiny` on it is finite, and the product is 0.
    tiny = torch.finfo(logits.dtype).tiny
    miss = (-torch.expm1(-cross_entropy)).clamp(min=tiny)
    loss = miss.pow(gamma) * cross_entropy
    if class_weight is not None:
        loss = loss * class_weight[target]
    if sample_weight is None:
        return loss.mean()
    total = sample_weight.sum()
    return torch.dot(sample_weight, loss) / torch.where(total > 0, total, 1.0)


def contrastive_loss(
    features: Tensor, target: Tensor, *, temperature: float = 0.07, sample_weight: Tensor | None = None
) -> Tensor:
    r"""Supervised contrastive loss: features of one class together, the rest apart, eq. 17 of [1]_.

    Parameters
    ----------
    features : Tensor of shape (B, F), float32 or float64
        One vector a row, finite, of any length; a vector of zeros is similar to nothing.
    target : Tensor of shape (B,), int64
        Class of each row.
    temperature : float, default=0.07
        tau, > 0.
    sample_weight : Tensor of shape (B,), default=None
        w, >= 0, of the dtype and on the device of `features`. None is 1 for every row.

    Returns
    -------
    loss : Tensor, scalar
        >= 0. Exactly 0 with a gradient of exactly 0 if no two rows share a class.

    Notes
    -----
    L_out of [2]_: with z the features at unit length, P(i) the other rows of the class of row i,
    and I the rows for which P(i) is not empty,

    .. math::
       \frac{1}{|I|} \sum_{i \in I} \frac{-w_i}{|P(i)|} \sum_{p \in P(i)}
       \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \ne i} \exp(z_i \cdot z_a / \tau)} .

    [1]_ prints the denominator with a = i in it; [2]_, which it cites, leaves it out, as here.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).
    .. [2] Khosla et al., "Supervised Contrastive Learning", NeurIPS (2020), arXiv 2004.11362.

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.training import contrastive_loss
    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> together = contrastive_loss(features, torch.tensor([0, 0, 1, 1]))
    >>> together.item() < contrastive_loss(features, torch.tensor([0, 1, 0, 1])).item()
    True
    """
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    # 1 for a zero vector: a small epsilon there would make its gradient enormous.
    z = features / torch.where(norm > 0, norm, 1.0)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    # The lowest finite number, not -inf: a lone row must not give inf - inf.
    lowest = torch.finfo(features.dtype).min
    log_share = ((z / temperature) @ z.T).masked_fill(itself, lowest).log_softmax(dim=1)
    positive = (target[:, None] == target).masked_fill(itself, False)
    n_positives = positive.sum(1, keepdim=True)
    n_anchors = (n_positives > 0).sum()
    weight = positive.to(features.dtype) / (n_positives * n_anchors).clamp(min=1)
    if sample_weight is not None:
        weight = weight * sample_weight[:, None]
    return -(weight * log_share).sum()


def distillation_loss(
    coarse_scores: Tensor,
    fine_attention: Tensor,
    *,
    emphasis: float | None = 2.0,
    sample_weight: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    r"""Teach the coarse attention what the fine attention found, eq. 18-19 of [1]_.

    Parameters
    ----------
    coarse_scores : Tensor of shape (B, k), float32 or float64
        Coarse attention at the chosen pixels, before the sigmoid.
    fine_attention : Tensor of shape (B, k), as `coarse_scores`
        Fine attention of the same pixels, non-negative. It is the teacher and gets no gradient.
    emphasis : float or None, default=2.0
        Contrast of the two distributions, > 0; None is the loss as printed.
    sample_weight : Tensor of shape (B,), default=None
        w, >= 0, of the dtype and on the device of the scores. None is 1 for every row.
    kept : Tensor of shape (B, k), bool, default=None
        Which pixels count, the first of each row among them; None is all.

    Returns
    -------
    loss : Tensor, scalar
        >= 0 up to rounding; 0 for k = 1.

    Notes
    -----
    KL(P_coarse || P_fine) over the k pixels, as a mean over the batch,

    .. math:: \frac{1}{B} \sum_b w_b \sum_j P^c_{bj} (\log P^c_{bj} - \log P^f_{bj}) .

    As printed, P^c = softmax(sigmoid(scores)) and P^f = softmax(attention): softmax over values in
    (0, 1), almost uniform on both sides. With an emphasis m both sides s, the raw scores and the
    attention, are standardised over the pixels of their image,
    P = softmax(m (s - mean) / (sd + 1e-6)), with the population standard deviation.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.training import distillation_loss
    >>> attention = torch.tensor([[0.1, 0.2, 0.4]])
    >>> round(distillation_loss(10 * attention, attention).item(), 4)
    0.0
    """
    fine = fine_attention.detach()
    if emphasis is None:
        coarse = coarse_scores.sigmoid()
    else:
        coarse = emphasis * _standardize(coarse_scores, kept)
        fine = emphasis * _standardize(fine, kept)
    if kept is not None:
        # The lowest finite number, not -inf: its share is 0, and 0 times its logarithm is no NaN.
        lowest = torch.finfo(fine.dtype).min
        coarse, fine = coarse.masked_fill(~kept, lowest), fine.masked_fill(~kept, lowest)
    # kl_div(input, target) is KL(target || input).
    divergence = F.kl_div(fine.log_softmax(1), coarse.log_softmax(1), reduction="none", log_target=True)
    if kept is not None:
        divergence = divergence.masked_fill(~kept, 0)
    divergence = divergence.sum(1)
    return (divergence if sample_weight is None else divergence * sample_weight).mean()


def consistency_loss(logits: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    r"""Let two views of an image have one answer, as in [1]_.

    Parameters
    ----------
    logits : Tensor of shape (2 * B, n_classes), float32 or float64
        Class scores before the softmax, finite: of B images, then of other views of the same, in this order.
    sample_weight : Tensor of shape (2 * B,), default=None
        w, >= 0, of the dtype and on the device of `logits`; the two views of an image have one weight. None
        is 1 for every image.

    Returns
    -------
    loss : Tensor, scalar
        >= 0.

    Raises
    ------
    ValueError
        If the rows are none, or odd in number.

    Notes
    -----
    With :math:`p_i` and :math:`q_i` the softmax probabilities of the two views of image i, the mean over the
    images of both directions of the Kullback-Leibler divergence,

    .. math::
       \frac{1}{B} \sum_i \tfrac{w_i}{2} \big[ KL(p_i || q_i) + KL(q_i || p_i) \big]
       = \frac{1}{2 B} \sum_i w_i \sum_c (p_{ic} - q_{ic}) (\log p_{ic} - \log q_{ic}) .

    The paper of SparseAttnNet has no such term. In [1]_ the two views are two
    draws of dropout.

    References
    ----------
    .. [1] Liang et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS (2021), arXiv 2106.14448.

    Examples
    --------
    >>> import torch
    >>> from sklearn_sparseattn.training import consistency_loss
    >>> consistency_loss(torch.tensor([[1.0, 0.0], [3.0, 2.0]])).item()
    0.0
    """
    if len(logits) == 0 or len(logits) % 2:
        raise ValueError(f"{len(logits)} rows of logits are not two views of some images.")
    one, other = logits.log_softmax(1).chunk(2)
    of_each = ((one.exp() - other.exp()) * (one - other)).sum(1)
    if sample_weight is not None:
        of_each = of_each * sample_weight[: len(of_each)]
    return of_each.mean() / 2


def _standardize(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Rows at mean 0 and about unit population standard deviation; a constant row at 0."""
    # From the first on, a constant row is exactly 0; and the gradient of a norm that is 0 is 0, where that of
    # var().sqrt() is infinite. torch.std_mean has both, but takes several times as long.
    values = values - values[:, :1].detach()
    if kept is None:
        values = values - values.mean(1, keepdim=True)
        deviation = torch.linalg.vector_norm(values, dim=1, keepdim=True) / math.sqrt(values.shape[1])
    else:
        n = kept.to(values.dtype).sum(1, keepdim=True)
        values = (values - (values * kept).sum(1, keepdim=True) / n) * kept
        deviation = torch.linalg.vector_norm(values, dim=1, keepdim=True) / n.sqrt()
    return values / (deviation + 1e-6)
