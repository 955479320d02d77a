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
CHANNELS = [(3, 4), (3, 4, 5)]


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


def along(position, n_cells, step):
    """Weight of each cell at a pixel: linear between the two that it lies between, the last one beyond."""
    weights = np.zeros(n_cells)
    before = min(position // step, n_cells - 1)
    after = min(before + 1, n_cells - 1)
    share = position / step - position // step
    weights[before] += 1 - share
    weights[after] += share
    return weights


def reference(coarse, image, strides, n_stages):
    """Scores of the pixels (H, W) and of the cells, z_coarse and the maps of one image (C, H, W)."""
    _, height, width = image.shape
    early = stage(image - array(coarse.background), coarse.early)
    middle = stage(early, coarse.middle)
    maps = [early, middle]
    if n_stages == 3:
        maps.append(stage(stage(middle, coarse.deep[0]), coarse.deep[1]))
    cells = convolution(middle, coarse.score)[0]
    step = strides[0] * strides[1]
    scores = np.empty((height, width))
    for i, j in itertools.product(range(height), range(width)):
        scores[i, j] = along(i, len(cells), step) @ cells @ along(j, len(cells[0]), step)
    return scores, cells, np.concatenate([maps[-1].mean((1, 2)), maps[-1].max((1, 2))]), maps


def test_a_plain_background_has_no_frame():
    coarse = make_coarse(2, (2, 2, 2))
    images = torch.full((1, 2, 20, 24), 0.8, dtype=torch.float64)
    assert coarse(images)[0].std() > 1e-3  # for the zeros beyond the border
    coarse.background.fill_(0.8)
    look = coarse.look(images)
    assert look.maps[0].std((-1, -2)).max() < 1e-12


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (16, 13), (2, 11)])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("interpolate", [True, False])
def test_forward_pass_is_the_reference(strides, height, width, channels, kernel_size, interpolate):
    n_channels = 1 + height % 3
    options = {"kernel_size": kernel_size, "interpolate": interpolate}
    coarse = make_coarse(n_channels, strides, channels=channels, **options)
    assert coarse.early[0].weight.shape[2:] == (kernel_size, kernel_size)
    images = np.random.default_rng(1).normal(size=(2, n_channels, height, width))
    look = coarse.look(torch.from_numpy(images))
    for b in range(2):
        scores, cells, z_coarse, maps = reference(coarse, images[b], strides, len(channels))
        expected = scores if interpolate else cells
        np.testing.assert_allclose(array(look.scores[b]), expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(array(look.z_coarse[b]), z_coarse, rtol=1e-10, atol=1e-10)
        for found, expected in zip(look.maps, maps, strict=True):
            np.testing.assert_allclose(array(found[b]), expected, rtol=1e-10, atol=1e-10)
    scores, z_coarse = coarse(torch.from_numpy(images))
    assert torch.equal(scores, look.scores)
    assert torch.equal(z_coarse, look.z_coarse)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("strides", STRIDES)
def test_cells_lie_over_every_step_th_pixel(strides, channels):
    coarse = make_coarse(1, strides, channels=channels)
    assert coarse.steps == tuple(np.cumprod(strides))[: len(channels)]
    images = torch.randn(1, 1, 30, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    look = coarse.look(images)
    for step, cells in zip(coarse.steps, look.maps, strict=True):
        assert cells.shape[2:] == images[0, 0, ::step, ::step].shape
    step = coarse.steps[1]
    torch.testing.assert_close(look.scores[:, ::step, ::step], coarse.score(look.maps[1])[:, 0])
    coarse.interpolate = False
    torch.testing.assert_close(look.scores[:, ::step, ::step], coarse.look(images).scores)


@settings(max_examples=60)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    n_channels=st.integers(1, 6),
    strides=st.sampled_from(STRIDES),
    training=st.booleans(),
    channels=st.sampled_from(CHANNELS),
    interpolate=st.booleans(),
)
@example(
    height=1, width=300, n_channels=1, strides=(2, 2, 2), training=True, channels=(3, 4), interpolate=False
)
@example(
    height=135,
    width=135,
    n_channels=1,
    strides=(2, 2, 2),
    training=True,
    channels=(3, 4, 5),
    interpolate=True,
)
@example(
    height=1, width=1, n_channels=5, strides=(2, 2, 2), training=True, channels=(3, 4), interpolate=False
)
def test_any_image_size_and_channels(height, width, n_channels, strides, training, channels, interpolate):
    coarse = CoarseAttention(n_channels, channels, strides, interpolate=interpolate).train(training)
    scores, z_coarse = coarse(torch.rand(2, n_channels, height, width))
    step = 1 if interpolate else strides[0] * strides[1]
    assert scores.shape == (2, -(-height // step), -(-width // step))
    assert z_coarse.shape == (2, coarse.n_features) == (2, 2 * channels[-1])
    assert torch.isfinite(scores).all()
    assert torch.isfinite(z_coarse).all()


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("strides", STRIDES)
def test_a_pixel_is_scored_by_its_neighbourhood(strides, kernel_size):
    """Far from a change the scores stay: every cell of the reduced map is spread around its own pixel."""
    coarse = make_coarse(1, strides, kernel_size=kernel_size)
    images = torch.zeros(2, 1, 64, 48, dtype=torch.float64)
    images[1, 0, 40, 11] = 3.0
    scores, _ = coarse(images)
    i, j = torch.nonzero(scores[0] != scores[1]).T
    # A cell sees half the first kernel and s0 pixels to each side; its score enters less than a step away.
    reach = kernel_size // 2 + strides[0] + strides[0] * strides[1] - 1
    assert len(i)
    assert abs(i - 40).max() <= reach
    assert abs(j - 11).max() <= reach
    assert scores[0, 40, 11] != scores[1, 40, 11]


def symmetric(coarse):
    """Make every kernel its own mirror image, up-down and left-right."""
    with torch.no_grad():
        for module in coarse.modules():
            if isinstance(module, nn.Conv2d):
                w = module.weight
                module.weight.copy_((w + w.flip(2) + w.flip(3) + w.flip(2, 3)) / 4)
    return coarse


@pytest.mark.parametrize("strides", STRIDES)
def test_the_score_map_is_not_displaced(strides):
    """Where cells lie over the first and the last pixel, a mirrored image has mirrored scores."""
    coarse = symmetric(make_coarse(2, strides))
    step = coarse.steps[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 2, 5 * step + 1, 8 * step + 1, dtype=torch.float64, generator=generator)
    scores, _ = coarse(images)
    for axes in ((1,), (2,), (1, 2)):
        mirrored, _ = coarse(images.flip([axis + 1 for axis in axes]))
        torch.testing.assert_close(mirrored, scores.flip(axes))
    centred = (images + images.flip(2) + images.flip(3) + images.flip(2, 3)) / 4
    scores, _ = coarse(centred)
    torch.testing.assert_close(scores, scores.flip(1))
    torch.testing.assert_close(scores, scores.flip(2))
    assert scores.std() > 0.01


@pytest.mark.parametrize("strides", STRIDES)
def test_a_bright_pixel_raises_the_scores_around_itself(strides):
    coarse = symmetric(CoarseAttention(1, strides=strides).double().eval())
    with torch.no_grad():
        for module in coarse.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.abs_()
    step = coarse.steps[1]
    i, j, reach = 8 * step, 6 * step, strides[0] + step
    images = torch.zeros(2, 1, 16 * step, 15 * step, dtype=torch.float64)
    images[1, 0, i, j] = 1.0
    scores, _ = coarse(images)
    raised = scores[1] - scores[0]
    around = raised[i - reach : i + reach + 1, j - reach : j + reach + 1]
    torch.testing.assert_close(around.sum(), raised.sum())
    torch.testing.assert_close(around, around.flip(0))
    torch.testing.assert_close(around, around.flip(1))
    assert (around >= 0).all()
    assert raised.argmax() == i * raised.shape[1] + j


@pytest.mark.parametrize("interpolate", [True, False])
@pytest.mark.parametrize("channels", CHANNELS)
def test_gradient_reaches_every_parameter(channels, interpolate):
    coarse = make_coarse(2, (2, 2, 2), channels=channels, interpolate=interpolate).train()
    generator = torch.Generator().manual_seed(0)
    scores, z_coarse = coarse(torch.randn(4, 2, 20, 21, dtype=torch.float64, generator=generator))
    (scores.square().sum() + z_coarse.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in coarse.parameters())


@pytest.mark.parametrize("strides", STRIDES)
def test_two_stages_are_the_first_two_of_three(strides):
    """Same weights, same scores and maps; nothing is left of the third, and its stride may be left out."""
    three = make_coarse(2, strides, channels=(3, 4, 5))
    two = make_coarse(2, strides[:2], channels=(3, 4), seed=1)
    names = {name.split(".")[0] for name in two.state_dict()}
    assert names == {"background", "early", "middle", "score"}
    assert {name.split(".")[0] for name in three.state_dict()} == names | {"deep"}
    two.load_state_dict({name: w for name, w in three.state_dict().items() if not name.startswith("deep")})
    images = torch.randn(2, 2, 20, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, full = two.look(images), three.look(images)
    assert torch.equal(short.scores, full.scores)
    assert len(short.maps) == 2
    assert all(torch.equal(a, b) for a, b in zip(short.maps, full.maps[:2], strict=True))


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


@pytest.mark.parametrize(
    ("channels", "strides"), [((8,), (2, 2, 2)), ((8, 16, 24, 32), (2, 2, 2, 2)), ((8, 16, 24), (2, 2))]
)
def test_stages_of_no_network(channels, strides):
    with pytest.raises(ValueError, match="must be two or three stages, each with its stride"):
        CoarseAttention(1, channels, strides)


@pytest.mark.parametrize("kernel_size", [1, 4, 9])
def test_kernels_of_no_network(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size={kernel_size} must be 3, 5 or 7"):
        CoarseAttention(kernel_size=kernel_size)
