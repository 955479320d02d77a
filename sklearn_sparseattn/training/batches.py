"""Training rows -> batches of scaled images, targets and weights.

Nothing is copied but the batch at hand, and every random number comes from the generator given.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from skorch.dataset import Dataset
from torch import Tensor

from ..images import ImageRows, PixelScale, call_given
from .augmentation import Augmentation

Batch = tuple[Tensor, tuple[Tensor, Tensor]]


class LabelledImages(Dataset):
    """Images, class indices and weights, row by row.

    Parameters
    ----------
    images : ImageRows
        n images.
    target : ndarray of shape (n,), int64
        Class indices.
    weight : ndarray of shape (n,)
        Sample weights, already normalised.
    scale : PixelScale
        From the user's numbers to [0, 1].
    """

    def __init__(self, images: ImageRows, target: np.ndarray, weight: np.ndarray, scale: PixelScale) -> None:
        self.images = images
        self.target = torch.from_numpy(np.asarray(target, dtype=np.int64))
        self.weight = torch.from_numpy(np.asarray(weight, dtype=np.float32))
        self.scale = scale

    def __len__(self) -> int:
        return len(self.images)

    @property
    def X(self) -> "LabelledImages":
        """What skorch's scoring callbacks predict: the rows themselves, read a batch at a time."""
        return self

    @property
    def y(self) -> Tensor:
        """What they compare with: the class indices."""
        return self.target

    def read(
        self,
        rows: npt.NDArray[np.intp],
        augment: Augmentation | None = None,
        rng: np.random.Generator | None = None,
        n_views: int = 1,
    ) -> Batch:
        """Make one batch.

        Parameters
        ----------
        rows : ndarray of int
            Which rows.
        augment : callable, default=None
            Applied to the scaled images.
        rng : numpy.random.Generator, default=None
            For `augment`.
        n_views : int, default=1
            How often each image is augmented anew.

        Returns
        -------
        images : Tensor of shape (n_views * b, C, H, W), float32
            Scaled; the b images in their first view, then in the next.
        (target, weight) : tuple of Tensor of shape (n_views * b,)
            Class indices and weights.

        Raises
        ------
        ValueError
            If there is more than one view without `augment`, or `augment` gives what cannot be used.
        """
        images = self.scale.finite(self.images.read(rows))
        target, weight = self.target[rows], self.weight[rows]
        if augment is None or rng is None:
            if n_views > 1:
                raise ValueError(f"n_views={n_views} needs augment and rng: else all views are the same.")
        elif n_views == 1:
            images = _augmented(images, augment, rng)
        else:
            views = np.empty((n_views, *images.shape), dtype=np.float32)
            for view in views:  # each of its own copy, and copied: functions may write where they like
                view[:] = _augmented(images.copy(), augment, rng)
            images = views.reshape(-1, *images.shape[1:])
            target, weight = target.repeat(n_views), weight.repeat(n_views)
        return torch.from_numpy(images), (target, weight)


def _augmented(images: np.ndarray, augment: Augmentation, rng: np.random.Generator) -> np.ndarray:
    result = call_given("augment", augment, images, rng)
    try:
        result = np.ascontiguousarray(np.asarray(result).astype(np.float32, casting="same_kind", copy=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"augment gave what is no array of numbers: {error}.") from error
    if result.shape != images.shape:
        raise ValueError(
            f"augment turned images of shape {images.shape} into {result.shape}; the shape must stay."
        )
    if not np.isfinite(result).all():
        raise ValueError("augment gave images that hold NaN or infinity.")
    return result


class Batches:
    """Iterate over a `LabelledImages` in batches of nearly equal size.

    A batch never has one row unless there is only one: batch norm needs two.

    Parameters
    ----------
    dataset : LabelledImages
        The rows.
    batch_size : int
        Greatest number of rows in a batch, but for the one row more that would be left alone.
    rng : numpy.random.Generator, default=None
        Shuffles the rows anew in every pass and drives `augment`; None keeps their order.
    augment : callable, default=None
        ``augment(images, rng)``.
    n_views : int, default=1
        How often each image of a batch is augmented anew; only with `augment`.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        batch_size: int,
        rng: np.random.Generator | None = None,
        augment: Augmentation | None = None,
        n_views: int = 1,
    ) -> None:
        self.dataset = dataset
        self.rng = rng
        self.augment = augment
        self.n_views = n_views
        self.n_batches = count_batches(len(dataset), batch_size)

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        n_rows = len(self.dataset)
        order = np.arange(n_rows) if self.rng is None else self.rng.permutation(n_rows)
        for rows in np.array_split(order, self.n_batches):
            # Sorted, a memory map is read forwards.
            yield self.dataset.read(np.sort(rows), self.augment, self.rng, self.n_views)


def count_batches(n_rows: int, batch_size: int) -> int:
    """Count the batches in a pass: as few as `batch_size` allows, none of a single row if that can be.

    Parameters
    ----------
    n_rows : int
        Rows in all.
    batch_size : int
        Greatest number of rows in a batch.

    Returns
    -------
    int
        At least 1.
    """
    return max(1, min(math.ceil(n_rows / batch_size), n_rows // 2))
