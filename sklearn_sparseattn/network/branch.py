"""Selection and the sparse branch in compiled code (`_branch.c`), for training on a CPU, with gradients.

It computes what `SparseAttnNet` says in PyTorch, an image at a time, so that the tokens of an image stay in
the cache: several times as fast, with little memory, and the same bits with any number of threads.
"""

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compiled import LANES, load_library, point, share_out, threads
from .fine import EPSILON

_N_MAPS = 2
MOST_PIXELS = 2**30  # of an image: they are counted in int32
_Maps = ctypes.c_void_p * _N_MAPS
_Counts = ctypes.c_int32 * _N_MAPS
_LEARNED = ("d_first", "d_first_bias", "d_key", "d_key_bias", "d_query", "d_cls_key")


class _Branch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("height", "width", "n_channels", "k", "embed_dim", "key_dim")),
        *((name, _Counts) for name in ("rows", "columns", "channels", "steps")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("images", "pixels", "gates")),
        ("maps", _Maps),
        *((name, ctypes.c_void_p) for name in ("first", "first_bias")),
        *((name, _Maps) for name in ("depthwise", "pointwise", "pointwise_back")),
        *((name, ctypes.c_void_p) for name in ("key", "key_bias", "key_back", "query", "cls_key")),
        *(
            (name, ctypes.c_void_p)
            for name in ("pooled", "weight", "cls_weight", "attention", "contribution")
        ),
        *((name, ctypes.c_void_p) for name in ("d_pooled", "d_weight", "d_cls_weight", "d_gates")),
        ("d_maps", _Maps),
        ("apart", ctypes.c_int64),
        *((name, _Maps) for name in ("d_depthwise", "d_pointwise")),
        *((name, ctypes.c_void_p) for name in _LEARNED),
    ]


def _load_library() -> Any:
    """The compiled code, if it was built with the package; else None."""
    library = load_library("branch", _Branch)
    if library is not None:
        library.sparseattn_select.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
        ]
    return library


_LIBRARY = _load_library()


def is_compiled(images: Tensor, channels: Sequence[int], embed_dim: int, key_dim: int) -> bool:
    """Whether the compiled branch can do these images.

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W)
        The images.
    channels : sequence of int
        Of the maps that tokens look at.
    embed_dim, key_dim : int
        Widths of a token and of its keys.

    Returns
    -------
    bool
        True for float32 on a CPU, images without gradient and not too large, and widths that fill vectors.
    """
    return (
        _LIBRARY is not None
        and images.device.type == "cpu"
        and images.dtype == torch.float32
        and not images.requires_grad
        and images.shape[-2:].numel() <= MOST_PIXELS
        and len(channels) == _N_MAPS
        and embed_dim % LANES == key_dim % (2 * LANES) == 0
        and all(n % LANES == 0 for n in channels)
    )


def select(scores: Tensor, k: int) -> Tensor | None:
    """Choose pixels as `select_pixel_set` does, in compiled code.

    Parameters
    ----------
    scores : Tensor of shape (B, N)
        One score a pixel.
    k : int
        Pixels to choose, 1 <= k <= N.

    Returns
    -------
    indices : Tensor of shape (B, k), int64, or None
        Ascending; None if compiled code cannot do it: elsewhere than on a CPU, not in float32, not finite,
        or too many.
    """
    if _LIBRARY is None or scores.device.type != "cpu" or scores.dtype != torch.float32:
        return None
    n_images, n_pixels = scores.shape
    if n_pixels > MOST_PIXELS:
        return None
    scores = scores.contiguous()
    indices = torch.empty(n_images, k, dtype=torch.int64)

    def select_some(begin: int, end: int) -> int:
        given, found = scores[begin:].data_ptr(), indices[begin:].data_ptr()
        return _LIBRARY.sparseattn_select(given, end - begin, n_pixels, k, found)

    with threads(n_images) as pool:
        return indices if share_out(pool, select_some, n_images) else None


