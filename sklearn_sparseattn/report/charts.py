"""Charts of a report, as SVG in the colours of the page, and as numbers. Only fixed texts are drawn.

matplotlib knows no CSS: colours stand in the figure for the page's variables and are exchanged afterwards.
"""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .scores import Bin

_INK, _GRID, _FIRST, _SECOND = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {_INK: "--ink", _GRID: "--line", _FIRST: "--first", _SECOND: "--second"}


class Chart(NamedTuple):
    """A chart, and what it says for those who do not see it.

    Attributes
    ----------
    title : str
        What it shows.
    svg : str
        An svg element, with a sentence that takes its place.
    head : list of str
        Of the columns of its table.
    rows : list of list of str
        The numbers that are drawn.
    """

    title: str
    svg: str
    head: list[str]
    rows: list[list[str]]


def calibration_chart(bins: list[Bin]) -> Chart:
    """Reliability diagram: share of right answers by confidence, with 95 % intervals.

    Parameters
    ----------
    bins : list of Bin
        What to draw.

    Returns
    -------
    Chart
        A row of the table for each bin.
    """
    figure, axes = _new_axes("probability given by the model, %", "right, %")
    x = [100 * one.confidence for one in bins]
    value, low, high = 100 * np.array([one.right for one in bins]).T
    axes.plot([0, 100], [0, 100], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="as sure as right")
    axes.errorbar(
        x, value, yerr=[value - low, high - value], color=_FIRST, marker="o", markersize=5, label="this model"
    )
    axes.set(xlim=(0, 103), ylim=(0, 103), aspect="equal")
    numbers = 100 * np.array([(one.confidence, *one.right) for one in bins])
    rows = [
        [f"{sure:.1f}", f"{share:.1f}", f"{least:.1f} to {most:.1f}", f"{one.n:,}"]
        for one, (sure, share, least, most) in zip(bins, numbers, strict=True)
    ]
    said = "; ".join(f"{right} % at a probability of {sure} %" for sure, right, *_ in rows)
    return Chart(
        "Is it as sure as it is right?",
        _svg(figure, axes, "calibration", f"Share of right answers by the probability given: {said}."),
        ["probability, %", "right, %", "95 % interval", "cells"],
        rows,
    )


def training_charts(history: Mapping[str, np.ndarray], n_pixels: int) -> list[Chart]:
    """Loss of the classification, k and validation accuracy by epoch.

    Parameters
    ----------
    history : dict of ndarray of shape (n_epochs,)
        ``history_`` of a fitted classifier.
    n_pixels : int
        Pixels of an image.

    Returns
    -------
    list of Chart
        A row of their tables for each epoch.
    """
    # Validation rows have no other term of the loss.
    losses = {"training": "focal_loss", "validation": "valid_loss"}
    loss = {label: np.asarray(history[key]) for label, key in losses.items() if key in history}
    k = {"chosen, %": 100 * np.asarray(history["k"]) / n_pixels}
    epochs = np.asarray(history["epoch"])
    drawn = [
        # Cross-entropy, unless focal_gamma makes it the focal loss.
        _line_chart("Classification loss", "loss", epochs, loss, ".3g"),
        _line_chart("Chosen pixels, % of the image", "k", epochs, k, ".1f"),
    ]
    if "valid_score" in history:
        score = {"accuracy, %": 100 * np.asarray(history["valid_score"])}
        title = "Accuracy on validation images, %"
        drawn.append(_line_chart(title, "score", epochs, score, ".1f", top=103))
    return drawn


def _line_chart(
    title: str,
    name: str,
    epochs: np.ndarray,
    series: Mapping[str, np.ndarray],
    form: str,
    top: float | None = None,
) -> Chart:
    """Lines over the epochs, from 0 up; their numbers are written in the given form."""
    figure, axes = _new_axes("epoch", "")
    # A single epoch is a point, not a line.
    marker = "o" if len(epochs) < 5 else ""
    for (label, values), colour in zip(series.items(), (_FIRST, _SECOND), strict=False):
        axes.plot(epochs, values, color=colour, marker=marker, label=label)
    most = max(values[np.isfinite(values)].max(initial=0) for values in series.values())
    axes.set_ylim(0, top or 1.05 * most or 1)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    rows = [
        [f"{epoch:.0f}", *(format(value, form) for value in values)]
        for epoch, *values in zip(epochs, *series.values(), strict=True)
    ]
    labels = [f"{label} " for label in series] if len(series) > 1 else [""]
    ends = zip(labels, rows[0][1:], rows[-1][1:], strict=True)
    said = "; ".join(f"{label}{first} in the first epoch, {last} in the last" for label, first, last in ends)
    return Chart(title, _svg(figure, axes, name, f"{title}, by epoch: {said}."), ["epoch", *series], rows)


def _new_axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Figure and axes in the page's colours; pyplot and its settings have no part in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(color=_GRID, labelcolor=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any, axes: Any, name: str, said: str) -> str:
    """Figure as an svg element that says a sentence; its ids begin with `name`, as there are several."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        # Over no line, wherever the lines are.
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=_INK)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    for reference in ('id="', 'href="#', "url(#"):
        svg = svg.replace(reference, f"{reference}{name}-")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)
