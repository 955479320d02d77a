"""SparseAttnClassifier: SparseAttnNet behind scikit-learn's interface.

Parameters, validation and fit. The mathematics is in `network`, the training loop in `training`, what the
fitted estimator answers in `fitted`.
"""

import copy
import inspect
import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from sklearn.utils.validation import _check_sample_weight

from .data_range import learn_data_range, warn_of_clipped, warn_of_other_range
from .fitted import FittedNetwork, all_or_nothing
from .images import PixelScale, validate_images
from .inference import resolve_device
from .network import SparseAttnNet
from .parameters import CONSTRAINTS, PUBLISHED, check_together, needs_validation
from .training.augmentation import resolve_augment
from .training.batches import Batches, LabelledImages
from .training.checkpoint import Checkpoint, fingerprint
from .training.counts import resolve_bounds
from .training.dynamic_k import K_MAX, K_MIN, TOLERANCE, DynamicK
from .training.final_check import warn_of_contradiction
from .training.fit import TrainingResult, TrainingSettings, given_rule, join_histories, train
from .training.net import recompute_batch_norm
from .training.setup import (
    class_weights,
    k_defaults,
    label_images,
    make_generators,
    new_network,
    unique_labels,
)
from .training.split import validation_split


class SparseAttnClassifier(FittedNetwork):
    """Classify images by the few per cent of their pixels that matter (SparseAttnNet [1]_).

    A small convolutional network looks at the whole image once and scores it tile by tile. Only the best
    tiles, of k pixels in all, go on. Deeper convolutions run between them alone, an attention of linear cost
    pools them, and a small MLP classifies from these and from pooled features of the first look. k is
    learned: it grows where more pixels lower the loss, and falls where they do not.

    Parameters
    ----------
    k_init, k_min, k_max : int or float, default=8000/18225, 1, 1.0
        Number of chosen pixels at the start of training, and its bounds. An int is a number of pixels, above
        H * W it means all; a float in (0, 1] is a share of the pixels of an image. Pixels are chosen by the
        tile, at least one.
    k_tolerance : float, default=0.001
        Training loss, in nats, by which k must be better than half as many pixels to grow, see `DynamicK`.
    predict_k : int or float, default=None
        Pixels that a fitted estimator chooses, best near `k_`; read at prediction. None is `k_`.
    variant : {"tiles", "paper"}, default="tiles"
        What a token is: a tile of pixels with the coarse features around it, or a pixel, its position and
        values, as printed in [1]_. `paper` has all of the published configuration.
    size : {"default", "large"}, default="default"
        Of the network with ``variant="tiles"``. "large" is for fine patterns, as in holograms; it is slower.
    embed_dim, n_heads, hidden_dim : int, default=32, 2, 128
        Length D of a token; heads of the fine attention, at most D; hidden width of the classifier, of which
        the paper has 512, more than fit into its own 0.05 M parameters.
    focal_gamma, class_weight : default=0.0, None
        Exponent of the focal loss (0: cross-entropy; paper: 2); its alpha, a dict by label or "balanced".
    contrastive_weight, temperature : float, default=0.1, 0.07
        Weight and temperature of the supervised contrastive loss.
    distillation_weight : float, default=0.02
        Weight of the loss by which the fine attention teaches the coarse one.
    consistency_weight : float, default=0.0
        Weight of the consistency loss: two augmented views of an image should get the same prediction. Needs
        `augment`; a step takes up to twice the time and memory.
    lr, weight_decay : float, default=1e-2, None
        Learning rate of AdamW, with "onecycle" its peak, and its weight decay. None is 3 / (`lr` * steps of
        the fit), counted as 300 at least: few steps need more of it for the same effect over a fit.
    lr_schedule : {"onecycle", "plateau"} or None, default="onecycle"
        "plateau" multiplies the rate by 0.9 after 5 epochs without gain, as in the paper.
    max_epochs : int, default=60
        Passes over the training rows.
    batch_size : int, default=32
        Greatest number of rows in a batch; batches are of nearly equal size, and of two rows at least.
    augment : str, callable, list of these, or None, default=None
        What is done to training images at random. "dihedral" flips and turns them by quarters (if H != W, by
        halves). "light" changes gain, offset and gamma, blurs and adds noise. "stain", for stained cells in
        RGB, turns, changes optical densities, light and scale, and blurs. Parts of these: "brightness",
        "noise", "blur", "zoom", "density". A callable is given ``(images, rng)``, float32 (B, C, H, W)
        scaled to about [0, 1] and a NumPy Generator, and returns an array of the same shape. A list is
        applied in its order.
    image_shape : (H, W) or (H, W, C), default=None
        Form if X is 2-D. None: square images if the number of features is a square, else images of one row.
    data_range : (lo, hi), default=None
        Values of X that become 0 and 1; values farther outside than three times this range are clipped. None
        learns it.
    validation_fraction : float in (0, 1), default=0.2
        Share of the rows held out if early stopping or "plateau" needs them.
    early_stopping, patience : bool, int, default=False, 10
        Stop after `patience` epochs without a lower validation loss, and go back to the best weights.
    warm_start : bool, default=False
        Let `fit` go on from the network, k and data range of the last fit instead of new ones.
    callbacks : list of skorch callbacks, default=None
        Further callbacks, or pairs (name, callback); the scores they record join `history_`. A DynamicK
        replaces the built-in one; its None is taken from `k_min`, `k_max` and `k_tolerance`.
    checkpoint_dir : str or path, default=None
        Folder to which `fit` writes its state after every epoch, see Notes. `partial_fit` writes nothing.
    n_jobs : int, default=None
        Threads to predict with; None is 1, -1 is all processors. A fit has PyTorch's; one after a fork.
    device : str or torch.device, default="cpu"
        "cpu", "cuda", "cuda:1", "mps", or "auto" for what there is.
    random_state : int, RandomState instance or None, default=None
        Seeds weights, shuffles, split and augmentation. Global generators are neither read nor written.
    verbose : int, default=0
        Above 0, a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    n_features_in_ : int
        H * W * C.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns, if X was a DataFrame.
    image_shape_ : tuple of (H, W, C)
        Form of the images.
    data_range_ : tuple of (lo, hi)
        Values that become 0 and 1: (0, 255) for uint8, (0, 1) for bool; for sparse data and data with
        negative values (0, max abs v), so that zero stays zero; otherwise the extremes of the training rows.
        A few values far outside of all others do not count.
    spanned_range_ : tuple of (lo, hi)
        What the training rows span, without outliers: prediction warns of images in other units.
    k_ : int
        Pixels chosen of each image: those of the chosen tiles.
    n_iter_ : int
        Epochs trained.
    history_ : dict of ndarray of shape (n_iter_,)
        By epoch: "epoch", "train_loss" and its terms "focal_loss", "contrastive_loss", "distillation_loss",
        "consistency_loss" (unweighted; 0 if not used), "k", the losses that it is found by, "loss_at_k" and
        "loss_at_half_k" (not with the published rule; NaN in epochs without comparison), "lr", "duration" in
        seconds and, with validation rows, "valid_loss" (focal) and "valid_score" (accuracy).
    network_ : SparseAttnNet
        The fitted PyTorch module. What predicts was made from it: to change it changes no answers.

    See Also
    --------
    PixelSetTransformer : Chosen pixels as features for any other classifier.

    Notes
    -----
    X may be (n, features), dense or sparse, (n, H, W) or (n, H, W, C), of booleans, integers or floats; after
    `fit` the forms may be interchanged. An image's result does not depend on the rest of the call, to 1e-9.

    With a `checkpoint_dir`, a fit that was killed goes on from its last whole epoch when the same call comes
    again, and ends with the same bits (on the same machine and number of threads). The same call has the same
    parameters (`n_jobs` and `verbose` aside), images, labels and weights; functions count by their code. The
    file is named after these, the version of PyTorch and the code of this package, so that many fits share a
    folder. The same fit twice at a time is an error (on Windows it is not noticed). Of `callbacks`, state is
    kept of EarlyStopping, LRScheduler and what has ``state_dict`` and ``load_state_dict``. With
    ``random_state=None`` the generators go on, too. A fit that is done removes its file; others leave it.

    Ctrl-C after an epoch or more ends a fit with a warning and a usable estimator: with early stopping that
    of the best epoch so far, else that of the last whole one. Where numbers go wrong, a loss or weights that
    are not finite, `fit` raises an error that names epoch and batch, and the estimator is as it was before.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> from sklearn_sparseattn import SparseAttnClassifier
    >>> from sklearn_sparseattn.datasets import make_cells
    >>> cells = make_cells(100, modality="brightfield", n_classes=2, image_size=32, random_state=0)
    >>> clf = SparseAttnClassifier(max_epochs=2, random_state=0).fit(cells.images, cells.target)
    >>> clf.predict_proba(cells.images[:5]).shape
    (5, 2)
    """

    history_: dict[str, np.ndarray]
    _parameter_constraints: dict = CONSTRAINTS

    def __init__(
        self,
        *,
        k_init=8000 / 18225,
        k_min=K_MIN,
        k_max=K_MAX,
        k_tolerance=TOLERANCE,
        predict_k=None,
        variant="tiles",
        size="default",
        embed_dim=32,
        n_heads=2,
        hidden_dim=128,
        focal_gamma=0.0,
        class_weight=None,
        contrastive_weight=0.1,
        temperature=0.07,
        distillation_weight=0.02,
        consistency_weight=0.0,
        lr=1e-2,
        weight_decay=None,
        lr_schedule="onecycle",
        max_epochs=60,
        batch_size=32,
        augment=None,
        image_shape=None,
        data_range=None,
        validation_fraction=0.2,
        early_stopping=False,
        patience=10,
        warm_start=False,
        callbacks=None,
        checkpoint_dir=None,
        n_jobs=None,
        device="cpu",
        random_state=None,
        verbose=0,
    ):
        self.k_init = k_init
        self.k_min = k_min
        self.k_max = k_max
        self.k_tolerance = k_tolerance
        self.predict_k = predict_k
        self.variant = variant
        self.size = size
        self.embed_dim = embed_dim
        self.n_heads = n_heads
        self.hidden_dim = hidden_dim
        self.focal_gamma = focal_gamma
        self.class_weight = class_weight
        self.contrastive_weight = contrastive_weight
        self.temperature = temperature
        self.distillation_weight = distillation_weight
        self.consistency_weight = consistency_weight
        self.lr = lr
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.augment = augment
        self.image_shape = image_shape
        self.data_range = data_range
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.patience = patience
        self.warm_start = warm_start
        self.callbacks = callbacks
        self.checkpoint_dir = checkpoint_dir
        self.n_jobs = n_jobs
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def paper(cls, **params):
        """Make an estimator with the published configuration.

        Parameters
        ----------
        **params : parameters of SparseAttnClassifier
            Those to set otherwise.

        Returns
        -------
        SparseAttnClassifier
            The published network, losses, rule of k and optimiser; the rest as by default.
        """
        callbacks = params.pop("callbacks", ())
        if callbacks is not None and given_rule(callbacks) is None:
            callbacks = [DynamicK.paper(k_min=None, k_max=None), *callbacks]
        return cls(**{**PUBLISHED, "callbacks": callbacks, **params})

    @all_or_nothing
    def fit(self, X, y, sample_weight=None, *, X_val=None, y_val=None):
        """Fit the network to images.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images; booleans, integers or floats. Never copied whole.
        y : array-like of shape (n,)
            Class labels of any kind.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights. Rows of weight zero are dropped; their classes stay.
        X_val, y_val : array-like, default=None
            Rows to validate on. None holds out `validation_fraction` of X, if something uses it.

        Returns
        -------
        self : SparseAttnClassifier
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter or the data cannot be used, a parameter has no effect, or training diverges.
        OSError
            If the checkpoint cannot be written; the last one is still there.
        """
        self._check_params()
        device = resolve_device(self.device)
        fresh = not (self.warm_start and hasattr(self, "network_"))
        images, y, weight, classes = self._check_training_rows(X, y, sample_weight, reset=fresh)
        if fresh:
            self.classes_ = classes
            self.data_range_, self.spanned_range_ = learn_data_range(images, self.data_range)
        else:
            warn_of_clipped(images, self.data_range_)
        self._check_with_shape()
        target = self._encode(y)
        scale = PixelScale(self.data_range_)
        held_out = self._held_out_rows(X_val, y_val, scale)
        with self._checkpoint(label_images(images, target, weight, scale), held_out, fresh) as checkpoint:
            rng, generator = make_generators(self.random_state)
            if checkpoint is not None:
                checkpoint.begin(rng)
            if held_out is None and needs_validation(self.get_params(deep=False)):
                split = validation_split(target, self.validation_fraction, rng, required=self.early_stopping)
                if split is not None:
                    kept, held = split
                    held_out = label_images(images.take(held), target[held], weight[held], scale)
                    images, target, weight = images.take(kept), target[kept], weight[kept]
            training = label_images(images, target, weight, scale)

            network = self._network_to_train(fresh, generator, training)
            settings = TrainingSettings.from_params(self.get_params(deep=False))
            result = self._train(network, training, held_out, rng, device, settings, checkpoint=checkpoint)
            # Shuffled: rows may come sorted by class, and the statistics are those of batches.
            recompute_batch_norm(network, Batches(training, self.batch_size, rng), device, result.draw)
            if not result.interrupted:
                warn_of_contradiction(
                    network,
                    training,
                    float(result.history["focal_loss"][-1]),
                    gamma=settings.focal_gamma,
                    class_weight=class_weights(self.class_weight, self.classes_, training),
                    device=device,
                )
            self._finish(network, result, fresh)
            self._resume = None
            if checkpoint is not None and not result.interrupted:
                checkpoint.remove()
        return self

    @all_or_nothing
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Make one training pass over some rows, going on from where the last call ended.

        k, its controller, the optimiser and the random generator are kept between calls. The learning rate is
        `lr` throughout, nothing is held out, and batch norm keeps its running statistics.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n, features), (n, H, W) or (n, H, W, C)
            Images.
        y : array-like of shape (n,)
            Class labels.
        classes : array-like of shape (n_classes,), default=None
            All labels that will ever come; needed in the first call.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights.

        Returns
        -------
        self : SparseAttnClassifier
            The estimator.

        Raises
        ------
        ValueError
            If `classes` is missing in the first call or differs later, or as in `fit`.
        """
        self._check_params(in_parts=True)
        device = resolve_device(self.device)
        first = not hasattr(self, "network_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        images, y, weight, _ = self._check_training_rows(X, y, sample_weight, reset=first)
        if first:
            self.classes_ = unique_labels(classes, "classes")
            self.data_range_, self.spanned_range_ = learn_data_range(images, self.data_range)
        elif classes is not None and not np.array_equal(unique_labels(classes, "classes"), self.classes_):
            raise ValueError(f"classes={classes!r} differ from those of the first call, {self.classes_}.")
        else:
            warn_of_clipped(images, self.data_range_)
        self._check_with_shape()
        training = label_images(images, self._encode(y), weight, PixelScale(self.data_range_))

        state = getattr(self, "_resume", None)
        rng, generator = make_generators(self.random_state)
        if state is not None:
            rng = copy.deepcopy(state.rng)
        network = self._network_to_train(first, generator, training)
        one_pass = {"max_epochs": 1, "lr_schedule": None, "early_stopping": False}
        settings = TrainingSettings.from_params(self.get_params(deep=False), **one_pass)
        result = self._train(network, training, None, rng, device, settings, state=state)
        network.eval()
        self._finish(network, result, first)
        self._resume = result.resume
        return self

    def _check_params(self, *, in_parts: bool = False) -> None:
        self._validate_params()
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        of_the_rule = (given_rule(self.callbacks) or DynamicK()).own_parameters()
        check_together(self.get_params(deep=False), defaults, of_the_rule, in_parts=in_parts)

    def _check_with_shape(self) -> None:
        """Bounds of k, or augmentations, that cannot be: an error before any work is lost."""
        resolve_augment(self.augment, self.image_shape_)
        rule = given_rule(self.callbacks) or DynamicK()
        k_min = self.k_min if rule.k_min is None else rule.k_min
        k_max = self.k_max if rule.k_max is None else rule.k_max
        resolve_bounds(k_min, k_max, math.prod(self.image_shape_[:2]))

    def _check_training_rows(self, X, y, sample_weight, *, reset):
        """Validate rows, labels and weights; drop the rows without weight."""
        images, y = validate_images(self, X, y, reset=reset, image_shape=self.image_shape)
        classes = unique_labels(y, "y")  # also of rows without weight, as in scikit-learn's classifiers
        if sample_weight is None:
            return images, y, np.ones(len(y)), classes
        weight = _check_sample_weight(sample_weight, images.data, dtype=np.float64, ensure_non_negative=True)
        used = np.flatnonzero(weight)
        if not (len(used) and np.isfinite(weight).all()):
            raise ValueError("sample_weight is infinite, or zero for every row: nothing is left to fit.")
        return images.take(used), y[used], weight[used], classes

    def _held_out_rows(self, X_val, y_val, scale: PixelScale) -> LabelledImages | None:
        """Validation rows that the user gave."""
        if X_val is None and y_val is None:
            return None
        if X_val is None or y_val is None:
            raise ValueError("X_val and y_val go together: one of them is None.")
        try:
            images, y_val = validate_images(self, X_val, y_val, reset=False)
            warn_of_other_range(images, self.spanned_range_, "X_val", stacklevel=5)
            return label_images(images, self._encode(y_val), np.ones(len(images)), scale)
        except (TypeError, ValueError) as error:
            raise ValueError(f"X_val or y_val: {error}") from error

    def _network_to_train(self, fresh, generator, training) -> SparseAttnNet:
        if not fresh:
            return copy.deepcopy(self.network_)  # should the fit fail, the old one is still there
        params = self.get_params(deep=False)
        return new_network(params, self.image_shape_, len(self.classes_), generator, training)

    def _checkpoint(self, training, held_out, fresh) -> AbstractContextManager[Checkpoint | None]:
        if self.checkpoint_dir is None:
            return nullcontext()
        params, start = self.get_params(deep=False), None if fresh else self.network_
        name = fingerprint(params, self.classes_, [training, held_out], start)
        return Checkpoint(self.checkpoint_dir, name)

    def _train(self, network, training, held_out, rng, device, settings, **going_on) -> TrainingResult:
        return train(
            network,
            training,
            held_out,
            settings,
            k_defaults=k_defaults(self.get_params(deep=False), network, self.image_shape_),
            class_weight=class_weights(self.class_weight, self.classes_, training),
            augment=resolve_augment(self.augment, self.image_shape_),
            rng=rng,
            device=device,
            **going_on,
        )

    def _finish(self, network: SparseAttnNet, result: TrainingResult, fresh: bool) -> None:
        self.network_ = network
        self.k_ = network.k_of(*self.image_shape_[:2])
        self.history_ = result.history if fresh else join_histories(self.history_, result.history)
        self.n_iter_ = len(self.history_["epoch"])
        self._make_ready()
