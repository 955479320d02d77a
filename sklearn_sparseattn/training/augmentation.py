"""Random changes of training images, by name: what the next lamp, stain or camera may do to the same cells.

All are functions of images (B, C, H, W), float32 and scaled to about [0, 1], and of a NumPy Generator. They
return new arrays and draw anew for each image.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from ..images import ImageShape, call_given

Augmentation = Callable[[np.ndarray, np.random.Generator], Any]
Floats = npt.NDArray[np.float32]

# Limits of what is drawn, evenly on a logarithmic scale for factors.
GAIN = 1.45  # of the light: from 1 / GAIN to GAIN
GAMMA = 1.5
OFFSET = 0.08  # to both sides
NOISE = 0.04  # standard deviation, at most
BLUR = 1.3  # standard deviation in pixels, at most
ZOOM = 1.3
MIXING = 0.15  # standard deviation of each entry of the matrix that mixes optical densities
STRENGTH = 1.6  # factor of the optical densities
TINT = 1.25  # gain of a channel beside that of all

_NORMAL = ndtri((np.arange(256) + 0.5) / 256)  # quantiles of the normal distribution, of variance 1
_NORMAL = (_NORMAL / _NORMAL.std()).astype(np.float32)
_DARKEST, _BRIGHTEST = 0.02, 1.5  # of an optical density: what is darker has no more


def _column(values: npt.ArrayLike) -> Floats:
    """Of a number for each image, or for each image and channel: (B, C or 1, 1, 1)."""
    values = np.asarray(values, dtype=np.float32)
    return values.reshape(len(values), -1, 1, 1)


def _factors(rng: np.random.Generator, most: float, *shape: int) -> npt.NDArray[np.float64]:
    """From 1 / most to most."""
    return np.exp(rng.uniform(-np.log(most), np.log(most), shape))


def dihedral(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip and turn each image at random: 8 ways if it is square, otherwise the 4 that keep its shape.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W)
        The images.
    rng : numpy.random.Generator
        Source of the choices.

    Returns
    -------
    ndarray of shape (B, C, H, W)
        A new array.
    """
    square = images.shape[2] == images.shape[3]
    choice = rng.integers(8 if square else 4, size=len(images))
    result = np.empty_like(images)
    for way in np.unique(choice):
        chosen = choice == way
        turned = images[chosen]
        if way & 1:
            turned = turned[:, :, ::-1]
        if way & 2:
            turned = turned[:, :, :, ::-1]
        if way & 4:
            turned = turned.swapaxes(2, 3)
        result[chosen] = turned
    return result


def brightness(images: np.ndarray, rng: np.random.Generator) -> Floats:
    r"""Change gain, offset and gamma of the light: v becomes :math:`a\, |v|^\gamma\, \mathrm{sign}(v) + b`.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of a in [1/1.45, 1.45], gamma in [1/1.5, 1.5] and b in [-0.08, 0.08], for each image.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    n = len(images)
    gamma, gain = (_column(_factors(rng, most, n)) for most in (GAMMA, GAIN))
    offset = _column(rng.uniform(-OFFSET, OFFSET, n))
    return np.copysign(np.abs(images) ** gamma, images) * gain + offset


def noise(images: np.ndarray, rng: np.random.Generator) -> Floats:
    """Add nearly Gaussian noise whose standard deviation, up to 0.04, is drawn for each image.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of the noise.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    deviation = _column(rng.uniform(0, NOISE, len(images)))
    # Random bytes, as quantiles: many times as fast as normal numbers.
    drawn = _NORMAL.take(np.frombuffer(rng.bytes(images.size), dtype=np.uint8)).reshape(images.shape)
    drawn *= deviation
    drawn += images
    return drawn


def zoom(images: np.ndarray, rng: np.random.Generator) -> Floats:
    """Enlarge or shrink about the centre, by factors from 1/1.3 to 1.3; border pixels fill what is missing.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of the factors.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    return resampled(images, _factors(rng, ZOOM, len(images)), np.zeros(len(images)))


def blur(images: np.ndarray, rng: np.random.Generator) -> Floats:
    """Blur half of the images by Gaussian kernels of up to 1.3 pixels.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of the standard deviations.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    return resampled(images, np.ones(len(images)), _blurs(rng, len(images)))


