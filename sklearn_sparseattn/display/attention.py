"""AttentionDisplay: what the classifier looked at in single images."""

from typing import Any

import numpy as np
from scipy import sparse

from .drawing import add_colour_bar, check_matplotlib, fit_text, name_classes, one_line, take_axes, take_rows

# Readable for the colour-blind, on gray as on a stained smear.
_CHOSEN_COLOUR = (0.90, 0.37, 0.0)
_NOT_CHOSEN_COLOUR = "0.9"
_COLUMNS = ("image", "coarse attention", "chosen pixels", "fine attention", "evidence")


class AttentionDisplay:
    """Rows of images: the image, its coarse attention, the chosen pixels and their fine attention; evidence.

    Make it with `from_estimator`, or with `from_maps` of what the estimator said before.

    Parameters
    ----------
    images : ndarray of shape (n, H, W) or (n, H, W, 3)
        Ready to be shown: gray or RGB, in [0, 1].
    coarse : ndarray of shape (n, H, W)
        Coarse attention.
    chosen : ndarray of shape (n, H, W), bool
        The pixels of the chosen tiles.
    fine : ndarray of shape (n, H, W)
        Fine attention.
    titles : list of str
        One for each image.
    evidence : ndarray of shape (n, H, W), default=None
        What the answer rests on, signed. None leaves the column out.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    axes_ : ndarray of matplotlib Axes of shape (n, 4), with evidence (n, 5)
        Set by `plot`.

    Examples
    --------
    >>> from sklearn_sparseattn import AttentionDisplay, SparseAttnClassifier
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(60, n_classes=2, image_size=24, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images, cells.target)
    >>> display = AttentionDisplay.from_estimator(clf, cells.images[:3], cells.target[:3])
    >>> display.axes_.shape
    (3, 4)
    """

    def __init__(
        self,
        images: np.ndarray,
        *,
        coarse: np.ndarray,
        chosen: np.ndarray,
        fine: np.ndarray,
        titles: list[str],
        evidence: np.ndarray | None = None,
    ) -> None:
        self.images = images
        self.coarse = coarse
        self.chosen = chosen
        self.fine = fine
        self.titles = titles
        self.evidence = evidence

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        max_images: int = 8,
        class_names: Any = None,
        evidence: bool | str = False,
        ax: Any = None,
    ) -> "AttentionDisplay":
        """Compute the maps of the first images and plot them.

        Parameters
        ----------
        estimator : SparseAttnClassifier
            Fitted.
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images as the estimator takes them.
        y : array-like of shape (n,), default=None
            True labels, to be set beside the predicted ones.
        max_images : int, default=8
            The first so many images are shown.
        class_names : array-like of shape (n_classes,), default=None
            Names to show instead of the labels, in the order of ``estimator.classes_``.
        evidence : bool or "occlusion", default=False
            Whether to show what the answer rests on, too: True is ``evidence_maps`` of the estimator, what
            each pixel added, "occlusion" its ``occlusion_maps``, found by trial, which takes longer.
        ax : array of matplotlib Axes of shape (n, 4), with evidence (n, 5), default=None
            Where to draw. None makes a figure.

        Returns
        -------
        AttentionDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are not as many `class_names` as classes, `ax` has another shape, or `evidence` is
            another word.
        """
        check_matplotlib(cls.__name__)
        methods = {False: None, True: "evidence_maps", "occlusion": "occlusion_maps"}
        if evidence not in methods:
            raise ValueError(f"evidence={evidence!r} must be True, False or 'occlusion'.")
        X = take_rows(X, slice(max_images))
        method = methods[evidence]
        explained = {} if method is None else {"evidence": getattr(estimator, method)(X)}
        return cls.from_maps(
            _as_pictures(X, estimator.image_shape_, estimator.data_range_),
            {**estimator.attention_maps(X), **explained},
            estimator.predict_proba(X),
            classes=estimator.classes_,
            y=None if y is None else np.asarray(y)[:max_images],
            class_names=class_names,
            ax=ax,
        )

    @classmethod
    def from_maps(
        cls,
        images: np.ndarray,
        maps: Any,
        proba: np.ndarray,
        *,
        classes: Any,
        y: Any = None,
        class_names: Any = None,
        ax: Any = None,
    ) -> "AttentionDisplay":
        """Plot maps and probabilities that have been computed.

        Parameters
        ----------
        images : ndarray of shape (n, H, W) or (n, H, W, 3)
            Ready to be shown: gray or RGB, in [0, 1].
        maps : mapping
            What ``attention_maps`` of the estimator gives for them; where it also holds ``evidence``, what
            ``evidence_maps`` or ``occlusion_maps`` gives.
        proba : ndarray of shape (n, n_classes)
            What its ``predict_proba`` gives.
        classes : array-like of shape (n_classes,)
            Its ``classes_``.
        y : array-like of shape (n,), default=None
            True labels.
        class_names : array-like of shape (n_classes,), default=None
            Names to show instead of the labels.
        ax : array of matplotlib Axes of shape (n, 4), with evidence (n, 5), default=None
            Where to draw. None makes a figure.

        Returns
        -------
        AttentionDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If there are not as many `class_names` as classes, or `ax` has another shape.
        """
        names = name_classes(classes, class_names)
        best = np.asarray(classes)[proba.argmax(axis=1)]
        titles = [
            f"{one_line(names[label])} ({p:.0%})" for label, p in zip(best, proba.max(axis=1), strict=True)
        ]
        if y is not None:
            true = [one_line(names.get(label, label)) for label in np.asarray(y)]
            titles = [f"{title}\ntrue: {name}" for title, name in zip(titles, true, strict=True)]
        own = {name: maps[name] for name in ("coarse", "chosen", "fine")}
        return cls(images, **own, titles=titles, evidence=maps.get("evidence")).plot(ax=ax)

    def plot(self, *, ax: Any = None, cmap: str = "viridis", panel_size: float = 2.0) -> "AttentionDisplay":
        """Draw the images and their maps.

        Parameters
        ----------
        ax : array of matplotlib Axes of shape (n, 4), with evidence (n, 5), default=None
            Where to draw. None makes a figure.
        cmap : str, default="viridis"
            Colour map of the attention. Each map has its own scale, on the colour bar beside it; that of the
            fine attention ends at the 99th percentile of the chosen pixels, so that a single one does not
            darken all others. Evidence is red where it is for the answer, blue where it is against it; its
            scale ends at the 99th percentile of its size.
        panel_size : float, default=2.0
            Side of a panel in inches, if a figure is made. Titles that are longer than two sides lose their
            middle.

        Returns
        -------
        AttentionDisplay
            Itself, with `figure_` and `axes_`.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If `ax` has another shape.
        """
        check_matplotlib(type(self).__name__)
        shape = (len(self.images), len(_COLUMNS) - (self.evidence is None))
        size = (panel_size * (shape[1] + 1), panel_size * shape[0] + 0.4)
        self.axes_ = take_axes(ax, shape, size)
        self.figure_ = self.axes_[0, 0].figure
        for axis, name in zip(self.axes_[0], _COLUMNS, strict=False):
            axis.set_title(name, fontsize="medium")
        for i, row in enumerate(self.axes_):
            row[0].imshow(self.images[i], cmap="gray", vmin=0, vmax=1)
            coarse = row[1].imshow(self.coarse[i], cmap=cmap)
            row[2].imshow(self._chosen(i))
            values, top = self._fine(i)
            row[3].set_facecolor(_NOT_CHOSEN_COLOUR)
            fine = row[3].imshow(values, cmap=cmap, vmin=0, vmax=top)
            title = fit_text(self.titles[i], row[0], panel_size if ax is None else None)
            row[0].set_ylabel(title, fontsize="small", parse_math=False)
            for axis in row:
                axis.set(xticks=[], yticks=[])
            add_colour_bar(row[1], coarse)
            add_colour_bar(row[3], fine, most=np.nanmax(values))
            if self.evidence is not None:
                strength = np.abs(self.evidence[i])
                limit = float(np.percentile(strength, 99)) or 1.0
                signed = row[4].imshow(self.evidence[i], cmap="RdBu_r", vmin=-limit, vmax=limit)
                add_colour_bar(row[4], signed, most=strength.max())
        return self

    def _chosen(self, i: int) -> np.ndarray:
        """Image i in gray, its chosen pixels tinted."""
        image, chosen = self.images[i], self.chosen[i]
        gray = image if image.ndim == 2 else image.mean(axis=-1)
        shown = np.repeat(gray[..., None], 3, axis=-1)
        shown[chosen] = 0.35 * shown[chosen] + 0.65 * np.array(_CHOSEN_COLOUR)
        return shown

    def _fine(self, i: int) -> tuple[np.ndarray, float]:
        """Fine attention of image i, NaN where no pixel was chosen, and the end of its colour scale."""
        shown = np.where(self.chosen[i], self.fine[i], np.nan)
        return shown, float(np.nanpercentile(shown, 99))


def _as_pictures(X: Any, image_shape: tuple[int, int, int], data_range: tuple[float, float]) -> np.ndarray:
    """Images of any form -> gray or RGB in [0, 1].

    The range learned from signed data, (0, max abs v), is for the network: what is shown of it goes from
    its least to its greatest value, the same for all images.
    """
    dense = X.toarray() if sparse.issparse(X) else np.asarray(X)
    images = dense.reshape(-1, *image_shape).astype(np.float64)
    low, high = data_range
    if images.min() < 0:
        low, high = images.min(), images.max()
    images = np.clip((images - low) / (high - low or 1.0), 0, 1)
    return images if image_shape[2] == 3 else images.mean(axis=-1)
