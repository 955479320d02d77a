"""MeanAttentionDisplay: where the classifier looks on average, by true and predicted class."""

from typing import Any

import numpy as np
from scipy import sparse
from sklearn.utils import check_consistent_length

from .drawing import add_colour_bar, check_matplotlib, fit_text, name_classes, one_line, take_axes, take_rows

_ROWS = 256  # images whose maps are in memory at a time


class MeanAttentionDisplay:
    """A confusion matrix of pictures: the mean attention of the images of each true and predicted class.

    Rows are true classes, columns predicted ones. All share one scale; pairs without images stay blank. Make
    it with `from_estimator`, or with `from_maps` of what the estimator said before.

    Parameters
    ----------
    attention : ndarray of shape (n_classes, n_classes, H, W)
        Mean attention by true and predicted class, NaN where there are no images.
    counts : ndarray of shape (n_classes, n_classes)
        Number of images.
    class_names : list
        In the order of the classes.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    axes_ : ndarray of matplotlib Axes of shape (n_classes, n_classes)
        Set by `plot`.

    Examples
    --------
    >>> from sklearn_sparseattn import MeanAttentionDisplay, SparseAttnClassifier
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(60, n_classes=2, image_size=24, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images, cells.target)
    >>> display = MeanAttentionDisplay.from_estimator(clf, cells.images, cells.target)
    >>> display.axes_.shape, int(display.counts.sum())
    ((2, 2), 60)
    """

    def __init__(self, attention: np.ndarray, *, counts: np.ndarray, class_names: list[Any]) -> None:
        self.attention = attention
        self.counts = counts
        self.class_names = class_names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        attention: str = "fine",
        class_names: Any = None,
        ax: Any = None,
    ) -> "MeanAttentionDisplay":
        """Compute the maps of all images, some at a time, and plot their means.

        Parameters
        ----------
        estimator : SparseAttnClassifier
            Fitted.
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images as the estimator takes them.
        y : array-like of shape (n,)
            True labels.
        attention : {"fine", "coarse"}, default="fine"
            Which map.
        class_names : array-like of shape (n_classes,), default=None
            Names to show instead of the labels, in the order of ``estimator.classes_``.
        ax : array of matplotlib Axes of shape (n_classes, n_classes), default=None
            Where to draw. None makes a figure.

        Returns
        -------
        MeanAttentionDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If X and y are not of one length, y has labels that the estimator does not know, `attention` is
            neither, there are not as many `class_names` as classes, or `ax` has another shape.

        Notes
        -----
        Maps of 256 images are in memory at a time, about 10 kB for each pixel of an image: 40 MB at 64 x 64,
        however many images there are. Sparse X of another form than CSR is copied into that once, which
        takes as much memory again as X.
        """
        check_matplotlib(cls.__name__)
        check_consistent_length(X, y)
        if attention not in ("fine", "coarse"):
            raise ValueError(f"attention={attention!r} must be 'fine' or 'coarse'.")
        X = X.tocsr() if sparse.issparse(X) else X  # not again for each piece
        true, means = np.asarray(y), _Means(estimator.classes_, class_names)
        for start in range(0, len(true), _ROWS):
            rows = slice(start, start + _ROWS)
            part = take_rows(X, rows)
            means.add(estimator.attention_maps(part)[attention], true[rows], estimator.predict(part))
        return means.to_display(cls).plot(ax=ax)

    @classmethod
    def from_maps(
        cls,
        maps: np.ndarray,
        y: Any,
        predicted: Any,
        *,
        classes: Any,
        class_names: Any = None,
        ax: Any = None,
    ) -> "MeanAttentionDisplay":
        """Plot the means of maps that have been computed.

        Parameters
        ----------
        maps : ndarray of shape (n, H, W)
            One of the maps that ``attention_maps`` of the estimator gives.
        y, predicted : array-like of shape (n,)
            True and predicted labels.
        classes : array-like of shape (n_classes,)
            The labels there are, in the order of rows and columns.
        class_names : array-like of shape (n_classes,), default=None
            Names to show instead of the labels.
        ax : array of matplotlib Axes of shape (n_classes, n_classes), default=None
            Where to draw. None makes a figure.

        Returns
        -------
        MeanAttentionDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If the lengths differ, labels are not among `classes`, there are not as many `class_names` as
            classes, or `ax` has another shape.
        """
        check_consistent_length(maps, y, predicted)
        means = _Means(classes, class_names)
        means.add(maps, np.asarray(y), np.asarray(predicted))
        return means.to_display(cls).plot(ax=ax)

    def plot(
        self, *, ax: Any = None, cmap: str = "viridis", panel_size: float = 1.6
    ) -> "MeanAttentionDisplay":
        """Draw the means.

        Parameters
        ----------
        ax : array of matplotlib Axes of shape (n_classes, n_classes), default=None
            Where to draw. None makes a figure.
        cmap : str, default="viridis"
            Colour map of the attention. The scale ends at the 99.5th percentile: a pair of few images would
            darken all others.
        panel_size : float, default=1.6
            Side of a panel in inches, if a figure is made. Names that are longer than two sides lose their
            middle.

        Returns
        -------
        MeanAttentionDisplay
            Itself, with `figure_` and `axes_`.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If `ax` has another shape.
        """
        check_matplotlib(type(self).__name__)
        n = len(self.class_names)
        self.axes_ = take_axes(ax, (n, n), (panel_size * (n + 0.7), panel_size * (1.15 * n + 0.3)))
        self.figure_ = self.axes_[0, 0].figure
        top = float(np.nanpercentile(self.attention, 99.5))
        side = panel_size if ax is None else None
        for i, j in np.ndindex(n, n):
            axis: Any = self.axes_[i, j]
            count = self.counts[i, j]
            # A picture of NaN is blank, but has the form of the others.
            picture = axis.imshow(self.attention[i, j], cmap=cmap, vmin=0, vmax=top)
            head = f"predicted {one_line(self.class_names[j])}\n" if i == 0 else ""
            title = fit_text(f"{head}{count}", axis, side)
            weight = "bold" if i == j else "normal"
            axis.set_title(title, fontsize="small", fontweight=weight, parse_math=False)
            axis.set(xticks=[], yticks=[])
            if not count:
                axis.spines[:].set_color("0.85")
            if j == 0:
                name = fit_text(f"true {one_line(self.class_names[i])}", axis, side)
                axis.set_ylabel(name, fontsize="small", parse_math=False)
        most = np.nanmax(self.attention)
        add_colour_bar(self.axes_[0, -1], picture, most=most, label="mean attention")
        return self


