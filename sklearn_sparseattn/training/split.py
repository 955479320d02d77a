"""Which training rows are held out for validation."""

import math

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedShuffleSplit

Rows = npt.NDArray[np.intp]


def validation_split(
    target: np.ndarray, fraction: float, rng: np.random.Generator, *, required: bool = False
) -> tuple[Rows, Rows] | None:
    """Hold out a stratified share of the rows, if the classes allow it.

    Parameters
    ----------
    target : ndarray of shape (n,)
        Class indices.
    fraction : float
        Share of the rows to hold out, in (0, 1); the number is rounded up.
    rng : numpy.random.Generator
        Source of the choice.
    required : bool, default=False
        Whether early stopping was asked for, which cannot do without.

    Returns
    -------
    (training, validation) : tuple of ndarray of int, or None
        Ascending row numbers. None if a class has a single row, or if either side would have fewer rows than
        there are classes.

    Raises
    ------
    ValueError
        If it would be None, but is required.
    """
    counts = np.unique(target, return_counts=True)[1]
    n_held = math.ceil(fraction * len(target))
    if counts.min() < 2 or min(n_held, len(target) - n_held) < len(counts):
        if required:
            raise ValueError(
                f"early_stopping=True needs validation rows, but validation_fraction={fraction} of "
                f"{len(target)} rows in {len(counts)} classes leaves too few: every class needs two rows, "
                "and both parts as many rows as there are classes. Give X_val and y_val, or "
                "early_stopping=False."
            )
        return None
    splitter = StratifiedShuffleSplit(1, test_size=n_held, random_state=int(rng.integers(2**31)))
    training, validation = next(splitter.split(target, target))
    return np.sort(training), np.sort(validation)
