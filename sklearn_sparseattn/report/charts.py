"""Charts of a report, as SVG that takes its colours from the page. Only fixed texts are drawn.

matplotlib knows no CSS: colours stand in the figure for the page's variables and are exchanged afterwards.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from .scores import Bin

_INK, _GRID, _FIRST, _SECOND = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {_INK: "--ink", _GRID: "--line", _FIRST: "--first", _SECOND: "--second"}


def calibration_chart(bins: list[Bin]) -> str:
    """Reliability diagram: share of right answers by confidence, with 95 % intervals.

    Parameters
    ----------
    bins : list of Bin
        What to draw.

    Returns
    -------
    str
        An svg element.
    """
    figure, axes = _new_axes("probability given by the model, %", "right, %")
    x = [100 * one.confidence for one in bins]
    value, low, high = 100 * np.array([one.right for one in bins]).T
    axes.plot([0, 100], [0, 100], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="as sure as right")
    axes.errorbar(
        x, value, yerr=[value - low, high - value], color=_FIRST, marker="o", markersize=5, label="this model"
    )
    axes.set(xlim=(0, 103), ylim=(0, 103), aspect="equal")
    return _svg(figure, axes, "calibration")


def training_charts(history: Mapping[str, np.ndarray], n_pixels: int) -> dict[str, str]:
    """Focal loss, k and validation accuracy by epoch.

    Parameters
    ----------
    history : dict of ndarray of shape (n_epochs,)
        ``history_`` of a fitted classifier.
    n_pixels : int
        Pixels of an image.

    Returns
    -------
    dict of str
        What a chart shows -> an svg element.
    """
    # Validation rows have no other term of the loss.
    losses = {"training": "focal_loss", "validation": "valid_loss"}
    lines = {
        "Focal loss": {label: history[key] for label, key in losses.items() if key in history},
        "Chosen pixels, % of the image": {"": 100 * np.asarray(history["k"]) / n_pixels},
    }
    if "valid_score" in history:
        lines["Accuracy on validation images, %"] = {"": 100 * np.asarray(history["valid_score"])}
    return {
        title: _line_chart(history["epoch"], series, f"training{i}")
        for i, (title, series) in enumerate(lines.items())
    }


def _line_chart(epochs: np.ndarray, series: Mapping[str, np.ndarray], name: str) -> str:
    """Lines over the epochs, from 0 up."""
    figure, axes = _new_axes("epoch", "")
    # A single epoch is a point, not a line.
    marker = "o" if len(epochs) < 5 else ""
    for (label, values), colour in zip(series.items(), (_FIRST, _SECOND), strict=False):
        axes.plot(epochs, values, color=colour, marker=marker, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, axes, name)


def _new_axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Figure and axes in the page's colours; pyplot and its settings have no part in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(color=_GRID, labelcolor=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, axes: Any, name: str) -> str:
    """Figure as an svg element whose ids begin with `name`: there are several on the page."""
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, labelcolor=_INK)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    for reference in ('id="', 'href="#', "url(#"):
        svg = svg.replace(reference, f"{reference}{name}-")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
