"""The skorch net that trains a SparseAttnNet: what a batch costs, and what is written down of it."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import skorch
import torch
from sklearn.base import ClassifierMixin
from skorch.callbacks import Callback
from skorch.utils import to_device
from torch import Tensor, nn

from ..network import SparseAttnNet, SparseAttnOutput
from .batches import LabelledImages
from .losses import consistency_loss, contrastive_loss, distillation_loss, focal_loss

LOSS_TERMS = ("focal_loss", "contrastive_loss", "distillation_loss", "consistency_loss")

_MOMENTUM = 0.5  # of running statistics in training; after it they are computed anew
_ROUNDING = 1e-5  # of float32 sums, with a margin


class SparseAttnLoss(nn.Module):
    """Focal + contrastive + distillation loss of a batch (eq. 20 in [1]_), and consistency of two views.

    Parameters
    ----------
    focal_gamma : float
        Exponent of the focal loss.
    class_weight : Tensor of shape (n_classes,)
        alpha by class.
    contrastive_weight, temperature : float
        Weight and temperature of the contrastive loss.
    distillation_weight : float
        Weight of the distillation loss.
    consistency_weight : float, default=0.0
        Weight of the consistency loss. Above 0, a batch in training is B images and then other views of them.

    References
    ----------
    .. [1] Yoshai et al., arXiv 2505.07661 (2025).
    """

    class_weight: Tensor

    def __init__(
        self,
        focal_gamma: float,
        class_weight: Tensor,
        contrastive_weight: float,
        temperature: float,
        distillation_weight: float,
        consistency_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.focal_gamma = focal_gamma
        self.register_buffer("class_weight", class_weight)
        self.contrastive_weight = contrastive_weight
        self.temperature = temperature
        self.distillation_weight = distillation_weight
        self.consistency_weight = consistency_weight

    @property
    def n_views(self) -> int:
        """How many views of each image a batch in training holds, one after the other."""
        return 2 if self.consistency_weight else 1

    def focal(self, output: SparseAttnOutput, target: Tensor, weight: Tensor) -> Tensor:
        """sum(w l) / B: weights that were normalised over all rows keep their meaning in a batch."""
        loss = focal_loss(
            output.logits,
            target,
            gamma=self.focal_gamma,
            class_weight=self.class_weight,
            sample_weight=weight,
        )
        return loss * weight.mean()

    def forward(self, output: SparseAttnOutput, target: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Compute the terms and their weighted sum.

        Parameters
        ----------
        output : SparseAttnOutput
            Of a training pass.
        target : Tensor of shape (rows,), int64
            Class indices.
        weight : Tensor of shape (rows,)
            Sample weights, of mean 1 over the training rows.

        Returns
        -------
        dict of Tensor
            The four terms, unweighted, and "total". Consistency is 0 if it has no weight.
        """
        focal = self.focal(output, target, weight)
        # A term without weight is still written down, but costs no backward pass.
        features = output.features if self.contrastive_weight else output.features.detach()
        scores = output.scores if self.distillation_weight else output.scores.detach()
        contrastive = contrastive_loss(features, target, temperature=self.temperature, sample_weight=weight)
        distillation = distillation_loss(
            scores.flatten(1).gather(1, output.tiles),
            output.attention,
            sample_weight=weight,
            kept=output.attention > 0,
        )
        total = focal + self.contrastive_weight * contrastive + self.distillation_weight * distillation
        consistency = torch.zeros_like(focal)
        if self.consistency_weight:
            consistency = consistency_loss(output.logits, sample_weight=weight)
            total = total + self.consistency_weight * consistency
        terms = dict(zip(LOSS_TERMS, (focal, contrastive, distillation, consistency), strict=True))
        return {**terms, "total": total}


class SparseAttnTrainer(ClassifierMixin, skorch.NeuralNet):
    """A skorch net whose batches are ``(images, (target, weight))``.

    At the end of a batch callbacks are given ``(images, target)`` and the logits. To scikit-learn's scorers
    the net is a classifier whose classes are indices.
    """

    @property
    def classes_(self) -> np.ndarray:
        """Class indices."""
        return np.arange(len(self.criterion_.class_weight))

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Call a method of all callbacks, with what those that score can use."""
        if method_name == "on_batch_end":
            images, (target, _) = cb_kwargs["batch"]
            # Callbacks keep them for an epoch: without the graph.
            cb_kwargs |= {"batch": (images, target), "y_pred": cb_kwargs["y_pred"].logits.detach()}
        super().notify(method_name, **cb_kwargs)

    def evaluation_step(self, batch: Any, training: bool = False) -> Tensor:
        """Give the logits of a batch."""
        return super().evaluation_step(batch, training=training).logits

    def forward_iter(self, X: Any, training: bool = False, device: Any = "cpu") -> Iterator[Tensor]:
        """Give the logits batch by batch, of a `LabelledImages` or of scaled images (B, C, H, W)."""
        if isinstance(X, LabelledImages):
            batches = self.get_iterator(X, training=training)
        else:
            batches = ((images, None) for images in torch.as_tensor(X).split(self.batch_size))
        for batch in batches:
            yield to_device(self.evaluation_step(batch, training=training), device=device)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class, for X as in `forward_iter`."""
        return np.concatenate([logits.softmax(1).cpu().numpy() for logits in self.forward_iter(X)])

    def predict(self, X: Any) -> np.ndarray:
        """Index of the most probable class."""
        return self.predict_proba(X).argmax(1)

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Train on a batch; one of a single row uses the running statistics of batch norm."""
        training = len(batch[0]) > self.criterion_.n_views
        if any(module.training != training for module in self.module_.modules()):  # to tell all takes longer
            self._set_training(training)
        images, labels = batch
        try:
            output = self.infer(images, **fit_params)
            loss = self.get_loss(output, labels, X=images, training=True)
            if not math.isfinite(loss.item()):
                raise FloatingPointError("the loss is not finite")
        except FloatingPointError as error:
            raise diverged(self, str(error)) from error
        loss.backward()
        return {"loss": loss, "y_pred": output}

    def validation_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Validate on a batch."""
        try:
            step = super().validation_step(batch, **fit_params)
            target, weight = (part.to(step["y_pred"].logits.device) for part in batch[1])
            correct = (step["y_pred"].logits.argmax(1) == target).float()
            self.history.record_batch("valid_score", ((correct * weight).sum() / weight.sum()).item())
            if not math.isfinite(step["loss"].item()):
                raise FloatingPointError("the loss is not finite")
        except FloatingPointError as error:
            raise diverged(self, f"{error} for validation images") from error
        return step

    def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Tensor:
        """Total loss in training, focal loss otherwise: the other terms depend on the batch."""
        target, weight = (part.to(y_pred.logits.device, non_blocking=True) for part in y_true)
        if training:
            terms = self.criterion_(y_pred, target, weight)
            for name in LOSS_TERMS:
                self.history.record_batch(name, terms[name].item())
            return terms["total"]
        return self.criterion_.focal(y_pred, target, weight)


def diverged(net: skorch.NeuralNet, reason: str) -> ValueError:
    """Make the error that ends a fit whose numbers went wrong.

    Parameters
    ----------
    net : skorch.NeuralNet
        In training.
    reason : str
        What was seen.

    Returns
    -------
    ValueError
        It names epoch and batch, and what may help.
    """
    batch = len(net.history[-1]["batches"])
    return ValueError(
        f"Training diverged in epoch {len(net.history)}, batch {batch}: {reason}. Try an lr lower than "
        f"{net.lr:g}, or look for extreme values in X, class_weight and sample_weight."
    )


