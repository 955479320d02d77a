"""What the displays share: axes, colour bars, rows of any X, class names. matplotlib is imported late."""

from typing import Any

import numpy as np
from scipy import sparse


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


def add_colour_bar(axis: Any, picture: Any, *, most: float | None = None) -> None:
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
    bar.ax.tick_params(labelsize="x-small", length=2, pad=1)


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
