"""The published rule of k (eq. 21-23): down while the training loss falls, up when it stalls."""

import math
from collections.abc import Mapping
from typing import Any

from skorch import NeuralNet

from ..parameters import to_pixels
from .counts import check_count, check_n_pixels, clip, is_real, read_k, write_k
from .dynamic_k import DynamicK


class LossTrendK(DynamicK):
    """Fewer pixels while the loss falls, more when it stalls: eq. 21-23 of [1]_; see `DynamicK.paper`.

    Parameters
    ----------
    k_min, k_max : int or float, default=1500, 1.0
        As in `DynamicK`.
    shrink, grow : int or float, default=50, 80
        How far k is pulled down while the loss falls, and up when it stalls; pixels or shares.
    ema_decay : float, default=0.2
        beta, in [0, 1): the share of the past in the moving average of the loss.
    momentum : float, default=0.2
        alpha, in [0, 1): the share of itself that k keeps in a step.
    update : {"epoch", "batch"}, default="batch"
        Take a step for every epoch, by its mean loss, or for every batch.
    n_pixels : int, default=None
        As in `DynamicK`.

    Attributes
    ----------
    ema_ : float or None
        L_ema; None before the first loss.

    Notes
    -----
    With L the training loss as the net records it (``train_loss``):

    1. L_ema <- beta L_ema + (1 - beta) L. The first loss only sets L_ema.
    2. k' = max(k - shrink, k_min) if L_ema fell, else k' = min(k + grow, k_max).
    3. k <- alpha k + (1 - alpha) k'.

    References
    ----------
    .. [1] Yoshai et al., arXiv 2505.07661 (2025).
    """

    tolerance = None  # of the other rule

    def __init__(
        self,
        *,
        k_min: float | None = 1500,
        k_max: float | None = 1.0,
        shrink: float = 50,
        grow: float = 80,
        ema_decay: float = 0.2,
        momentum: float = 0.2,
        update: str = "batch",
        n_pixels: int | None = None,
    ) -> None:
        # Not by the other rule's: skorch takes all that is set here for parameters of this one.
        self.k_min = k_min
        self.k_max = k_max
        self.n_pixels = n_pixels
        self.shrink = shrink
        self.grow = grow
        self.ema_decay = ema_decay
        self.momentum = momentum
        self.update = update

    def own_parameters(self) -> list[str]:
        """Name the parameters of `SparseAttnClassifier` that have no effect beside this.

        Returns
        -------
        list of str
            Among "k_min", "k_max" and "k_tolerance", which this rule does not know.
        """
        return [*super().own_parameters(), "k_tolerance"]

    def initialize(self) -> "LossTrendK":
        """Check the parameters and forget all losses.

        Returns
        -------
        LossTrendK
            Itself.
        """
        super().initialize()
        self.ema_: float | None = None
        self.epoch_loss_: float | None = None
        return self

    def state_dict(self) -> dict[str, float | None]:
        """What it remembers of the losses.

        Returns
        -------
        dict
            For `load_state_dict`.
        """
        return {"ema": self.ema_, "epoch_loss": self.epoch_loss_, "is_due": float(self.is_due_)}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Remember what another one did.

        Parameters
        ----------
        state : dict
            From `state_dict`.
        """
        self.ema_, self.epoch_loss_, self.is_due_ = state["ema"], state["epoch_loss"], bool(state["is_due"])

    def on_batch_end(self, net: NeuralNet, training: bool | None = None, **kwargs: Any) -> None:
        """Take a step by the loss of a training batch.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training; ``train_loss`` of the last batch is read from its history.
        training : bool
            False for a validation batch.
        **kwargs : dict
            Not used.
        """
        if training and self.update == "batch":
            self._follow(net, net.history[-1, "batches", -1, "train_loss"])

    def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
        """Record k, and keep the epoch's mean loss for the next step.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training; ``train_loss`` and ``train_batch_size`` of the epoch's batches are read
            from its history, and ``k`` is written there.
        **kwargs : dict
            Not used.
        """
        net.history.record("k", read_k(net.module_))
        if self.update == "epoch":
            rows = net.history[-1, "batches", :, ("train_loss", "train_batch_size")]
            self.epoch_loss_ = sum(loss * n for loss, n in rows) / sum(n for _, n in rows)
            self.is_due_ = True

    def _begin_batch(self, net: NeuralNet, batch: Any) -> None:
        """Every batch has the same k."""

    def draw(self, k: float, n: int, exploring: float | None = None) -> None:
        """All images have the same k.

        Parameters
        ----------
        k : float
            Of the module.
        n : int
            Images.
        exploring : float, default=None
            Not used.
        """

    def _step(self, net: NeuralNet) -> None:
        assert self.epoch_loss_ is not None  # an epoch has ended
        self._follow(net, self.epoch_loss_)

    def _follow(self, net: NeuralNet, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if self.ema_ is None:
            self.ema_ = loss
            return
        low, high = self._bounds()
        k, self.ema_ = next_k(
            read_k(net.module_),
            loss,
            self.ema_,
            k_min=low,
            k_max=high,
            shrink=to_pixels(self.shrink, self.n_),
            grow=to_pixels(self.grow, self.n_),
            ema_decay=self.ema_decay,
            momentum=self.momentum,
        )
        write_k(net.module_, k)

    def _start(self, net: NeuralNet, n_pixels: int) -> None:
        self.n_ = n_pixels
        super()._start(net, n_pixels)

    def _check_parameters(self) -> None:
        for name, least in {"k_min": 1, "k_max": 1, "shrink": 0, "grow": 0}.items():
            check_count(name, self._value(name), least=least)
        for name in ("ema_decay", "momentum"):
            value = getattr(self, name)
            if not (is_real(value) and 0 <= float(value) < 1):
                raise ValueError(f"{name}={value!r} in DynamicK: a number in [0, 1).")
        if self.update not in ("epoch", "batch"):
            raise ValueError(f'update={self.update!r} in DynamicK: "epoch" or "batch".')
        check_n_pixels(self.n_pixels)


def next_k(
    k: float,
    loss: float,
    ema: float,
    *,
    k_min: float,
    k_max: float,
    shrink: float,
    grow: float,
    ema_decay: float,
    momentum: float,
) -> tuple[float, float]:
    """One step of eq. 21-23, all counts in pixels.

    Parameters
    ----------
    k : float
        Pixels now.
    loss : float
        L, finite.
    ema : float
        L_ema before this loss.
    k_min, k_max, shrink, grow, ema_decay, momentum : float
        As in `DynamicK`.

    Returns
    -------
    k : float
        Pixels from now on, in [k_min, k_max].
    ema : float
        L_ema with this loss.
    """
    # beta ema + (1 - beta) loss in a form that is exact for loss == ema: otherwise rounding alone
    # could make a constant loss look like a falling one.
    change = (1 - ema_decay) * (loss - ema)
    target = max(k - shrink, k_min) if change < 0 else min(k + grow, k_max)
    # Clipped because the sum may round past a bound, and a restored k may lie outside.
    return clip(momentum * k + (1 - momentum) * target, k_min, k_max), ema + change
