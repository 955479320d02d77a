"""The plan of the house, held by tests: who may import whom, docstrings, sizes, a quiet import.

The rules read the source of the package with `ast`, each through a small function that is itself
tried on a piece of source which breaks it.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sklearn_sparseattn

NAME = "sklearn_sparseattn"
PACKAGE = Path(sklearn_sparseattn.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Which rooms a room may import; inside a room everything is free. A new file or folder of the
# package root needs its line here.
MAY_IMPORT = {
    "__init__": {
        "classifier",
        "datasets",
        "display",
        "export",
        "persistence",
        "pixel_set",
        "report",
        "training",
        "versions",
    },
    "classifier": {"data_range", "fitted", "images", "inference", "network", "parameters", "training"},
    "fitted": {"data_range", "images", "inference", "network", "parameters", "threads"},
    "pixel_set": {"images", "network", "parameters"},
    "training": {"files", "images", "network", "parameters"},
    "inference": {"images", "network", "threads"},
    "files": set(),
    "image_forms": set(),
    "images": {"image_forms"},
    "data_range": {"images"},
    "network": set(),
    "parameters": set(),
    "threads": set(),
    "datasets": set(),
    "display": set(),
    "persistence": {"classifier", "files", "fitted", "inference", "network", "parameters", "threads"},
    "export": {
        "classifier",
        "files",
        "images",
        "inference",
        "network",
        "parameters",
        "persistence",
        "threads",
    },
    "report": {"files"},
    "versions": {"inference"},
}
# Prefixes of foreign modules that a room must not import, and exceptions from them.
FOREIGN = {
    "network": ({"sklearn", "skorch"}, set()),
    "image_forms": ({"sklearn", "skorch"}, set()),
    "images": ({"sklearn", "skorch"}, {"sklearn.utils", "sklearn.exceptions"}),
}
# They reach a fitted estimator by its public attributes.
NO_PRIVATE_ATTRIBUTES = ("display", "export", "persistence", "report")

# The public paths that stay.
PUBLIC = {
    NAME: {
        "SparseAttnClassifier",
        "PixelSetTransformer",
        "DynamicK",
        "AttentionDisplay",
        "MeanAttentionDisplay",
        "TrainingDisplay",
        "export_onnx",
        "load_model",
        "save_model",
        "show_versions",
        "write_report",
    },
    f"{NAME}.network": {
        "CoarseAttention",
        "select_pixels",
        "PixelEmbedding",
        "FineAttention",
        "FusionClassifier",
        "SparseAttnNet",
        "TileTokens",
    },
    f"{NAME}.training": {"focal_loss", "contrastive_loss", "distillation_loss", "consistency_loss"},
    f"{NAME}.datasets": {"make_cells", "make_fields", "load_image_folder"},
}


# ---- who imports whom ----


def room_of(module):
    """Room of a dotted module inside the package; the package itself is the room `__init__`."""
    return [*module.split("."), "__init__"][1]


def imported_modules(source, file):
    """Absolute dotted names that `source` imports, at module level or inside a function.

    `from a import b` gives `a.b`, as `b` may be a module; `file` is the path inside the package.
    """
    package = [NAME, *Path(file).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def inside(module, prefixes):
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def import_violations(source, file):
    room = Path(file).parts[0].removesuffix(".py")
    if room not in MAY_IMPORT:
        return [f"{file}: no rule says what the room '{room}' may import"]
    found = []
    barred, excepted = FOREIGN.get(room, (set(), set()))
    for module in imported_modules(source, file):
        if inside(module, {NAME}):
            # `from sklearn_sparseattn import X` is the package itself unless X is a room.
            target = room_of(module) if room_of(module) in MAY_IMPORT else "__init__"
            if target != room and target not in MAY_IMPORT[room]:
                found.append(f"{file}: '{room}' must not import '{target}' ({module})")
        elif inside(module, barred) and not inside(module, excepted):
            found.append(f"{file}: '{room}' must not import {module}")
    return found


def private_attributes(source):
    """Attributes with a leading underscore that are read from anything but `self` and `cls`."""
    return [
        f"line {node.lineno}: .{node.attr}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way(file):
    assert import_violations((PACKAGE / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("network/fine.py", "from ..images import to_batches"),
        ("network/fine.py", "from .. import classifier"),
        ("network/fine.py", "def f():\n    import skorch"),
        ("network/fine.py", "from sklearn.base import BaseEstimator"),
        ("images.py", "from .training.losses import focal_loss"),
        ("images.py", "from sklearn.linear_model import LogisticRegression"),
        ("inference/engine.py", "import sklearn_sparseattn.training.losses"),
        ("training/fit.py", "from ..inference import predict"),
        ("training/fit.py", "from sklearn_sparseattn import SparseAttnClassifier"),
        ("datasets/cells.py", "from ..images import to_batches"),
        ("display/attention.py", "from ..network.fine import FineAttention"),
        ("persistence.py", "def load():\n    from .training import DynamicK"),
        ("new_room/file.py", "import math"),
    ],
)
def test_a_wrong_import_is_seen(file, source):
    assert len(import_violations(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("network/sparse_attn_net.py", "from .fine import FineAttention\nimport torch"),
        ("training/fit.py", "from ..network import SparseAttnNet\nimport skorch, sklearn"),
        ("images.py", "from sklearn.utils.validation import validate_data"),
        ("classifier.py", f"from {NAME}.inference import predict\nfrom . import images"),
    ],
)
def test_a_right_import_is_let_through(file, source):
    assert import_violations(source, file) == []


@pytest.mark.parametrize("room", NO_PRIVATE_ATTRIBUTES)
def test_display_and_persistence_use_public_attributes(room):
    files = [file for file in FILES if Path(file).parts[0].removesuffix(".py") == room]
    assert files
    for file in files:
        assert private_attributes((PACKAGE / file).read_text(encoding="utf-8")) == [], file


def test_a_private_attribute_is_seen():
    source = "estimator.network_\nself._axes\nx.__class__\nestimator._net"
    assert private_attributes(source) == ["line 4: ._net"]


# ---- a quiet import ----

QUIET_IMPORT = """
import importlib, pickle, random, sys, warnings
for name in {foreign!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass  # `from module import function`: the module has been imported by its own name
import numpy, torch

def state():
    return {{
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "NumPy generator": pickle.dumps(numpy.random.get_state()),
        "NumPy errors": numpy.geterr(),
        "Python generator": random.getstate(),
        "warnings": list(warnings.filters),
    }}

matplotlib_before = "matplotlib" in sys.modules
before = state()
for name in {own!r}:
    importlib.import_module(name)
from sklearn.base import clone
from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier
for estimator in (SparseAttnClassifier(random_state=0), PixelSetTransformer()):
    clone(estimator).set_params(**estimator.get_params())
    repr(estimator)
after = state()
changed = [key for key in before if before[key] != after[key]]
assert not changed, f"importing {{sys.modules['sklearn_sparseattn'].__name__}} changed: {{changed}}"
assert not matplotlib_before, "a dependency imported matplotlib: this test sees nothing then"
assert "matplotlib" not in sys.modules, "importing the package imported matplotlib"
"""


def test_importing_changes_nothing_outside_and_needs_no_matplotlib():
    """In a fresh interpreter, and after the dependencies' own imports have done what they do."""
    foreign, own = set(), set()
    for file in FILES:
        own.add(".".join([NAME, *Path(file).with_suffix("").parts]).removesuffix(".__init__"))
        for module in imported_modules((PACKAGE / file).read_text(encoding="utf-8"), file):
            if not inside(module, {NAME, "matplotlib", "__future__"}):
                foreign |= {module, module.rpartition(".")[0] or module}
    script = QUIET_IMPORT.format(foreign=sorted(foreign), own=sorted(own))
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# ---- docstrings ----


def sections(docstring):
    """Sections of a numpydoc docstring: heading -> its lines; the text before them under ''."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    found, heading = {"": []}, ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line and set(following) == {"-"} and len(following) == len(line):
            heading = line
            found[heading] = []
        elif set(line) != {"-"}:
            found[heading].append(line)
    return found


def documented_names(docstring, section):
    """Names that a section describes, in order; `a, b : int` is two."""
    entries = [line for line in sections(docstring).get(section, []) if line[:1].strip()]
    return [name.strip() for line in entries for name in line.split(" : ")[0].split(",")]


def signature_parameters(thing):
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(thing).parameters.values()
    return [stars.get(p.kind, "") + p.name for p in parameters if p.name not in ("self", "cls")]


def returns_something(function):
    """Whether the function's own body, nested functions left out, returns a value or yields."""
    waiting = list(ast.parse(inspect.cleandoc("\n" + inspect.getsource(function))).body[0].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom) or (
            isinstance(node, ast.Return) and node.value is not None
        ):
            return True
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def docstring_faults(thing, *, inherits_contract=False):
    """What numpydoc asks for and `thing` lacks.

    A method that fills in one of torch's, skorch's or scikit-learn's (`inherits_contract`) need not
    say again what its parameters are, but what it says must be right.
    """
    docstring = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not docstring:
        return ["has no docstring"]
    found, faults = sections(docstring), []
    # What a named tuple is made from is what one reads from it.
    section = "Attributes" if hasattr(thing, "_fields") else "Parameters"
    written, real = documented_names(docstring, section), signature_parameters(thing)
    if written != real and not (inherits_contract and not written):
        faults.append(f"{section} lists {written}, the signature has {real}")
    answers = not inspect.isclass(thing) and not inherits_contract and returns_something(thing)
    if answers and not {"Returns", "Yields"} & found.keys():
        faults.append("returns a value and has no Returns section")
    listed = re.findall(r"^\.\. \[(\w+)\]", "\n".join(found.get("References", [])), re.M)
    cited = re.findall(r"\[(\w+)\]_", docstring)
    if set(cited) - set(listed):
        faults.append(f"cites {sorted(set(cited) - set(listed))}, which References does not list")
    return faults


def public_methods(cls):
    """Own public methods of a class: name, function, whether a foreign base class has it too."""
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)  # static and class methods
        if not name.startswith("_") and inspect.isfunction(function):
            bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith(NAME)]
            yield name, function, any(hasattr(base, name) for base in bases)


