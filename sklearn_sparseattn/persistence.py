"""A fitted classifier in one file, without pickle: nothing in the file is ever executed.

The file has the safetensors form: the weights and the history as arrays, all else as JSON in the header. It
reaches an estimator by its public attributes and the state that pickle would take.
"""

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import skorch
import torch
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from sklearn.utils.validation import check_is_fitted

from .classifier import SparseAttnClassifier
from .files import package_version, resolve_target, write_whole
from .fitted import network_arrays, network_of
from .inference import resolve_device
from .network import SparseAttnNet
from .parameters import is_count_or_share
from .threads import safe_after_fork

FORMAT_VERSION = 1

_KEY = "sklearn_sparseattn"  # of the JSON text among the metadata
# The JSON text begins with the checksum; as a string in the header its quotes are escaped.
_MARK = rb"\"checksum\":\""
_NO_CHECKSUM = "0" * hashlib.sha256().digest_size * 2
_DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
_ENOUGH_FOR_LABELS = 2**16  # bytes
_MOST_VALUES, _MOST_THREADS = 2**40, 2**10  # of an image, and to predict with; more is not meant well
_OF_THE_MACHINE = {"checkpoint_dir", "device"}  # parameters that mean nothing elsewhere
_WHAT_WRONG_CONTENT_RAISES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


@safe_after_fork()
def save_model(estimator: SparseAttnClassifier, path: str | os.PathLike[str]) -> None:
    """Keep a fitted classifier in a file that is safe to load, whoever sent it.

    The file is written whole or not at all: after an error the one that was there is as it was.

    Parameters
    ----------
    estimator : SparseAttnClassifier
        Fitted, on whatever device.
    path : str or path
        Of the file. An ending is not added; ".safetensors" tells other programs what it is.

    Raises
    ------
    TypeError
        If it is another estimator.
    NotFittedError
        Before `fit`.
    ValueError
        If the labels are neither numbers of up to 64 bits nor text, dates for one, or if a fitted attribute
        was changed into something that such a file cannot hold.
    OSError
        If the file cannot be written, for a full disk for one.

    Warns
    -----
    UserWarning
        If parameters are left out, see Notes.

    See Also
    --------
    load_model : The way back.

    Notes
    -----
    Kept are the parameters, all attributes that end with an underscore, and the versions of what it was made
    with. Parameters that are Python objects - a callable `augment`, `callbacks`, a RandomState - are left out
    with a warning and have their default value when loaded: they steer the fit, and prediction needs none of
    them. `checkpoint_dir` belongs to the machine and is left out, too; `device` is for `load_model` to say.
    NumPy's numbers among the parameters become Python's. What only `partial_fit` knows (optimiser, controller
    of k, generator) is left out: after loading it goes on from the weights and k, as it does after `fit`.
    joblib and skops keep all of it.

    The header is JSON with a SHA-256 checksum of the whole file, in which its own digits count as zeros. It
    finds damage; who made a file it cannot tell.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from sklearn_sparseattn import SparseAttnClassifier, load_model, save_model
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(40, modality="event", n_classes=2, image_size=16, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images, cells.target)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(clf, Path(folder) / "cells.safetensors")
    ...     loaded = load_model(Path(folder) / "cells.safetensors")
    >>> bool((loaded.predict_proba(cells.images) == clf.predict_proba(cells.images)).all())
    True
    """
    path = resolve_target(path)
    if type(estimator) is not SparseAttnClassifier:
        raise TypeError(
            f"save_model keeps a SparseAttnClassifier, not {type(estimator).__name__}; of a pipeline or a "
            "search, give it the classifier inside, or use joblib."
        )
    check_is_fitted(estimator, "network_")
    try:
        content, left_out = _encode(estimator)
        _decode(content, "cpu")
    except _WHAT_WRONG_CONTENT_RAISES as error:
        raise ValueError(f"This classifier cannot be kept: {error}") from error
    write_whole(path, content)
    if left_out:
        warnings.warn(
            f"{' and '.join(left_out)} cannot be kept in a model file: the loaded classifier predicts the "
            "same, but to fit it again, set them first.",
            UserWarning,
            stacklevel=2,
        )


