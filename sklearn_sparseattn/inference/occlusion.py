"""Which parts of an image an answer rests on: what it becomes as parts of the image are covered."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..images import ImageRows, ImageShape
from .results import Passes, probabilities

_PENALTY = 2.0  # of the squared effects, beside the squared errors of all maskings
_SHOWN = (0.1, 0.9)  # least and greatest share of the fields that are left in the image

Run = Callable[[ImageRows], Passes]


class CoveredImage(ImageRows):
    """One image again and again, each time with some of its fields covered by its background.

    The copies are made when they are read, a few at a time.

    Parameters
    ----------
    image : ndarray of shape (H, W, C)
        In the user's dtype.
    fields : ndarray of shape (H, W), int
        Number of the field to which each pixel belongs.
    shown : ndarray of shape (n, n_fields), bool
        Which fields are left, in each copy.
    """

    def __init__(self, image: np.ndarray, fields: npt.NDArray[np.intp], shown: npt.NDArray[np.bool_]) -> None:
        super().__init__(shown, image.shape)
        self.image = image
        self.fields = fields
        self.background = background_of(image)

    def take(self, rows: npt.NDArray[np.intp]) -> "CoveredImage":
        """Select some of the copies.

        Parameters
        ----------
        rows : ndarray of int
            Positions among them.

        Returns
        -------
        CoveredImage
            Of the same image.
        """
        return CoveredImage(self.image, self.fields, self.data[rows])

    def read(self, rows: "slice | npt.NDArray[np.intp]") -> np.ndarray:
        """Make some of the copies.

        Parameters
        ----------
        rows : slice or ndarray of int
            Positions among them.

        Returns
        -------
        ndarray of shape (b, H, W, C)
            In the dtype of the image.
        """
        return np.where(self.data[rows][:, self.fields, np.newaxis], self.image, self.background)


def background_of(image: np.ndarray) -> np.ndarray:
    """Colour that stands for nothing: the median along the sides of an image, of two in the middle the lower.

    Parameters
    ----------
    image : ndarray of shape (H, W, C)
        In any dtype.

    Returns
    -------
    ndarray of shape (C,)
        In the same dtype.
    """
    outer = np.ones(image.shape[:2], dtype=bool)
    outer[1:-1, 1:-1] = False
    values = np.sort(image[outer], axis=0)
    return values[(len(values) - 1) // 2]


def fields_of(image_shape: ImageShape, grid: int) -> npt.NDArray[np.intp]:
    """Divide an image into fields of nearly equal size.

    Parameters
    ----------
    image_shape : tuple of (H, W, C)
        Of the image.
    grid : int
        Fields along each axis; as many as there are pixels, if these are fewer.

    Returns
    -------
    ndarray of shape (H, W), int
        Number of the field to which each pixel belongs, row-major.
    """
    rows, columns = (np.arange(n) * min(grid, n) // n for n in image_shape[:2])
    return rows[:, np.newaxis] * (columns[-1] + 1) + columns


def maskings(n_fields: int, n_masks: int) -> npt.NDArray[np.bool_]:
    """Choose fields that are left in an image, again and again, and then just the others.

    Parameters
    ----------
    n_fields : int
        Of the image.
    n_masks : int
        How many times, rounded up to an even number.

    Returns
    -------
    ndarray of shape (n_masks, n_fields), bool
        The same at every call. Shares from few to most of the fields are left.
    """
    rng = np.random.default_rng(0)
    shares = np.linspace(*_SHOWN, -(-n_masks // 2))[:, np.newaxis]
    shown = rng.random((len(shares), n_fields)) < shares
    return np.concatenate([shown, ~shown])


def contrast_of(image: np.ndarray) -> npt.NDArray[np.float64]:
    """How far each pixel is from the background: covering it changes so much of the image.

    Parameters
    ----------
    image : ndarray of shape (H, W, C)
        In any dtype.

    Returns
    -------
    ndarray of shape (H, W), float64
        1 at the farthest pixel; zeros if there is only background.
    """
    values = image.astype(np.float64)
    values = values / (np.abs(values).max() or 1.0)  # differences of the largest floats would overflow
    distance = np.abs(values - background_of(values)).mean(axis=2)
    return distance / (distance.max() or 1.0)


def occlusion_maps(
    run: Run,
    images: ImageRows,
    classes: npt.NDArray[np.int64],
    *,
    n_classes: int,
    grid: int,
    n_masks: int,
) -> np.ndarray:
    """Find the effect of each field on the probability of a class, by least squares over many maskings.

    Parameters
    ----------
    run : callable
        Gives the network's results for images, a few at a time.
    images : ImageRows
        Validated.
    classes : ndarray of shape (n,), int64
        Number of the class to explain, for each image.
    n_classes : int
        Of the network.
    grid : int
        Fields along each axis.
    n_masks : int
        Maskings of each image.

    Returns
    -------
    ndarray of shape (n, H, W)
        Signed: the effect of a pixel's field, times the contrast of the pixel. float64 or float32 as the
        images are, float32 for other dtypes.
    """
    fields = fields_of(images.image_shape, grid)
    shown = maskings(int(fields[-1, -1]) + 1, n_masks)
    to_effects = _least_squares(shown - 0.5)  # in pairs, each field is left in half of them
    maps = np.empty((len(images), *fields.shape), dtype=images.float_dtype)
    for i, label in enumerate(classes):
        image = images.read(slice(i, i + 1))[0]
        answers = probabilities(run(CoveredImage(image, fields, shown)), len(shown), n_classes)[:, label]
        # Without the mean, what never changes has an effect of exactly 0.
        maps[i] = (to_effects @ (answers - answers.mean()))[fields] * contrast_of(image)
    return maps


def _least_squares(design: np.ndarray) -> np.ndarray:
    """Matrix that makes effects, one for each column of the design, of answers, one for each row."""
    n, n_effects = design.shape
    if n < n_effects:  # the same, by the smaller matrix
        return np.linalg.solve(design @ design.T + _PENALTY * np.eye(n), design).T
    return np.linalg.solve(design.T @ design + _PENALTY * np.eye(n_effects), design.T)
