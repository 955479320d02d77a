"""What SparseAttnClassifier is held against: dense twins, larger CNNs from scratch, and scikit-learn alone.

A dense twin is a plain CNN of our own size, trained by our own recipe (`Twin`). Each peer has
fit(X, y, X_val, y_val), predict_proba, and after the fit `n_iter_` and `n_parameters_` (None where that means
nothing). X is (n, H, W) or (n, H, W, C) as it came, y are class numbers. ResNet50 and MobileNetV2 are those
of `transformers` (extra `benchmarks`), which is imported when one of them is built.
"""

from functools import partial

import numpy as np
import torch
from skimage.color import rgb2gray
from skimage.feature import hog
from skimage.transform import downscale_local_mean
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from skorch import NeuralNetClassifier
from skorch.callbacks import EarlyStopping, LRScheduler
from skorch.helper import predefined_split
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.data_range import learn_data_range
from sklearn_sparseattn.images import ImageRows, PixelScale
from sklearn_sparseattn.training.augmentation import dihedral
from sklearn_sparseattn.training.batches import Batches, LabelledImages, count_batches
from sklearn_sparseattn.training.fit import _SHRINKAGE
from sklearn_sparseattn.training.setup import background_level


def with_channels(images):
    return images[..., None] if images.ndim == 3 else images


# ---- networks ----


def resnet50(image_shape, n_classes):
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_channels=image_shape[2], num_labels=n_classes))


def mobilenetv2(image_shape, n_classes):
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    # 0.8 in transformers is the share that TensorFlow keeps, not the one it drops.
    config = MobileNetV2Config(
        num_channels=image_shape[2],
        image_size=image_shape[0],
        num_labels=n_classes,
        classifier_dropout_prob=0.2,
    )
    network = MobileNetV2ForImageClassification(config)
    # 0.997 there, TensorFlow's share of the past, is in PyTorch the share of the last batch: evaluated with
    # the statistics of one batch, the peer would be worse than it is.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network


def lenet(image_shape, n_classes):
    """LeNet-5 with ReLU; the last maps are pooled to 5×5, as they are for 32×32, whatever the image size."""
    return nn.Sequential(
        nn.Conv2d(image_shape[2], 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(5),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, n_classes),
    )


