"""What the displays share: axes, colour bars, texts, rows of any X. matplotlib is imported late."""

import textwrap
import unicodedata
from typing import Any

import numpy as np
from scipy import sparse

# Of a letter in units of the font size: bold ones and capitals are wider than most.
_LETTER_WIDTH = 0.65
_MAX_LINES = 2


def check_matplotlib(name: str) -> None:
    """Say what to install where matplotlib is missing.

    Parameters
    ----------
    name : str
        Of the display that needs it.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name} needs matplotlib: pip install 'sklearn-sparseattn[plot]'.") from error


def take_axes(ax: Any, shape: tuple[int, ...], size: tuple[float, float]) -> np.ndarray:
    """Axes to draw on: the user's, or those of a new figure.

    Parameters
    ----------
    ax : array of matplotlib Axes or None
        The user's.
    shape : tuple of (rows, columns) or (columns,)
        What is needed.
    size : tuple of (width, height)
        Of a new figure, in inches.

    Returns
    -------
    ndarray of matplotlib Axes of that shape
        Where to draw.

    Raises
    ------
    ValueError
        If `ax` has another shape.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        grid = shape if len(shape) == 2 else (1, *shape)
        return plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")[1].reshape(shape)
    axes = np.asarray(ax, dtype=object)
    if axes.shape != shape:
        meaning = ", rows x columns" if len(shape) == 2 else ""
        raise ValueError(f"ax must have the shape {shape}{meaning}; got {axes.shape}.")
    return axes


def add_colour_bar(axis: Any, picture: Any, *, most: float | None = None, label: str = "") -> None:
    """Set a narrow colour bar to the right of a panel; no other axes are moved or made smaller.

    Parameters
    ----------
    axis : matplotlib Axes
        The panel.
    picture : matplotlib AxesImage
        Whose colours the bar explains.
    most : float, default=None
        Greatest value shown, its sign aside where the scale has both; beyond the end of the scale the bar
        ends in a point.
    label : str, default=""
        What the values are, where no title says it.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = picture.get_clim()
    beyond = most is not None and most > high
    bar = axis.figure.colorbar(
        picture,
        cax=axis.inset_axes((1.03, 0, 0.06, 1)),
        ticks=MaxNLocator(3),
        format="%.2g",
        extend=("both" if low < 0 else "max") if beyond else "neither",
    )
    bar.outline.set_visible(False)
    # A tick would look like a minus before its number.
    bar.ax.tick_params(labelsize="x-small", length=0, pad=2)
    if label:
        bar.set_label(label, fontsize="x-small")


def one_line(name: Any) -> str:
    """Name of a class as text without line breaks.

    Parameters
    ----------
    name : object
        A label or a name.

    Returns
    -------
    str
        Its words, single blanks between them.
    """
    return " ".join(str(name).split())


def fit_text(text: str, axis: Any, panel_size: float | None) -> str:
    """Break long lines in two, and leave out their middle where that is not enough, beside a panel.

    Names differ at their ends as often as at their beginnings, and a probability comes last.

    Parameters
    ----------
    text : str
        To be drawn small; each line of it is fitted by itself.
    axis : matplotlib Axes
        The panel.
    panel_size : float or None
        Side of the panel in inches; None takes that which it has, before any layout.

    Returns
    -------
    str
        As many lines as there were, or up to twice as many.
    """
    from matplotlib.font_manager import FontProperties

    side = panel_size or min(axis.bbox.width, axis.bbox.height) / axis.figure.dpi
    letter = _LETTER_WIDTH * FontProperties(size="small").get_size_in_points()
    width = max(4, int(72 * side / letter))
    return "\n".join(_fit_line(line, width) for line in text.split("\n"))


def _fit_line(line: str, width: int) -> str:
    """One line as `_MAX_LINES` at most, none longer than `width` letters."""
    line = unicodedata.normalize("NFC", line)  # a letter and its accent are one
    lines, half = textwrap.wrap(line, width), _MAX_LINES * width // 2
    while len(lines) > _MAX_LINES:
        half -= 1
        lines = textwrap.wrap(f"{line[:half]}…{line[-half:]}", width)
    return "\n".join(lines)


def take_rows(X: Any, rows: slice) -> Any:
    """Some rows of any X that the estimator takes.

    Parameters
    ----------
    X : array-like, sparse matrix or DataFrame
        Images.
    rows : slice
        Which.

    Returns
    -------
    object
        As X is, sparse ones as CSR.
    """
    if hasattr(X, "iloc"):
        return X.iloc[rows]
    return X.tocsr()[rows] if sparse.issparse(X) else X[rows]


def name_classes(classes: Any, class_names: Any) -> dict[Any, Any]:
    """Label -> the name to show.

    Parameters
    ----------
    classes : array-like of shape (n_classes,)
        Labels.
    class_names : array-like of shape (n_classes,) or None
        Names in the same order; None shows the labels.

    Returns
    -------
    dict
        In the order of `classes`.

    Raises
    ------
    ValueError
        If there are not as many names as classes.
    """
    names = classes if class_names is None else class_names
    if len(names) != len(classes):
        raise ValueError(f"class_names has {len(names)} names for {len(classes)} classes: {names}.")
    return dict(zip(classes, names, strict=True))
