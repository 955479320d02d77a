"""A fitted classifier as an ONNX model: images as the user has them in, probabilities out.

Needs onnx (extra ``onnx``). The graph is written node by node; all sizes but the number of images are static,
and batch norms are folded into the linear layers before them. After a convolution they stay, and a Clip that
changes nothing keeps the runtimes from folding them: where they magnify, the rounding of the folded weights,
the same in all cells, would be most of the error.
"""

import copy
import json
import os
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from .classifier import SparseAttnClassifier
from .files import resolve_target, write_whole
from .images import ImageShape
from .inference import is_plain
from .network import SparseAttnNet
from .network.fine import EPSILON
from .persistence import plain_labels

_DTYPES = ("uint8", "uint16", "float32")
_BLOCK = 64  # tokens
_OPSET, _IR_VERSION = 18, 8  # of 2022: runtimes of all platforms know them


def export_onnx(
    estimator: SparseAttnClassifier, path: str | os.PathLike[str], *, dtype: str | None = None
) -> None:
    """Write a fitted classifier as an ONNX model, for programs without Python.

    The input ``images`` of any number n of images is (n, H, W), in colour (n, H, W, C), in the units of the
    training images; the output ``probabilities`` is (n, n_classes), float32. The metadata of the model holds
    ``classes``, ``image_shape`` (H, W, C), ``data_range`` and ``k``, as JSON. The file is written whole or
    not at all.

    Parameters
    ----------
    estimator : SparseAttnClassifier
        Fitted, on whatever device.
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
        If `dtype` is another one, layers of ``network_`` were replaced, it comes from a model file of version
        2, or the labels are neither numbers of up to 64 bits nor text, dates for one.
    OSError
        If the file cannot be written, for a full disk for one.

    See Also
    --------
    save_model : Keeps the whole estimator.

    Notes
    -----
    A runtime adds in another order than this package does, so that probabilities differ in their last digits.
    Where the scores of two pixels differ by less than that, too, the other one may be chosen. A runtime that
    rounds to half precision by itself, as OpenVINO does on some processors, is to be told not to
    (``{"INFERENCE_PRECISION_HINT": "f32"}``). NaN and images in other units are not looked for.

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
    data_range = estimator.data_range_
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
    if network.form["margins"]:
        raise ValueError("a classifier from a model file of version 2 cannot be exported: fit it again.")
    try:
        import onnx
    except ImportError as error:
        raise ImportError("export_onnx needs onnx: pip install 'sklearn-sparseattn[onnx]'") from error

    graph = _Graph(onnx)
    shape = estimator.image_shape_
    probabilities = _network(graph, network.double().eval(), _scaled(graph, shape, data_range), shape)
    own = ["n", *(shape[:2] if shape[2] == 1 else shape)]
    model = graph.finish(dtype, own, probabilities, len(estimator.classes_))
    facts = {
        "classes": labels,
        "image_shape": shape,
        "data_range": data_range,
        "k": estimator.k_,
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

    def convolve(self, maps: str, weight: Any, bias: Any, stride: int) -> str:
        size = weight.shape[2]
        return self.add(
            "Conv",
            *(maps, self.constant(weight), self.constant(bias)),
            kernel_shape=[size, size],
            pads=[size // 2] * 4,
            strides=[stride, stride],
        )

    def rows_of(self, maps: str, n_channels: int, n_cells: int, cells: str) -> str:
        """Features (n, k, channels) of maps (n, channels, h, w) at cells (n, k)."""
        flat = self.add("Reshape", maps, self.whole(-1, n_channels, n_cells))
        table = self.add("Transpose", flat, perm=[0, 2, 1])
        return self.add("GatherND", table, self.add("Unsqueeze", cells, self.whole(-1)), batch_dims=1)

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
            producer_version=metadata.version("sklearn-sparseattn"),
        )


# ---- the parts, in the order of the network; it comes in float64 ----


def _array(tensor: Any) -> npt.NDArray[np.float64]:
    return tensor.detach().numpy()


def _scaled(graph: _Graph, shape: ImageShape, data_range: tuple[float, float]) -> str:
    """Images (n, C, H, W), about in [0, 1]."""
    low, high = data_range
    images = graph.add("Cast", "images", to=graph.onnx.TensorProto.FLOAT)
    for part in (np.float32(low), low - float(np.float32(low))):  # which float32 cannot hold as one
        if part:
            images = graph.add("Sub", images, graph.constant(part))
    images = graph.add("Div", images, graph.constant(high - low))
    if shape[2] == 1:
        return graph.add("Unsqueeze", images, graph.whole(1))
    return graph.add("Transpose", images, perm=[0, 3, 1, 2])


def _network(graph: _Graph, network: Any, images: str, shape: ImageShape) -> str:
    """Probabilities (n, n_classes)."""
    height, width, n_channels = shape
    n_pixels = height * width
    coarse, embedding = network.coarse, network.embedding
    above = graph.add("Sub", images, graph.constant(_array(coarse.background)))
    maps, sizes = _coarse_maps(graph, coarse, above, shape)
    scores = _scores(graph, coarse, maps[1], sizes[1], shape)
    flat = graph.add("Reshape", scores, graph.whole(-1, n_pixels))
    spread = _array(network.ranks(torch.zeros(1, height, width))).reshape(1, -1)
    ranks = graph.add("Add", flat, graph.constant(spread))
    is_chosen, pixels = _chosen(graph, ranks, network.n_chosen(n_pixels))
    rows = graph.add("Div", pixels, graph.whole(width))
    columns = graph.add("Sub", pixels, graph.add("Mul", rows, graph.whole(width)))
    places = [
        graph.add("Gather", graph.constant((2 * np.arange(size) + 1) / size - 1), at)
        for at, size in ((columns, width), (rows, height))
    ]
    places = [graph.add("Unsqueeze", place, graph.whole(-1)) for place in places]
    values = graph.rows_of(images, n_channels, n_pixels, pixels)
    tokens = graph.add("Concat", *places, values, axis=2)
    hidden = graph.linear(tokens, _array(embedding.first.weight), _array(embedding.first.bias))
    if network.context is None:
        hidden = graph.add("Relu", hidden)
    else:
        parts = zip(maps, sizes, coarse.steps, network.context.kernels(), strict=True)
        for features, cells, step, kernel in parts:
            around = _around(graph, features, cells, step, _array(kernel), (rows, columns), shape)
            hidden = graph.add("Add", hidden, around)
        gates = graph.add("Sigmoid", flat)
        if network.form["margin"] and network.n_chosen(n_pixels) < n_pixels:
            gates = graph.add("Mul", gates, _open_parts(graph, ranks, is_chosen, network.form["margin"]))
        gates = graph.add("Unsqueeze", graph.add("GatherElements", gates, pixels, axis=1), graph.whole(-1))
        hidden = graph.add("Mul", graph.add("Relu", hidden), gates)

    pooled = _pooled(graph, maps[-1], sizes[-1][1])
    fused = graph.add("Concat", _fine(graph, network, hidden, n_pixels), pooled, axis=1)
    first = graph.add("Relu", graph.linear(fused, *_folded(*network.fusion.first[:2])))
    more = graph.add("Relu", graph.linear(first, *_folded(*network.fusion.residual[:2])))
    out = network.fusion.out
    logits = graph.linear(graph.add("Add", first, more), _array(out.weight), _array(out.bias))
    return graph.add("Softmax", logits, axis=1)


def _affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Batch norm as factor and bias."""
    factor = _array(norm.weight) / np.sqrt(_array(norm.running_var) + norm.eps)
    return factor, _array(norm.bias) - _array(norm.running_mean) * factor


