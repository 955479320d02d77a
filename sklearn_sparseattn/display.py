"""AttentionDisplay: what the classifier looked at, as a figure. Needs matplotlib, the extra `plot`."""

from typing import Any

import numpy as np
from scipy import sparse

# Readable for the colour-blind, on gray as on a stained smear.
_CHOSEN_COLOUR = (0.90, 0.37, 0.0)
_COLUMNS = ("image", "coarse attention", "chosen pixels", "fine attention")


class AttentionDisplay:
    """Rows of images: the image, its coarse attention, the chosen pixels and their fine attention.

    Make it with `from_estimator`.

    Parameters
    ----------
    images : ndarray of shape (n, H, W) or (n, H, W, 3)
        Ready to be shown: gray or RGB, in [0, 1].
    coarse, fine : ndarray of shape (n, H, W)
        Attention maps.
    pixels : ndarray of shape (n, k)
        Row-major indices of the chosen pixels.
    titles : list of str
        One for each image.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    axes_ : ndarray of matplotlib Axes of shape (n, 4)
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
        pixels: np.ndarray,
        fine: np.ndarray,
        titles: list[str],
    ) -> None:
        self.images = images
        self.coarse = coarse
        self.pixels = pixels
        self.fine = fine
        self.titles = titles

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: Any = None, *, max_images: int = 8, class_names: Any = None
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

        Returns
        -------
        AttentionDisplay
            Plotted.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        X = X.iloc[:max_images] if hasattr(X, "iloc") else X[:max_images]
        maps = estimator.attention_maps(X)
        proba = estimator.predict_proba(X)
        names = np.asarray(estimator.classes_ if class_names is None else class_names)
        best = proba.argmax(axis=1)
        titles = [f"{names[i]} ({p:.0%})" for i, p in zip(best, proba.max(axis=1), strict=True)]
        if y is not None:
            true = names[np.searchsorted(estimator.classes_, np.asarray(y)[: len(titles)])]
            titles = [f"{title}\ntrue: {name}" for title, name in zip(titles, true, strict=True)]
        images = _as_pictures(X, estimator.image_shape_, estimator.data_range_)
        display = cls(images, coarse=maps.coarse, pixels=maps.pixels, fine=maps.fine, titles=titles)
        return display.plot()

    def plot(self, *, cmap: str = "viridis", panel_size: float = 2.0) -> "AttentionDisplay":
        """Draw the figure.

        Parameters
        ----------
        cmap : str, default="viridis"
            Colour map of the attention; each map has its own scale.
        panel_size : float, default=2.0
            Side of a panel in inches.

        Returns
        -------
        AttentionDisplay
            Itself, with `figure_` and `axes_`.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot as plt
        except ImportError as error:
            raise ImportError(
                "AttentionDisplay needs matplotlib: pip install 'sklearn-sparseattn[plot]'."
            ) from error
        n_images, n_columns = len(self.images), len(_COLUMNS)
        size = (panel_size * (n_columns + 0.6), panel_size * n_images + 0.4)
        self.figure_, self.axes_ = plt.subplots(
            n_images, n_columns, figsize=size, squeeze=False, layout="constrained"
        )
        for axis, name in zip(self.axes_[0], _COLUMNS, strict=True):
            axis.set_title(name, fontsize="medium")
        for i, row in enumerate(self.axes_):
            row[0].imshow(self.images[i], cmap="gray", vmin=0, vmax=1)
            row[1].imshow(self.coarse[i], cmap=cmap)
            row[2].imshow(self._chosen(i))
            row[3].imshow(self.fine[i], cmap=cmap)
            row[0].set_ylabel(self.titles[i], fontsize="small")
            for axis in row:
                axis.set(xticks=[], yticks=[])
        return self

    def _chosen(self, i: int) -> np.ndarray:
        """Image i in gray, its chosen pixels tinted."""
        image = self.images[i]
        gray = image if image.ndim == 2 else image.mean(axis=-1)
        shown = np.repeat(gray.reshape(-1, 1), 3, axis=1)
        chosen = self.pixels[i]
        shown[chosen] = 0.35 * shown[chosen] + 0.65 * np.array(_CHOSEN_COLOUR)
        return shown.reshape(*gray.shape, 3)


def _as_pictures(X: Any, image_shape: tuple[int, int, int], data_range: tuple[float, float]) -> np.ndarray:
    """Images of any form -> gray or RGB in [0, 1]; of signed data, zero is mid-gray."""
    dense = X.toarray() if sparse.issparse(X) else np.asarray(X)
    images = dense.reshape(-1, *image_shape).astype(np.float64)
    low, high = data_range
    if images.size and images.min() < 0:
        low = -high
    images = np.clip((images - low) / (high - low), 0, 1)
    return images if image_shape[2] == 3 else images.mean(axis=-1)
