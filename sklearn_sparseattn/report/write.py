"""`write_report`: numbers, charts and pictures put into the page and written."""

import base64
import hashlib
import inspect
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length, check_scalar, column_or_1d

from ..files import resolve_target, write_whole
from .charts import calibration_chart, training_charts
from .pictures import draw_cells
from .scores import calibration, calibration_error, class_scores, confusion, most_telling, wilson

_HERE = Path(__file__).parent
_PACKAGES = ("sklearn-sparseattn", "scikit-learn", "torch", "skorch", "numpy")
_MAX_CHARACTERS = 200


def write_report(
    estimator: Any,
    X: Any,
    y: Any,
    path: str | os.PathLike[str],
    *,
    max_images: int = 1000,
    class_names: Any = None,
    names: Any = None,
) -> None:
    """Write one HTML file that shows what the classifier answers and where it looked.

    It opens in any browser, from disk and without a network: what the model is, scores by class,
    calibration, training, the confusion matrix, and a gallery of the cells with their attention.

    Parameters
    ----------
    estimator : SparseAttnClassifier
        Fitted.
    X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
        Images as the estimator takes them, best ones that it has not learned from.
    y : array-like of shape (n,)
        Their true labels.
    path : str or path
        Of the file. One that is there is replaced when the new one is complete.
    max_images : int, default=1000
        Most images in the gallery: first the wrong ones, then those of which the classifier is least sure.
        All rows count in the scores.
    class_names : array-like of shape (n_classes,), default=None
        Names to show instead of the labels, in the order of ``estimator.classes_``.
    names : array-like of shape (n,), default=None
        A name for each image to be found by, say that of its file.

    Raises
    ------
    ImportError
        If Jinja2 or matplotlib is not installed.
    ValueError
        If y has a label that the estimator does not know, lengths differ, `max_images` is below 1, X
        does not fit the training images, or `path` is a folder.
    NotFittedError
        Before `fit`.
    OSError
        If the file cannot be written.

    Notes
    -----
    Labels and names are text wherever they stand, whatever is in them. A thousand images stay below 15 MB:
    large ones are shown smaller.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from sklearn_sparseattn import SparseAttnClassifier, write_report
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(60, n_classes=2, image_size=24, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images, cells.target)
    >>> with TemporaryDirectory() as folder:
    ...     write_report(clf, cells.images, cells.target, Path(folder) / "report.html")
    ...     print((Path(folder) / "report.html").read_text(encoding="utf-8")[:15])
    <!doctype html>
    """
    path = resolve_target(path)
    template = _template()
    check_scalar(max_images, "max_images", Integral, min_val=1)
    proba = estimator.predict_proba(X)
    y = column_or_1d(y)
    check_consistent_length(proba, y)
    true = _class_numbers(y, estimator.classes_)
    predicted, confidence = proba.argmax(axis=1), proba.max(axis=1)
    rows = most_telling(confidence, true == predicted, max_images)
    # On the page the surest come first, among the wrong and among the right ones.
    rows = rows[np.lexsort((-confidence[rows], (true == predicted)[rows]))]
    classes = _class_names(estimator.classes_, class_names)
    image_names = _image_names(names, rows, len(proba))
    scores, bins = _scores(true, predicted, len(classes)), calibration(confidence, true == predicted)
    pictures = draw_cells(estimator, X, rows)
    cells = [
        {
            "true": int(true[row]),
            "predicted": int(predicted[row]),
            "proba": [round(p, 4) for p in proba[row].tolist()],
            "name": name,
        }
        for row, name in zip(rows, image_names, strict=True)
    ]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    page = template.render(
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        classes=classes,
        model=_model(estimator, pictures.n_tiles),
        charts=[calibration_chart(bins), *training_charts(estimator.history_, _n_pixels(estimator))],
        calibration_error=calibration_error(bins),
        cells=cells,
        pictures=pictures,
        # The images themselves stand in the gallery.
        overlays={name: texts for name, texts in pictures.layers.items() if name != "image"},
        n_cells=len(proba),
        **scores,
    )
    write_whole(path, page.encode("utf-8", errors="replace"))


