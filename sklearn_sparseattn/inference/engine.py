"""The fitted network in compiled code (`sparseattn.h`): fast on a CPU, each image by itself.

An image's result is the same bits whatever else is in the call, in whatever order, on however many threads.
Where there is no compiled code, or the network is not the plain one of this package, there is no engine.
"""

import ctypes
import functools
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..images import CLIP, ImageShape, PixelScale
from ..network import CoarseAttention, FineAttention, FusionClassifier, SparseAttnNet, TileTokens
from .library import KINDS, MOST_LAYERS, Plan, Results, load_or_warn

PARTS = ("coarse", "selection", "tokens", "head")  # whose time is taken

_ALIGNED = 64  # bytes of a line of the cache
_MOST_KEPT = 2**24  # bytes to work in that a thread keeps between calls
_SPANS = 1e-30, 1e300  # of a data range: within, all products are normal numbers
_MOST_VALUES = 2**31 // 8  # of an image: the engine counts them, and its maps, by int32


class Engine:
    """A fitted network, prepared to be run by compiled code.

    Parameters
    ----------
    library : ctypes.CDLL
        The compiled code.
    network : SparseAttnNet
        Fitted; its weights are copied, so that what happens to them later is not seen here.
    image_shape : tuple of (H, W, C)
        Of the images.
    scale : PixelScale
        The map learned in the fit.

    Attributes
    ----------
    seconds : ndarray of shape (4,), float64
        Time spent so far in `PARTS`, if `run` was asked to take it.
    """

    def __init__(
        self, library: Any, network: SparseAttnNet, image_shape: ImageShape, scale: PixelScale
    ) -> None:
        self._library = library
        self._own = threading.local()
        self._kept: list[np.ndarray] = []  # alive as long as the plan that points to them
        self._scale = scale
        self._image_shape = image_shape
        self._count_tiles = functools.partial(network.n_chosen, *image_shape[:2])
        self._n_tiles = math.prod(network.grid_of(*image_shape[:2]))
        self._k = float(network.k)
        self.seconds = np.zeros(len(PARTS))
        self._plan = self._make_plan(network)

    @classmethod
    def of(cls, network: SparseAttnNet, image_shape: ImageShape, scale: PixelScale) -> "Engine | None":
        """Prepare a network, if that is possible.

        Parameters
        ----------
        network : SparseAttnNet
            Fitted.
        image_shape : tuple of (H, W, C)
            Of the images.
        scale : PixelScale
            The map learned in the fit.

        Returns
        -------
        Engine or None
            None if there is no compiled code, if it does not know such large images, so short or long a data
            range or such a network, or if the network is elsewhere than on the CPU.

        Warns
        -----
        UserWarning
            If there should be compiled code and is none, once in the process.
        """
        is_far = not _SPANS[0] < scale.span < _SPANS[1]
        if (
            is_far
            or math.prod(image_shape) > _MOST_VALUES
            or not is_plain(network)
            or not _is_within(network)
        ):
            return None
        library = load_or_warn()
        return None if library is None else cls(library, network, image_shape, scale)

    def run(
        self, images: np.ndarray, *, k: float | None = None, maps: bool = False, timed: bool = False
    ) -> dict[str, np.ndarray]:
        """Run the network on some images, on this thread.

        Parameters
        ----------
        images : ndarray of shape (b, H, W, C)
            As the user has them.
        k : float, default=None
            Pixels to choose; None takes what the network had when the engine was made.
        maps : bool, default=False
            Whether to give the maps and tiles, too.
        timed : bool, default=False
            Whether to add the time to `seconds`; then on one thread at a time.

        Returns
        -------
        dict
            ``failed`` (b,), bool: where there is NaN, or float32 overflowed, and nothing else counts;
            ``logits`` (b, n_classes) and ``features`` (b, n_features), float32. With `maps` also ``scores``
            (b, N) of all tiles, ``tiles`` (b, n), int32, best first, ``attention`` and ``contribution``
            (b, n) of these.

        Raises
        ------
        ValueError
            If the images have another shape than those of the fit.
        MemoryError
            If there is none.
        """
        if images.shape[1:] != self._image_shape:
            raise ValueError(f"images of shape {images.shape[1:]}, not {self._image_shape}, cannot be run.")
        plan, b, n = self._plan, len(images), self._count_tiles(self._k if k is None else k)
        found: dict[str, np.ndarray] = {
            "failed": np.zeros(b, dtype=np.bool_),
            "logits": np.empty((b, plan.n_classes), dtype=np.float32),
            "features": np.empty((b, 2 * plan.embed_dim + 2 * plan.n_middle), dtype=np.float32),
        }
        if maps:
            found["scores"] = np.empty((b, self._n_tiles), dtype=np.float32)
            found["tiles"] = np.zeros((b, n), dtype=np.int32)
            found |= {name: np.empty((b, n), dtype=np.float32) for name in ("attention", "contribution")}
        results = Results(**{name: array.ctypes.data for name, array in found.items()})
        if timed:
            results.seconds = self.seconds.ctypes.data
        if not (images.dtype.name in KINDS and images.dtype.isnative):
            images = images.astype(np.float64)
        images = np.ascontiguousarray(images)
        given = images.ctypes.data, KINDS.index(images.dtype.name)
        scratch = self._scratch(n)
        self._library.sparseattn_run(ctypes.addressof(plan), n, *given, b, ctypes.addressof(results), scratch)
        if maps:
            scores = np.take_along_axis(found["scores"], found["tiles"], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")  # the engine gives them ascending
            for name in ("tiles", "attention", "contribution"):
                found[name] = np.take_along_axis(found[name], order, axis=1)
        return found

    def release(self) -> None:
        """Let go of this thread's memory to work in if it is much; kept, it makes the next call quicker."""
        if len(getattr(self._own, "scratch", ())) > _MOST_KEPT:
            del self._own.scratch, self._own.n, self._own.address

    def _scratch(self, n: int) -> int:
        """Address of memory to work in: this thread's, made once for many calls."""
        if n > getattr(self._own, "n", 0):
            plan = ctypes.addressof(self._plan)
            scratch = np.empty(self._library.sparseattn_scratch(plan, n, None) + _ALIGNED, dtype=np.uint8)
            self._own.scratch, self._own.n, self._own.address = scratch, n, _aligned(scratch)
            self._library.sparseattn_scratch(plan, n, self._own.address)
        return self._own.address

    # ---- the plan ----

    def _keep(self, values: Any, *, columns: int | None = None, rows: int | None = None) -> int:
        """Address of a copy in float32, its last two axes filled up with zeros."""
        array = np.asarray(values, dtype=np.float64)
        padding = [(0, 0)] * array.ndim
        if columns is not None:
            padding[-1] = (0, columns - array.shape[-1])
        if rows is not None:
            padding[-2] = (0, rows - array.shape[-2])
        array = np.ascontiguousarray(np.pad(array, padding), dtype=np.float32)
        kept = np.empty(array.nbytes + _ALIGNED, dtype=np.uint8)
        self._kept.append(kept)
        ctypes.memmove(_aligned(kept), array.ctypes.data, array.nbytes)
        return _aligned(kept)

    def _make_plan(self, network: SparseAttnNet) -> Plan:
        height, width, n_channels = self._image_shape
        coarse, tokens, fine, fusion = network.coarse, network.tokens, network.fine, network.fusion
        assert tokens is not None  # the paper's form has no engine
        early, middle = _convolutions(coarse)
        plan = Plan(
            height=height,
            width=width,
            n_channels=n_channels,
            kernel_size=early.kernel_size[0],
            stride_early=early.stride[0],
            stride_middle=middle.stride[0],
            n_early=early.out_channels,
            n_middle=middle.out_channels,
            embed_dim=fine.key.in_features,
            n_keys=fine.key.out_features,
            n_layers=len(tokens.layers),
            hidden_dim=fusion.out.in_features,
            n_classes=fusion.out.out_features,
            low=self._scale.low,
            span=self._scale.span,
            background=float(coarse.background),
        )
        plan.exact_low, plan.exact_span = self._scale.low, self._scale.span
        plan.least, plan.most = CLIP
        scaled = self._scale(np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1)).ravel()
        plan.bytes = self._keep(scaled.astype(float) - plan.background)
        self._put_coarse(plan, coarse)
        self._put_tokens(plan, tokens)
        self._put_attention(plan, fine, tokens.out, network.fine_norm)
        self._put_head(plan, fusion)
        return plan

    def _put_coarse(self, plan: Plan, coarse: CoarseAttention) -> None:
        n_early, n_middle = _round_up(plan.n_early, 8), _round_up(plan.n_middle, 16)
        factor, offset = _as_affine(coarse.early[1])
        weight = _array(coarse.early[0].weight).transpose(2, 1, 3, 0) * factor
        plan.early = self._keep(_twice(_filled(weight, n_early)))
        plan.early_bias = self._keep(_twice(_filled(offset, n_early)))
        factor, offset = _as_affine(coarse.middle[1])
        weight = _array(coarse.middle[0].weight).transpose(2, 3, 1, 0) * factor
        plan.middle = self._keep(weight, rows=n_early, columns=n_middle)
        plan.middle_bias = self._keep(offset, columns=n_middle)
        weight = _filled(_array(coarse.score.weight).ravel(), n_middle)
        plan.score = self._keep(np.append(weight, _array(coarse.score.bias)))

    def _put_tokens(self, plan: Plan, tokens: TileTokens) -> None:
        columns = _round_up(plan.embed_dim)
        factor, offset = _as_affine(tokens.norms[0])
        place, around, under = np.split(
            (_array(tokens.first.weight) * factor[:, None]).T, [2, 2 + 9 * plan.n_middle]
        )
        around = around.reshape(9, plan.n_middle, -1)
        under = under.reshape(plan.stride_middle**2, plan.n_early, -1)
        rows = [
            place,
            np.pad(around, [(0, 0), (0, _round_up(plan.n_middle, 16) - plan.n_middle), (0, 0)]),
            np.pad(under, [(0, 0), (0, _round_up(plan.n_early, 8) - plan.n_early), (0, 0)]),
        ]
        plan.token = self._keep(
            np.vstack([part.reshape(-1, plan.embed_dim) for part in rows]), columns=columns
        )
        plan.token_bias = self._keep(offset, columns=columns)
        for i, (linear, norm) in enumerate(zip(tokens.layers, tokens.norms[1:], strict=True)):
            factor, offset = _as_affine(norm)
            plan.layers[i] = self._keep((_array(linear.weight) * factor[:, None]).T, columns=columns)
            plan.layer_biases[i] = self._keep(offset, columns=columns)

    def _put_attention(self, plan: Plan, fine: FineAttention, out: nn.Linear, norm: nn.LayerNorm) -> None:
        key, value, cls = _array(fine.key.weight), _array(fine.value.weight), _array(fine.cls_token).ravel()
        weight, bias = _array(out.weight), _array(out.bias)
        plan.key_epsilon, plan.norm_epsilon = fine.epsilon, norm.eps
        columns = _round_up(plan.n_keys)
        plan.key = self._keep((key @ weight).T, columns=columns)
        plan.key_bias = self._keep(key @ bias, columns=columns)
        plan.cls_key = self._keep(np.maximum(key @ cls, 0) + fine.epsilon, columns=columns)
        plan.query = self._keep(_array(fine.query.weight) @ cls / fine.n_heads, columns=columns)
        columns = _round_up(plan.embed_dim)
        plan.value = self._keep((value @ weight).T, columns=columns)
        plan.value_bias = self._keep(value @ bias, columns=columns)
        plan.cls_value = self._keep(value @ cls, columns=columns)
        plan.norm_weight = self._keep(_array(norm.weight))
        plan.norm_bias = self._keep(_array(norm.bias))

    def _put_head(self, plan: Plan, fusion: FusionClassifier) -> None:
        columns = _round_up(plan.hidden_dim)
        assert fusion.norm is not None  # only the paper's form has none
        before: Any = _as_affine(fusion.norm)
        layers: dict[str, Any] = {"first": fusion.first, "residual": fusion.residual}
        for name, (linear, norm, _) in layers.items():
            factor, offset = _as_affine(norm)
            weight = _array(linear.weight) * factor[:, None]
            if before is not None:
                weight, offset = weight * before[0], offset + weight @ before[1]
            before = None
            setattr(plan, name, self._keep(weight.T, columns=columns))
            setattr(plan, f"{name}_bias", self._keep(offset, columns=columns))
        columns = _round_up(plan.n_classes)
        plan.last = self._keep(_array(fusion.out.weight).T, columns=columns)
        plan.last_bias = self._keep(_array(fusion.out.bias), columns=columns)


