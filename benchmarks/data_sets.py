"""The images that the benchmarks measure on, how they are split, and how they may be turned.

`load(name)` gives images, class numbers and splits (name, training rows, test rows). Real images are read
from SPARSEATTN_DATA (by default ../shared/data).
"""

import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split

from sklearn_sparseattn.datasets import load_image_folder, make_cells, make_fields

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("SPARSEATTN_DATA", HERE.parent.parent / "shared" / "data"))
N_SPLITS = 30  # of each data set; the first five go through all rows, or donors, where they are folds
N_MORE = 4000  # generated cells that only serve to score
N_FIELDS = (1000, 500)  # fields that are split, and those that only serve to score
N_LABELLED = 30  # training cells a class, where labels are few
TEST_DONORS = (1, 2, 3, 5, 6)  # those of the literature; donor 4 is always among the training rows

# Class counts of the paper; equal shares where it names none. Classes in the order of `make_cells`.
COUNTS = {
    "opd": (2445, 2445, 2444),
    "hologram": (2445, 2445, 2444),
    "event": (792, 792),
    "brightfield": (1034, 234, 2660, 322, 89),
}


def random_splits(target):
    """One split a seed: 80 % for training, stratified."""
    rows = np.arange(len(target))
    splits = []
    for seed in range(N_SPLITS):
        train, test = train_test_split(rows, test_size=0.2, stratify=target, random_state=seed)
        splits.append((f"seed{seed}", np.sort(train), np.sort(test)))
    return splits


def pbc5(image_size):
    # The size of the photographs differs by class: what is cut away must not tell.
    cells = load_image_folder(DATA / "pbc5", crop="square", image_size=image_size)
    return cells.images, cells.target, random_splits(cells.target)


def few_labels(load):
    """Another data set, of which a few cells of each class are for training and all others to score on."""
    images, target, _ = load()
    splits = []
    for seed in range(N_SPLITS):
        rng = np.random.default_rng(seed)
        drawn = [
            rng.choice(np.flatnonzero(target == label), N_LABELLED, replace=False)
            for label in np.unique(target)
        ]
        train = np.sort(np.concatenate(drawn))
        splits.append((f"seed{seed}", train, np.setdiff1d(np.arange(len(target)), train)))
    return images, target, splits


def jurkat():
    with np.load(DATA / "jurkat_cellcycle_bf_40.npz") as file:
        images, labels = file["images"], file["labels"]
    target = np.minimum(labels, 3)  # G1, S, G2, and all phases of mitosis as one
    turns = [
        fold
        for turn in range(N_SPLITS // 5)
        for fold in StratifiedKFold(5, shuffle=True, random_state=turn).split(images, target)
    ]
    return images, target, [(f"fold{i}", train, test) for i, (train, test) in enumerate(turns)]


def tcell():
    with np.load(DATA / "tcell_activation_82.npz") as file:
        images, target, donors = file["images"], file["labels"], file["groups"]
    # A donor's batch gives the label away: never split at random.
    splits = [
        (f"donor{donor}", np.flatnonzero(donors != donor), np.flatnonzero(donors == donor))
        for donor in TEST_DONORS
    ]
    return images, target, splits  # and no more: there are no other donors


def generated(modality, image_size=64):
    """As many cells as the paper has, and more to score on: they cost nothing, and make the noise smaller."""
    counts = np.array(COUNTS[modality])
    more = np.ceil(counts / counts.sum() * N_MORE).astype(int)
    parts = [
        make_cells(n, modality=modality, n_classes=len(counts), image_size=image_size, random_state=i)
        for i, n in enumerate((counts, more))
    ]
    images, target = (np.concatenate([part[key] for part in parts]) for key in ("images", "target"))
    only_scored = np.arange(counts.sum(), len(target))
    splits = random_splits(parts[0].target)
    return images, target, [(name, train, np.append(test, only_scored)) for name, train, test in splits]


def fields(image_size=256):
    """Fields of many cells, of which one decides the class; half as many more to score on."""
    parts = [make_fields(n, image_size=image_size, random_state=i) for i, n in enumerate(N_FIELDS)]
    images, target = (np.concatenate([part[key] for part in parts]) for key in ("images", "target"))
    only_scored = np.arange(N_FIELDS[0], len(target))
    splits = random_splits(parts[0].target)
    return images, target, [(name, train, np.append(test, only_scored)) for name, train, test in splits]


DATA_SETS = {
    "pbc5": partial(pbc5, 64),
    "pbc5_few": partial(few_labels, partial(pbc5, 64)),
    "pbc5_128": partial(pbc5, 128),
    "pbc5_128_few": partial(few_labels, partial(pbc5, 128)),
    "jurkat": jurkat,
    "jurkat_few": partial(few_labels, jurkat),
    "tcell": tcell,
    "opd": partial(generated, "opd"),
    "hologram": partial(generated, "hologram", 96),  # fewer pixels hold too few fringes
    "event": partial(generated, "event"),
    "brightfield": partial(generated, "brightfield"),
    "fields": fields,
}

TITLES = {
    "pbc5": "stained white blood cells (real, 5 classes, 64×64 RGB)",
    "pbc5_few": f"stained white blood cells, {N_LABELLED} labelled a class (real, 5 classes, 64×64 RGB)",
    "pbc5_128": "stained white blood cells (real, 5 classes, 128×128 RGB)",
    "pbc5_128_few": f"stained white blood cells, {N_LABELLED} labelled a class (real, 5 classes, 128×128)",
    "jurkat": "cell cycle of Jurkat cells, unstained (real, 4 classes, 40×40)",
    "jurkat_few": f"cell cycle of Jurkat cells, {N_LABELLED} labelled a class (real, 4 classes, 40×40)",
    "tcell": "activation of T cells, one donor left out (real, 2 classes, 82×82)",
    "opd": "generated, opd (3 classes, 64×64)",
    "hologram": "generated, hologram (3 classes, 96×96)",
    "event": "generated, event (2 classes, 64×64)",
    "brightfield": "generated, brightfield (5 classes, 64×64 RGB)",
    "fields": "generated, fields of many cells of which one decides (3 classes, 256×256)",
}


@lru_cache(maxsize=1)
def load(name):
    """Images, class numbers and splits; the last set asked for is kept, as its runs come in a row."""
    return DATA_SETS[name]()


def keep_fringes(images, rng):
    """Mirror at the diagonal, turn by half, as examples/demo.py: a hologram's fringes keep their slant."""
    images = images.copy()
    mirrored, turned = rng.random((2, len(images))) < 0.5
    images[mirrored] = images[mirrored].swapaxes(2, 3)
    images[turned] = images[turned, :, ::-1, ::-1]
    return images


def augmentation(name):
    """The same for all models: "dihedral" or a function, as `SparseAttnClassifier` takes it."""
    return keep_fringes if name == "hologram" else "dihedral"


BATCH_SIZE = 32  # the same for all neural models