def _blurs(rng: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    return np.maximum(rng.uniform(-BLUR, BLUR, n), 0)


def resampled(images: np.ndarray, factors: npt.ArrayLike, blurs: npt.ArrayLike) -> Floats:
    """Enlarge each image by a factor, by linear interpolation, then blur it.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        The images.
    factors : array-like of shape (B,)
        Positive; about the centre.
    blurs : array-like of shape (B,)
        Standard deviations of Gaussian kernels in pixels; 0 does nothing.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array. Beyond the border the images go on as their outermost pixels.
    """
    height, width = images.shape[2:]
    given = np.asarray(factors), np.asarray(blurs)
    rows = _lines(height, *given)
    columns = rows if width == height else _lines(width, *given)
    return np.matmul(np.matmul(rows[:, None], images), columns[:, None].swapaxes(2, 3))


def _lines(n: int, factors: np.ndarray, blurs: np.ndarray) -> Floats:
    """(B, n, n): how much of each pixel of a line is in each pixel of the new one. Rows sum to 1."""
    at, centre = np.arange(n, dtype=np.float32), (n - 1) / 2
    places = np.clip((at - centre) / factors[:, None] + centre, 0, n - 1).astype(np.float32)
    zoomed = np.maximum(1 - np.abs(places[:, :, None] - at), 0)
    if not blurs.any():
        return zoomed
    reach = math.ceil(3 * blurs.max())
    distance = np.arange(-reach, n + reach, dtype=np.float32) - at[:, None]
    sharpness = (0.5 / np.maximum(blurs, 0.05) ** 2).astype(np.float32)  # 0.05 pixels are none
    # Not less than exp(-60): products with the least of all floats are slow.
    weights = np.exp(-np.minimum(sharpness[:, None, None] * distance**2, 60))
    weights[:, np.abs(distance) > reach] = 0
    weights /= weights.sum(axis=2, keepdims=True)
    spread = weights[:, :, reach : n + reach]
    spread[:, :, 0] += weights[:, :, :reach].sum(axis=2)  # what lies beyond the border is as at the border
    spread[:, :, -1] += weights[:, :, n + reach :].sum(axis=2)
    return np.matmul(spread, zoomed)


def density(images: np.ndarray, rng: np.random.Generator) -> Floats:
    r"""Change the stain and the light of images of stained cells, in optical densities.

    With :math:`D = -\log v` by pixel, v becomes :math:`\exp(-s\,(I + M) D)` times a gain of each channel.
    Other labs' stains differ in strength (s) and hue (M), their lamps in brightness and colour (the gains).

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of s in [1/1.6, 1.6], of the entries of M (normal, standard deviation 0.15) and of the gains.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    n, channels = images.shape[:2]
    densities = -np.log(np.clip(images, _DARKEST, _BRIGHTEST)).reshape(n, channels, -1)
    mixing = np.eye(channels) + rng.normal(0, MIXING, (n, channels, channels))
    mixing = (mixing * _factors(rng, STRENGTH, n, 1, 1)).astype(np.float32)
    gains = np.log(_factors(rng, GAIN, n, 1) * _factors(rng, TINT, n, channels))
    densities = np.matmul(mixing, densities) - gains.astype(np.float32)[:, :, None]
    return np.exp(-densities).clip(0, _BRIGHTEST).reshape(images.shape)


def light(images: np.ndarray, rng: np.random.Generator) -> Floats:
    """Change the light, blur and add noise: `brightness`, `blur` and `noise`. For images without stain.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of all that is drawn.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    return noise(blur(brightness(images, rng), rng), rng)


def stain(images: np.ndarray, rng: np.random.Generator) -> Floats:
    """Change what differs from lab to lab: `dihedral`, `density`, `zoom`, `blur`. For stained cells in RGB.

    Parameters
    ----------
    images : ndarray of shape (B, C, H, W), float32
        Scaled.
    rng : numpy.random.Generator
        Source of all that is drawn.

    Returns
    -------
    ndarray of shape (B, C, H, W), float32
        A new array.
    """
    images = density(dihedral(images, rng), rng)
    return resampled(images, _factors(rng, ZOOM, len(images)), _blurs(rng, len(images)))


AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "dihedral": dihedral,
        "light": light,
        "stain": stain,
        "brightness": brightness,
        "density": density,
        "zoom": zoom,
        "blur": blur,
        "noise": noise,
    }
)
_OF_COLOURS = ("stain", "density")


def resolve_augment(augment: Any, image_shape: ImageShape) -> Augmentation | None:
    """Make one function of what the user gave as `augment`.

    Parameters
    ----------
    augment : str, callable, sequence of these, or None
        Names are those of `AUGMENTATIONS`; a sequence is applied in its order.
    image_shape : tuple of (H, W, C)
        Of the images.

    Returns
    -------
    callable or None
        None if nothing is to be done.

    Raises
    ------
    ValueError
        If a name is unknown, a part is neither name nor function, or a part for images in RGB gets others.
    """
    if augment is None:
        return None
    parts = [augment] if isinstance(augment, str) or callable(augment) else [*augment]
    for part in parts:
        if not (callable(part) or (isinstance(part, str) and part in AUGMENTATIONS)):
            raise ValueError(
                f"augment={augment!r}: {part!r} is neither a function nor one of {', '.join(AUGMENTATIONS)}."
            )
        if isinstance(part, str) and part in _OF_COLOURS and image_shape[2] != 3:
            raise ValueError(
                f"augment={augment!r}: {part!r} is for images in RGB, not with {image_shape[2]} channels. "
                "'light' is for images without stain."
            )
    functions = [AUGMENTATIONS[part] if isinstance(part, str) else part for part in parts]
    if len(functions) < 2:
        return functions[0] if functions else None
    return functools.partial(_in_turn, functions)


def _in_turn(functions: Sequence[Augmentation], images: np.ndarray, rng: np.random.Generator) -> Any:
    for function in functions:
        images = call_given("augment", function, images, rng)
    return images
