"""The main job in about a minute: cells of four modalities, learned and shown.

Generates cell images as four kinds of microscope see them, fits a classifier to each kind, prints a
table and saves a picture of what the classifiers looked at.

    python examples/demo.py        # or: make demo
"""

from time import perf_counter

import numpy as np
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


def main(n_samples=1200, image_size=64, max_epochs=20, difficulty=0.2, output="demo.png"):
    start = perf_counter()
    print(f"{n_samples} images of {image_size}×{image_size} pixels a modality, 3 classes of cells.")
    print("80 % to learn from, 20 % to score. One fit a line:\n")
    print("modality      images  accuracy  pixels used    fit (s)  predict (images/s)", flush=True)
    figure, axes = plt.subplots(len(MODALITIES), 4, figsize=(9.5, 9.6), layout="constrained")
    for row, modality in enumerate(MODALITIES):
        print(f"{modality:<12}", end="", flush=True)
        cells = make_cells(
            n_samples, modality=modality, image_size=image_size, difficulty=difficulty, random_state=0
        )
        X_train, X_test, y_train, y_test = train_test_split(
            cells.images, cells.target, test_size=0.2, stratify=cells.target, random_state=0
        )
        clf = SparseAttnClassifier(
            augment=keep_fringes if modality == "hologram" else "dihedral",
            batch_size=32,
            max_epochs=max_epochs,
            random_state=0,
        )
        fit_start = perf_counter()
        clf.fit(X_train, y_train)
        fit_seconds = perf_counter() - fit_start
        predict_start = perf_counter()
        accuracy = np.mean(clf.predict(X_test) == y_test)
        rate = len(X_test) / (perf_counter() - predict_start)
        used = f"{clf.k_} ({clf.k_ / image_size**2:.1%})"
        print(
            f"  {n_samples:>6}  {accuracy:>8.3f}  {used:>11}  {fit_seconds:>9.1f}  {rate:>18.0f}", flush=True
        )
        AttentionDisplay.from_estimator(
            clf, X_test[:1], y_test[:1], class_names=cells.target_names, ax=axes[row : row + 1]
        )
        axes[row, 0].set_ylabel(f"{modality}\n{axes[row, 0].get_ylabel()}", fontsize="small")
    for axis in axes[1:].flat:
        axis.set_title("")
    figure.savefig(output, dpi=120)
    plt.close(figure)
    print(f"\nPicture: {output}   ({perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
