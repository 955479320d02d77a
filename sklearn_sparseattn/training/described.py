"""Describe parameters the same way in every process: functions by their code, objects by their state."""

import functools
import hashlib
import types
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
from skorch.callbacks import Callback, MlflowLogger, NeptuneLogger, SacredLogger, TensorBoard, WandbLogger
from torch import Tensor

_PLAIN = bool | int | float | complex | str | bytes | None
# They hold connections, and only watch.
_LOGGERS = (MlflowLogger, NeptuneLogger, SacredLogger, TensorBoard, WandbLogger)


@functools.cache
def digest_of_sources() -> str:
    """Name the code of this package: other code may compute other bits.

    Returns
    -------
    str
        32 hexadecimal digits, from the names and bytes of its Python files.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(repr((path.relative_to(root).as_posix(), len(content))).encode() + content)
    return digest.hexdigest()


def describe(name: str, value: Any) -> Any:
    """Describe a parameter by all that makes another fit.

    Parameters
    ----------
    name : str
        Of the parameter.
    value : object
        Functions count by name, code, defaults and what they enclose; a partial by function and arguments;
        other objects by type and state.

    Returns
    -------
    str or list
        The description.

    Raises
    ------
    ValueError
        If it cannot be described, as an open file.
    """
    try:
        return _described(value, ())
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint_dir: {name}={value!r} cannot be described ({error}), so that a fit with "
            f"another {name} could be mistaken for this one. Leave one of the two out."
        ) from error


def _described(value: Any, within: tuple[int, ...]) -> Any:
    """Describe `value`, which is inside the objects with the ids `within`."""
    if id(value) in within:
        return "itself"
    inside = functools.partial(_described, within=(*within, id(value)))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return ["tensor", str(value.dtype), repr(value.tolist())]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, repr(value.shape), inside(value.tolist())]
    if isinstance(value, np.random.RandomState):
        return inside(value.get_state(legacy=False))
    if isinstance(value, Mapping):
        return sorted(([inside(key), inside(part)] for key, part in value.items()), key=repr)
    if isinstance(value, Set):
        return sorted((inside(part) for part in value), key=repr)
    if isinstance(value, list | tuple):
        return [inside(part) for part in value]
    if isinstance(value, functools.partial):
        return ["partial", inside(value.func), inside(value.args), inside(value.keywords)]
    if isinstance(value, types.MethodType):
        return ["method", inside(value.__func__), inside(value.__self__)]
    if isinstance(value, types.FunctionType):
        return _described_function(value, inside)
    if isinstance(value, type):
        return [_name(value), *_described_methods(value)]
    if isinstance(value, types.ModuleType | types.CodeType):
        return value.__name__ if isinstance(value, types.ModuleType) else _described_code(value)
    if isinstance(value, Callback):
        parameters = {key: part for key, part in vars(value).items() if not key.endswith("_")}
        return [inside(type(value)), {} if isinstance(value, _LOGGERS) else inside(parameters)]
    # As pickle would, but for functions: what has no state that can be kept raises an error.
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return [type(value).__name__, str(getattr(value, "__module__", "")), reduced]
    make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    return [
        inside(type(value)),
        inside([_name(make), arguments, state, list(items or ()), list(pairs or ())]),
    ]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _described_function(function: types.FunctionType, inside: Any) -> list[Any]:
    """Name, code, defaults, what it encloses, and the constants and functions of its module that it names."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    known = function.__globals__
    named = {name: known[name] for name in sorted(_names(function.__code__)) if name in known}
    used = {
        name: value
        for name, value in named.items()
        if isinstance(value, _PLAIN)
        or (isinstance(value, types.FunctionType) and value.__module__ == function.__module__)
    }
    code = _described_code(function.__code__)
    return [
        _name(function),
        code,
        *map(inside, (function.__defaults__, function.__kwdefaults__, cells, used)),
    ]


def _names(code: types.CodeType) -> set[str]:
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*nested)


def _described_code(code: types.CodeType) -> list[Any]:
    constants = [_described(constant, ()) for constant in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _described_methods(cls: type) -> list[Any]:
    functions = {name: part for name, part in vars(cls).items() if isinstance(part, types.FunctionType)}
    return [[name, _described_code(part.__code__)] for name, part in sorted(functions.items())]
