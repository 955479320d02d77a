"""What the classifier looks at, in four modalities: attention maps as pictures.

Fits each modality, saves a picture of a few test images and prints how many of the chosen pixels lie on the
cell, which the generated images know, and how many in a frame of two pixels around the image. For the last of
them, brightfield, it also saves how the fit went, and the mean attention by true and predicted class.

    python examples/plot_attention.py
    python examples/plot_attention.py --save examples/images    # somewhere else
"""

import argparse
from pathlib import Path

import numpy as np
from demo import keep_fringes
from matplotlib import pyplot as plt
from PIL import Image

from sklearn_sparseattn import AttentionDisplay, MeanAttentionDisplay, SparseAttnClassifier, TrainingDisplay
from sklearn_sparseattn.datasets import make_cells

MODALITIES = ["opd", "hologram", "event", "brightfield"]


def save(display, file, dpi=80):
    display.figure_.savefig(file, dpi=dpi)
    plt.close(display.figure_)
    with Image.open(file) as picture:  # 256 colours will do, in a third of the bytes
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


def main(n_samples=800, image_size=64, max_epochs=30, n_shown=3, folder="."):
    print(
        "modality     accuracy  chosen on cell  cell's share  chosen in frame  frame's share  picture",
        flush=True,
    )
    folder, n_train = Path(folder), n_samples * 3 // 4
    for modality in MODALITIES:
        is_hologram = modality == "hologram"
        side = image_size * 3 // 2 if is_hologram else image_size  # fewer pixels hold too few fringes
        in_frame = np.ones((side, side), dtype=bool)
        in_frame[2:-2, 2:-2] = False
        cells = make_cells(
            n_samples,
            modality=modality,
            image_size=side,
            difficulty=0.2,
            return_masks=True,
            random_state=0,
        )
        X_test, y_test, names = cells.images[n_train:], cells.target[n_train:], cells.target_names
        augment = keep_fringes if is_hologram else "dihedral"
        clf = SparseAttnClassifier(augment=augment, max_epochs=max_epochs, random_state=0)
        # Validation is for the picture of the fit alone: without early stopping nothing makes use of it.
        clf.fit(cells.images[:n_train], cells.target[:n_train], X_val=X_test, y_val=y_test)

        file = folder / f"attention_{modality}.png"
        shown = np.unique(y_test, return_index=True)[1][:n_shown]  # one of each class
        display = AttentionDisplay.from_estimator(
            clf, X_test[shown], y_test[shown], class_names=names, evidence="occlusion"
        )
        save(display, file)

        on_cell = cells.masks[n_train:] > 0
        chosen = clf.attention_maps(X_test).chosen
        shares = (on_cell[chosen], on_cell, np.broadcast_to(in_frame, chosen.shape)[chosen], in_frame)
        numbers = [
            f"{share.mean():>{width}.0%}" for share, width in zip(shares, (14, 12, 15, 13), strict=True)
        ]
        print(f"{modality:<11}  {clf.score(X_test, y_test):>8.3f}  {'  '.join(numbers)}  {file}", flush=True)

    save(TrainingDisplay.from_estimator(clf), folder / "training.png")
    save(
        MeanAttentionDisplay.from_estimator(clf, X_test, y_test, class_names=names),
        folder / "mean_attention.png",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", default=".", metavar="FOLDER", help="where the pictures go")
    main(folder=parser.parse_args().save)
