"""Batches: every row once, of nearly equal size, drawn from their own generator alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sklearn_sparseattn.images import ImageRows, PixelScale
from sklearn_sparseattn.training.augmentation import dihedral
from sklearn_sparseattn.training.batches import Batches, LabelledImages, count_batches

UNIT = 256.0  # of the images: scaled, none of their numbers is clipped, and all are exact


def labelled(n, height=2, width=3, channels=1):
    """Row i holds i throughout, is of class i and weighs i."""
    data = np.repeat(np.arange(n, dtype=np.int32), height * width * channels).reshape(n, -1)
    images = ImageRows(data, (height, width, channels))
    return LabelledImages(images, np.arange(n), np.arange(n), PixelScale((0.0, UNIT)))


def rows_of(batches):
    return [batch[1][0].tolist() for batch in batches]


@given(n=st.integers(1, 300), batch_size=st.integers(1, 400), seed=st.none() | st.integers(0, 9))
@example(n=1, batch_size=64, seed=0)
@example(n=65, batch_size=64, seed=0)
@example(n=3, batch_size=2, seed=0)
@example(n=2, batch_size=1, seed=0)
def test_batches_of_nearly_equal_size(n, batch_size, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    batches = Batches(labelled(n), batch_size, rng)
    found = rows_of(batches)
    sizes = [len(rows) for rows in found]
    assert sorted(itertools.chain(*found)) == list(range(n))
    assert len(batches) == len(found) == count_batches(n, batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2 or n == 1
    # Two rows at least: an odd number of rows needs one batch of three.
    assert max(sizes) <= max(batch_size, 3 if n % 2 else 2)
    if batch_size > 2:
        assert len(sizes) == -(-n // batch_size)


@pytest.mark.parametrize("shape", [(4, 5, 1), (1, 1, 1), (2, 3, 4)])
def test_a_batch_holds_what_belongs_together(shape):
    dataset = labelled(23, *shape)
    height, width, channels = shape
    for images, (target, weight) in Batches(dataset, 5, np.random.default_rng(0)):
        assert images.dtype == torch.float32
        assert images.shape == (len(target), channels, height, width)
        assert target.dtype == torch.int64
        assert weight.dtype == torch.float32
        assert torch.equal(weight, target.float())
        assert (UNIT * images == target.view(-1, 1, 1, 1)).all()
    assert len(dataset) == 23


def test_without_a_generator_the_order_stays():
    assert rows_of(Batches(labelled(7), 3)) == [[0, 1, 2], [3, 4], [5, 6]]


def test_shuffles_anew_in_every_pass_and_the_same_from_the_same_seed():
    batches = Batches(labelled(50), 8, np.random.default_rng(1))
    first, second = rows_of(batches), rows_of(batches)
    assert first != second
    again = Batches(labelled(50), 8, np.random.default_rng(1))
    assert [rows_of(again), rows_of(again)] == [first, second]
    assert rows_of(Batches(labelled(50), 8, np.random.default_rng(2))) != first
    assert all(rows == sorted(rows) for rows in first)  # a memory map is read forwards


def test_global_generators_are_not_touched():
    def states():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002

    before = states()
    for _ in Batches(labelled(20, 3, 3), 4, np.random.default_rng(0), dihedral):
        pass
    assert states() == before


def test_weights_and_targets_are_taken_as_they_are():
    images = ImageRows(np.zeros((3, 4)), (2, 2, 1))
    dataset = LabelledImages(
        images, np.array([2, 0, 1], np.uint8), np.array([0.5, 2, 0.5]), PixelScale((0, 1))
    )
    _, (target, weight) = dataset.read(np.array([2, 0]))
    assert target.tolist() == [1, 2]
    assert weight.tolist() == [0.5, 0.5]


# ---- augmentation ----


def test_augment_sees_the_scaled_images_and_the_generator():
    rng = np.random.default_rng(0)
    seen = []

    def augment(images, given_rng):
        assert given_rng is rng
        assert images.dtype == np.float32
        seen.append(images.copy())
        images += 100 / UNIT  # a batch of its own: it may be written to
        return images.astype(np.float64)

    dataset = labelled(6)
    for images, (target, _) in Batches(dataset, 3, rng, augment):
        assert images.dtype == torch.float32
        assert (UNIT * images == 100 + target.view(-1, 1, 1, 1)).all()
        assert (UNIT * seen[-1] == target.view(-1, 1, 1, 1).numpy()).all()
    assert len(seen) == 2
    assert dataset.images.data.max() == 5


def test_views_of_a_batch_are_augmented_one_after_the_other():
    def augment(images, rng):
        tens = 10 * rng.integers(1, 100, size=(len(images), 1, 1, 1))
        images += tens / UNIT  # written to: each view has its own
        return images

    rng = np.random.default_rng(3)
    for images, (target, weight) in Batches(labelled(6), 3, rng, augment, n_views=2):
        images = UNIT * images
        assert images.shape == (6, 1, 2, 3)
        assert target[:3].tolist() == target[3:].tolist() == weight[:3].tolist() == weight[3:].tolist()
        assert (images % 10 == target.view(-1, 1, 1, 1)).all()
        assert ((images >= 10) & (images < 1000)).all()
        assert not torch.equal(images[:3], images[3:])
    with pytest.raises(ValueError, match="n_views=2 needs augment and rng"):
        labelled(6).read(np.arange(6), n_views=2)


def test_views_differ_even_if_augment_always_writes_to_the_same_place():
    place = np.empty((4, 1, 2, 3), dtype=np.float32)

    def augment(images, rng):
        place[:] = images + rng.integers(1, 100, size=(len(images), 1, 1, 1))
        return place

    ((images, _),) = Batches(labelled(4), 4, np.random.default_rng(0), augment, n_views=2)
    assert (images[:4] != images[4:]).any()


@pytest.mark.parametrize(
    "augment",
    [lambda images, rng: images[:, :, 1:], lambda images, rng: images[1:], lambda images, rng: images[0]],
    ids=["smaller", "fewer", "one"],
)
def test_augment_must_keep_the_shape(augment):
    with pytest.raises(ValueError, match=r"augment turned images of shape \(4, 1, 2, 3\) into .*must stay"):
        list(Batches(labelled(4), 4, np.random.default_rng(0), augment))
