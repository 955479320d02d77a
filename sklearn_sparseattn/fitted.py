"""What a fitted SparseAttnNet answers, in scikit-learn's terms: classes, probabilities, features, maps.

Nothing is fitted here. `SparseAttnClassifier` adds the parameters and the fit.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted

from .images import ImageRows, PixelScale, validate_images, warn_of_other_range
from .inference import Engine, attention_maps, fused_features, probabilities, resolve_device, run
from .network import SparseAttnOutput


def all_or_nothing(fit: Callable) -> Callable:
    """Let a fit that fails leave the estimator as it was, and fit whatever PyTorch's grad mode is outside.

    Parameters
    ----------
    fit : callable
        Method that fits.

    Returns
    -------
    callable
        The method.
    """

    @functools.wraps(fit)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__.copy()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    return wrapped


class FittedNetwork(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):
    """A fitted network; a subclass fits it and sets the attributes read here.

    These are ``network_``, ``classes_``, ``image_shape_``, ``n_features_in_``, ``data_range_``, ``k_`` and
    the parameters ``device`` and ``n_jobs``. Then the subclass calls `_make_ready`.
    """

    def predict_proba(self, X):
        """Probability of each class.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            In the order of `classes_`; rows sum to 1.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images.
        """
        images = self._check_images(X)
        return probabilities(self._run(images), len(images), len(self.classes_))

    def predict(self, X):
        """Most probable class.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        ndarray of shape (n,)
            Labels, as in y.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images.
        """
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def transform(self, X):
        """Fused features f = [z_fine ; z_coarse] (eq. 14 in [1]_).

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        ndarray of shape (n, embed_dim + 32), with ``variant="paper"`` (n, embed_dim + 48)
            float64 or float32 as X is, float32 for other dtypes.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images.

        References
        ----------
        .. [1] Yoshai et al., arXiv 2505.07661 (2025).
        """
        images = self._check_images(X)
        return fused_features(self._run(images), len(images), self._n_features_out, images.float_dtype)

    def attention_maps(self, X):
        """Show where each answer came from.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        Bunch
            coarse : ndarray of shape (n, H, W)
                Coarse attention, in (0, 1).
            pixels : ndarray of shape (n, k), int64
                Row-major indices i * W + j of the chosen pixels, best first.
            fine : ndarray of shape (n, H, W)
                Fine attention, non-negative; zero off the chosen pixels.
            contribution : ndarray of shape (n, H, W)
                Signed weight w_j with which a pixel entered z_fine; zero off the chosen pixels.

            The maps are float64 or float32 as X is, float32 for other dtypes.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images.
        """
        images = self._check_images(X)
        maps = attention_maps(
            self._run(images, maps=True), len(images), self.image_shape_, self.k_, images.float_dtype
        )
        return Bunch(**maps)

    @property
    def _n_features_out(self) -> int:
        return self.network_.fusion.first[0].in_features

    def _check_images(self, X) -> ImageRows:
        """Validate X against the fit."""
        check_is_fitted(self, "network_")
        images, _ = validate_images(self, X, reset=False)
        warn_of_other_range(images, self.data_range_)
        return images

    def _run(self, images: ImageRows, *, maps: bool = False) -> Iterator[tuple[slice, SparseAttnOutput]]:
        scale, n_threads = PixelScale(self.data_range_), effective_n_jobs(self.n_jobs)
        return run(self._engine, self.network_, images, scale, maps=maps, n_threads=n_threads)

    def _make_ready(self) -> None:
        """Prepare the network to be run; what happens to its weights later does not count."""
        self._engine = Engine.of(self.network_, self.image_shape_, PixelScale(self.data_range_))

    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("_engine", None)
        network = state.get("network_")
        if network is not None and next(network.parameters()).device.type != "cpu":
            state["network_"] = copy.deepcopy(network).cpu()
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if not hasattr(self, "network_"):
            return
        try:
            device = resolve_device(self.device)
        except ValueError:
            warnings.warn(
                f"device={self.device!r} of the fit is not to be had here; the estimator works on the CPU.",
                UserWarning,
                stacklevel=2,
            )
            device = torch.device("cpu")
        self.network_.to(device)
        self._make_ready()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
