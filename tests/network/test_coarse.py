"""The coarse network against a NumPy/SciPy form of its forward pass, and on images of any size."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d
from torch import nn

from sklearn_sparseattn.network import CoarseAttention, strides_for

STRIDES = [(2, 2, 2), (1, 2, 2), (1, 1, 2), (1, 1, 1), (2, 1, 1)]


def make_coarse(n_channels, strides, seed=0, **options):
    """Float64, in evaluation mode, with statistics as after some training."""
    generator = torch.Generator().manual_seed(seed)
    coarse = CoarseAttention(n_channels, strides=strides, **options).double().eval()
    with torch.no_grad():
        for value in (*coarse.parameters(), *coarse.buffers()):
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for module in coarse.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.abs_().add_(0.1)
    return coarse


def array(tensor):
    return tensor.detach().numpy()


def convolution(image, layer):
    """One image (C, H, W) through a convolution: a zero border, cross-correlation, every stride-th one."""
    weight, (border, _), (stride, _) = array(layer.weight), layer.padding, layer.stride
    padded = np.pad(image, ((0, 0), (border, border), (border, border)))
    maps = [sum(correlate2d(padded[c], w[c], mode="valid") for c in range(len(padded))) for w in weight]
    bias = 0 if layer.bias is None else array(layer.bias)[:, None, None]
    return np.stack(maps)[:, ::stride, ::stride] + bias


def stage(image, layers):
    """Convolution, batch norm by the running statistics, ReLU."""
    conv, norm, _ = layers
    mean, variance, scale, shift = (
        array(value)[:, None, None] for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    features = convolution(image, conv)
    return np.maximum((features - mean) / np.sqrt(variance + norm.eps) * scale + shift, 0)


def reference(coarse, image):
    """Scores (H, W) and z_coarse of one image (C, H, W)."""
    _, height, width = image.shape
    features = image
    for layers in coarse.middle:
        features = stage(features, layers)
    cells = convolution(features, coarse.score)
    step = coarse.score_stride
    scores = np.empty((height, width))
    for i, j in itertools.product(range(height), range(width)):
        scores[i, j] = cells[(i % step) * step + j % step, i // step, j // step]
    for layers in coarse.deep:
        features = stage(features, layers)
    return scores, np.concatenate([features.mean((1, 2)), features.max((1, 2))])


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (16, 13), (2, 11)])
def test_forward_pass_is_the_reference(strides, height, width):
    n_channels = 1 + height % 3
    coarse = make_coarse(n_channels, strides, channels=(3, 4, 5))
    images = np.random.default_rng(1).normal(size=(2, n_channels, height, width))
    scores, z_coarse = coarse(torch.from_numpy(images))
    for b in range(2):
        expected_scores, expected_z = reference(coarse, images[b])
        np.testing.assert_allclose(array(scores[b]), expected_scores, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(array(z_coarse[b]), expected_z, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    n_channels=st.integers(1, 6),
    strides=st.sampled_from(STRIDES),
    training=st.booleans(),
)
@example(height=1, width=300, n_channels=1, strides=(2, 2, 2), training=True)
@example(height=135, width=135, n_channels=1, strides=(2, 2, 2), training=True)
@example(height=1, width=1, n_channels=5, strides=(2, 2, 2), training=True)
def test_any_image_size_and_channels(height, width, n_channels, strides, training):
    coarse = CoarseAttention(n_channels, strides=strides).train(training)
    scores, z_coarse = coarse(torch.rand(2, n_channels, height, width))
    assert scores.shape == (2, height, width)
    assert z_coarse.shape == (2, coarse.n_features) == (2, 48)
    assert torch.isfinite(scores).all()
    assert torch.isfinite(z_coarse).all()


@pytest.mark.parametrize("strides", STRIDES)
def test_a_pixel_is_scored_by_its_neighbourhood(strides):
    """Far from a change the scores stay: every cell of the reduced map lands on its own pixels."""
    coarse = make_coarse(1, strides)
    images = torch.zeros(2, 1, 64, 48, dtype=torch.float64)
    images[1, 0, 40, 11] = 3.0
    scores, _ = coarse(images)
    i, j = torch.nonzero(scores[0] != scores[1]).T
    # Three 3x3 convolutions see at most 1 + 2 * (1 + s0 + s0 s1) pixels across, plus the cell itself.
    reach = 1 + strides[0] + 2 * coarse.score_stride
    assert len(i)
    assert abs(i - 40).max() <= reach
    assert abs(j - 11).max() <= reach
    assert scores[0, 40, 11] != scores[1, 40, 11]


def test_gradient_reaches_every_parameter():
    coarse = make_coarse(2, (2, 2, 2)).train()
    scores, z_coarse = coarse(torch.randn(4, 2, 20, 21, dtype=torch.float64))
    (scores.square().sum() + z_coarse.square().sum()).backward()
    without = [name for name, p in coarse.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_scores_are_before_the_sigmoid():
    scores, _ = make_coarse(1, (2, 2, 2))(torch.randn(1, 1, 30, 30, dtype=torch.float64))
    assert scores.min() < 0
    assert scores.max() > 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (1, 1, 1)),
        ((7, 7), (1, 1, 1)),
        ((8, 8), (1, 1, 2)),
        ((15, 3), (1, 1, 2)),
        ((16, 16), (1, 2, 2)),
        ((1, 31), (1, 2, 2)),
        ((32, 32), (2, 2, 2)),
        ((5, 32), (2, 2, 2)),
        ((135, 135), (2, 2, 2)),
        ((1024, 1024), (2, 2, 2)),
    ],
)
def test_strides_follow_the_longer_side(size, expected):
    assert strides_for(*size) == strides_for(*size[::-1]) == expected