class _Means:
    """Sums of maps by true and predicted class, filled piece by piece."""

    def __init__(self, classes: Any, class_names: Any) -> None:
        self.names = name_classes(classes, class_names)
        self.place = {label: i for i, label in enumerate(classes)}
        self.counts = np.zeros((len(self.place), len(self.place)), dtype=np.int64)
        self.sums: np.ndarray | None = None

    def add(self, maps: np.ndarray, y: np.ndarray, predicted: np.ndarray) -> None:
        """Add maps of shape (n, H, W)."""
        unknown = {*y.tolist(), *predicted.tolist()} - self.place.keys()
        if unknown:
            raise ValueError(
                f"y has labels {sorted(unknown)} which are not among the classes {[*self.place]}."
            )
        if self.sums is None:
            self.sums = np.zeros((*self.counts.shape, *maps.shape[1:]))
        for label, i in self.place.items():
            for other, j in self.place.items():
                belongs = (y == label) & (predicted == other)
                self.counts[i, j] += belongs.sum()
                self.sums[i, j] += maps[belongs].sum(axis=0, dtype=np.float64)

    def to_display(self, cls: type[MeanAttentionDisplay]) -> MeanAttentionDisplay:
        """Sums -> means."""
        if self.sums is None:
            raise ValueError("there are no images to take the mean of.")
        counts = self.counts[:, :, None, None]
        means = np.where(counts, self.sums / np.maximum(counts, 1), np.nan)
        return cls(means, counts=self.counts, class_names=[*self.names.values()])
