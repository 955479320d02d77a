"""Which parts of an image an answer rests on: what it becomes as parts of the image are covered."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch import softmax

from ..images import ImageRows, ImageShape
from ..network import SparseAttnOutput

_PENALTY = 2.0  # of the squared effects, beside the squared errors of all maskings
_SHOWN = (0.1, 0.9)  # least and greatest share of the fields that are left in the image

Run = Callable[[ImageRows], Iterator[tuple[slice, SparseAttnOutput]]]


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
    distance = np.abs(image.astype(np.float64) - background_of(image).astype(np.float64)).mean(axis=2)
    return distance / (distance.max() or 1.0)


def occlusion_maps(
    run: Run, images: ImageRows, classes: npt.NDArray[np.int64], *, grid: int, n_masks: int
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
    deviation = shown - shown.mean(axis=0)
    squares = deviation.T @ deviation + _PENALTY * np.eye(deviation.shape[1])
    solution = np.linalg.solve(squares, deviation.T)
    maps = np.empty((len(images), *fields.shape), dtype=images.float_dtype)
    for i, label in enumerate(classes):
        image = images.read(slice(i, i + 1))[0]
        answers = np.concatenate(
            [
                softmax(output.logits.double(), dim=1)[:, label].numpy()
                for _, output in run(CoveredImage(image, fields, shown))
            ]
        )
        maps[i] = (solution @ (answers - answers.mean()))[fields] * contrast_of(image)
    return maps
