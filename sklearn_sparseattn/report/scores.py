"""Numbers of a report: scores by class with their intervals, calibration, the order of the cells."""

from typing import NamedTuple

import numpy as np

# Two-sided 95 % of a normal distribution.
_Z = 1.959963984540054
_N_BINS = 10


class Score(NamedTuple):
    """A share and its 95 % interval; NaN where there is nothing to count.

    Attributes
    ----------
    value, low, high : float
        In [0, 1].
    """

    value: float
    low: float
    high: float


class ClassScores(NamedTuple):
    """How well one class is found.

    Attributes
    ----------
    recall, precision, f1 : Score
        Of the class.
    n_true, n_predicted : int
        Cells that are, and that are called, of the class.
    """

    recall: Score
    precision: Score
    f1: Score
    n_true: int
    n_predicted: int


class Bin(NamedTuple):
    """Cells of like confidence.

    Attributes
    ----------
    confidence : float
        Their mean probability of the predicted class.
    right : Score
        Share of them that is right.
    n : int
        Their number, at least 1.
    """

    confidence: float
    right: Score
    n: int


def wilson(hits: int, n: int) -> Score:
    """Share of hits, with Wilson's score interval.

    Parameters
    ----------
    hits, n : int
        Hits among n trials.

    Returns
    -------
    Score
        NaN if n is 0.
    """
    if n == 0:
        return Score(np.nan, np.nan, np.nan)
    share = hits / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    # At 0 and n hits the interval ends there, but for rounding.
    return Score(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def f1_score(hits: int, n: int) -> Score:
    """F1 with an interval.

    Of the n cells that are or are called of a class, each is a hit with probability J, the Jaccard index;
    F1 = 2 J / (1 + J) rises with J and takes the interval along.

    Parameters
    ----------
    hits, n : int
        Cells that are and are called of the class, among those that are or are called so.

    Returns
    -------
    Score
        NaN if n is 0.
    """
    return Score(*(2 * share / (1 + share) for share in wilson(hits, n)))


def confusion(true: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Count cells by true and predicted class.

    Parameters
    ----------
    true, predicted : ndarray of shape (n,), int
        Numbers of classes.
    n_classes : int
        How many there are.

    Returns
    -------
    ndarray of shape (n_classes, n_classes), int
        Rows are true, columns predicted.
    """
    pairs = np.bincount(true * n_classes + predicted, minlength=n_classes**2)
    return pairs.reshape(n_classes, n_classes)


def class_scores(counts: np.ndarray) -> list[ClassScores]:
    """Score each class.

    Parameters
    ----------
    counts : ndarray of shape (n_classes, n_classes)
        From `confusion`.

    Returns
    -------
    list of ClassScores
        In the order of the rows.
    """
    n_true, n_predicted = counts.sum(axis=1).tolist(), counts.sum(axis=0).tolist()
    return [
        ClassScores(
            recall=wilson(hits, n_true[i]),
            precision=wilson(hits, n_predicted[i]),
            f1=f1_score(hits, n_true[i] + n_predicted[i] - hits),
            n_true=n_true[i],
            n_predicted=n_predicted[i],
        )
        for i, hits in enumerate(counts.diagonal().tolist())
    ]


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    """Compare how sure with how right, in bins of one width.

    Parameters
    ----------
    confidence : ndarray of shape (n,)
        Probability of the predicted class.
    right : ndarray of shape (n,), bool
        Whether it is the true one.

    Returns
    -------
    list of Bin
        By rising confidence, without empty ones.
    """
    which = np.minimum((confidence * _N_BINS).astype(int), _N_BINS - 1)
    return [
        Bin(
            confidence[which == i].mean(),
            wilson(right[which == i].sum().item(), (which == i).sum().item()),
            (which == i).sum().item(),
        )
        for i in np.unique(which)
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Mean gap between how sure and how right, weighted by the cells of a bin (ECE).

    Parameters
    ----------
    bins : list of Bin
        From `calibration`.

    Returns
    -------
    float
        In [0, 1].
    """
    gaps = [abs(one.confidence - one.right.value) for one in bins]
    return float(np.average(gaps, weights=[one.n for one in bins]))


def most_telling(confidence: np.ndarray, right: np.ndarray, n: int) -> np.ndarray:
    """Choose cells to show: the wrong ones, the surest first, then the right ones, the least sure first.

    Parameters
    ----------
    confidence : ndarray of shape (n_cells,)
        Probability of the predicted class.
    right : ndarray of shape (n_cells,), bool
        Whether it is the true one.
    n : int
        How many at most.

    Returns
    -------
    ndarray of shape (min(n, n_cells),), int
        Rows.
    """
    return np.lexsort((np.where(right, confidence, -confidence), right))[:n]
