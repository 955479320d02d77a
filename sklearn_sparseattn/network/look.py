"""The coarse network in compiled code (`_look.c`), for training on a CPU, with gradients.

It computes what `CoarseAttention` says in PyTorch up to its second stage, with the statistics of the batch:
several times as fast, and the same bits with any number of threads.
"""

import ctypes
from concurrent.futures import Executor
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compiled import LANES, has_hooks, load_library, point, share_out, threads

_STAGES = (0, 1)
_Stages = ctypes.c_void_p * len(_STAGES)
_Counts = ctypes.c_int32 * len(_STAGES)


class _Look(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("height", "width", "step")),
        *((name, _Counts) for name in ("inputs", "channels", "strides", "rows", "columns", "sizes")),
        *(("images", ctypes.c_void_p), ("weight", _Stages), ("back", ctypes.c_void_p)),
        *(("score", ctypes.c_void_p), ("raw", _Stages), ("maps", _Stages)),
        *(("moments", _Stages), ("norm", _Stages)),
        *((name, ctypes.c_void_p) for name in ("scores", "pooled", "d_scores", "d_pooled")),
        *((name, _Stages) for name in ("d_maps", "d_normed", "d_moments", "d_norm")),
        *(("d_score", ctypes.c_void_p), ("d_weight", _Stages)),
    ]


_LIBRARY = load_library("look", _Look)


class _Stage(NamedTuple):
    convolution: nn.Conv2d
    norm: nn.BatchNorm2d


class _Norm(NamedTuple):
    """Batch norm by one batch, (channels,) in float64."""

    mean: Tensor
    inverse: Tensor  # of the standard deviation
    factor: Tensor


