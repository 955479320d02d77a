"""What a fit starts from: generators, network, controller of k, weights of the classes.

Each function reads the estimator's parameters by name and leaves everything else alone.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight

from ..images import ImageRows, ImageShape, PixelScale
from ..network import SparseAttnNet, strides_for
from .batches import LabelledImages
from .dynamic_k import DynamicK, to_pixels


def make_generators(random_state: Any) -> tuple[np.random.Generator, torch.Generator]:
    """Make generators of our own, for all that is drawn in NumPy and for the weights.

    Parameters
    ----------
    random_state : int, RandomState or None
        None gives other numbers every time; NumPy's global generator is not used.

    Returns
    -------
    rng : numpy.random.Generator
        For shuffles, splits and augmentation.
    generator : torch.Generator
        For the weights.
    """
    seed = None
    if random_state is not None:
        seed = check_random_state(random_state).randint(2**31 - 1, size=4)
    rng = np.random.default_rng(seed)
    return rng, torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))


def new_network(
    params: Mapping[str, Any], image_shape: ImageShape, n_classes: int, generator: torch.Generator
) -> SparseAttnNet:
    """Make a network with weights drawn from `generator`, without touching PyTorch's global one.

    Parameters
    ----------
    params : mapping
        Parameters of the estimator.
    image_shape : tuple of (H, W, C)
        Of the images.
    n_classes : int
        Number of classes.
    generator : torch.Generator
        For the weights.

    Returns
    -------
    SparseAttnNet
        On the CPU.
    """
    height, width, channels = image_shape
    if isinstance(params["k_init"], bool | np.bool_):
        raise ValueError(f"k_init={params['k_init']} is neither a number of pixels nor a share of them.")
    with torch.device("meta"):  # where nothing is drawn
        network = SparseAttnNet(
            channels,
            n_classes,
            to_pixels(params["k_init"], height * width),
            embed_dim=params["embed_dim"],
            n_heads=params["n_heads"],
            hidden_dim=params["hidden_dim"],
            strides=strides_for(height, width),
            variant=params["variant"],
        )
    network.to_empty(device="cpu").float().reset_parameters(generator)
    # In which the maps come as the sparse branch wants them, and a fifth of the time is saved.
    network.coarse.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def make_dynamic_k(params: Mapping[str, Any], n_pixels: int) -> DynamicK:
    """Make the controller of k.

    Parameters
    ----------
    params : mapping
        Parameters of the estimator.
    n_pixels : int
        H * W.

    Returns
    -------
    DynamicK
        The callback.
    """
    return DynamicK(
        k_min=params["k_min"],
        k_max=params["k_max"],
        shrink=params["k_shrink"],
        grow=params["k_grow"],
        ema_decay=params["ema_decay"],
        momentum=params["k_momentum"],
        update=params["k_update"],
        n_pixels=n_pixels,
    )


def label_images(
    images: ImageRows, target: np.ndarray, weight: np.ndarray, scale: PixelScale
) -> LabelledImages:
    """Join images with class indices, and weights normalised to mean 1.

    Parameters
    ----------
    images : ImageRows
        n images.
    target : ndarray of shape (n,)
        Class indices.
    weight : ndarray of shape (n,)
        Positive.
    scale : PixelScale
        From the user's numbers to [0, 1].

    Returns
    -------
    LabelledImages
        Rows for training or validation.
    """
    weight = weight / weight.max()  # first, so that no sum overflows
    return LabelledImages(images, target, weight / weight.mean(), scale)


def class_weights(class_weight: Any, classes: np.ndarray, training: LabelledImages) -> np.ndarray:
    """Give alpha of the focal loss, by class.

    Parameters
    ----------
    class_weight : "balanced", dict or None
        "balanced" counts the rows by their weights.
    classes : ndarray of shape (n_classes,)
        The labels.
    training : LabelledImages
        The rows counted.

    Returns
    -------
    ndarray of shape (n_classes,)
        1 for each class if `class_weight` is None.

    Raises
    ------
    ValueError
        If a weight is negative or no finite number.
    """
    if isinstance(class_weight, dict):
        for label, weight in class_weight.items():
            if not (isinstance(weight, Real) and 0 <= float(weight) < math.inf):
                raise ValueError(f"class_weight={class_weight!r}: the weight of {label!r} is no number >= 0.")
    if not isinstance(class_weight, str):
        return compute_class_weight(class_weight, classes=classes, y=classes)
    counts = np.bincount(training.target, weights=training.weight, minlength=len(classes))
    present = counts > 0
    weights = np.ones(len(classes))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights
