"""What a fit starts from: generators, network, controller of k, weights of the classes.

Each function reads the estimator's parameters by name and leaves everything else alone.
"""

from collections.abc import Mapping, Set
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from ..images import ImageRows, ImageShape, PixelScale, chunk_slices
from ..network import SparseAttnNet, strides_for
from ..parameters import capped, is_int, to_pixels
from .batches import LabelledImages

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
                1,
                strides=strides_for(height, width),
                variant=params["variant"],
                size=params["size"],
                **sizes,
            )
        network.to_empty(device="cpu").float()
    except (RuntimeError, OverflowError, TypeError) as error:
        named = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(f"{named}: no network of this size can be made here.") from error
    network.reset_parameters(generator)
    k_init = capped(params["k_init"], height * width)
    network.k.fill_(to_pixels(k_init, network.area_of(height, width)))
    network.coarse.background.fill_(0.0 if training is None else background_level(training))
    # The maps then come as the tiles are gathered from them.
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
        If there is NaN.
    """
    n = len(training.images)
    images = training.images.take(np.linspace(0, n - 1, min(n, _ENOUGH)).astype(np.intp))
    levels = []
    for rows in chunk_slices(len(images), images.image_shape):
        some = images.read(rows)
        border = np.concatenate([some[:, 0], some[:, -1], some[:, 1:-1, 0], some[:, 1:-1, -1]], axis=1)
        levels.append(training.scale.finite(border[:, None]).mean((1, 2, 3), dtype=np.float64))
    return float(np.concatenate(levels).mean())


def k_defaults(params: Mapping[str, Any], network: SparseAttnNet, image_shape: ImageShape) -> dict[str, Any]:
    """Pick what `DynamicK.use` wants out of an estimator's parameters.

    Parameters
    ----------
    params : mapping
        Parameters of the estimator.
    network : SparseAttnNet
        To be trained.
    image_shape : tuple of (H, W, C)
        Of the images.

    Returns
    -------
    dict
        ``k_min``, ``k_max``, ``tolerance``, ``n_pixels``.
    """
    height, width, _ = image_shape
    k_min = capped(params["k_min"], height * width)
    if is_int(k_min):
        k_min = max(k_min, network.tile_area(height, width))  # no k is below a tile
    return {
        "k_min": k_min,
        "k_max": capped(params["k_max"], height * width),
        "tolerance": params["k_tolerance"],
        "n_pixels": network.area_of(height, width),
    }


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
        If they are none, bytes, of several parts, or cannot be put in order.
    """
    if isinstance(labels, Set):
        labels = [*labels]
    dtype = np.asarray(labels).dtype
    if dtype.kind == "S":  # which of scikit-learn's releases warns and which refuses would be theirs to say
        raise ValueError(
            f"{name} has labels of dtype {dtype}: bytes are not supported, give text: astype(str)."
        )
    if dtype.kind == "V":  # NumPy's records have an order, but no hash
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