def documented_things():
    """Every public class and function, and the public methods of the classes."""
    seen = set()
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) in seen or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            seen.add(id(thing))
            yield pytest.param(thing, False, id=name)
            if inspect.isclass(thing):
                for method, function, inherited in public_methods(thing):
                    yield pytest.param(function, inherited, id=f"{name}.{method}")


@pytest.mark.parametrize("module_name", PUBLIC)
def test_public_paths(module_name):
    module = importlib.import_module(module_name)
    assert PUBLIC[module_name] <= set(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize(("thing", "inherits_contract"), list(documented_things()))
def test_docstring_agrees_with_signature(thing, inherits_contract):
    assert docstring_faults(thing, inherits_contract=inherits_contract) == []


def _example(first, second=1, *rest, **options):
    """Add, as [1]_ and [2]_ say.

    Parameters
    ----------
    first, second : int
        Summands.
    *rest : int
        More of them.
    **options : object
        Not looked at.

    Returns
    -------
    total : int
        Their sum.

    References
    ----------
    .. [1] A book.
    .. [2] Another.
    """
    return first + second + sum(rest)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Add", "Add", None),
        ("first, second", "second, first", "Parameters lists"),
        ("    *rest : int\n        More of them.\n", "", "Parameters lists"),
        ("Parameters\n    ----------", "Arguments\n    ---------", "Parameters lists"),
        ("Returns\n    -------", "Result\n    ------", "no Returns"),
        (".. [2]", ".. [3]", "cites ['2']"),
    ],
    ids=["right", "order", "one missing", "heading", "no Returns", "no reference"],
)
def test_a_wrong_docstring_is_seen(old, new, fault, monkeypatch):
    monkeypatch.setattr(_example, "__doc__", _example.__doc__.replace(old, new))
    faults = docstring_faults(_example)
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]
