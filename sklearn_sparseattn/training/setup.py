"""What a fit starts from: generators, network, controller of k, weights of the classes.

Each function reads the estimator's parameters by name and leaves everything else alone.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor, nn

from ..images import ImageRows, ImageShape, PixelScale, chunk_slices
from ..network import SparseAttnNet, strides_for
from .batches import LabelledImages
from .dynamic_k import DynamicK, to_pixels

_MOST = float(np.finfo(np.float32).max)
_ENOUGH = 1000  # images to find the background in


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
    params: Mapping[str, Any],
    image_shape: ImageShape,
    n_classes: int,
    generator: torch.Generator,
    training: LabelledImages | None = None,
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
    training : LabelledImages, default=None
        Whose background becomes that of the network; without them it is 0.

    Returns
    -------
    SparseAttnNet
        On the CPU.

    Raises
    ------
    ValueError
        If the network cannot be made so large.
    """
    height, width, channels = image_shape
    sizes: dict[str, Any] = {name: int(params[name]) for name in ("embed_dim", "n_heads", "hidden_dim")}
    try:
        with torch.device("meta"):  # where nothing is drawn
            network = SparseAttnNet(
                channels,
                n_classes,
                to_pixels(params["k_init"], height * width),
                strides=strides_for(height, width),
                variant=params["variant"],
                kernel_size=int(params["kernel_size"]),
                depth=int(params["depth"]),
                **sizes,
            )
        network.to_empty(device="cpu").float()
    except (RuntimeError, OverflowError, TypeError) as error:
        named = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(f"{named}: no network of this size can be made here.") from error
    network.reset_parameters(generator)
    if network.context is not None:  # the paper's form has no gates
        score_bias = cast(Tensor, network.coarse.score.bias)
        nn.init.constant_(score_bias, math.log(params["gate_init"] / (1 - params["gate_init"])))
    network.coarse.background.fill_(0.0 if training is None else background_level(training))
    # In which the maps come as the sparse branch wants them, and a fifth of the time is saved.
    network.coarse.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def background_level(training: LabelledImages) -> float:
    """Give the mean of the outermost pixels, of at most a thousand of the images.

    Parameters
    ----------
    training : LabelledImages
        At least one row.

    Returns
    -------
    float
        On the scale of the network.

    Raises
    ------
    ValueError
        If values are so far outside `data_range` that they overflow when scaled.
    """
    n = len(training.images)
    images = training.images.take(np.linspace(0, n - 1, min(n, _ENOUGH)).astype(np.intp))
    levels = []
    for rows in chunk_slices(len(images), images.image_shape):
        some = images.read(rows)
        border = np.concatenate([some[:, 0], some[:, -1], some[:, 1:-1, 0], some[:, 1:-1, -1]], axis=1)
        levels.append(training.scale.finite(border[:, None]).mean((1, 2, 3), dtype=np.float64))
    return float(np.concatenate(levels).mean())


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


def unique_labels(labels: Any, name: str) -> np.ndarray:
    """Sort labels, each once.

    Parameters
    ----------
    labels : array-like of shape (n,)
        Of any kind that can be put in order.
    name : str
        What the user calls them; "y" must be those of a classification.

    Returns
    -------
    ndarray of shape (n_classes,)
        The classes.

    Raises
    ------
    ValueError
        If they are none.
    """
    if np.asarray(labels).dtype.kind == "V":  # NumPy's records have an order, but no hash
        raise ValueError(f"{name} has labels of several parts: each must be one number or text.")
    try:
        with np.errstate(invalid="ignore"):  # whole floats beyond all integers
            if name == "y":
                check_classification_targets(labels)
            return np.unique(labels)
    except TypeError as error:
        raise ValueError(f"{name} has labels that cannot be put in order: {error}.") from error


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
        If a weight is negative, or no number that float32 holds.
    """
    if isinstance(class_weight, dict):
        for label, weight in class_weight.items():
            if not (isinstance(weight, Real) and 0 <= weight <= _MOST):  # type: ignore[operator]
                raise ValueError(
                    f"class_weight={class_weight!r}: weight of {label!r} is no number in [0, {_MOST:.3g}]."
                )
    if not isinstance(class_weight, str):
        return compute_class_weight(class_weight, classes=classes, y=classes)
    counts = np.bincount(training.target, weights=training.weight, minlength=len(classes))
    present = counts > 0
    weights = np.ones(len(classes))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights
