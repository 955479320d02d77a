"""DynamicK: a skorch callback that moves the number of chosen pixels, k, by the training loss.

It knows no more of the network than that `net.module_` has a `k`, and no more of the data than how
many pixels an image has.
"""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import Tensor, nn

# Shares, so that they mean the same at every image size. The bounds are the paper's at 135 x 135.
# With the paper's other constants k does not learn (see DynamicK.paper), so the rest is ours.
K_MIN = 1500 / 18225
K_MAX = 1.0
SHRINK = 0.035
GROW = 0.06
EMA_DECAY = 0.85
MOMENTUM = 0.2


class DynamicK(Callback):
    """Fewer pixels while the loss falls, more when it stalls: eq. 21-23 of [1]_.

    A callback for any skorch net whose module has a `k`, the number of pixels it chooses: a buffer
    of one element, or a plain number. The module uses it as ``floor(k + 0.5)``.

    Parameters
    ----------
    k_min, k_max : int or float, default=1500/18225, 1.0
        Bounds of k. As everywhere here, an int is a number of pixels and a float in (0, 1] a share
        of the N pixels of an image: 1 is one pixel, 1.0 is all of them. Both are clipped to [1, N].
    shrink, grow : int or float, default=0.035, 0.06
        How far k is pulled down while the loss falls, and up when it stalls.
    ema_decay : float, default=0.85
        beta, in [0, 1): the share of the past in the moving average of the loss.
    momentum : float, default=0.2
        alpha, in [0, 1): the share of itself that k keeps in a step.
    update : {"epoch", "batch"}, default="epoch"
        Take a step for every epoch, by its mean loss, or for every batch.
    grow_with_lr : bool, default=True
        Make `grow` smaller as the learning rate falls, by its share of the highest rate so far. A network
        that hardly learns any more cannot use pixels that are new to it: they raise its loss, for which it
        would get yet more of them. Without a schedule of the rate this changes nothing.
    n_pixels : int, default=None
        N. None takes the last two axes, (H, W), of the images in the first training batch.

    Attributes
    ----------
    ema_ : float or None
        L_ema; None before the first loss. It goes on through `partial_fit` and starts anew with the
        net's `initialize`.
    highest_rate_ : float
        The highest learning rate at any step so far; 0 before the first, and as long-lived as `ema_`.

    Raises
    ------
    ValueError
        If a parameter is out of its range, both bounds were given and k_min lies above k_max, or N
        cannot be read from the batch.
    AttributeError
        If the module has no `k`.

    Notes
    -----
    With L the training loss as the net records it (``train_loss``):

    1. L_ema <- beta L_ema + (1 - beta) L. The first loss only sets L_ema.
    2. k' = max(k - shrink, k_min) if L_ema fell, else k' = min(k + grow, k_max); with `grow_with_lr`, grow
       times the learning rate / `highest_rate_`, which is not in the paper.
    3. k <- alpha k + (1 - alpha) k'.

    An epoch's step is taken as the next epoch begins. So ``net.history[:, "k"]``, recorded as an
    epoch ends, is the k which that epoch was trained and validated with; a checkpoint holds it,
    whatever the order of the callbacks; and a fitted module keeps the k it was last trained with.
    By batches it is the k after the last batch of the epoch.

    k is read back from the module at every step, so that restored weights bring theirs. It is
    clipped to its bounds whenever training starts. A loss that is not finite changes nothing. If
    k_max was given and the default k_min lies above it, k_min gives way.

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
    >>> net = net.set_params(callbacks__dynamic_k__grow=0.05)
    """

    def __init__(
        self,
        *,
        k_min: float = K_MIN,
        k_max: float = K_MAX,
        shrink: float = SHRINK,
        grow: float = GROW,
        ema_decay: float = EMA_DECAY,
        momentum: float = MOMENTUM,
        update: str = "epoch",
        grow_with_lr: bool = True,
        n_pixels: int | None = None,
    ) -> None:
        self.k_min = k_min
        self.k_max = k_max
        self.shrink = shrink
        self.grow = grow
        self.ema_decay = ema_decay
        self.momentum = momentum
        self.update = update
        self.grow_with_lr = grow_with_lr
        self.n_pixels = n_pixels

    @classmethod
    def paper(cls, **overrides: Any) -> "DynamicK":
        """Make the callback with the published constants.

        By batches, with so short a memory, the signs of the steps are almost coin flips.

        Parameters
        ----------
        **overrides : parameters of DynamicK
            Those to set otherwise, `n_pixels` for one.

        Returns
        -------
        DynamicK
            k_min=1500, k_max=1.0, shrink=50, grow=80, ema_decay=0.2, momentum=0.2, update="batch",
            grow_with_lr=False.
        """
        published: dict[str, Any] = {
            "k_min": 1500,
            "k_max": 1.0,
            "shrink": 50,
            "grow": 80,
            "ema_decay": 0.2,
            "momentum": 0.2,
            "update": "batch",
            "grow_with_lr": False,
        }
        return cls(**(published | overrides))

    def initialize(self) -> "DynamicK":
        """Check the parameters and forget all losses.

        Returns
        -------
        DynamicK
            Itself.
        """
        self._check_parameters()
        self.ema_: float | None = None
        self.highest_rate_ = 0.0
        self.epoch_loss_: float | None = None  # of a finished epoch whose step is still to be taken
        self.pixels_: dict[str, float] | None = None  # bounds and steps in pixels, once N is known
        return self

    def state_dict(self) -> dict[str, float | None]:
        """What it remembers of the losses, for a new net that goes on where another stopped.

        Returns
        -------
        dict
            For `load_state_dict`. k is not in it: that is the module's.
        """
        return {"ema": self.ema_, "highest_rate": self.highest_rate_, "epoch_loss": self.epoch_loss_}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Remember what another one did; to be called after the net's `initialize`.

        Parameters
        ----------
        state : dict
            From `state_dict`.
        """
        self.ema_, self.epoch_loss_ = state["ema"], state["epoch_loss"]
        self.highest_rate_ = state["highest_rate"] or 0.0

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
        _read_k(net.module_)
        self.pixels_ = None  # the images may have another size than the last time
        if self.n_pixels is not None:
            self._start(net, self.n_pixels)

    def on_batch_begin(
        self, net: NeuralNet, batch: Any = None, training: bool | None = None, **kwargs: Any
    ) -> None:
        """Learn N from the first training batch, and take the step of the last epoch.

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
        if self.pixels_ is None:
            self._start(net, _n_pixels(batch))
        if self.epoch_loss_ is not None:
            self._step(net, self.epoch_loss_)
            self.epoch_loss_ = None

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
            self._step(net, net.history[-1, "batches", -1, "train_loss"])

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
        net.history.record("k", _read_k(net.module_))
        if self.update == "epoch":
            rows = net.history[-1, "batches", :, ("train_loss", "train_batch_size")]
            self.epoch_loss_ = sum(loss * n for loss, n in rows) / sum(n for _, n in rows)

    def _check_parameters(self) -> None:
        for name, least in {"k_min": 1, "k_max": 1, "shrink": 0, "grow": 0}.items():
            value = getattr(self, name)
            if not ((_is_int(value) and value >= least) or _is_share(value)):
                raise ValueError(
                    f"{name}={value!r} in DynamicK: an int >= {least}, a number of pixels, or a "
                    "float in (0, 1], a share of the pixels of an image."
                )
        for name in ("ema_decay", "momentum"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= float(value) < 1):
                raise ValueError(f"{name}={value!r} in DynamicK: a number in [0, 1).")
        if self.update not in ("epoch", "batch"):
            raise ValueError(f'update={self.update!r} in DynamicK: "epoch" or "batch".')
        if not isinstance(self.grow_with_lr, bool):
            raise ValueError(f"grow_with_lr={self.grow_with_lr!r} in DynamicK: True or False.")
        if self.n_pixels is not None and not (_is_int(self.n_pixels) and self.n_pixels >= 1):
            raise ValueError(f"n_pixels={self.n_pixels!r} in DynamicK: an int >= 1, or None.")

    def _start(self, net: NeuralNet, n_pixels: int) -> None:
        k_min, k_max = resolve_bounds(self.k_min, self.k_max, n_pixels)
        self.pixels_ = {
            "k_min": k_min,
            "k_max": k_max,
            "shrink": to_pixels(self.shrink, n_pixels),
            "grow": to_pixels(self.grow, n_pixels),
        }
        _write_k(net.module_, _clip(_read_k(net.module_), k_min, k_max))

    def _step(self, net: NeuralNet, loss: float) -> None:
        learning = self._share_of_rate(net)
        if not math.isfinite(loss):
            return
        if self.ema_ is None:
            self.ema_ = loss
            return
        assert self.pixels_ is not None  # a training batch has begun
        pixels = self.pixels_
        if self.grow_with_lr:
            pixels = pixels | {"grow": learning * pixels["grow"]}
        k, self.ema_ = next_k(
            _read_k(net.module_),
            loss,
            self.ema_,
            ema_decay=self.ema_decay,
            momentum=self.momentum,
            **pixels,
        )
        _write_k(net.module_, k)

    def _share_of_rate(self, net: NeuralNet) -> float:
        """The learning rate, as a share of the highest so far."""
        rate = max(float(group["lr"]) for group in net.optimizer_.param_groups)
        self.highest_rate_ = max(self.highest_rate_, rate)
        return rate / self.highest_rate_ if self.highest_rate_ > 0 else 1.0


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
    return _clip(momentum * k + (1 - momentum) * target, k_min, k_max), ema + change


def resolve_bounds(k_min: float, k_max: float, n_pixels: int) -> tuple[float, float]:
    """Bounds of k in pixels, for images of N pixels.

    Parameters
    ----------
    k_min, k_max : int or float
        An int is a number of pixels, a float in (0, 1] a share of N.
    n_pixels : int
        N, >= 1.

    Returns
    -------
    k_min, k_max : float
        1 <= k_min <= k_max <= N.

    Raises
    ------
    ValueError
        If k_min lies above k_max, unless k_min is the default: then it gives way.
    """
    low, high = (_clip(to_pixels(bound, n_pixels), 1, n_pixels) for bound in (k_min, k_max))
    if low <= high:
        return low, high
    # k_max was given: its default is N, and nothing lies above.
    if k_min != K_MIN:
        raise ValueError(
            f"k_min={k_min!r} is above k_max={k_max!r}: {low:g} and {high:g} of the {n_pixels} "
            "pixels of an image. Lower k_min or raise k_max."
        )
    return high, high


def to_pixels(count: float, n_pixels: int) -> float:
    """Turn a count into pixels: an int is one already, a float is a share of N.

    Parameters
    ----------
    count : int or float
        Number of pixels, or a share in (0, 1].
    n_pixels : int
        N.

    Returns
    -------
    float
        Pixels, neither rounded nor clipped.
    """
    return float(min(count, 2**53)) if _is_int(count) else float(count) * n_pixels


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, Integral)
    return is_real and 0 < float(value) <= 1


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _n_pixels(batch: Any) -> int:
    """H * W of the images in a skorch batch (X, y), X being images or a dict or tuple of them."""
    images = batch
    while not hasattr(images, "shape"):
        images = next(iter(images.values())) if isinstance(images, Mapping) else images[0]
    if len(images.shape) < 3:
        raise ValueError(
            f"n_pixels=None in DynamicK, but a training batch of shape {tuple(images.shape)} has "
            "no axes (B, ..., H, W) to read it from: give n_pixels as an int."
        )
    return int(images.shape[-2] * images.shape[-1])


def _read_k(module: nn.Module) -> float:
    if not hasattr(module, "k"):
        raise AttributeError(
            f"DynamicK moves the `k` of the module, and {type(module).__name__} has none: register "
            "a buffer `k` of one element, or set a number `self.k`, in its __init__."
        )
    k: Any = module.k
    return float(k.item() if isinstance(k, Tensor) else k)


def _write_k(module: nn.Module, k: float) -> None:
    if not isinstance(module.k, Tensor):
        module.k = k  # type: ignore[assignment]
        return
    with torch.no_grad():
        # Rounded as it will be used: fill_ would cut the fraction off, and k could only fall.
        module.k.fill_(k if module.k.is_floating_point() else math.floor(k + 0.5))
