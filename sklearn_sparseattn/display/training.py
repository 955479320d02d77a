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
    """Loss and its terms, chosen pixels and what they are found by, learning rate, validation score by epoch.

    The terms are drawn before their weights. k is found by two losses, with k pixels and with half as many:
    it grows where the first one is lower by more than the tolerance. The published rule has no such panel.
    Make the display with `from_estimator` or `from_history`.

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
    axes_ : ndarray of matplotlib Axes of shape (3,), (4,) or (5,)
        One more for the losses by which k was found, and one more for a validation score, if the history has
        them. Set by `plot`.

    Examples
    --------
    >>> from sklearn_sparseattn import SparseAttnClassifier, TrainingDisplay
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(60, n_classes=2, image_size=24, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=2, random_state=0).fit(cells.images, cells.target)
    >>> [axis.get_title() for axis in TrainingDisplay.from_estimator(clf).axes_]
    ['loss', 'chosen pixels, % of the image', 'loss with k and with k / 2 pixels', 'learning rate']
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
        ax : array of matplotlib Axes of shape (3,), (4,) or (5,), default=None
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
        ax : array of matplotlib Axes of shape (3,), (4,) or (5,), default=None
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
        ax : array of matplotlib Axes of shape (3,), (4,) or (5,), default=None
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
        kinds = ["loss", "k", "lr"]
        if np.isfinite(np.asarray(self.history.get("loss_at_k", np.nan))).any():
            kinds.insert(2, "compared")
        if "valid_score" in self.history:
            kinds.append("score")
        self.axes_ = take_axes(ax, (len(kinds),), (1.3 * panel_size * len(kinds), panel_size))
        self.figure_ = self.axes_[0].figure
        for kind, axis in zip(kinds, self.axes_, strict=True):
            getattr(self, f"_draw_{kind}")(axis)
        return self

    def _draw_loss(self, axis: Any) -> None:
        text_colour = axis.xaxis.label.get_color()
        for name, (label, colour, style) in _LOSSES.items():
            # A term of weight 0 is not computed.
            if np.any(np.asarray(self.history.get(name, 0)) > 0):
                self._draw(
                    axis, self.history[name], label=label, color=colour or text_colour, linestyle=style
                )
        axis.set_yscale("log")
        axis.legend(fontsize="x-small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_title("loss", fontsize="medium")

    def _draw_k(self, axis: Any) -> None:
        self._draw(axis, 100 * np.asarray(self.history["k"]) / self.n_pixels)
        axis.set_title("chosen pixels, % of the image", fontsize="medium")
        axis.set_ylim(bottom=0)

    def _draw_compared(self, axis: Any) -> None:
        self._draw(axis, self.history["loss_at_k"], label="k")
        self._draw(axis, self.history["loss_at_half_k"], label="k / 2", color="#D55E00", linestyle="--")
        axis.legend(fontsize="x-small", frameon=False)
        axis.set_title("loss with k and with k / 2 pixels", fontsize="medium")

    def _draw_lr(self, axis: Any) -> None:
        self._draw(axis, self.history["lr"])
        axis.set_title("learning rate", fontsize="medium")
        axis.set_ylim(bottom=0)

    def _draw_score(self, axis: Any) -> None:
        self._draw(axis, self.history["valid_score"])
        axis.set_title("validation accuracy", fontsize="medium")

    def _draw(self, axis: Any, values: Any, **style: Any) -> None:
        """One curve over the epochs that have a value."""
        from matplotlib.ticker import MaxNLocator

        style = {"color": "#0072B2", "linewidth": 1.2, "marker": ".", "markersize": 3} | style
        values = np.asarray(values, dtype=np.float64)
        known = np.isfinite(values)
        axis.plot(np.asarray(self.history["epoch"])[known], values[known], **style)
        axis.set_xlabel("epoch", fontsize="small")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.tick_params(labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