def _aligned(memory: np.ndarray) -> int:
    """Address in it from which on vectors do not straddle the lines of the cache."""
    return -(-memory.ctypes.data // _ALIGNED) * _ALIGNED


def _round_up(n: int, step: int = 32) -> int:
    return -(-n // step) * step


def _array(tensor: Any) -> npt.NDArray[np.float64]:
    return tensor.detach().double().numpy()


def _filled(array: np.ndarray, n: int) -> np.ndarray:
    """The last axis filled up with zeros."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, n - array.shape[-1])])


def _twice(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)


def _as_affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Batch norm in evaluation as a factor and an offset."""
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    factor = _array(norm.weight) / np.sqrt(variance + norm.eps)
    return factor, _array(norm.bias) - mean * factor


def _is_within(network: SparseAttnNet) -> bool:
    """Whether the compiled code has this form of a plain network."""
    tokens, coarse = network.tokens, network.coarse
    if tokens is None or len(tokens.layers) > MOST_LAYERS:
        return False
    return {layer.stride[0] for layer in _convolutions(coarse)} <= {1, 2}


def _convolutions(coarse: CoarseAttention) -> list[nn.Conv2d]:
    stages: tuple[Any, ...] = (coarse.early, coarse.middle)
    return [stage[0] for stage in stages]


def is_plain(network: SparseAttnNet) -> bool:
    """Tell whether a network is what its form and its weights say: on the CPU, nothing replaced or hooked in.

    Parameters
    ----------
    network : SparseAttnNet
        Fitted.

    Returns
    -------
    bool
        If so, its form and its weights are all there is to it.
    """
    with torch.device("meta"):
        twin = SparseAttnNet(k=1, **network.form)
    return (
        str(network) == str(twin)
        and all(_is_alike(*pair) for pair in zip(network.modules(), twin.modules(), strict=True))
        and {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}
    )


def _is_alike(module: nn.Module, other: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return (
        type(module) is type(other)
        and vars(module).keys() == vars(other).keys()
        and not any(getattr(module, name) for name in hooks)
    )
