"""Learn your own images: a folder that holds one folder of images for each class.

Prints a report by class on a fifth of the images, which the classifier has not seen, and how it found
the number of pixels that it looks at.

    python examples/classify_folder.py FOLDER --image-size 64
    python examples/classify_folder.py FOLDER --image-size 128 --epochs 30 --gray --crop 200
"""

import argparse
import sys
from time import perf_counter

import numpy as np
from sklearn.metrics import accuracy_score, classification_report, f1_score
from sklearn.model_selection import train_test_split

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import load_image_folder

COURSE = ("k", "loss_at_k", "loss_at_half_k", "train_loss")


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="holds one folder of images for each class")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels to resize to (64)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (20)")
    parser.add_argument(
        "--crop",
        default="square",
        help="'square' for the largest centred square (default), 'none', or the side in pixels",
    )
    parser.add_argument("--gray", action="store_true", help="turn colour images to gray")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that are unfit")
    options = parser.parse_args(arguments)
    if options.crop == "none":
        options.crop = None
    elif options.crop != "square":
        if not options.crop.isdigit():
            parser.error(f"--crop must be 'square', 'none' or a number of pixels, not {options.crop!r}")
        options.crop = int(options.crop)
    return options


def load(options):
    """Load the folder, or end with one line that says what is wrong with it."""
    try:
        data = load_image_folder(
            options.folder,
            image_size=options.image_size,
            crop=options.crop,
            gray=options.gray,
            n_jobs=-1,
            on_error="warn" if options.skip_unreadable else "raise",
        )
    except (OSError, ValueError) as error:
        sys.exit(f"Cannot use this folder: {error}")
    counts = np.bincount(data.target)
    if len(counts) < 2 or counts.min() < 2:
        found = ", ".join(f"{name} {n}" for name, n in zip(data.target_names, counts, strict=True))
        sys.exit(f"Two classes of two images each are needed at least; {options.folder} has: {found}.")
    return data


def print_course_of_k(clf, n_pixels, n_rows=10):
    """Print k, the losses it is found by and the training loss for about `n_rows` of the epochs."""
    print("epoch      k  share of pixels  loss with k  with k / 2  training loss")
    last = clf.n_iter_ - 1
    for i in np.unique(np.linspace(0, last, n_rows).round().astype(int)):
        k, at_k, at_half_k, loss = (clf.history_[name][i] for name in COURSE)
        print(
            f"{i + 1:>5}  {k:>5.0f}  {k / n_pixels:>15.1%}  {at_k:>11.4f}  {at_half_k:>10.4f}  {loss:>13.4f}"
        )


def main(arguments=None):
    options = parse(arguments)
    start = perf_counter()
    data = load(options)
    loaded = perf_counter()
    shape = "×".join(str(side) for side in data.images.shape[1:])
    print(f"{len(data.images)} images of {shape}, {len(data.target_names)} classes")

    X_train, X_test, y_train, y_test = train_test_split(
        data.images, data.target, test_size=0.2, stratify=data.target, random_state=0
    )
    clf = SparseAttnClassifier(augment="dihedral", max_epochs=options.epochs, random_state=0, verbose=1)
    clf.fit(X_train, y_train)
    fitted = perf_counter()
    y_pred = clf.predict(X_test)
    predicted = perf_counter()

    labels = np.arange(len(data.target_names))
    print(f"\n{len(X_test)} images held out:\n")
    print(
        classification_report(
            y_test, y_pred, labels=labels, target_names=data.target_names, digits=3, zero_division=0
        )
    )
    print_course_of_k(clf, options.image_size**2)
    print(f"\naccuracy  {accuracy_score(y_test, y_pred):.4f}")
    print(f"macro F1  {f1_score(y_test, y_pred, labels=labels, average='macro', zero_division=0):.4f}")
    print(f"pixels    {clf.k_} of {options.image_size**2} ({clf.k_ / options.image_size**2:.1%})")
    print(
        f"time      load {loaded - start:.1f} s, fit {fitted - loaded:.1f} s, "
        f"predict {len(X_test) / (predicted - fitted):.0f} images/s"
    )


if __name__ == "__main__":
    main()