def _folded(layer: Any, norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a linear layer with its batch norm."""
    factor, bias = _affine(norm)
    return _array(layer.weight) * factor[:, None], bias


def _coarse_maps(
    graph: _Graph, coarse: Any, images: str, shape: ImageShape
) -> tuple[list[str], list[tuple[int, int]]]:
    """Features after each stage, and how many cells they have."""
    maps, sizes = [], []
    here, (n_rows, n_columns, _) = images, shape
    for stage in coarse.stages():
        for convolution, norm, _ in stage:
            stride = convolution.stride[0]
            factor, bias = (part.reshape(-1, 1, 1) for part in _affine(norm))
            here = _by_rows(graph, here, _array(convolution.weight), stride)
            here = graph.add("Clip", here, graph.constant(-3e38), graph.constant(3e38))
            here = graph.add("Add", graph.add("Mul", here, graph.constant(factor)), graph.constant(bias))
            here = graph.add("Relu", here)
            n_rows, n_columns = (n_rows - 1) // stride + 1, (n_columns - 1) // stride + 1
        maps.append(here)
        sizes.append((n_rows, n_columns))
    return maps, sizes


def _by_rows(graph: _Graph, maps: str, weight: np.ndarray, stride: int) -> str:
    """Convolution; each row of the kernel is summed by itself, which loses fewer digits."""
    size = weight.shape[2]
    rows = [weight * (np.arange(size) == row)[:, None] for row in range(size)]
    total, *others = (graph.convolve(maps, row, np.zeros(len(weight)), stride) for row in rows)
    for other in others:
        total = graph.add("Add", total, other)
    return total


def _scores(graph: _Graph, coarse: Any, middle: str, size: tuple[int, int], shape: ImageShape) -> str:
    """Scores (n, H, W): those of the cells, and linearly between them.

    Written as u + t (v - u): where u = v that is u in floating point, too, and equal scores stay equal.
    """
    scored = graph.convolve(middle, _array(coarse.score.weight), _array(coarse.score.bias), 1)
    scores = graph.add("Squeeze", scored, graph.whole(1))
    step = coarse.steps[1]
    for axis, (n_cells, n_pixels) in enumerate(zip(size, shape[:2], strict=True), start=1):
        at = np.arange(n_pixels)
        here, following = (
            graph.add("Gather", scores, graph.constant(np.minimum(cells, n_cells - 1), np.int64), axis=axis)
            for cells in (at // step, at // step + 1)
        )
        part = (at % step / step).reshape(-1, *[1] * (2 - axis))
        slope = graph.add("Sub", following, here)
        scores = graph.add("Add", here, graph.add("Mul", graph.constant(part), slope))
    return scores


def _open_parts(graph: _Graph, ranks: str, is_chosen: str, margin: float) -> str:
    """How far gates (n, N) are open: by how far above those not chosen, see `SparseAttnNet`."""
    others = graph.add("Where", is_chosen, graph.constant(-3e38), ranks)
    above = graph.add("Sub", ranks, graph.add("ReduceMax", others, graph.whole(1), keepdims=1))
    above = graph.add("Div", above, graph.constant(margin))
    return graph.add("Clip", above, graph.constant(0), graph.constant(1))


def _chosen(graph: _Graph, scores: str, k: int) -> tuple[str, str]:
    """Of ranks (n, N) the k highest, of equal ones the first: who they are, and ascending indices (n, k).

    As `select_pixel_set` does it: the indices that TopK gives are not in this order in all runtimes.
    """
    whole = {"to": graph.onnx.TensorProto.INT64}
    best, _ = graph.add("TopK", scores, graph.whole(k), axis=1, n_outputs=2)
    threshold = graph.add("ReduceMin", best, graph.whole(1), keepdims=1)
    above = graph.add("Greater", scores, threshold)
    tied = graph.add("Equal", scores, threshold)
    room = graph.add("Sub", graph.whole(k), _sum(graph, graph.add("Cast", above, **whole)))
    order = graph.add("CumSum", graph.add("Cast", tied, **whole), graph.constant(1, np.int64))
    first = graph.add("And", tied, graph.add("LessOrEqual", order, room))
    is_chosen = graph.add("Or", above, first)
    indices = graph.add("NonZero", is_chosen)
    pixels = graph.add("Gather", indices, graph.constant(1, np.int64), axis=0)
    return is_chosen, graph.add("Reshape", pixels, graph.whole(-1, k))


def _around(
    graph: _Graph,
    features: str,
    size: tuple[int, int],
    step: int,
    weight: np.ndarray,
    pixels: tuple[str, str],
    shape: ImageShape,
) -> str:
    """3x3 convolution of a map at the cells nearest to the pixels, see `TokenContext`."""
    nearest = []
    for n, n_cells, at in zip(shape[:2], size, pixels, strict=True):
        table = np.minimum((np.arange(n) + step // 2) // step, n_cells - 1)
        nearest.append(graph.add("Gather", graph.constant(table, np.int64), at))
    cells = graph.add("Add", graph.add("Mul", nearest[0], graph.whole(size[1])), nearest[1])
    convolved = graph.convolve(features, weight, np.zeros(len(weight)), 1)
    return graph.rows_of(convolved, len(weight), size[0] * size[1], cells)


def _fine(graph: _Graph, network: SparseAttnNet, hidden: str, n_pixels: int) -> str:
    """z_fine (n, D) of tokens before the last layer of the embedding, see `FineAttention`."""
    fine, out, norm = network.fine, network.embedding.out, network.fine_norm
    weight, bias, query, cls_key = (_array(part) for part in fine.fold(out))
    k = network.n_chosen(n_pixels)
    keys = _in_blocks(graph, graph.add("Relu", graph.linear(hidden, weight, bias)), k, len(weight))
    hidden = _in_blocks(graph, hidden, k, out.in_features)
    of_keys = graph.add("MatMul", graph.constant(np.ones((1, _BLOCK))), keys)
    of_keys = graph.add("ReduceSum", of_keys, graph.whole(1, 2), keepdims=0)
    total = graph.add("Add", of_keys, graph.constant(k * EPSILON + cls_key))
    readout = graph.add("Div", graph.constant(query), total)
    offset = graph.add("Mul", _sum(graph, readout), graph.constant(EPSILON))

    weights = graph.add("MatMul", keys, graph.add("Unsqueeze", readout, graph.whole(1, 3)))
    weights = graph.add("Add", weights, graph.add("Unsqueeze", offset, graph.whole(1, 3)))
    weights = graph.add("Transpose", weights, perm=[0, 1, 3, 2])
    pooled = graph.add("ReduceSum", graph.add("MatMul", weights, hidden), graph.whole(1, 2), keepdims=0)
    pooled = graph.add("MatMul", pooled, graph.constant(_array(out.weight).T))
    of_all = _sum(graph, graph.add("Mul", readout, of_keys))
    of_all = graph.add("Add", of_all, graph.add("Mul", offset, graph.constant(k)))
    of_cls = _sum(graph, graph.add("Mul", readout, graph.constant(cls_key)))
    for factor, vector in ((of_all, _array(out.bias)), (of_cls, _array(fine.cls_token)[0, 0])):
        pooled = graph.add("Add", pooled, graph.add("Mul", factor, graph.constant(vector)))
    z_fine = graph.add("MatMul", pooled, graph.constant(_array(fine.value.weight).T))
    if not isinstance(norm, nn.LayerNorm):
        return z_fine
    of_norm = [graph.constant(_array(part)) for part in (norm.weight, norm.bias)]
    return graph.add("LayerNormalization", z_fine, *of_norm, axis=-1, epsilon=norm.eps)


def _in_blocks(graph: _Graph, tokens: str, k: int, width: int) -> str:
    """(n, k, width) -> (n, blocks, _BLOCK, width), filled up with zeros.

    Sums of thousands of float32 lose digits where a runtime adds one after the other; so blocks come first.
    """
    n_blocks = -(-k // _BLOCK)
    tokens = graph.add("Pad", tokens, graph.whole(0, 0, 0, 0, n_blocks * _BLOCK - k, 0))
    return graph.add("Reshape", tokens, graph.whole(-1, n_blocks, _BLOCK, width))


def _sum(graph: _Graph, values: str) -> str:
    """Sum (n, 1) over the last axis."""
    return graph.add("ReduceSum", values, graph.whole(-1), keepdims=1)


def _pooled(graph: _Graph, maps: str, n_columns: int) -> str:
    """Mean and maximum of each channel, (n, 2 * channels)."""
    # By rows first: sums of thousands of float32 lose digits.
    means = graph.add("MatMul", maps, graph.constant(np.full((n_columns, 1), 1 / n_columns)))
    means = graph.add("ReduceMean", means, graph.whole(2, 3), keepdims=0)
    most = graph.add("ReduceMax", maps, graph.whole(2, 3), keepdims=0)
    return graph.add("Concat", means, most, axis=1)
