"""Whether the fitted network answers as it was trained."""

import warnings

import numpy as np
import torch

from ..network import SparseAttnNet
from .batches import LabelledImages
from .losses import focal_loss

_ENOUGH = 256  # images


def warn_of_contradiction(
    network: SparseAttnNet,
    training: LabelledImages,
    trained: float,
    *,
    gamma: float,
    class_weight: np.ndarray,
    device: torch.device,
) -> None:
    """Warn if the network has not learned what its loss in training says.

    In training, batch norm takes the statistics of each batch, and afterwards those of the whole fit. A few
    images unlike all others can spoil the latter.

    Parameters
    ----------
    network : SparseAttnNet
        Fitted, in evaluation mode.
    training : LabelledImages
        At least one row; of many, 256 are looked at.
    trained : float
        Focal loss of the last epoch.
    gamma : float
        Exponent of the focal loss.
    class_weight : ndarray of shape (n_classes,)
        alpha of the focal loss.
    device : torch.device
        Where the network is.

    Warns
    -----
    UserWarning
        If the loss in training is below half of that of equal probabilities for all classes, and that of the
        fitted network above it.
    """
    n = len(training)
    images, (target, weight) = training.read(np.linspace(0, n - 1, min(n, _ENOUGH)).astype(np.intp))
    with torch.inference_mode():
        logits = torch.cat([network(some.to(device)).logits.double().cpu() for some in images.split(32)])
    weights = {
        "class_weight": torch.from_numpy(np.asarray(class_weight, dtype=np.float64)),
        "sample_weight": weight.double(),
    }
    found, of_chance = (
        focal_loss(some, target, gamma=gamma, **weights).item() for some in (logits, torch.zeros_like(logits))
    )
    if trained < of_chance / 2 and not found <= of_chance:
        warnings.warn(
            f"The fit contradicts itself: the loss in training ended at {trained:.3g}, but that of the "
            f"fitted network on the same images is {found:.3g}, and that of a guess {of_chance:.3g}. "
            "Some images may be unlike all others: look for faults of the camera among them.",
            UserWarning,
            stacklevel=4,
        )
