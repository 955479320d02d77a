"""The main job in about a minute: cells of four modalities, learned and shown.

Generates cell images as four kinds of microscope see them, fits a classifier to each kind, prints a
table and saves a picture of what the classifiers looked at.

    python examples/demo.py        # or: make demo
"""

from time import perf_counter

import numpy as np
from joblib import Parallel, delayed
from matplotlib import pyplot as plt
from sklearn.model_selection import train_test_split

from sklearn_sparseattn import AttentionDisplay, SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells

MODALITIES = ["opd", "hologram", "event", "brightfield"]


def keep_fringes(images, rng):
    """Mirror images at the diagonal, turn them by half: the fringes of a hologram keep their slant."""
    images = images.copy()
    mirrored, turned = rng.random((2, len(images))) < 0.5
    images[mirrored] = images[mirrored].swapaxes(2, 3)
    images[turned] = images[turned, :, ::-1, ::-1]
    return images


def learn(modality, n_samples, image_size, max_epochs, difficulty):
    cells = make_cells(
        n_samples, modality=modality, image_size=image_size, difficulty=difficulty, random_state=0
    )
    X_train, X_test, y_train, y_test = train_test_split(
        cells.images, cells.target, test_size=0.2, stratify=cells.target, random_state=0
    )
    clf = SparseAttnClassifier(
        augment=keep_fringes if modality == "hologram" else "dihedral",
        max_epochs=max_epochs,
        random_state=0,
    )
    start = perf_counter()
    clf.fit(X_train, y_train)
    fitted = perf_counter()
    accuracy = np.mean(clf.predict(X_test) == y_test)
    rate = len(X_test) / (perf_counter() - fitted)
    used = f"{clf.k_} ({clf.k_ / image_size**2:.1%})"
    row = (
        f"{modality:<11}  {n_samples:>6}  {accuracy:>8.3f}  {used:>11}  {fitted - start:>7.1f}  {rate:>18.0f}"
    )
    return modality, row, clf, X_test[:1], y_test[:1], cells.target_names


def main(n_samples=1200, image_size=64, max_epochs=20, difficulty=0.2, output="demo.png", n_jobs=-1):
    start = perf_counter()
    print(f"{n_samples} cells of 3 classes in each of 4 modalities, {image_size}×{image_size} pixels.")
    print("80 % to learn from, 20 % to score. A line for each fit, as they end:\n")
    print("modality     images  accuracy  pixels used  fit (s)  predict (images/s)", flush=True)
    # For images this small, one thread for each of several fits is faster than several for one.
    results = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(learn)(modality, n_samples, image_size, max_epochs, difficulty) for modality in MODALITIES
    )
    figure, axes = plt.subplots(len(MODALITIES), 4, figsize=(9.5, 9.6), layout="constrained")
    for panels, (modality, row, clf, X, y, names) in zip(axes, results, strict=True):
        print(row, flush=True)
        AttentionDisplay.from_estimator(clf, X, y, class_names=names, ax=panels[None])
        panels[0].set_ylabel(f"{modality}\n{panels[0].get_ylabel()}", fontsize="small")
    for panel in axes[1:].flat:
        panel.set_title("")
    figure.savefig(output, dpi=120)
    plt.close(figure)
    print(f"\nPicture: {output}   ({perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
