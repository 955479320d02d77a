"""The validation split: stratified, and only where the classes allow it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklearn_sparseattn.training.split import validation_split


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_is_stratified_or_refused(counts, fraction, seed):
    rng = np.random.default_rng(seed)
    target = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    n, n_classes = len(target), len(counts)
    n_held = math.ceil(fraction * n)
    possible = min(counts) >= 2 and n_held >= n_classes and n - n_held >= n_classes
    split = validation_split(target, fraction, rng)
    assert (split is not None) == possible
    if split is None:
        return
    training, validation = split
    assert len(validation) == n_held
    np.testing.assert_array_equal(np.sort(np.concatenate([training, validation])), np.arange(n))
    for part in (training, validation):
        assert (np.diff(part) > 0).all()
        # As near to its share as whole rows allow.
        expected = np.array(counts) * len(part) / n
        assert (abs(np.bincount(target[part], minlength=n_classes) - expected) < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("target", "fraction", "reason"),
    [
        ([0, 0, 0, 0, 1], 0.4, "a class of one row"),
        ([0, 0, 1, 1, 2, 2, 2, 2, 2, 2], 0.2, "two rows held for three classes"),
        ([0, 0, 1, 1], 0.7, "one row left for two classes"),
        ([0], 0.5, "one row"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_there_is_none(target, fraction, reason):
    rng = np.random.default_rng(0)
    assert validation_split(np.array(target), fraction, rng) is None
    # Nothing was drawn: the rest of the fit is as if no split had been asked for.
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_the_smallest_that_is_allowed():
    target = np.array([0, 1, 0, 1])
    training, validation = validation_split(target, 0.5, np.random.default_rng(0))
    assert sorted(target[training]) == sorted(target[validation]) == [0, 1]


def test_gaps_among_the_class_indices_do_not_count():
    """Rows of weight zero are dropped first, and their classes may go with them."""
    target = np.array([0, 7] * 5)
    training, validation = validation_split(target, 0.2, np.random.default_rng(0))
    assert sorted(target[validation]) == [0, 7]
    assert len(training) == 8


def test_the_same_from_the_same_generator_and_no_other():
    target = np.arange(60) % 3
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (validation_split(target, 0.3, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[1], same[1])
    assert not np.array_equal(one[1], other[1])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