class DenseTwin(nn.Module):
    """A plain CNN: 3x3 convolutions, mean and maximum of the last maps, one hidden layer.

    Images pass less `background`, as in the coarse network of ours.
    """

    def __init__(self, image_shape, n_classes, channels, strides=(2, 2, 2, 1), hidden=128):
        super().__init__()
        layers, n = [], image_shape[2]
        for n_out, stride in zip(channels, strides, strict=True):
            layers += [nn.Conv2d(n, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            n = n_out
        self.background = 0.0
        self.features, self.norm = nn.Sequential(*layers), nn.BatchNorm1d(2 * n)
        self.head = nn.Sequential(
            nn.Linear(2 * n, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_classes)
        )

    def forward(self, images):
        """Logits of (B, C, H, W)."""
        maps = self.features(images - self.background if self.background else images)
        return self.head(self.norm(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)))


# 2.5, 5.7 and 9.6 M multiply-adds at 135×135, one channel.
TWINS = {
    "twin_small": partial(DenseTwin, channels=(6, 12, 16, 24)),
    "twin": partial(DenseTwin, channels=(8, 16, 32, 32)),
    "twin_large": partial(DenseTwin, channels=(10, 20, 40, 48)),
}


class Logits(nn.Module):
    """A network that gives logits, whatever it is wrapped in; channels last, which is faster on a CPU."""

    def __init__(self, build, image_shape, n_classes):
        super().__init__()
        self.network = build(image_shape, n_classes).to(memory_format=torch.channels_last)

    def forward(self, images):
        """Logits of (B, C, H, W)."""
        output = self.network(images.contiguous(memory_format=torch.channels_last))
        return getattr(output, "logits", output)


class Trainer(NeuralNetClassifier):
    """Trained on `Batches`, whose targets come with a weight (1 here); with bfloat16 in training if told."""

    def __init__(self, *args, bfloat16=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.bfloat16 = bfloat16

    def infer(self, x, **fit_params):
        """Logits in float32, whatever they were computed in."""
        reduced = self.bfloat16 and self.module_.training
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            return super().infer(x, **fit_params).float()

    def get_loss(self, y_pred, y_true, *args, **kwargs):
        """Cross-entropy; the weights are all 1."""
        return super().get_loss(y_pred, y_true[0], *args, **kwargs)


def labelled(X, y, scale):
    """Rows for `Batches`; without y all are of class 0."""
    images = with_channels(X)
    target = np.zeros(len(images), dtype=np.int64) if y is None else y
    return LabelledImages(ImageRows(images, images.shape[1:]), target, np.ones(len(images)), scale)


def scale_of(X):
    """From the numbers of X to about [0, 1], as ours learns it."""
    images = with_channels(X)
    return PixelScale(learn_data_range(ImageRows(images, images.shape[1:]))[0])


@torch.no_grad()
def recompute_batch_norm(network, batches):
    """Running statistics over unaugmented rows, at the weights as they are, as after a fit of ours."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    network.eval()
    for norm in norms:
        norm.train()
    for i, (images, _) in enumerate(batches):
        for norm in norms:
            norm.momentum = 1 / (i + 1)  # the first batch replaces, the rest average
        network(images)
    network.eval()


class Twin:
    """A dense twin, trained by our recipe, whose epochs, rate and weight decay are the defaults of ours.

    One cycle of AdamW, cross-entropy, the background subtracted, statistics of batch norm computed anew at
    the end; it has no use for validation rows. Weights begin as PyTorch makes them.
    """

    def __init__(self, build, *, augment=None, batch_size=32, random_state=0, **recipe):
        self.build = build
        self.augment = dihedral if augment == "dihedral" else augment
        self.batch_size = batch_size
        self.random_state = random_state
        defaults = SparseAttnClassifier().get_params()
        self.recipe = {name: defaults[name] for name in ("max_epochs", "lr", "weight_decay")} | recipe

    def fit(self, X, y, X_val=None, y_val=None):
        """Train."""
        self.scale_ = scale_of(X)
        rows, rng = labelled(X, y, self.scale_), np.random.default_rng(self.random_state)
        n_epochs, rate, decay = (self.recipe[name] for name in ("max_epochs", "lr", "weight_decay"))
        n_steps = n_epochs * count_batches(len(rows), self.batch_size)
        decay = _SHRINKAGE / (rate * n_steps) if decay is None else decay  # as that of ours
        with torch.random.fork_rng(devices=[]):  # weights
            torch.manual_seed(self.random_state)
            self.trainer_ = Trainer(
                Logits,
                module__build=self.build,
                module__image_shape=with_channels(X).shape[1:],
                module__n_classes=int(y.max()) + 1,
                criterion=nn.CrossEntropyLoss,
                optimizer=AdamW,
                optimizer__weight_decay=decay,
                optimizer__fused=True,
                lr=rate,
                max_epochs=n_epochs,
                batch_size=self.batch_size,
                iterator_train=Batches,
                iterator_train__rng=rng,
                iterator_train__augment=self.augment,
                iterator_valid=Batches,
                train_split=None,
                callbacks=[
                    LRScheduler(
                        OneCycleLR, max_lr=rate, total_steps=n_steps, step_every="batch", event_name=None
                    )
                ],
                callbacks__print_log=None,
                verbose=0,
            ).initialize()
            network = self.trainer_.module_
            network.network.background = background_level(rows)
            self.trainer_.partial_fit(rows)
        recompute_batch_norm(network, Batches(rows, self.batch_size, rng))
        self.n_iter_ = len(self.trainer_.history)
        self.n_parameters_ = sum(p.numel() for p in network.parameters())
        return self

    def predict_proba(self, X):
        """Probabilities, (n, n_classes)."""
        return self.trainer_.predict_proba(labelled(X, None, self.scale_))


class Cnn:
    """A network trained from scratch until the validation loss has not fallen for `patience` epochs."""

    def __init__(
        self,
        build,
        *,
        augment=None,
        batch_size=64,
        random_state=0,
        bfloat16=False,
        max_epochs=100,
        patience=10,
    ):
        self.build = build
        self.augment = dihedral if augment == "dihedral" else augment
        self.batch_size = batch_size
        self.random_state = random_state
        self.bfloat16 = bfloat16
        self.max_epochs = max_epochs
        self.patience = patience

    def fit(self, X, y, X_val, y_val):
        """Train; schedule and stopping watch the validation rows."""
        self.scale_ = scale_of(X)
        validation = labelled(X_val, y_val, self.scale_)
        with torch.random.fork_rng(devices=[]):  # weights and dropout
            torch.manual_seed(self.random_state)
            self.trainer_ = self._trainer(with_channels(X).shape[1:], int(y.max()) + 1, validation)
            self.trainer_.fit(labelled(X, y, self.scale_), None)
        self.n_iter_ = len(self.trainer_.history)
        self.n_parameters_ = sum(p.numel() for p in self.trainer_.module_.parameters())
        return self

    def _trainer(self, image_shape, n_classes, validation):
        return Trainer(
            Logits,
            module__build=self.build,
            module__image_shape=image_shape,
            module__n_classes=n_classes,
            criterion=nn.CrossEntropyLoss,
            optimizer=AdamW,
            optimizer__weight_decay=1e-4,
            optimizer__fused=True,
            lr=1e-3,
            max_epochs=self.max_epochs,
            batch_size=self.batch_size,
            iterator_train=Batches,
            iterator_train__rng=np.random.default_rng(self.random_state),
            iterator_train__augment=self.augment,
            iterator_valid=Batches,
            train_split=predefined_split(validation),
            callbacks=[
                ("schedule", LRScheduler(ReduceLROnPlateau, monitor="valid_loss", factor=0.3, patience=4)),
                # As for ours: any gain counts, and the best weights come back.
                ("stopping", EarlyStopping(patience=self.patience, threshold=0, load_best=True, sink=silent)),
            ],
            callbacks__print_log=None,
            callbacks__valid_acc=None,
            bfloat16=self.bfloat16,
            verbose=0,
        )

    def predict_proba(self, X):
        """Probabilities, (n, n_classes)."""
        return self.trainer_.predict_proba(labelled(X, None, self.scale_))


def silent(text):
    pass


# ---- scikit-learn ----


def stacked(X, y, X_val, y_val):
    """Who needs no validation rows trains on them."""
    return np.concatenate([X, X_val]), np.concatenate([y, y_val])


class HogSvc:
    """Histograms of oriented gradients of the gray image and an RBF SVM, its C by cross-validation."""

    n_iter_ = n_parameters_ = None

    def __init__(self, *, random_state=0, C=(1, 10, 100)):
        self.random_state = random_state
        self.C = C

    @staticmethod
    def features(X):
        """One row an image."""
        images = with_channels(X)
        gray = rgb2gray(images) if images.shape[-1] == 3 else images[..., 0].astype(float)
        cell = max(4, gray.shape[1] // 8)  # about 8×8 cells, whatever the size
        return np.array([hog(image, pixels_per_cell=(cell, cell), cells_per_block=(2, 2)) for image in gray])

    def fit(self, X, y, X_val, y_val):
        """Train on all rows."""
        X, y = stacked(X, y, X_val, y_val)
        folds = StratifiedKFold(3, shuffle=True, random_state=self.random_state)
        pipeline = make_pipeline(StandardScaler(), SVC())
        search = GridSearchCV(pipeline, {"svc__C": list(self.C)}, cv=folds, refit=False)
        features = self.features(X)
        pipeline.set_params(**search.fit(features, y).best_params_)
        # One SVM of all rows; the folds only teach the map from its decision values to probabilities.
        self.model_ = CalibratedClassifierCV(pipeline, cv=folds, ensemble=False).fit(features, y)
        return self

    def predict_proba(self, X):
        """Probabilities, (n, n_classes)."""
        return self.model_.predict_proba(self.features(X))


class BoostedPixels:
    """HistGradientBoosting on pixels; larger images are averaged down to at most 32×32 first."""

    n_parameters_ = None

    def __init__(self, *, random_state=0, max_iter=100):
        self.random_state = random_state
        self.max_iter = max_iter

    @staticmethod
    def features(X):
        """One row an image, of means over blocks of pixels."""
        images = with_channels(X)
        factor = -(-max(images.shape[1:3]) // 32)
        return downscale_local_mean(images, (1, factor, factor, 1)).reshape(len(images), -1)

    def fit(self, X, y, X_val, y_val):
        """Train on all rows."""
        X, y = stacked(X, y, X_val, y_val)
        self.model_ = HistGradientBoostingClassifier(
            max_iter=self.max_iter, early_stopping=True, random_state=self.random_state
        ).fit(self.features(X), y)
        self.n_iter_ = self.model_.n_iter_
        return self

    def predict_proba(self, X):
        """Probabilities, (n, n_classes)."""
        return self.model_.predict_proba(self.features(X))


def cnn(build, **options):
    def make(*, augment, batch_size, random_state):
        recipe = {"augment": augment, "batch_size": batch_size, "random_state": random_state}
        return Cnn(build, **recipe | options)

    return make


def plain(peer, **options):
    """A peer that knows neither batches nor augmentation."""

    def make(*, augment, batch_size, random_state):
        return peer(random_state=random_state, **options)

    return make


# name -> function of augment, batch_size and random_state that gives a peer.
PEERS = {
    **{name: partial(Twin, build) for name, build in TWINS.items()},
    # 1.8 times as fast where the processor has bfloat16, many times slower elsewhere; evaluated in float32.
    "resnet50": cnn(resnet50, bfloat16=torch.cpu._is_avx512_bf16_supported()),
    "mobilenetv2": cnn(mobilenetv2),
    "lenet": cnn(lenet),
    "hog_svc": plain(HogSvc),
    "hist_gradient_boosting": plain(BoostedPixels),
}