class LearningRate(Callback):
    """Write the learning rate of each epoch's last step into the history, as ``lr``."""

    def on_batch_begin(self, net: skorch.NeuralNet, training: bool = False, **kwargs: Any) -> None:
        """Note the rate before a schedule changes it for the next step."""
        if training:
            self.lr_ = float(net.optimizer_.param_groups[0]["lr"])

    def on_epoch_end(self, net: skorch.NeuralNet, **kwargs: Any) -> None:
        """Record ``lr``.

        Parameters
        ----------
        net : skorch.NeuralNet
            In training.
        **kwargs : dict
            Not used.
        """
        net.history.record("lr", self.lr_)


class ProgressBar(Callback):
    """A tqdm bar over the epochs, with the loss and k.

    Parameters
    ----------
    n_epochs : int
        Length of the bar.
    """

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs = n_epochs

    def on_train_begin(self, net: skorch.NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Open the bar."""
        # In a notebook tqdm.auto warns where ipywidgets are missing; the bar as text needs none.
        tqdm = importlib.import_module("tqdm.auto" if importlib.util.find_spec("ipywidgets") else "tqdm").tqdm
        self.bar_ = tqdm(total=self.n_epochs, unit="epoch", desc="SparseAttnClassifier")

    def on_epoch_end(self, net: skorch.NeuralNet, **kwargs: Any) -> None:
        """Move the bar on."""
        shown = {"loss": f"{net.history[-1, 'train_loss']:.4f}", "k": f"{net.history[-1, 'k']:.0f}"}
        if "valid_loss" in net.history[-1]:
            shown["valid"] = f"{net.history[-1, 'valid_loss']:.4f}"
        self.bar_.set_postfix(shown)
        self.bar_.update(len(net.history) - self.bar_.n)  # more than one if a checkpoint was taken up

    def on_train_end(self, net: skorch.NeuralNet, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar_.close()


@contextmanager
def keeping_up(network: nn.Module) -> Iterator[None]:
    """Let the running statistics of batch norm follow the weights, for as long as they are trained.

    By them validation rows are scored. At the usual momentum they are those of about 20 batches, in which the
    weights have moved on so far that for most of a cycle validation knows nothing.

    Parameters
    ----------
    network : nn.Module
        To be trained.

    Yields
    ------
    None
        Afterwards all is as it was.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = _MOMENTUM
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def recompute_batch_norm(
    network: SparseAttnNet,
    batches: Any,
    device: torch.device,
    draw: Callable[[float, int], Tensor | None] | None = None,
) -> None:
    """Replace the running statistics of batch norm by those over `batches`, at the weights as they are.

    During training they trail behind the weights.

    Parameters
    ----------
    network : nn.Module
        Trained; left in evaluation mode.
    batches : iterable of (images, ...)
        Unaugmented training rows; batches of one row are left out.
    device : torch.device
        Where the network is.
    draw : callable, default=None
        Of (k, number of images), gives the k of each: statistics depend on k, and are those of training if
        this is its `DynamicK.draw`. None gives all that of the network.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
    try:
        usable = (images for images, *_ in batches if len(images) > 1)
        for i, images in enumerate(usable):
            for norm in norms:
                norm.momentum = 1 / (i + 1)  # the first batch replaces, the rest average
            network.k_by_image = draw(network.k.item(), len(images)) if draw else None
            network(images.to(device))
        all_constant = False
        for norm in norms:
            all_constant = _soften_constants(norm, all_constant)
    finally:
        network.k_by_image = None
        network.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _soften_constants(norm: Any, all_constant: bool) -> bool:
    """Set the variance of channels that differ by rounding alone, as those of images without content do.

    Divided by eps alone the last digits of one norm after the other would decide. What follows a norm whose
    channels are `all_constant` is rounding, too. Gives whether those of this one are.
    """
    is_constant = norm.running_var < (_ROUNDING * norm.running_mean.abs().max()).square()
    is_constant |= all_constant
    norm.running_var[is_constant] = 1
    return bool(is_constant.all())
