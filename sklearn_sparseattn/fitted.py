"""What a fitted SparseAttnNet answers, in scikit-learn's terms: classes, probabilities, features, maps.

Nothing is fitted here. `SparseAttnClassifier` adds the parameters and the fit.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Bunch, check_scalar
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from .data_range import warn_of_other_range
from .images import ImageRows, PixelScale, validate_images
from .inference import (
    Engine,
    attention_maps,
    evidence_maps,
    fused_features,
    is_plain,
    occlusion_maps,
    probabilities,
    resolve_device,
    run,
)
from .network import SparseAttnNet, SparseAttnOutput
from .parameters import capped, check_predict_k, to_pixels
from .threads import safe_after_fork


def all_or_nothing(fit: Callable) -> Callable:
    """Let a fit that fails leave the estimator as it was. PyTorch's grad mode and autocast do not matter.

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
            with torch.inference_mode(False), torch.enable_grad(), safe_after_fork(), ExitStack() as plain:
                for device in ("cpu", "cuda"):
                    plain.enter_context(torch.autocast(device, enabled=False))
                return fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    return wrapped


def network_arrays(network: SparseAttnNet) -> dict[str, np.ndarray]:
    """Copy weights and buffers of a network.

    Parameters
    ----------
    network : SparseAttnNet
        On whatever device.

    Returns
    -------
    dict of ndarray
        By name.
    """
    return {name: np.array(tensor.cpu().numpy(), order="C") for name, tensor in network.state_dict().items()}


