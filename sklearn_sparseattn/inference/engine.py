"""The fitted network in compiled code (`_engine.c`): fast on a CPU, each image by itself.

An image's result is the same bits whatever else is in the call, in whatever order, on however many threads.
Where there is no compiled code, or the network is not the plain one of this package, there is no engine.
"""

import ctypes
import importlib.util
import itertools
import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..images import ImageShape, PixelScale
from ..network import CoarseAttention, FusionClassifier, SparseAttnNet
from ..network.branch import MOST_PIXELS
from ..network.compiled import is_stale
from ..network.fine import EPSILON
from ..network.selection import turns

PARTS = ("coarse", "selection", "tokens", "head")  # whose time is taken

_LANES = 8
_ALIGNED = 64  # bytes of a line of the cache
_MOST_KEPT = 2**24  # bytes to work in that a thread keeps between calls
_MOST_LAYERS, _N_CONTEXT = 5, 2


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int32, "n_inputs", "n_outputs", "stride", "size"),
        *_fields(ctypes.c_void_p, "weight", "bias"),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_int32, "height", "width", "n_channels", "k"),
        *_fields(ctypes.c_int32, "n_embed", "n_pooled", "n_classes"),
        *_fields(ctypes.c_int32, "embed_dim", "key_dim", "hidden_dim", "n_logits"),
        *_fields(ctypes.c_int32, "n_layers", "has_context", "normalizes"),
        ("shifts", ctypes.c_int32 * _N_CONTEXT),
        ("ends", ctypes.c_int32 * _N_CONTEXT),
        *_fields(ctypes.c_float, "key_epsilon", "norm_epsilon", "margin"),
        ("background", ctypes.c_double),
        ("layers", _Layer * _MOST_LAYERS),
        *_fields(ctypes.c_void_p, "bytes", "score", "position"),
        ("depthwise", ctypes.c_void_p * _N_CONTEXT),
        ("context", ctypes.c_void_p * _N_CONTEXT),
        *_fields(ctypes.c_void_p, "turns", "zeros"),
        *_fields(ctypes.c_void_p, "key", "key_bias", "cls_key", "query", "mean_key"),
        *_fields(ctypes.c_void_p, "embed", "embed_bias", "cls", "value", "norm_weight", "norm_bias"),
        *_fields(ctypes.c_void_p, "first", "first_bias", "residual", "residual_bias", "last", "last_bias"),
    ]


class _Results(ctypes.Structure):
    _fields_ = _fields(
        ctypes.c_void_p,
        *("logits", "features", "scores", "pixels", "attention", "contribution", "failed", "seconds"),
    )


def _load_library() -> Any:
    """The compiled code, if it was built with the package; else None."""
    spec = importlib.util.find_spec("._engine", __package__)
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    sizes = [ctypes.c_int64(), ctypes.c_int64()]
    library.sparseattn_sizes(*(ctypes.byref(size) for size in sizes))
    if [size.value for size in sizes] != [ctypes.sizeof(_Plan), ctypes.sizeof(_Results)] or is_stale(library):
        raise ImportError(f"{spec.origin} was built from other sources: install sklearn-sparseattn again.")
    library.sparseattn_run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] + [ctypes.c_void_p] * 2
    library.sparseattn_run.restype = None
    library.sparseattn_scratch.argtypes = [ctypes.c_void_p] * 2
    library.sparseattn_scratch.restype = ctypes.c_int64
    return library


_LIBRARY = _load_library()