def look(
    images: Tensor, early: nn.Sequential, middle: nn.Sequential, score: nn.Conv2d
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Do in compiled code what `CoarseAttention` does in training, running statistics included.

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W)
        The images.
    early, middle : nn.Sequential
        Convolution, batch norm and ReLU.
    score : nn.Conv2d
        Of the second stage.

    Returns
    -------
    scores : Tensor of shape (B, H, W)
        Coarse attention before the sigmoid.
    pooled : Tensor of shape (B, 2 * channels)
        Mean and maximum of the second stage.
    early, middle : Tensor of shape (B, channels, h, w)
        The maps, channels last.

    Notes
    -----
    It returns None if compiled code cannot do it: elsewhere than on a CPU, not in float32, without the
    statistics of a batch, or if the stages are not as usual or have hooks.
    """
    if _LIBRARY is None or not (_has_its_layers(early) and _has_its_layers(middle)) or has_hooks(score):
        return None
    stages = [_Stage(*list(cast(Any, layers))[:2]) for layers in (early, middle)]
    if not _is_usual(images, stages, score):
        return None
    learned = [p for conv, norm in stages for p in (conv.weight, norm.weight, norm.bias)]
    return cast(Any, CompiledLook.apply(images, stages, score.weight, score.bias, *learned))


def _has_its_layers(stage: nn.Sequential) -> bool:
    return (
        type(stage) is nn.Sequential
        and tuple(map(type, stage)) == (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        and not has_hooks(stage, *stage)
    )


def _is_usual(images: Tensor, stages: list[_Stage], score: nn.Conv2d) -> bool:
    tensors = (images, score.weight, *(part.weight for stage in stages for part in stage))
    return (
        all(_is_usual_stage(*stage) for stage in stages)
        and (type(score), score.out_channels) == (nn.Conv2d, 1)
        and (score.kernel_size, score.stride, score.padding) == ((1, 1), (1, 1), (0, 0))
        and score.bias is not None
        and len(images) > 1
        and not images.requires_grad
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    )


def _is_usual_stage(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    return (
        norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and convolution.kernel_size in ((3, 3), (5, 5), (7, 7))
        and convolution.stride[0] == convolution.stride[1]
        and (convolution.padding, convolution.padding_mode) == (_border(convolution), "zeros")
        and (convolution.dilation, convolution.groups) == ((1, 1), 1)
        and convolution.bias is None
        and convolution.out_channels % LANES == 0
    )


def _border(convolution: nn.Conv2d) -> tuple[int, ...]:
    """Padding by which the cells of a map lie over the pixels that they do."""
    return tuple(size // 2 for size in convolution.kernel_size)


class CompiledLook(torch.autograd.Function):
    """The first two stages, their scores and pooled features; the mathematics is in `CoarseAttention`."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, stages: list[_Stage], *learned: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`learned` are weight and bias of the score, then of each stage the kernel, weight and bias."""
        images = images.contiguous()
        structure, _kept = _describe(images, stages, *learned)
        raw, maps = (_of_cells(structure, len(images)) for _ in range(2))
        scores = images.new_empty(len(images), *images.shape[-2:])
        pooled = images.new_empty(len(images), 2 * structure.channels[1])
        point(structure, {"scores": scores, "pooled": pooled}, raw=raw, maps=maps)
        norms, moments = [], _of_channels(structure, len(images))
        point(structure, {}, moments=moments)
        with threads(len(images)) as pool:
            for m in _STAGES:
                _run(structure, pool, len(images), m)
                norm, affine = _normalize(moments[m], raw[m][0, 0].numel(), stages[m].norm)
                norms.append(norm)
                structure.norm[m] = affine.data_ptr()
                moments.append(affine)  # lives as long
            _run(structure, pool, len(images), 2)
        ctx.save_for_backward(images, pooled, *maps, *raw, *learned)
        ctx.stages, ctx.norms = stages, norms
        ctx.set_materialize_grads(False)
        return scores, pooled, maps[0], maps[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the weights come by image and are summed here, in an order that never changes."""
        images, pooled, *rest = ctx.saved_tensors
        maps, raw, learned = rest[:2], rest[2:4], rest[4:]
        structure, _kept = _describe(images, ctx.stages, *learned)
        d_scores, d_pooled, *d_maps = gradients
        given = {"d_scores": d_scores, "d_pooled": d_pooled}
        given = {name: d.contiguous() for name, d in given.items() if d is not None}
        d_maps = [None if d is None else d.contiguous(memory_format=torch.channels_last) for d in d_maps]
        d_score = images.new_empty(len(images), structure.channels[1] + 1)
        shapes = zip(structure.sizes, structure.inputs, structure.channels, strict=True)
        kernels = [(size, size, inputs, n) for size, inputs, n in shapes]
        d_weight = [images.new_zeros(len(images), *shape) for shape in kernels]
        d_normed, d_moments = _of_cells(structure, len(images)), _of_channels(structure, len(images))
        point(structure, {"pooled": pooled, "d_score": d_score} | given, maps=maps, raw=raw, d_maps=d_maps)
        means = [norm.mean.float() for norm in ctx.norms]
        point(structure, {}, d_weight=d_weight, d_normed=d_normed, d_moments=d_moments, d_norm=means)
        found: list[Tensor] = []
        with threads(len(images)) as pool:
            _run(structure, pool, len(images), 3)
            for m, phase in ((1, 4), (0, 5)):
                norm, n_cells = ctx.norms[m], raw[m][:, 0].numel()
                plain, along = d_moments[m].sum(0)
                slope = norm.inverse.square() * along / n_cells
                d_norm = torch.stack([norm.mean, plain / n_cells, slope, norm.factor]).float()
                structure.d_norm[m] = d_norm.data_ptr()
                _run(structure, pool, len(images), phase)
                kernel = d_weight[m].sum(0).permute(3, 2, 0, 1)
                found = [kernel, (norm.inverse * along).float(), plain.float(), *found]
        if d_scores is None:  # and not zeros, by which an optimiser would go on
            return None, None, None, None, *found
        summed = d_score.sum(0)
        return None, None, summed[:-1].view(1, -1, 1, 1), summed[-1:], *found


def _run(structure: _Look, pool: Executor | None, n_images: int, phase: int) -> None:
    address = ctypes.addressof(structure)
    if not share_out(pool, lambda *share: _LIBRARY.sparseattn_look(address, *share, phase), n_images):
        raise MemoryError("no memory for the features of an image")


def _of_cells(structure: _Look, n_images: int) -> list[Tensor]:
    """A number for each cell and channel of the maps."""
    shapes = zip(structure.channels, structure.rows, structure.columns, strict=True)
    return [
        torch.empty(n_images, *shape, dtype=torch.float32, memory_format=torch.channels_last)
        for shape in shapes
    ]


def _of_channels(structure: _Look, n_images: int) -> list[Tensor]:
    """Two numbers for each channel."""
    return [torch.empty(n_images, 2, n, dtype=torch.float64) for n in structure.channels]


def _describe(
    images: Tensor, stages: list[_Stage], score: Tensor, bias: Tensor, *learned: Tensor
) -> tuple[_Look, list[Tensor]]:
    """What `_look.c` is given, and the tensors that must live as long."""
    height, width = images.shape[-2:]
    sizes = [height, width]
    strides = [conv.stride[0] for conv, _ in stages]
    shapes, kernels = [], [learned[0], learned[3]]
    for stride in strides:
        sizes = [(n - 1) // stride + 1 for n in sizes]
        shapes.append(sizes)
    weight = [kernel.permute(2, 3, 1, 0).contiguous() for kernel in kernels]
    structure = _Look(
        height=height,
        width=width,
        step=strides[0] * strides[1],
        inputs=_Counts(*(kernel.shape[1] for kernel in kernels)),
        channels=_Counts(*(len(kernel) for kernel in kernels)),
        strides=_Counts(*strides),
        rows=_Counts(*(shape[0] for shape in shapes)),
        columns=_Counts(*(shape[1] for shape in shapes)),
        sizes=_Counts(*(kernel.shape[2] for kernel in kernels)),
    )
    plain = {
        "images": images,
        "back": kernels[1].permute(0, 2, 3, 1).contiguous(),
        "score": torch.cat([score.flatten(), bias]),
    }
    point(structure, plain, weight=weight)
    return structure, [*plain.values(), *weight]


def _normalize(moments: Tensor, n_cells: int, layer: nn.BatchNorm2d) -> tuple[_Norm, Tensor]:
    """Join what the images found; batch norm by that, which notes it, also as an affine map."""
    means, squares = moments.unbind(1)
    n_all = n_cells * len(means)
    mean = means.mean(0)
    spread = squares.sum(0) + n_cells * (means - mean).square().sum(0)
    cast(Tensor, layer.num_batches_tracked).add_(1)
    cast(Tensor, layer.running_mean).lerp_(mean.float(), cast(float, layer.momentum))
    cast(Tensor, layer.running_var).lerp_((spread / (n_all - 1)).float(), cast(float, layer.momentum))
    inverse = (spread / n_all + layer.eps).rsqrt()
    factor = layer.weight * inverse
    return _Norm(mean, inverse, factor), torch.stack([factor, layer.bias - mean * factor]).float()
