"""The cells, with masks, that explanation.py measures on, and the models fitted to them.

A model is fitted once and kept in a folder for temporary files, outside the repository.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import joblib
import numpy as np
import torch
from data_sets import BATCH_SIZE, DATA
from peers import PEERS
from skimage.transform import resize
from sklearn.model_selection import StratifiedKFold, train_test_split
from threadpoolctl import threadpool_limits

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import load_image_folder, make_cells

KEPT = Path(tempfile.gettempdir()) / "sparseattn-explanation-tiles"
N_FOLDS = 3
N_TRAIN, N_TEST, SIDE = 400, 200, 64  # of the generated cells
# Cells of pbc5 are 1.75 times as many pixels wide as those of wbc_jtsc: 210 of its pixels are 120 of those.
PBC5_CROP, PBC5_SIDE = 210, 64


@cache
def wbc_jtsc(side=120):
    """Images, class numbers, masks, folds; without the one basophil."""
    with np.load(DATA / "wbc_jtsc_120.npz") as file:
        kept = file["labels"] < 4
        images, target, masks = (file[name][kept] for name in ("images", "labels", "masks"))
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(images, target)
    splits = {f"fold{i}": split for i, split in enumerate(folds)}
    if side != 120:
        images = np.stack([resize(image, (side, side), anti_aliasing=True) for image in images])
        images = np.round(255 * images).astype(np.uint8)
        keep = {"order": 0, "anti_aliasing": False, "preserve_range": True}
        masks = np.stack([resize(mask, (side, side), **keep) for mask in masks]).astype(np.uint8)
    return images, target, masks, splits


@cache
def generated(modality):
    """As `wbc_jtsc`, with one split."""
    n = N_TRAIN + N_TEST
    cells = make_cells(n, modality=modality, image_size=SIDE, return_masks=True, random_state=0)
    split = (np.arange(N_TRAIN), np.arange(N_TRAIN, n))
    return cells.images, cells.target, cells.masks, {"split": split}


@cache
def pbc5():
    """Images and class numbers, its cells as large in the image as those of wbc_jtsc."""
    cells = load_image_folder(DATA / "pbc5", crop=PBC5_CROP, image_size=PBC5_SIDE)
    # The order of the classes of wbc_jtsc; basophils come last.
    names = ("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil")
    return cells.images, np.array([names.index(name) for name in cells.target_names])[cells.target]


DATA_SETS = {"wbc_jtsc": wbc_jtsc, "opd": partial(generated, "opd")}


# ---- models ----


def ours(images, target, augment, **params):
    # As many steps as 600 images have in 60 epochs: of 200, an epoch is 7 steps, and 60 are too few.
    epochs = max(60, 36000 // len(images))
    recipe = {"augment": augment, "batch_size": BATCH_SIZE, "random_state": 0, "max_epochs": epochs}
    return SparseAttnClassifier(**recipe | params).fit(images, target)


def shuffled(images, target, augment):
    """Ours, fitted to labels that say nothing."""
    return ours(images, np.random.default_rng(0).permutation(target), augment)


def untrained(images, target, augment, seed=0):
    """Ours with the weights that it was born with; batch norm has its statistics, k is the usual one."""
    k = 1500 / 135**2
    fixed = {"k_init": k, "k_min": k, "k_max": k, "random_state": seed}
    return ours(images, target, augment, max_epochs=1, lr=1e-12, **fixed)


def mobilenetv2(images, target, augment):
    """A tenth of the rows says when to stop."""
    fitting, held = train_test_split(np.arange(len(target)), test_size=0.1, stratify=target, random_state=0)
    peer = PEERS["mobilenetv2"](augment=augment, batch_size=BATCH_SIZE, random_state=0)
    return peer.fit(images[fitting], target[fitting], images[held], target[held])


def of_pbc5(images, target, augment):
    """Ours, fitted to other photographs: of pbc5."""
    return ours(*pbc5(), augment)


MODELS = {
    "tiles": ours,
    "mobilenetv2": mobilenetv2,
    "shuffled": shuffled,
    **{f"untrained{seed}": partial(untrained, seed=seed) for seed in range(5)},
    "pbc5": of_pbc5,
}
SPLITS = {"wbc_jtsc": [f"fold{i}" for i in range(N_FOLDS)], "opd": ["split"]}
ONCE = ("shuffled", "pbc5", *(f"untrained{seed}" for seed in range(5)))  # on the first split alone
JOBS = [
    (data, model, split)
    for model in MODELS
    for data, splits in SPLITS.items()
    for split in (splits[:1] if model in ONCE else splits)
    if model != "pbc5" or data == "wbc_jtsc"
]


def fitted(data, model, split):
    """The model, from its file if there is one."""
    path = KEPT / f"{data}-{model}-{split}.joblib"
    if not path.exists():
        images, target, _, splits = DATA_SETS[data]()
        train, _ = splits[split]
        torch.set_num_threads(1)
        with threadpool_limits(1):
            estimator = MODELS[model](images[train], target[train], "dihedral")
        path.parent.mkdir(exist_ok=True)
        joblib.dump(estimator, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    return joblib.load(path)


def tested(data, model, split):
    """Images, class numbers and masks that the model has not seen."""
    if model == "pbc5":
        return wbc_jtsc(PBC5_SIDE)[:3]
    images, target, masks, splits = DATA_SETS[data]()
    rows = splits[split][1]
    return images[rows], target[rows], masks[rows]