@safe_after_fork()
def load_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> SparseAttnClassifier:
    """Load a classifier that `save_model` wrote.

    Nothing in the file is executed, and no more memory is taken than goes with the size of the file.

    Parameters
    ----------
    path : str or path
        Of the file.
    device : str or torch.device, default="cpu"
        Where it is to work from now on; it becomes the parameter `device`.

    Returns
    -------
    SparseAttnClassifier
        It predicts the same bits as the one that was kept, on a machine of the same kind.

    Raises
    ------
    ValueError
        If this is not a model file, was damaged or has another format version, or if the device is not there.
    OSError
        If the file cannot be read.

    See Also
    --------
    save_model : The way there.
    """
    resolve_device(device)
    path = Path(path)
    try:
        return _decode(_read(path), device)
    except _WHAT_WRONG_CONTENT_RAISES as error:
        raise ValueError(f"{path} is not a model file that can be loaded: {error}") from error


def plain_labels(classes: np.ndarray) -> list[Any]:
    """Give labels as JSON has them, which Python's own numbers and texts can be.

    Parameters
    ----------
    classes : ndarray of shape (n_classes,)
        The labels.

    Returns
    -------
    list
        In the same order.

    Raises
    ------
    ValueError
        If they are of another kind: as JSON they would be other labels.
    """
    labels, dtype = classes.tolist(), classes.dtype
    numbers = dtype.kind in "biuf" and dtype.itemsize <= 8
    if not (numbers or all(isinstance(label, str) for label in labels)):
        raise ValueError(
            f"its classes {classes.astype(str).tolist()!r:.80} of dtype {dtype} are neither numbers of up to "
            "64 bits nor text: fit it to labels that are."
        )
    return labels


# ---- estimator -> bytes ----


def _encode(estimator: Any) -> tuple[bytes, list[str]]:
    """The file, and which parameters are not in it."""
    network = estimator.network_
    params, left_out = _encode_params(estimator.get_params(deep=False))
    names = getattr(estimator, "feature_names_in_", None)
    model = {
        "checksum": _NO_CHECKSUM,
        "format_version": FORMAT_VERSION,
        "versions": _versions(),
        "params": params,
        "classes": _encode_classes(estimator.classes_),
        "image_shape": estimator.image_shape_,
        "data_range": estimator.data_range_,
        "spanned_range": estimator.spanned_range_,
        "k": estimator.k_,
        "feature_names": None if names is None else list(names),
        "network": network.form,
        "history": list(estimator.history_),
    }
    arrays = {f"network.{name}": array for name, array in network_arrays(network).items()}
    for name, column in estimator.history_.items():
        if column.dtype not in _DTYPES.values():
            raise ValueError(f"history_[{name!r}] of dtype {column.dtype} cannot be kept.")
        arrays[f"history.{name}"] = column
    text = json.dumps(model, separators=(",", ":"), default=_plain_number)
    return _seal(save(arrays, metadata={_KEY: text})), left_out


def _seal(content: bytes) -> bytes:
    """Put in the checksum."""
    at = content.index(_MARK) + len(_MARK)
    return content[:at] + _checksum(content, at) + content[at + len(_NO_CHECKSUM) :]


def _checksum(content: bytes, at: int) -> bytes:
    """Of all but the digits that are, or will be, at `at`."""
    digest = hashlib.sha256(content[:at])
    digest.update(_NO_CHECKSUM.encode())
    digest.update(memoryview(content)[at + len(_NO_CHECKSUM) :])
    return digest.hexdigest().encode()


def _versions() -> dict[str, str]:
    modules = {"numpy": np, "scikit-learn": sklearn, "skorch": skorch, "torch": torch}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    return {
        "sklearn-sparseattn": package_version(),
        "python": platform.python_version(),
        **versions,
    }