class Engine:
    """A fitted network, prepared to be run by compiled code.

    Parameters
    ----------
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

    def __init__(self, network: SparseAttnNet, image_shape: ImageShape, scale: PixelScale) -> None:
        self._own = threading.local()
        self._kept: list[np.ndarray] = []  # alive as long as the plan that points to them
        self._scale = scale
        self._background = float(network.coarse.background)
        self._image_shape = image_shape
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
            None if there is no compiled code, the images are too large for it, or the network is elsewhere
            than on the CPU or not the plain one.
        """
        if _LIBRARY is None or math.prod(image_shape[:2]) > MOST_PIXELS or not is_plain(network):
            return None
        if network.form["margins"]:  # of model files of version 2: PyTorch computes them
            return None
        return cls(network, image_shape, scale)

    def run(self, images: np.ndarray, *, maps: bool = False, timed: bool = False) -> dict[str, np.ndarray]:
        """Run the network on some images, on this thread.

        Parameters
        ----------
        images : ndarray of shape (b, H, W, C)
            As the user has them.
        maps : bool, default=False
            Whether to give the maps and pixels, too.
        timed : bool, default=False
            Whether to add the time to `seconds`; then on one thread at a time.

        Returns
        -------
        dict
            ``failed`` (b,), bool: where float32 overflowed and nothing else counts; ``logits`` (b, n_classes)
            and ``features`` (b, n_features), float32. With `maps` also ``scores`` (b, H * W), ``pixels``
            (b, k), int32 and ascending, ``attention`` and ``contribution`` (b, k).

        Raises
        ------
        ValueError
            If the images have another shape than those of the fit, or values so far outside the range of the
            fit that they overflow when scaled.
        MemoryError
            If there is none.
        """
        if images.shape[1:] != self._image_shape:
            raise ValueError(f"images of shape {images.shape[1:]}, not {self._image_shape}, cannot be run.")
        plan, n = self._plan, len(images)
        found: dict[str, np.ndarray] = {
            "failed": np.zeros(n, dtype=np.bool_),
            "logits": np.empty((n, plan.n_classes), dtype=np.float32),
            "features": np.empty((n, plan.n_embed + plan.n_pooled), dtype=np.float32),
        }
        if maps:
            found["scores"] = np.empty((n, plan.height * plan.width), dtype=np.float32)
            found["pixels"] = np.empty((n, plan.k), dtype=np.int32)
            found |= {name: np.empty((n, plan.k), dtype=np.float32) for name in ("attention", "contribution")}
        results = _Results(**{name: array.ctypes.data for name, array in found.items()})
        if timed:
            results.seconds = self.seconds.ctypes.data
        if images.dtype == np.uint8 and self._bytes_are_finite:
            images = np.ascontiguousarray(images)
            given: tuple[int | None, int | None] = (images.ctypes.data, None)
        else:
            images = self._scale.finite(images)
            given = (None, images.ctypes.data)
        scratch = self._scratch()
        _LIBRARY.sparseattn_run(ctypes.addressof(plan), *given, n, ctypes.addressof(results), scratch)
        return found

    def release(self) -> None:
        """Let go of this thread's memory to work in if it is much; kept, it makes the next call quicker."""
        if len(getattr(self._own, "scratch", ())) > _MOST_KEPT:
            del self._own.scratch

    def _scratch(self) -> int:
        """Address of memory to work in: this thread's, made once for many calls."""
        if not hasattr(self._own, "scratch"):
            plan = ctypes.addressof(self._plan)
            scratch = np.empty(_LIBRARY.sparseattn_scratch(plan, None) + _ALIGNED, dtype=np.uint8)
            _LIBRARY.sparseattn_scratch(plan, _aligned(scratch))
            self._own.scratch = scratch
        return _aligned(self._own.scratch)

    # ---- the plan ----

    def _keep(
        self, values: Any, *, rows: int | None = None, columns: int | None = None, dtype: Any = np.float32
    ) -> int:
        """Address of a copy, its last two axes filled up with zeros."""
        array = np.asarray(values, dtype=dtype)
        padding = [(0, 0)] * array.ndim
        if columns is not None:
            padding[-1] = (0, columns - array.shape[-1])
        if rows is not None:
            padding[-2] = (0, rows - array.shape[-2])
        array = np.ascontiguousarray(np.pad(array, padding))
        self._kept.append(array)
        return array.ctypes.data

    def _make_plan(self, network: SparseAttnNet) -> _Plan:
        height, width, n_channels = self._image_shape
        fine, fusion = network.fine, network.fusion
        n_embed, n_keys = fine.key.in_features, fine.key.out_features
        plan = _Plan(
            height=height,
            width=width,
            n_channels=n_channels,
            k=network.n_chosen(height * width),
            n_embed=n_embed,
            n_pooled=network.coarse.n_features,
            n_classes=fusion.out.out_features,
            embed_dim=_round_up(n_embed),
            key_dim=_round_up(n_keys, 2 * _LANES),
            hidden_dim=_round_up(fusion.out.in_features),
            n_logits=_round_up(fusion.out.out_features),
            has_context=network.context is not None,
            margin=network.form["margin"],
            n_layers=len(_layers(network.coarse)),
            normalizes=isinstance(network.fine_norm, nn.LayerNorm),
        )
        with np.errstate(over="ignore"):
            bytes_scaled = self._scale(np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1))
        self._bytes_are_finite = bool(np.isfinite(bytes_scaled).all())
        plan.background = self._background
        plan.bytes = self._keep(bytes_scaled.ravel().astype(float) - self._background, dtype=np.float64)
        self._put_coarse(plan, network.coarse)
        self._put_tokens(plan, network)
        self._put_attention(plan, network)
        self._put_head(plan, fusion)
        return plan

    def _put_coarse(self, plan: _Plan, coarse: CoarseAttention) -> None:
        n_inputs = plan.n_channels
        for layer, (convolution, norm, _) in zip(plan.layers, _layers(coarse), strict=False):
            factor, offset = _as_affine(norm)
            weight = _array(convolution.weight)
            layer.n_inputs, layer.n_outputs = n_inputs, _round_up(len(weight))
            layer.stride, layer.size = convolution.stride[0], convolution.kernel_size[0]
            filled: dict[str, Any] = {"columns": layer.n_outputs, "dtype": np.float64}
            layer.weight = self._keep(_by_position(weight) * factor, rows=n_inputs, **filled)
            layer.bias = self._keep(offset, **filled)
            n_inputs = layer.n_outputs
        plan.ends[:] = np.cumsum([len(stage) for stage in coarse.stages()[:_N_CONTEXT]]) - 1
        n_middle = plan.layers[plan.ends[1]].n_outputs
        weight = np.pad(_array(coarse.score.weight).ravel(), (0, n_middle))
        plan.score = self._keep(np.append(weight[:n_middle], _array(coarse.score.bias)))
        plan.shifts[:] = [step.bit_length() - 1 for step in coarse.steps[:_N_CONTEXT]]

    def _put_tokens(self, plan: _Plan, network: SparseAttnNet) -> None:
        first = network.embedding.first
        weight = _array(first.weight)  # of place and values, and the latter lack the background
        rows = np.vstack([weight.T, _array(first.bias) + self._background * weight[:, 2:].sum(1)])
        plan.position = self._keep(rows, columns=plan.embed_dim)
        if network.context is not None:
            for m, convolution in enumerate(network.context.convolve):
                *depthwise, weight = map(_array, convolution.parameters())
                n_channels = plan.layers[plan.ends[m]].n_outputs
                if depthwise:
                    plan.depthwise[m] = self._keep(depthwise[0].reshape(-1, 9).T, columns=n_channels)
                plan.context[m] = self._keep(_by_position(weight), rows=n_channels, columns=plan.embed_dim)
            if network.form["spread"] > 0:
                tile = network.form["spread"] * turns(network.coarse.steps[1])
                plan.turns = self._keep(np.tile(tile, _LANES // len(tile)))

    def _put_attention(self, plan: _Plan, network: SparseAttnNet) -> None:
        fine, out = network.fine, network.embedding.out
        key, cls = _array(fine.key.weight), _array(fine.cls_token)[0, 0]
        columns = plan.key_dim
        plan.key_epsilon = EPSILON
        plan.key = self._keep((key @ _array(out.weight)).T, columns=columns)
        plan.key_bias = self._keep(key @ _array(out.bias), columns=columns)
        plan.cls_key = self._keep(np.maximum(key @ cls, 0) + EPSILON, columns=columns)
        plan.query = self._keep(_array(fine.query.weight) @ cls / fine.n_heads, columns=columns)
        plan.mean_key = self._keep(np.full(len(key), 1 / len(key)), columns=columns)
        columns = plan.embed_dim
        plan.zeros = self._keep(np.zeros(columns))
        plan.embed = self._keep(_array(out.weight).T, columns=columns)
        plan.embed_bias = self._keep(_array(out.bias), columns=columns)
        plan.cls = self._keep(cls, columns=columns)
        plan.value = self._keep(_array(fine.value.weight).T, columns=columns)
        if isinstance(network.fine_norm, nn.LayerNorm):
            plan.norm_weight = self._keep(_array(network.fine_norm.weight))
            plan.norm_bias = self._keep(_array(network.fine_norm.bias))
            plan.norm_epsilon = network.fine_norm.eps

    def _put_head(self, plan: _Plan, fusion: FusionClassifier) -> None:
        layers: dict[str, Any] = {"first": fusion.first, "residual": fusion.residual}
        for name, (linear, norm, _) in layers.items():
            factor, offset = _as_affine(norm)
            weight = (_array(linear.weight) * factor[:, None]).T
            rows = plan.hidden_dim if name == "residual" else None
            setattr(plan, name, self._keep(weight, rows=rows, columns=plan.hidden_dim))
            setattr(plan, f"{name}_bias", self._keep(offset, columns=plan.hidden_dim))
        weight = _array(fusion.out.weight).T
        plan.last = self._keep(weight, rows=plan.hidden_dim, columns=plan.n_logits)
        plan.last_bias = self._keep(_array(fusion.out.bias), columns=plan.n_logits)


def _aligned(scratch: np.ndarray) -> int:
    """Address in it from which on vectors do not straddle the lines of the cache."""
    return -(-scratch.ctypes.data // _ALIGNED) * _ALIGNED


def _round_up(n: int, step: int = _LANES) -> int:
    return -(-n // step) * step


def _array(tensor: Any) -> npt.NDArray[np.float64]:
    return tensor.detach().double().numpy()


def _by_position(weight: np.ndarray) -> np.ndarray:
    """(outputs, inputs, n, n) -> (n * n, inputs, outputs)."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[1], len(weight))


def _as_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """Batch norm in evaluation as a factor and an offset."""
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    factor = _array(norm.weight) / np.sqrt(variance + norm.eps)
    return factor, _array(norm.bias) - mean * factor


def is_plain(network: SparseAttnNet) -> bool:
    """Tell whether `_engine.c` computes this: on the CPU, nothing replaced, nothing hooked in.

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
        and all(layer[0].stride[0] in (1, 2) for layer in _layers(network.coarse))
        and {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}
    )


def _is_alike(module: nn.Module, other: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return (
        type(module) is type(other)
        and vars(module).keys() == vars(other).keys()
        and not any(getattr(module, name) for name in hooks)
    )


def _layers(coarse: CoarseAttention) -> list[Any]:
    """Convolutions with their batch norms and ReLUs, in order."""
    return list(itertools.chain.from_iterable(coarse.stages()))
