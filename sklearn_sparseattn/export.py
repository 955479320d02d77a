"""A fitted classifier as an ONNX model: images as the user has them in, probabilities out.

Needs onnx (extra ``onnx``). The graph is written node by node. All sizes but the number of images are static,
and batch norms are folded into the layers before them.
"""

import copy
import json
import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_is_fitted

from .classifier import SparseAttnClassifier
from .files import package_version, resolve_target, write_whole
from .images import CLIP, ImageShape
from .inference import is_plain
from .network.selection import LEAST, n_closing
from .parameters import capped, check_predict_k, to_pixels
from .persistence import plain_labels
from .threads import safe_after_fork

_DTYPES = ("uint8", "uint16", "float32")
_OPSET, _IR_VERSION = 18, 8  # of 2022: runtimes of all platforms know them

Size = tuple[int, int]  # rows and columns


@safe_after_fork()
def export_onnx(
    estimator: SparseAttnClassifier, path: str | os.PathLike[str], *, dtype: str | None = None
) -> None:
    """Write a fitted classifier as an ONNX model, for programs without Python.

    The input ``images`` of any number n of images is (n, H, W), in colour (n, H, W, C), in the units of the
    training images; the output ``probabilities`` is (n, n_classes), float32. The metadata of the model holds
    ``classes``, ``image_shape`` (H, W, C), ``data_range``, ``tile`` (pixels along its side) and ``n_tiles``
    (chosen of each image), as JSON. The file is written whole or not at all.

    Parameters
    ----------
    estimator : SparseAttnClassifier
        Fitted, on whatever device. Its `predict_k` at this moment counts.
    path : str or path
        Of the file, by custom with the ending ".onnx", which is not added.
    dtype : {"uint8", "uint16", "float32"}, default=None
        Of the input. None is "uint8" if `data_range_` is (0, 255), and "float32" otherwise.

    Raises
    ------
    TypeError
        If it is another estimator.
    NotFittedError
        Before `fit`.
    ImportError
        If onnx is not installed.
    ValueError
        If `dtype` is another one, layers of ``network_`` were replaced, or the labels are neither numbers of
        up to 64 bits nor text, dates for one.
    OSError
        If the file cannot be written, for a full disk for one.

    See Also
    --------
    save_model : Keeps the whole estimator.

    Notes
    -----
    A runtime adds in another order than this package does, so that probabilities differ in their last digits.
    With ``variant="paper"``, where the scores of two pixels differ by less than that, the other one may be
    chosen. A runtime that rounds to half precision by itself, as OpenVINO does on some processors, must be
    told not to (``{"INFERENCE_PRECISION_HINT": "f32"}``). The model does not look for NaN, or for images in
    other units.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from sklearn_sparseattn import SparseAttnClassifier, export_onnx
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(40, modality="brightfield", n_classes=2, image_size=16, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images, cells.target)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(clf, Path(folder) / "cells.onnx")
    """
    path = resolve_target(path)
    if not isinstance(estimator, SparseAttnClassifier):
        raise TypeError(f"export_onnx takes a SparseAttnClassifier, not {type(estimator).__name__}.")
    check_is_fitted(estimator, "network_")
    shape, data_range = estimator.image_shape_, estimator.data_range_
    if dtype is None:
        dtype = "uint8" if tuple(data_range) == (0, 255) else "float32"
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be None or one of {_DTYPES}.")
    try:
        labels = plain_labels(estimator.classes_)
    except ValueError as error:
        raise ValueError(f"This classifier cannot be exported: {error}") from error
    network: Any = copy.deepcopy(estimator.network_).cpu()
    if not is_plain(network):
        raise ValueError("network_ is not as the fit made it: a replaced layer cannot be exported.")
    try:
        import onnx
    except ImportError as error:
        raise ImportError("export_onnx needs onnx: pip install 'sklearn-sparseattn[onnx]'") from error

    k = estimator.predict_k
    if k is not None:
        check_predict_k(k)
        k = to_pixels(capped(k, shape[0] * shape[1]), network.area_of(*shape[:2]))
    n_chosen = network.n_chosen(*shape[:2], k)
    graph = _Graph(onnx)
    images = _scaled(graph, shape, data_range)
    probabilities = _probabilities(graph, network.double().eval(), images, shape, n_chosen)
    own = ["n", *(shape[:2] if shape[2] == 1 else shape)]
    model = graph.finish(dtype, own, probabilities, len(estimator.classes_))
    facts = {
        "classes": labels,
        "image_shape": shape,
        "data_range": data_range,
        "tile": network.tile,
        "n_tiles": n_chosen,
    }
    onnx.helper.set_model_props(model, {name: json.dumps(fact) for name, fact in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    write_whole(path, model.SerializeToString())


class _Graph:
    """Nodes and constants; what an operation gives is known by its name."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, values: Any, dtype: npt.DTypeLike = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.array(values, dtype=dtype, order="C")
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def whole(self, *values: int) -> str:
        """A vector of int64."""
        return self.constant(values, np.int64)

    def add(self, operation: str, *inputs: str, n_outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; gives the name of its output, or their list."""
        names = [f"{operation}_{len(self.nodes)}_{i}" for i in range(n_outputs)]
        self.nodes.append(self.onnx.helper.make_node(operation, inputs, names, **attributes))
        return names[0] if n_outputs == 1 else names

    def linear(self, values: str, weight: Any, bias: Any) -> str:
        """Values @ weight.T + bias."""
        return self.add("Add", self.add("MatMul", values, self.constant(weight.T)), self.constant(bias))

    def convolve(self, maps: str, weight: Any, bias: Any, stride: int = 1) -> str:
        size = weight.shape[2]
        return self.add(
            "Conv",
            *(maps, self.constant(weight), self.constant(bias)),
            kernel_shape=[size, size],
            pads=[size // 2] * 4,
            strides=[stride, stride],
        )

    def sum(self, values: str) -> str:
        """Sum over the last axis, which stays."""
        return self.add("ReduceSum", values, self.whole(-1), keepdims=1)

    def running_sum(self, counts: str) -> str:
        """Of (n, N), along the last axis."""
        return self.add("CumSum", counts, self.constant(1, np.int64))

    def counts(self, flags: str) -> str:
        """Booleans as int64."""
        return self.add("Cast", flags, to=self.onnx.TensorProto.INT64)

    def column(self, values: str, place: int) -> str:
        """(n, N) -> (n, 1)."""
        return self.add("Gather", values, self.whole(place), axis=1)

    def table(self, maps: str, before: int = 0, after: Size = (0, 0)) -> str:
        """(n, channels, rows, columns), with zeros before and after each axis -> (n, cells, channels)."""
        if before or any(after):
            maps = self.add("Pad", maps, self.whole(0, 0, before, before, 0, 0, *after))
        flat = self.add("Reshape", maps, self.whole(0, 0, -1))
        return self.add("Transpose", flat, perm=[0, 2, 1])

    def rows_of(self, table: str, index: str) -> str:
        """Of each image's table (n, N) or (n, N, channels), the rows at index (n, ...)."""
        return self.add("GatherND", table, self.add("Unsqueeze", index, self.whole(-1)), batch_dims=1)

    def finish(self, dtype: str, shape: list[Any], output: str, n_classes: int) -> Any:
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        self.nodes.append(helper.make_node("Identity", [output], ["probabilities"]))
        graph = helper.make_graph(
            self.nodes,
            "sklearn_sparseattn",
            [helper.make_tensor_value_info("images", getattr(kinds, dtype.upper().replace("32", "")), shape)],
            [helper.make_tensor_value_info("probabilities", kinds.FLOAT, ["n", n_classes])],
            self.constants,
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="sklearn-sparseattn",
            producer_version=package_version(),
        )


# ---- the parts, in the order of the network; it comes in float64 ----


def _array(tensor: Any) -> npt.NDArray[np.float64]:
    return tensor.detach().numpy()


def _scaled(graph: _Graph, shape: ImageShape, data_range: tuple[float, float]) -> str:
    """Images (n, C, H, W), about in [0, 1]."""
    low, high = data_range
    images = graph.add("Cast", "images", to=graph.onnx.TensorProto.FLOAT)
    images = graph.add("Sub", images, graph.constant(low))
    # Not a division: a runtime may make it a product with a rounded factor, an error of the same sign in all
    # pixels. With a factor of 8 bits the product is exact for integers, and the rest of the factor is small.
    factor = 1 / (high - low)
    mantissa, exponent = math.frexp(factor)
    main = math.ldexp(round(mantissa * 2**8), exponent - 8)
    parts = [graph.add("Mul", images, graph.constant(part)) for part in (main, factor - main)]
    images = graph.add("Add", *parts)
    if rest := float(np.float32(low)) - low:  # what float32 cannot hold of `low`
        images = graph.add("Add", images, graph.constant(rest * factor))
    images = graph.add("Clip", images, *(graph.constant(end) for end in CLIP))
    if shape[2] == 1:
        return graph.add("Unsqueeze", images, graph.whole(1))
    return graph.add("Transpose", images, perm=[0, 3, 1, 2])


def _probabilities(graph: _Graph, network: Any, images: str, shape: ImageShape, n_chosen: int) -> str:
    """Probabilities (n, n_classes) of images (n, C, H, W), by their `n_chosen` best tiles."""
    size = network.grid_of(*shape[:2])
    early, middle, deep = _coarse_maps(graph, network.coarse, images)
    score = network.coarse.score
    scores = graph.convolve(middle, _array(score.weight), _array(score.bias))
    if network.embedding is not None:
        scores = _between_cells(graph, scores, network.coarse.steps[1], size)
    scores = graph.add("Reshape", scores, graph.whole(0, -1))
    best, is_chosen, tiles = _choose(graph, scores, n_chosen, math.prod(size))
    rows, columns = ((2 * np.arange(n) + 1) / n - 1 for n in size)
    places = np.stack([np.tile(columns, len(rows)), np.repeat(rows, len(columns))], axis=1)
    place = graph.add("Gather", graph.constant(places), tiles)
    pooled = [_pooled(graph, deep)]
    if network.embedding is not None:
        first, out = network.embedding.first, network.embedding.out
        pixels = graph.add("Concat", place, graph.rows_of(graph.table(images), tiles), axis=2)
        tokens = graph.add("Relu", graph.linear(pixels, _array(first.weight), _array(first.bias)))
    else:
        out, stride = network.tokens.out, network.tokens.stride
        n_early = (-(-n // network.coarse.steps[0]) for n in shape[:2])
        missing = tuple(stride * n - n_cells for n, n_cells in zip(size, n_early, strict=True))
        tables = graph.table(middle, 1, (1, 1)), graph.table(early, 0, missing)
        gates = _gates(graph, scores, best, tiles, n_chosen, math.prod(size))
        tokens = _tile_tokens(graph, network.tokens, place, *tables, is_chosen, tiles, gates, size)
        pooled.insert(0, graph.add("ReduceMax", tokens, graph.whole(1), keepdims=0))
    tokens = graph.linear(tokens, _array(out.weight), _array(out.bias))
    features = graph.add("Concat", _fine(graph, network, tokens, n_chosen), *pooled, axis=1)
    weight, bias = _folded(*network.fusion.first[:2])
    if network.fusion.norm is not None:
        factor, offset = _as_affine(network.fusion.norm)
        weight, bias = weight * factor, bias + weight @ offset
    first = graph.add("Relu", graph.linear(features, weight, bias))
    more = graph.add("Relu", graph.linear(first, *_folded(*network.fusion.residual[:2])))
    last = network.fusion.out
    logits = graph.linear(graph.add("Add", first, more), _array(last.weight), _array(last.bias))
    return graph.add("Softmax", logits, axis=1)


def _folded(layer: Any, norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a layer without bias, with the batch norm after it."""
    factor, offset = _as_affine(norm)
    return (_array(layer.weight).T * factor).T, offset


def _as_affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Batch norm as a factor and an offset."""
    factor = _array(norm.weight) / np.sqrt(_array(norm.running_var) + norm.eps)
    return factor, _array(norm.bias) - _array(norm.running_mean) * factor


def _coarse_maps(graph: _Graph, coarse: Any, images: str) -> list[str]:
    """Features after each stage: early, middle, and the last one again or the deep one."""
    stages = [[coarse.early], [coarse.middle], [] if coarse.deep is None else coarse.deep]
    here = graph.add("Sub", images, graph.constant(_array(coarse.background)))
    maps = []
    for stage in stages:
        for convolution, norm, _ in stage:
            here = graph.convolve(here, *_folded(convolution, norm), convolution.stride[0])
            here = graph.add("Relu", here)
        maps.append(here)
    return maps


def _between_cells(graph: _Graph, cells: str, step: int, size: Size) -> str:
    """Scores (n, 1, H, W) of pixels: those of the cells (n, 1, h, w), and linearly between them.

    Written as u + t (v - u): where u = v that is u in floating point, too, and equal scores stay equal.
    """
    for axis, n_pixels in enumerate(size, start=2):
        at = np.arange(n_pixels)
        here, following = (
            graph.add("Gather", cells, graph.constant(np.minimum(cell, at[-1] // step), np.int64), axis=axis)
            for cell in (at // step, at // step + 1)
        )
        part = (at % step / step).reshape(-1, *[1] * (3 - axis))
        slope = graph.add("Sub", following, here)
        cells = graph.add("Add", here, graph.add("Mul", graph.constant(part), slope))
    return cells


def _choose(graph: _Graph, scores: str, n_chosen: int, n_tiles: int) -> tuple[str, str, str]:
    """Choose the highest of scores (n, N), of equal ones the first, as `select_pixels` does.

    Gives the scores of the chosen ones from the highest down, and the next one if there is one; who is chosen
    (n, N); and their indices (n, n_chosen), ascending. TopK orders equal ones otherwise in some runtimes.
    """
    best, _ = graph.add("TopK", scores, graph.whole(min(n_chosen + 1, n_tiles)), axis=1, n_outputs=2)
    threshold = graph.column(best, n_chosen - 1)
    above = graph.add("Greater", scores, threshold)
    tied = graph.add("Equal", scores, threshold)
    room = graph.add("Sub", graph.whole(n_chosen), graph.sum(graph.counts(above)))
    first = graph.add("LessOrEqual", graph.running_sum(graph.counts(tied)), room)
    is_chosen = graph.add("Or", above, graph.add("And", tied, first))
    indices = graph.add("Gather", graph.add("NonZero", is_chosen), graph.constant(1, np.int64), axis=0)
    return best, is_chosen, graph.add("Reshape", indices, graph.whole(-1, n_chosen))


def _gates(graph: _Graph, scores: str, best: str, tiles: str, n_chosen: int, n_tiles: int) -> str:
    """Gates (n, n_chosen, 1) of the chosen tiles, see `SparseAttnNet`."""
    own = graph.add("GatherElements", scores, tiles, axis=1)
    gates = graph.add("Sigmoid", own)
    if n_chosen < n_tiles:  # see `openness`
        left = graph.column(best, n_chosen)
        width = graph.add("Sub", graph.column(best, max(n_chosen - 1 - n_closing(n_chosen), 0)), left)
        width = graph.add("Max", width, graph.constant(LEAST))
        openness = graph.add("Div", graph.add("Sub", own, left), width)
        gates = graph.add("Mul", gates, graph.add("Min", openness, graph.constant(1)))
    return graph.add("Unsqueeze", gates, graph.whole(-1))


def _tile_tokens(
    graph: _Graph,
    tile_tokens: Any,
    place: str,
    of_middle: str,
    of_early: str,
    is_chosen: str,
    tiles: str,
    gates: str,
    size: Size,
) -> str:
    """Tokens (n, n_chosen, D), see `TileTokens`; the maps are tables of cells, with those beyond tiles."""
    height, width = size

    def windows(side: int, step: int, n_columns: int) -> str:
        """Raster indices (n, n_chosen, side * side) of windows that begin at tile * step."""
        rows, columns = (step * np.arange(n)[:, np.newaxis] + np.arange(side) for n in size)
        index = rows[:, np.newaxis, :, np.newaxis] * n_columns + columns[np.newaxis, :, np.newaxis]
        return graph.add("Gather", graph.constant(index.reshape(-1, side**2), np.int64), tiles)

    def seen(table: str, index: str) -> str:
        return graph.add("Reshape", graph.rows_of(table, index), graph.whole(0, 0, -1))

    stride = tile_tokens.stride
    around, under = windows(3, 1, width + 2), windows(stride, stride, width * stride)
    norm, *norms = tile_tokens.norms
    known = graph.add("Concat", place, seen(of_middle, around), seen(of_early, under), axis=2)
    tokens = graph.add("Relu", graph.linear(known, *_folded(tile_tokens.first, norm)))
    tokens = graph.add("Mul", tokens, gates)
    # Where the neighbours are in the table of tokens, whose row 0 is zero: that of tiles not chosen.
    counts = graph.counts(is_chosen)
    slots = graph.add("Mul", graph.running_sum(counts), counts)
    slots = graph.add("Reshape", slots, graph.whole(-1, height, width))
    slots = graph.add("Pad", slots, graph.whole(0, 1, 1, 0, 1, 1))
    near = graph.rows_of(graph.add("Reshape", slots, graph.whole(0, -1)), around)
    for layer, norm in zip(tile_tokens.layers, norms, strict=True):
        table = graph.add("Pad", tokens, graph.whole(0, 1, 0, 0, 0, 0))
        more = graph.add("Relu", graph.linear(seen(table, near), *_folded(layer, norm)))
        tokens = graph.add("Add", tokens, graph.add("Mul", more, gates))
    return tokens


def _fine(graph: _Graph, network: Any, tokens: str, n_tokens: int) -> str:
    """Normalised z_fine (n, D) of tokens (n, n_tokens, D), see `FineAttention`."""
    fine, norm = network.fine, network.fine_norm
    weight, _, query, cls_key = fine.fold(None)
    keys = graph.add("Relu", graph.add("MatMul", tokens, graph.constant(_array(weight).T)))
    total = graph.add("ReduceSum", keys, graph.whole(1), keepdims=1)
    total = graph.add("Add", total, graph.constant(n_tokens * fine.epsilon + _array(cls_key)))
    readout = graph.add("Div", graph.constant(_array(query)), total)  # (n, 1, width)
    weights = graph.add("MatMul", readout, graph.add("Transpose", keys, perm=[0, 2, 1]))
    weights = graph.add("Add", weights, graph.add("Mul", graph.sum(readout), graph.constant(fine.epsilon)))
    of_cls = graph.sum(graph.add("Mul", readout, graph.constant(_array(cls_key))))
    of_cls = graph.add("Mul", of_cls, graph.constant(_array(fine.cls_token)))
    pooled = graph.add("Add", graph.add("MatMul", weights, tokens), of_cls)
    z_fine = graph.add(
        "MatMul", graph.add("Squeeze", pooled, graph.whole(1)), graph.constant(_array(fine.value.weight).T)
    )
    of_norm = [graph.constant(_array(part)) for part in (norm.weight, norm.bias)]
    return graph.add("LayerNormalization", z_fine, *of_norm, axis=-1, epsilon=norm.eps)


def _pooled(graph: _Graph, maps: str) -> str:
    """Mean and maximum of each channel, (n, 2 * channels)."""
    mean, most = (
        graph.add(kind, maps, graph.whole(2, 3), keepdims=0) for kind in ("ReduceMean", "ReduceMax")
    )
    return graph.add("Concat", mean, most, axis=1)