def _plain_number(value: Any) -> Any:
    """What JSON makes of a NumPy number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is no number or text.")


def _encode_params(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    kept, left_out = {}, []
    for name, value in params.items():
        if name in _OF_THE_MACHINE:
            continue
        try:
            kept[name] = _encode_value(value)
        except TypeError:
            left_out.append(f"{name}={value!r:.80}")
    return kept, left_out


def _encode_value(value: Any) -> Any:
    """A parameter as JSON; what JSON does not know is an object of one entry."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encode_value(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode_value(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode_value(key), _encode_value(item)] for key, item in value.items()]}
    raise TypeError(f"{value!r} is not JSON.")


def _encode_classes(classes: np.ndarray) -> dict[str, Any]:
    if classes.dtype.kind == "U" and classes.nbytes > _ENOUGH_FOR_LABELS:
        classes = np.array(classes.tolist())  # no wider than they need
    return {"dtype": classes.dtype.str, "values": plain_labels(classes)}


# ---- bytes -> estimator ----


def _read(path: Path) -> bytes:
    """The file, if it is one of ours and undamaged; others are not read to their end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("it is not a file.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        n_header = int.from_bytes(length, "little")
        if len(length) < 8 or n_header > size - 8:
            raise ValueError("it was not written by save_model, or is cut short.")
        header = file.read(n_header)
        at = header.find(_MARK)
        if at < 0:
            raise ValueError("it was not written by save_model, or is damaged.")
        content = length + header + file.read(size - 8 - n_header)
    at += 8 + len(_MARK)
    if content[at : at + len(_NO_CHECKSUM)] != _checksum(content, at):
        raise ValueError("its checksum is wrong: it is damaged, cut short or was changed.")
    return content


def _decode(content: bytes, device: str | torch.device) -> SparseAttnClassifier:
    """Make an estimator of a file, whose checksum may be right and all else wrong."""
    arrays = _decode_arrays(content)
    n_header = int.from_bytes(content[:8], "little")
    model = json.loads(json.loads(content[8 : 8 + n_header])["__metadata__"][_KEY])
    version = model["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"its format_version is {version!r:.80}, and this release reads {FORMAT_VERSION}.")
    height, width, channels = shape = _image_shape(model["image_shape"])
    classes = _decode_classes(model["classes"], len(content))
    n_features = math.prod(shape)
    names = model["feature_names"]
    if names is not None and not (_is_list_of(names, str) and len(names) == n_features):
        raise ValueError(f"feature_names are not {n_features} names.")
    form = _network_form(model["network"], channels, len(classes), len(content))
    network = _make_network(form, arrays.pop("network"))
    if model["k"] != network.k_of(height, width):
        raise ValueError(f"k={model['k']!r} is not that of the network.")
    history = _history(model["history"], arrays.pop("history"))
    state = {
        "classes_": classes,
        "image_shape_": shape,
        "n_features_in_": n_features,
        "data_range_": _data_range(model["data_range"]),
        "spanned_range_": _spanned_range(model["spanned_range"]),
        "k_": model["k"],
        "history_": history,
        "n_iter_": len(history["epoch"]),
        "network_": network,
    }
    if names is not None:
        state["feature_names_in_"] = np.array(names, dtype=object)
    estimator = _make_estimator(model["params"], device)
    estimator.__setstate__(state)
    return estimator


def _decode_arrays(content: bytes) -> dict[str, dict[str, np.ndarray]]:
    """The arrays by group and name. The library holds sizes and places against each other."""
    arrays: dict[str, dict[str, np.ndarray]] = {"network": {}, "history": {}}
    for full_name, found in deserialize(content):
        group, _, name = full_name.partition(".")
        dtype = _DTYPES.get(found["dtype"])
        if dtype is None or group not in arrays:
            raise ValueError(f"array {full_name!r} of dtype {found['dtype']} does not belong there.")
        array = np.frombuffer(found["data"], np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)
        arrays[group][name] = array.reshape(found["shape"])
    return arrays


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _image_shape(values: Any) -> tuple[int, int, int]:
    fits = _is_list_of(values, int) and len(values) == 3 and min(values) > 0
    if not (fits and math.prod(values) <= _MOST_VALUES):
        raise ValueError(f"image_shape={values!r:.80} is not the (H, W, C) of an image.")
    return tuple(values)


def _data_range(values: Any) -> tuple[float, float]:
    fits = _is_list_of(values, float) and len(values) == 2
    if not (fits and values[0] < values[1] and math.isfinite(values[1] - values[0])):
        raise ValueError(f"data_range={values!r:.80} is not (lo, hi).")
    return tuple(values)


def _spanned_range(values: Any) -> tuple[float, float]:
    fits = _is_list_of(values, float) and len(values) == 2
    if not (fits and -math.inf < values[0] <= values[1] < math.inf):
        raise ValueError(f"spanned_range={values!r:.80} is not (lo, hi).")
    return tuple(values)


def _decode_classes(found: Any, n_bytes: int) -> np.ndarray:
    values, dtype = found["values"], np.dtype(found["dtype"])
    if dtype.kind not in "biufUOT" or dtype.itemsize * len(values) > max(n_bytes, _ENOUGH_FOR_LABELS):
        raise ValueError(f"classes of dtype {found['dtype']!r:.80} are not possible.")
    classes = np.array(values, dtype=dtype)
    kept = classes.ndim == 1 and classes.tolist() == values and np.array_equal(np.unique(classes), classes)
    if not (kept and (dtype.kind != "O" or _is_list_of(values, str))):
        raise ValueError("classes are not distinct labels of one kind in their order.")
    return classes


def _history(names: Any, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = {column.shape for column in columns.values()}
    if set(names) != columns.keys() or "epoch" not in names or [len(shape) for shape in shapes] != [1]:
        raise ValueError("the columns of the history do not go together.")
    return {name: columns[name] for name in names}


def _network_form(form: Any, n_channels: int, n_classes: int, n_bytes: int) -> dict[str, Any]:
    """What the network is made with. A number that exceeds the file's bytes cannot be one of its sizes."""
    sizes = [form[name] for name in ("n_channels", "n_classes", "embed_dim", "n_heads", "hidden_dim")]
    if not (_is_list_of(sizes, int) and min(sizes) >= 1 and max(sizes) <= n_bytes):
        raise ValueError(f"the network cannot have the sizes {sizes!r:.80}.")
    if sizes[:2] != [n_channels, n_classes]:
        raise ValueError(f"the network is not for {n_channels} channels and {n_classes} classes.")
    strides = form["strides"]
    if not (_is_list_of(strides, int) and len(strides) == 3 and set(strides) <= {1, 2}):
        raise ValueError(f"the network cannot have the strides {strides!r:.80}.")
    for name in ("variant", "size"):
        if type(form[name]) is not str:
            raise ValueError(f"the network cannot have {name}={form[name]!r:.80}.")
    return {**form, "strides": tuple(strides)}


