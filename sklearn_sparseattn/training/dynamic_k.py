"""DynamicK: a skorch callback that finds the number of chosen pixels, k, while a network trains.

It knows no more of the network than `k` and `k_by_image`, and of the data than the pixels of an image.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from skorch.dataset import unpack_data
from torch import Tensor

from ..parameters import is_int
from .counts import (
    check_count,
    check_n_pixels,
    clip,
    images_of,
    is_real,
    pixels_of,
    read_k,
    resolve_bounds,
    write_k,
)

K_MIN = 1  # pixel: it decides nothing
K_MAX = 1.0
TOLERANCE = 0.001
STEP = 0.12
_DECAY = 0.97  # of the moving averages, for each comparison
_TINY = 1e-12
# What goes on from one net to the next.
_REMEMBERED: dict[str, type] = {
    **dict.fromkeys(("worth", "spread", "highest_rate", "exploring"), float),
    **dict.fromkeys(("n_compared", "n_per_epoch", "n_seen"), int),
    "is_due": bool,
}
_DRIFT = 0.3  # of a step, downwards: what more pixels bring must be seen
_EXPLORE = 0.25  # share of the images whose k is drawn from the whole range, at least
_GROUPS = 4  # of a batch, each with a k of its own
_EVERY = 2  # batches, at least, from one comparison to the next


class DynamicK(Callback):
    """Find how many pixels are worth looking at.

    A callback for any skorch net whose module has a `k`, the number of pixels it chooses: a buffer of one
    element, or a plain number. While a batch is trained, `k_by_image` of the module is a Tensor with the
    number of each image, otherwise None. `paper` makes the callback with the published rule instead.

    Parameters
    ----------
    k_min, k_max : int or float, default=None
        Bounds of k. As everywhere here, an int is a number of pixels and a float in (0, 1] a share
        of the N pixels of an image: 1 is one pixel, 1.0 is all of them. Both are clipped to [1, N].
        None is 1 and 1.0, or what `SparseAttnClassifier` has.
    tolerance : float, default=None
        Loss, in nats, by which k must be better than half as many pixels to grow, >= 0. None is 0.001, or the
        ``k_tolerance`` of `SparseAttnClassifier`.
    step : float, default=0.12
        Change of log k in a step at the highest learning rate, > 0. It falls with the learning rate.
    n_checks : int, default=5
        Batches of an epoch on which k / 2 and k are compared, at most.
    n_pixels : int, default=None
        N. None takes the last two axes, (H, W), of the images in the first training batch.

    Attributes
    ----------
    worth_ : float or None
        Moving average of loss(k / 2) - loss(k); None before the first comparison. It goes on through
        `partial_fit` and starts anew with the net's `initialize`.
    noise_ : float
        Its standard error.
    highest_rate_ : float
        The highest learning rate at any step so far; 0 before the first, and as long-lived as `worth_`.

    Raises
    ------
    ValueError
        If a parameter is out of its range, k_min lies above k_max, or N cannot be read from the batch.
    AttributeError
        If the module has no `k`.

    Notes
    -----
    With rate the learning rate divided by `highest_rate_`, each quarter of a batch is trained with another k,
    drawn log-uniformly: from the whole range (but not below a 64th of k_max) with a probability of
    max(rate, 1/4), otherwise from k / 2 to 2 k. A network then serves any k, batch norm by statistics of
    many, and each tile has its turn to teach the scores.

    On some batches, before they are trained, the loss is computed with k / 2 and with k (with k_min and twice
    as many where k / 2 is less): `net.get_loss` without gradient, in evaluation mode. With d the difference
    and beta = 0.97 for each comparison,

    1. worth <- beta worth + (1 - beta) d, and likewise its variance, from which comes its standard error,
       the noise.
    2. excess = worth - tolerance, less what of it lies within the noise, divided by noise + tolerance / 2.
    3. After each epoch log k moves by `step` * rate * (excess - 0.3), at most by `step` * rate.

    So k grows where the last doubling of the pixels lowered the loss by more than the tolerance and the
    noise, and falls where it did not.

    An epoch's step is taken as the next epoch begins. So ``net.history[:, "k"]``, recorded as an
    epoch ends, is the k about which that epoch was trained and with which it was validated; and a fitted
    module keeps the k it was last trained with. ``loss_at_half_k`` and ``loss_at_k`` in the history are the
    means of an epoch's comparisons.

    k is read back from the module at every step, so that restored weights bring theirs. It is
    clipped to its bounds whenever training starts. A loss that is not finite changes nothing.

    References
    ----------
    .. [1] Yoshai, Yagoda-Aharoni, Dotan, Shaked, "Hierarchical Sparse Attention Framework for
       Computationally Efficient Classification of Biological Cells", arXiv 2505.07661 (2025).

    Examples
    --------
    >>> from skorch import NeuralNetClassifier
    >>> from sklearn_sparseattn import DynamicK
    >>> from sklearn_sparseattn.network import SparseAttnNet
    >>> net = NeuralNetClassifier(SparseAttnNet, callbacks=[("dynamic_k", DynamicK(k_min=20))])
    >>> net = net.set_params(callbacks__dynamic_k__tolerance=0.02)
    """

    def __init__(
        self,
        *,
        k_min: float | None = None,
        k_max: float | None = None,
        tolerance: float | None = None,
        step: float = STEP,
        n_checks: int = 5,
        n_pixels: int | None = None,
    ) -> None:
        self.k_min = k_min
        self.k_max = k_max
        self.tolerance = tolerance
        self.step = step
        self.n_checks = n_checks
        self.n_pixels = n_pixels

    @staticmethod
    def paper(**overrides: Any) -> "DynamicK":
        """Make the callback with the published rule and its constants.

        By batches, with so short a memory, the signs of the steps are almost coin flips.

        Parameters
        ----------
        **overrides : parameters of the rule
            Those to set otherwise: k_min=1500, k_max=1.0, shrink=50, grow=80, ema_decay=0.2, momentum=0.2,
            update="batch" ("epoch" takes a step an epoch), n_pixels=None.

        Returns
        -------
        DynamicK
            By eq. 21-23 of the paper.
        """
        from .loss_trend_k import LossTrendK  # which is made from this class

        return LossTrendK(**overrides)

    def use(self, *, k_min: float, k_max: float, tolerance: float, n_pixels: int, rng: Any) -> None:
        """Take these where the callback has None itself; `initialize` forgets nothing of it.

        Parameters
        ----------
        k_min, k_max, tolerance : float
            As the parameters.
        n_pixels : int
            Of the images.
        rng : numpy.random.Generator
            Draws the k of each image.
        """
        self.defaults_: dict[str, Any] = {"k_min": k_min, "k_max": k_max, "tolerance": tolerance}
        self.defaults_ |= {"n_pixels": n_pixels, "rng": rng}

    def own_parameters(self) -> list[str]:
        """Name the parameters of `SparseAttnClassifier` in whose place this has its own.

        Returns
        -------
        list of str
            Among "k_min", "k_max" and "k_tolerance".
        """
        names = {"k_min": "k_min", "k_max": "k_max", "tolerance": "k_tolerance"}
        return [theirs for own, theirs in names.items() if getattr(self, own) is not None]

    def initialize(self) -> "DynamicK":
        """Check the parameters and forget all losses.

        Returns
        -------
        DynamicK
            Itself.
        """
        self._check_parameters()
        self.worth_: float | None = None
        self.spread_ = 0.0  # variance of the differences
        self.n_compared_ = 0
        self.highest_rate_ = 0.0
        self.is_due_ = False  # the step of a finished epoch is still to be taken
        self.n_per_epoch_ = 0  # batches; not known in the first epoch
        self.n_seen_ = 0  # batches in all
        self.bounds_: tuple[float, float] | None = None  # in pixels, once N is known
        self.exploring_ = 1.0  # probability of a k from the whole range
        rng = getattr(self, "defaults_", {}).get("rng")
        if rng is None:  # in a net of another kind: as torch.manual_seed said
            rng = np.random.default_rng(torch.initial_seed() % 2**63)
        self.rng_: np.random.Generator = rng
        return self

    @property
    def noise_(self) -> float:
        """Standard error of the moving average."""
        n = min(self.n_compared_, (1 + _DECAY) / (1 - _DECAY))
        return math.sqrt(self.spread_ / n) if n else 0.0

    def state_dict(self) -> dict[str, float | None]:
        """What it remembers of the losses, for a new net that goes on where another stopped.

        Returns
        -------
        dict
            For `load_state_dict`. k is not in it: that is the module's.
        """
        numbers = {name: getattr(self, f"{name}_") for name in _REMEMBERED}
        return {name: None if value is None else float(value) for name, value in numbers.items()}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Remember what another one did; to be called after the net's `initialize`.

        Parameters
        ----------
        state : dict
            From `state_dict`.
        """
        for name, value in state.items():
            kind = _REMEMBERED[name]
            setattr(self, f"{name}_", None if value is None else kind(value))

    def on_train_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        """Look for the module's k, and put it between its bounds if N is known.

        Parameters
        ----------
        net : skorch.NeuralNet
            About to train.
        **kwargs : dict
            Not used.
        """
        self._check_parameters()  # set_params may have come since initialize
        read_k(net.module_)
        self.bounds_ = None  # the images may have another size than the last time
        if self._value("n_pixels") is not None:
            self._start(net, self._value("n_pixels"))

    def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        """Begin to count.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training.
        **kwargs : dict
            Not used.
        """
        self.n_batches_ = 0
        self.compared_: list[tuple[float, float]] = []

    def on_batch_begin(
        self, net: NeuralNet, batch: Any = None, training: bool | None = None, **kwargs: Any
    ) -> None:
        """Learn N from the first batch, take the step of the last epoch, compare, and draw for this batch.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training.
        batch : tuple (X, y)
            The coming batch; X is images (B, ..., H, W), or a dict or tuple that begins with them.
        training : bool
            False for a validation batch.
        **kwargs : dict
            Not used.
        """
        if not training:
            return
        if self.bounds_ is None:
            self._start(net, pixels_of(batch))
        if self.is_due_:
            self._step(net)
            self.is_due_ = False
        self._begin_batch(net, batch)

    def on_batch_end(self, net: NeuralNet, training: bool | None = None, **kwargs: Any) -> None:
        """End what was drawn for this batch.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training.
        training : bool
            False for a validation batch.
        **kwargs : dict
            Not used.
        """
        if training:
            net.module_.k_by_image = None

    def on_train_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """End what was drawn for a batch within which the keyboard ended training.

        Parameters
        ----------
        net : skorch.NeuralNet
            Trained.
        **kwargs : dict
            Not used.
        """
        net.module_.k_by_image = None

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Record k and the losses compared.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training; ``k``, ``loss_at_half_k`` and ``loss_at_k`` are written to its history.
        **kwargs : dict
            Not used.
        """
        net.history.record("k", read_k(net.module_))
        means = np.mean(self.compared_, axis=0) if self.compared_ else (np.nan, np.nan)
        for name, mean in zip(("loss_at_half_k", "loss_at_k"), means, strict=True):
            net.history.record(name, float(mean))
        self.n_per_epoch_, self.is_due_ = self.n_batches_, True
        self.exploring_ = self._share_of_rate(net)

    # ---- the rule ----

    def _begin_batch(self, net: NeuralNet, batch: Any) -> None:
        low, high = self._bounds()
        k = read_k(net.module_)
        every = max(_EVERY, self.n_per_epoch_ // self.n_checks)
        if self.n_seen_ % every == 0 and len(self.compared_) < self.n_checks:
            more = min(max(k, 2 * low), high)  # at the lower bound, too, a doubling is looked at
            self._compare(net, batch, max(more / 2, low), more)
        self.n_batches_ += 1
        self.n_seen_ += 1
        net.module_.k_by_image = self.draw(k, len(images_of(batch)), self._share_of_rate(net))

    def draw(self, k: float, n: int, exploring: float | None = None) -> Tensor | None:
        """Draw a k for each of some images: from the whole range while much is learned, at last about k.

        Parameters
        ----------
        k : float
            Of the module.
        n : int
            Images.
        exploring : float, default=None
            Probability of the whole range, if above 1/4; None is that at the end of the last epoch.

        Returns
        -------
        Tensor of shape (n,), float64, or None
            Pixels to choose of each; None where all have that of the module.
        """
        low, high = self._bounds()
        exploring = max(self.exploring_ if exploring is None else exploring, _EXPLORE)
        explores = self.rng_.random(_GROUPS) < exploring
        lowest = np.where(explores, max(low, high / 64), max(low, k / 2))
        highest = np.where(explores, high, min(high, 2 * k))
        drawn = np.exp(self.rng_.uniform(np.log(lowest), np.log(highest))).clip(low, high)
        return torch.from_numpy(drawn[np.arange(n) * _GROUPS // max(n, _GROUPS)])

    def _compare(self, net: NeuralNet, batch: Any, fewer: float, more: float) -> None:
        """Compute the losses of a batch with fewer and with more pixels."""
        (images, target), losses, k = unpack_data(batch), [], read_k(net.module_)
        net._set_training(False)
        try:
            for count in (fewer, more):
                write_k(net.module_, count)
                with torch.no_grad():
                    output = net.infer(images)
                    losses.append(float(net.get_loss(output, target, X=images, training=False)))
        finally:
            write_k(net.module_, k)
        if not all(map(math.isfinite, losses)):
            return
        self.compared_.append((losses[0], losses[1]))
        difference = losses[0] - losses[1]
        self.n_compared_ += 1
        share = max(1 - _DECAY, 1 / self.n_compared_)  # a plain mean at first
        before = difference if self.worth_ is None else self.worth_
        self.worth_ = before + share * (difference - before)
        self.spread_ += share * ((difference - before) * (difference - self.worth_) - self.spread_)

    def _step(self, net: NeuralNet) -> None:
        rate = self._share_of_rate(net)
        if self.worth_ is None:
            return
        low, high = self._bounds()
        tolerance = self._value("tolerance")
        excess = self.worth_ - tolerance
        excess -= clip(excess, -self.noise_, self.noise_)
        excess = excess / (self.noise_ + tolerance / 2 + _TINY) - _DRIFT
        factor = math.exp(clip(excess, -1, 1) * self.step * rate)
        write_k(net.module_, clip(factor * read_k(net.module_), low, high))

    def _share_of_rate(self, net: NeuralNet) -> float:
        """The learning rate, as a share of the highest so far."""
        rate = max(float(group["lr"]) for group in net.optimizer_.param_groups)
        self.highest_rate_ = max(self.highest_rate_, rate)
        return rate / self.highest_rate_ if self.highest_rate_ > 0 else 1.0

    # ---- parameters ----

    def _value(self, name: str) -> Any:
        """A parameter, or what stands for its None."""
        value = getattr(self, name)
        if value is not None:
            return value
        fixed = {"k_min": K_MIN, "k_max": K_MAX, "tolerance": TOLERANCE}
        return getattr(self, "defaults_", fixed).get(name)

    def _check_parameters(self) -> None:
        for name in ("k_min", "k_max"):
            check_count(name, self._value(name), least=1)
        tolerance = self._value("tolerance")
        if not (is_real(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance={tolerance!r} in DynamicK: a number >= 0.")
        if not (is_real(self.step) and self.step > 0):
            raise ValueError(f"step={self.step!r} in DynamicK: a number > 0.")
        if not (is_int(self.n_checks) and self.n_checks >= 1):
            raise ValueError(f"n_checks={self.n_checks!r} in DynamicK: an int >= 1.")
        check_n_pixels(self.n_pixels)

    def _bounds(self) -> tuple[float, float]:
        assert self.bounds_ is not None  # a training batch has begun
        return self.bounds_

    def _start(self, net: NeuralNet, n_pixels: int) -> None:
        self.bounds_ = resolve_bounds(self._value("k_min"), self._value("k_max"), n_pixels)
        write_k(net.module_, clip(read_k(net.module_), *self.bounds_))