def network_of(form: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> SparseAttnNet:
    """Make the network that `network_arrays` was given.

    Parameters
    ----------
    form : mapping
        ``network.form``.
    arrays : mapping of ndarray
        Weights and buffers by name.

    Returns
    -------
    SparseAttnNet
        On the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If the arrays are not those of such a network.
    """
    with torch.device("meta"):  # where nothing is drawn, and nothing takes memory
        network = SparseAttnNet(k=1, **form).float()  # whatever PyTorch's default dtype is
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    expected, found = (
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        for state in (network.state_dict(), tensors)
    )
    if found != expected:
        raise ValueError("The arrays are not those of the network.")
    network.load_state_dict(tensors, assign=True)
    network.coarse.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in the fit
    return network.eval()


class FittedNetwork(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):
    """A fitted network; a subclass fits it and sets the attributes read here.

    These are ``network_``, ``classes_``, ``image_shape_``, ``n_features_in_``, ``data_range_``, ``k_`` and
    the parameters ``device``, ``n_jobs`` and ``predict_k``. Then the subclass calls `_make_ready`.
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

    def predict_log_proba(self, X):
        """Logarithm of the probability of each class.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            In the order of `classes_`; -inf where `predict_proba` is 0.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images.
        """
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

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
        """Fused features f (eq. 14 in [1]_): [z_fine ; maximum of the tokens ; z_coarse].

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        ndarray of shape (n, 2 * embed_dim + 32), with ``size="large"`` (n, 2 * embed_dim + 64)
            float64 or float32 as X is, float32 for other dtypes. With ``variant="paper"`` there is no maximum
            of the tokens, and the shape is (n, embed_dim + 48).

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
        """Show where the network looked; `evidence_maps` and `occlusion_maps` show why it answered so.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.

        Returns
        -------
        Bunch
            coarse : ndarray of shape (n, H, W)
                Coarse attention, in (0, 1); the pixels of a tile have its value.
            tiles : ndarray of shape (n, n_tiles), int64
                Row-major indices of the chosen tiles, best first. Tiles have ``network_.tile`` pixels along
                the side, and ``network_.grid_of(H, W)`` gives their rows and columns. In the paper's form a
                tile is a pixel.
            chosen : ndarray of shape (n, H, W), bool
                The pixels of the chosen tiles.
            fine : ndarray of shape (n, H, W)
                Fine attention, non-negative; zero off the chosen pixels. The pixels of a tile have equal
                shares of its attention. It is where the network looked, not why it answered: for that see
                `evidence_maps` and `occlusion_maps`.
            contribution : ndarray of shape (n, H, W)
                Signed weight w_j with which a tile entered z_fine, shared likewise.

            The maps are float64 or float32 as X is, float32 for other dtypes.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images.
        """
        images = self._check_images(X)
        passes = self._run(images, maps=True)
        n_chosen = self._n_chosen_tiles()
        maps = attention_maps(
            passes, len(images), self.image_shape_, self.network_.tile, n_chosen, images.float_dtype
        )
        return Bunch(**maps)

    def evidence_maps(self, X, y=None):
        r"""Show why the network answered: what each pixel added to the log-odds of a class, to first order.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.
        y : array-like of shape (n,), default=None
            Labels of the classes to explain, one for each image, among `classes_`. None takes those that
            `predict` gives.

        Returns
        -------
        ndarray of shape (n, H, W)
            Positive for the class, negative against it; float64 or float32 as X is, float32 for other dtypes.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images, or y holds other labels than those of the fit, or not one
            for each image.

        Notes
        -----
        With the log-odds :math:`l = \log \frac{p_y}{1 - p_y}`, tile t of :math:`|t|` pixels with its token
        :math:`T_t` and :math:`E_t = W_2 T_t + b_2`, the maximum :math:`M` of the tokens, and the cells c of
        the last coarse map, pixel j of tile t has

        .. math::
            m_j = \frac{1}{|t|} \Big[ w_t E_t W_v \frac{\partial l}{\partial z_{fine}}
            + \sum_i s_{ti} T_{ti} \frac{\partial l}{\partial M_i} \Big]
            + \sum_c a_{jc}\, (C_c - \bar C) \frac{\partial l}{\partial C_c} .

        The bracket is there for chosen tiles only. :math:`s_{ti}` is 1 for the tile that holds the maximum of
        channel i, and shared where some tie. The last term is that of the features that are pooled over the
        whole image and reach the answer without tokens, so that fine attention cannot show it:
        :math:`\bar C` is the median cell along the sides of the image, background as a rule, and
        :math:`a_{jc}` shares a cell among the pixels around it, so that the map's sum is that over all tokens
        and cells. In the paper's form a tile is a pixel, and there is no maximum of the tokens.

        It is a slope, not a test: scores, choice and attention are held as they are, the slope holds for
        small changes, and the parts need not sum to the log-odds. The maximum of a feature is all that of the
        tile or cell that holds it, a dot in the map, though another may be close behind. A token knows its
        neighbourhood: what counts may lie some pixels beside it. That a pixel counts for the network does not
        mean that it counts in nature.
        """
        images = self._check_images(X)
        classes = self._classes_to_explain(images, y)
        scale = PixelScale(self.data_range_)
        return evidence_maps(self.network_, images, scale, classes, k=self._predicting_k())

    def occlusion_maps(self, X, y=None, *, grid=8, n_masks=1000):
        r"""Show what the answer rests on, by trial: what it becomes as parts of an image are covered.

        The slowest of the maps: every image is classified `n_masks` times.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images of the size of the fit.
        y : array-like of shape (n,), default=None
            Labels of the classes to explain, one for each image, among `classes_`. None takes those that
            `predict` gives.
        grid : int, default=8
            An image is divided into `grid` by `grid` fields, fewer where it has not so many pixels.
        n_masks : int, default=1000
            How often each image is classified, with other fields covered; an odd number is rounded up.

        Returns
        -------
        ndarray of shape (n, H, W)
            Positive for the class, negative against it; float64 or float32 as X is, float32 for other dtypes.

        Raises
        ------
        NotFittedError
            Before `fit`.
        ValueError
            If X does not fit the training images, y holds other labels than those of the fit, or not one
            for each image, or `grid` or `n_masks` is below 1.
        TypeError
            If `grid` or `n_masks` is no integer.

        Notes
        -----
        With the probability p of the class, and masks m that are 1 where a field is left and 0 where it has
        the colour of the background, the effects :math:`\beta` of the fields minimise

        .. math::
            \sum_m \Big( p(m) - \alpha - \sum_f \beta_f m_f \Big)^2 + 2 \sum_f \beta_f^2 ,

        a linear stand-in for the network around one image [1]_. From a tenth to nine tenths of the fields are
        left, at random, and then just the others; the masks are the same for all images and calls. The
        background is the median along the sides of the image.

        A pixel has the effect of its field times its own distance from the background (mean over the
        channels; 1 for the farthest of the image): what is as empty as its cover is not changed by it.
        What counts together is shared among its fields. Where the background is of more than one colour, as
        the fringes of a hologram, covered fields are something that the network has not seen.

        References
        ----------
        .. [1] Ribeiro, Singh, Guestrin, "Why should I trust you?", KDD 2016.
        """
        for name, value in (("grid", grid), ("n_masks", n_masks)):
            check_scalar(value, name, Integral, min_val=1)
        images = self._check_images(X)
        classes = self._classes_to_explain(images, y)
        return occlusion_maps(
            self._run, images, classes, n_classes=len(self.classes_), grid=int(grid), n_masks=int(n_masks)
        )

    def _classes_to_explain(self, images: ImageRows, y) -> np.ndarray:
        """Their numbers, one for each image: of the labels given, or as predicted."""
        if y is None:
            return probabilities(self._run(images), len(images), len(self.classes_)).argmax(axis=1)
        y = column_or_1d(y)
        check_consistent_length(images, y)
        return self._encode(y)

    @property
    def _n_features_out(self) -> int:
        return self.network_.fusion.first[0].in_features

    def _encode(self, y):
        """Labels -> class indices."""
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y has labels {unknown} which are not among the classes {self.classes_}.")
        return np.searchsorted(self.classes_, y)

    def _check_images(self, X) -> ImageRows:
        """Validate X against the fit."""
        check_is_fitted(self, "network_")
        images, _ = validate_images(self, X, reset=False)
        warn_of_other_range(images, self.spanned_range_)
        return images

    def _run(self, images: ImageRows, *, maps: bool = False) -> Iterator[tuple[slice, SparseAttnOutput]]:
        scale = PixelScale(self.data_range_)
        # To count the processors takes as long as the engine does for an image, which is never shared.
        is_alone = len(images) == 1 and self.n_jobs != 0 and self._engine is not None
        n_threads = 1 if is_alone else effective_n_jobs(self.n_jobs)
        k = self._predicting_k()
        return run(self._engine, self.network_, images, scale, k=k, maps=maps, n_threads=n_threads)

    def _predicting_k(self) -> float:
        """Pixels to choose of an image, as `predict_k` is now."""
        if self.predict_k is None:
            return float(self.network_.k)
        check_predict_k(self.predict_k)
        height, width, _ = self.image_shape_
        return to_pixels(capped(self.predict_k, height * width), self.network_.area_of(height, width))

    def _n_chosen_tiles(self) -> int:
        return self.network_.n_chosen(*self.image_shape_[:2], self._predicting_k())

    def _make_ready(self) -> None:
        """Prepare the network to be run; what happens to its weights later does not count."""
        self._engine = Engine.of(self.network_, self.image_shape_, PixelScale(self.data_range_))

    @safe_after_fork()
    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("_engine", None)
        network = state.get("network_")
        if network is not None and next(network.parameters()).device.type != "cpu":
            state["network_"] = network = copy.deepcopy(network).cpu()
        if network is not None and is_plain(network):
            # Without tensors other formats than pickle, like that of skops, can hold it.
            state["network_"] = {"form": network.form, "arrays": network_arrays(network)}
        return state

    @safe_after_fork()
    def __setstate__(self, state):
        network = state.get("network_")
        if isinstance(network, Mapping):
            state = state | {"network_": network_of(**network)}
        super().__setstate__(state)
        if network is None:
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