def _make_network(form: dict[str, Any], arrays: dict[str, np.ndarray]) -> SparseAttnNet:
    for name, array in arrays.items():
        if not np.isfinite(array).all() or (name.endswith("running_var") and (array < 0).any()):
            raise ValueError(f"{name} of the network has values that cannot be.")
    return network_of(form, arrays)


def _make_estimator(params: dict[str, Any], device: str | torch.device) -> SparseAttnClassifier:
    decoded = {name: _decode_value(value) for name, value in params.items()}
    known = SparseAttnClassifier().get_params(deep=False).keys() - _OF_THE_MACHINE
    if unknown := decoded.keys() - known:
        raise ValueError(f"this release does not know its parameters {sorted(unknown)}.")
    # These two are used before the next fit, which checks all.
    n_jobs, predict_k = decoded.get("n_jobs"), decoded.get("predict_k")
    if n_jobs is not None and not (type(n_jobs) is int and abs(n_jobs) <= _MOST_THREADS):
        raise ValueError(f"n_jobs={n_jobs!r:.80} is no number of threads up to {_MOST_THREADS}.")
    if predict_k is not None and not is_count_or_share(predict_k):
        raise ValueError(f"predict_k={predict_k!r:.80} is not a number or share of pixels.")
    return SparseAttnClassifier(**decoded, device=device)


def _decode_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode_value(item) for item in value]
    if isinstance(value, dict):
        [(kind, items)] = value.items()
        if kind == "tuple":
            return tuple(_decode_value(items))
        return {_decode_value(key): _decode_value(item) for key, item in items}
    return value
