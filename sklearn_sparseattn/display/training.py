"""TrainingDisplay: how a fit went, epoch by epoch."""

import math
from typing import Any

import numpy as np

from .drawing import check_matplotlib, take_axes

# Name in the history: what it is called here, its colour (told apart by the colour-blind; None is that of the
# text, black or white) and its line.
_LOSSES = {
    "train_loss": ("total", None, "-"),
    "focal_loss": ("answer", "#0072B2", "-"),
    "contrastive_loss": ("contrastive", "#009E73", "--"),
    "distillation_loss": ("distillation", "#D55E00", "-."),
    "consistency_loss": ("consistency", "#CC79A7", (0, (3, 1, 1, 1, 1, 1))),
    "valid_loss": ("answer, validation", "#0072B2", ":"),
}


class TrainingDisplay:
    """Loss and its terms, chosen pixels, learning rate and validation score by epoch.

    The terms are drawn before their weights. Make it with `from_estimator` or `from_history`.

    Parameters
    ----------
    history : dict of array-like of shape (n_epochs,)
        As ``history_`` of the estimator.
    n_pixels : int
        H * W of the images, of which k is a share.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    axes_ : ndarray of matplotlib Axes of shape (3,), or (4,) if the history has a validation score
        Set by `plot`.

    Examples
    --------
    >>> from sklearn_sparseattn import SparseAttnClassifier, TrainingDisplay
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(60, n_classes=2, image_size=24, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=2, random_state=0).fit(cells.images, cells.target)
    >>> [axis.get_title() for axis in TrainingDisplay.from_estimator(clf).axes_]
    ['loss', 'chosen pixels, % of the image', 'learning rate']
    """

    def __init__(self, history: dict[str, Any], *, n_pixels: int) -> None:
        self.history = history
        self.n_pixels = n_pixels

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> "TrainingDisplay":
        """Plot the history of a fitted estimator.

        Parameters
        ----------
        estimator : SparseAttnClassifier
            Fitted.
        ax : array of matplotlib Axes of shape (3,) or (4,), default=None
            Where to draw, as many as `axes_` has. None makes a figure.

        Returns
        -------
        TrainingDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If `ax` has another shape.
        """
        return cls.from_history(estimator.history_, n_pixels=math.prod(estimator.image_shape_[:2]), ax=ax)

    @classmethod
    def from_history(cls, history: dict[str, Any], *, n_pixels: int, ax: Any = None) -> "TrainingDisplay":
        """Plot a history that has been kept.

        Parameters
        ----------
        history : dict of array-like of shape (n_epochs,)
            As ``history_`` of the estimator; a DataFrame of it does, too.
        n_pixels : int
            H * W of the images.
        ax : array of matplotlib Axes of shape (3,) or (4,), default=None
            Where to draw, as many as `axes_` has. None makes a figure.

        Returns
        -------
        TrainingDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If `ax` has another shape.
        """
        return cls(history, n_pixels=n_pixels).plot(ax=ax)

    def plot(self, *, ax: Any = None, panel_size: float = 2.6) -> "TrainingDisplay":
        """Draw the curves.

        Parameters
        ----------
        ax : array of matplotlib Axes of shape (3,) or (4,), default=None
            Where to draw, as many as `axes_` has. None makes a figure.
        panel_size : float, default=2.6
            Height of a panel in inches, if a figure is made.

        Returns
        -------
        TrainingDisplay
            Itself, with `figure_` and `axes_`.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If `ax` has another shape.
        """
        check_matplotlib(type(self).__name__)
        n_panels = 4 if "valid_score" in self.history else 3
        self.axes_ = take_axes(ax, (n_panels,), (1.3 * panel_size * n_panels, panel_size))
        self.figure_ = self.axes_[0].figure
        loss, k, lr = self.axes_[:3]
        text_colour = loss.xaxis.label.get_color()
        for name, (label, colour, style) in _LOSSES.items():
            # A term of weight 0 is not computed.
            if np.any(np.asarray(self.history.get(name, 0)) > 0):
                self._draw(
                    loss, self.history[name], label=label, color=colour or text_colour, linestyle=style
                )
        loss.set_yscale("log")
        loss.legend(fontsize="x-small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        loss.set_title("loss", fontsize="medium")
        self._draw(k, 100 * np.asarray(self.history["k"]) / self.n_pixels)
        k.set_title("chosen pixels, % of the image", fontsize="medium")
        self._draw(lr, self.history["lr"])
        lr.set_title("learning rate", fontsize="medium")
        for axis in (k, lr):
            axis.set_ylim(bottom=0)
        if n_panels == 4:
            self._draw(self.axes_[3], self.history["valid_score"])
            self.axes_[3].set_title("validation accuracy", fontsize="medium")
        return self

    def _draw(self, axis: Any, values: Any, **style: Any) -> None:
        """One curve over the epochs."""
        from matplotlib.ticker import MaxNLocator

        style = {"color": "#0072B2", "linewidth": 1.2, "marker": ".", "markersize": 3} | style
        axis.plot(np.asarray(self.history["epoch"]), np.asarray(values), **style)
        axis.set_xlabel("epoch", fontsize="small")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.tick_params(labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