def _template() -> Any:
    """Page, to be filled in; what is put into it is escaped."""
    try:
        import jinja2
        import matplotlib as _matplotlib  # noqa: F401  asked for before any work is done
    except ImportError as error:
        raise ImportError(
            "write_report needs Jinja2 and matplotlib: pip install 'sklearn-sparseattn[report]'."
        ) from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(_HERE),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    return environment.get_template("page.html")


def _percent(share: float) -> str:
    """Share -> text; a dash for NaN."""
    return "–" if np.isnan(share) else f"{100 * share:.1f}"


def _scores(true: np.ndarray, predicted: np.ndarray, n_classes: int) -> dict[str, Any]:
    """Numbers of the page that need all rows."""
    counts = confusion(true, predicted, n_classes)
    by_class = class_scores(counts)
    f1 = [one.f1.value for one in by_class if not np.isnan(one.f1.value)]
    return {
        "counts": counts.tolist(),
        "scores": by_class,
        "accuracy": wilson(int(counts.trace()), len(true)),
        "macro_f1": float(np.mean(f1)),
    }


def _model(estimator: Any, n_tiles: int) -> dict[str, Any]:
    """What the model is, how it was fitted, and with how many pixels it answered."""
    tile = estimator.network_.tile
    tile_area = estimator.network_.tile_area(*estimator.image_shape_[:2])
    k = min(n_tiles * tile_area, _n_pixels(estimator))  # not `k_`, where predict_k says otherwise
    defaults = inspect.signature(type(estimator)).parameters
    texts = {name: _short(repr, value) for name, value in estimator.get_params(deep=False).items()}
    parameters = [(name, text, text != repr(defaults[name].default)) for name, text in texts.items()]
    history = estimator.history_
    return {
        "kind": type(estimator).__name__,
        "parameters": sorted(parameters, key=lambda parameter: not parameter[2]),
        "image_shape": estimator.image_shape_,
        "data_range": [f"{float(value):g}" for value in estimator.data_range_],
        "tile": tile,
        "k": k,
        "share": k / _n_pixels(estimator),
        "n_weights": sum(weights.numel() for weights in estimator.network_.parameters()),
        "n_epochs": estimator.n_iter_,
        "seconds": float(np.sum(history["duration"])),
        "loss": float(history["train_loss"][-1]),
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _n_pixels(estimator: Any) -> int:
    height, width, _ = estimator.image_shape_
    return height * width


def _class_numbers(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Label -> its place in `classes`."""
    places = {label: i for i, label in enumerate(classes.tolist())}
    labels = y.tolist()
    unknown = sorted({str(label) for label in labels if label not in places})
    if unknown:
        raise ValueError(f"y has labels that the estimator was not fitted with: {', '.join(unknown[:5])}.")
    return np.array([places[label] for label in labels])


def _class_names(classes: np.ndarray, class_names: Any) -> list[str]:
    """Names to show, in the order of `classes`."""
    names = classes if class_names is None else class_names
    if len(names) != len(classes):
        raise ValueError(f"class_names has {len(names)} names for {len(classes)} classes: {names}.")
    return [_short(str, name) for name in names]


def _image_names(names: Any, rows: np.ndarray, n_images: int) -> list[str]:
    """Names of the cells shown; their row in X if none were given."""
    if names is None:
        return [f"row {row}" for row in rows]
    if len(names) != n_images:
        raise ValueError(f"names has {len(names)} names for {n_images} images.")
    texts = np.asarray(names, dtype=object)
    return [_short(str, texts[row]) for row in rows]


def _short(to_text: Callable[[Any], str], value: Any) -> str:
    """Text of a value, cut where it is very long, in quotes where it would not be seen."""
    text = to_text(value)
    text = text if text.strip() else f'"{text}"'
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