class TokenBranch(torch.autograd.Function):
    """Chosen pixels -> their pooled tokens; the mathematics is in `SparseAttnNet` and `FineAttention`.

    With h_j the gated hidden token of pixel j and w_j its signed weight, the results are the sum of w_j h_j,
    that of w_j, and the weight of the CLS token; and, without gradients, attention and contribution.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        pixels: Tensor,
        steps: tuple[int, ...],
        gates: Tensor,
        *learned: Tensor,
    ) -> tuple[Tensor, ...]:
        """`learned` are maps, their kernels, W1, b1, keys, their bias, then query and key of the CLS token.

        Of kernels there are two a map, 3x3 and 1x1. Weights are as PyTorch's layers have them; the rest as in
        `_branch.c`.
        """
        ctx.save_for_backward(images, pixels, gates, *learned)
        ctx.steps = steps
        branch, _ = _describe(images, pixels, steps, gates, *learned)
        n_images, k = pixels.shape
        results = {
            "pooled": images.new_empty(n_images, branch.embed_dim),
            "weight": images.new_empty(n_images, 1),
            "cls_weight": images.new_empty(n_images, 1),
            "attention": images.new_empty(n_images, k),
            "contribution": images.new_empty(n_images, k),
        }
        point(branch, results)
        _run(branch, n_images, is_back=False)
        results["attention"] /= branch.key_dim
        ctx.mark_non_differentiable(results["attention"], results["contribution"])
        return tuple(results.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weights come by image and are summed here, in an order that never changes."""
        images, pixels, *rest = ctx.saved_tensors
        branch, kept = _describe(images, pixels, ctx.steps, *rest)
        n_images, k = pixels.shape
        size, numbers, n_keys = branch.embed_dim, 2 + branch.n_channels, branch.key_dim
        given = dict(zip(("d_pooled", "d_weight", "d_cls_weight"), gradients[:3], strict=True))
        given = {name: gradient.contiguous() for name, gradient in given.items()}
        d_gates = images.new_empty(n_images, k)
        d_maps = [torch.empty_like(cells) for cells in kept[:_N_MAPS]]
        point(branch, given | {"d_gates": d_gates}, d_maps=d_maps)
        shapes = [shape for n in branch.channels for shape in ((9, n), (n, size))]
        shapes += [(numbers, size), (1, size), (size, n_keys), (1, n_keys), (1, n_keys), (1, n_keys)]
        lengths = [math.prod(shape) for shape in shapes]
        by_image = images.new_zeros(n_images, sum(lengths))
        ends = itertools.accumulate(lengths)
        starts = [by_image[0, end - n :].data_ptr() for n, end in zip(lengths, ends, strict=True)]
        branch.d_depthwise[:], branch.d_pointwise[:] = starts[: 2 * _N_MAPS : 2], starts[1 : 2 * _N_MAPS : 2]
        for name, start in zip(_LEARNED, starts[2 * _N_MAPS :], strict=True):
            setattr(branch, name, start)
        branch.apart = by_image.shape[1]
        _run(branch, n_images, is_back=True)
        summed = by_image.sum(0).split(lengths)
        parts = [part.view(shape).T for part, shape in zip(summed, shapes, strict=True)]
        kernels = [part.reshape(like.shape) for part, like in zip(parts, rest[1 + _N_MAPS :], strict=True)]
        return (
            *(None, None, None, d_gates),
            *(cells.permute(0, 3, 1, 2) for cells in d_maps),
            *kernels,
        )


def _describe(
    images: Tensor,
    pixels: Tensor,
    steps: tuple[int, ...],
    gates: Tensor,
    *learned: Tensor,
) -> tuple[_Branch, list[Tensor]]:
    """What `_branch.c` is given, and the tensors that must live as long; the maps come first among these."""
    _, n_channels, height, width = images.shape
    coarse_maps, kernels = learned[:_N_MAPS], learned[_N_MAPS : 3 * _N_MAPS]
    first, first_bias, key, key_bias, query, cls_key = learned[3 * _N_MAPS :]
    maps = [cells.permute(0, 2, 3, 1).contiguous() for cells in coarse_maps]
    depthwise = [kernel.flatten(1).T.contiguous() for kernel in kernels[::2]]
    back = [kernel.flatten(1).contiguous() for kernel in kernels[1::2]]
    pointwise = [kernel.T.contiguous() for kernel in back]
    plain = {
        "images": images,
        "pixels": pixels,
        "gates": gates,
        "first": first.T,
        "first_bias": first_bias,
        "key": key.T,
        "key_bias": key_bias,
        "key_back": key,
        "query": query,
        "cls_key": cls_key,
    }
    plain = {name: tensor.contiguous() for name, tensor in plain.items()}
    branch = _Branch(
        height=height,
        width=width,
        n_channels=n_channels,
        k=pixels.shape[1],
        embed_dim=len(first),
        key_dim=len(key),
        rows=_Counts(*(cells.shape[1] for cells in maps)),
        columns=_Counts(*(cells.shape[2] for cells in maps)),
        channels=_Counts(*(cells.shape[3] for cells in maps)),
        steps=_Counts(*steps[:_N_MAPS]),
        epsilon=EPSILON,
    )
    point(branch, plain, maps=maps, depthwise=depthwise, pointwise=pointwise, pointwise_back=back)
    return branch, [*maps, *depthwise, *pointwise, *back, *plain.values()]


def _run(branch: _Branch, n_images: int, *, is_back: bool) -> None:
    address = ctypes.addressof(branch)
    with threads(n_images) as pool:
        done = share_out(pool, lambda *share: _LIBRARY.sparseattn_branch(address, *share, is_back), n_images)
    if not done:
        raise MemoryError("no memory for the tokens of an image")
