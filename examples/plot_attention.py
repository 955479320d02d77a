"""What the classifier looks at, in four modalities: attention maps as pictures.

Fits each modality, saves a picture of a few test images and prints how many of the chosen pixels lie on
the cell, which the generated images know.

    python examples/plot_attention.py
"""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from sklearn_sparseattn import AttentionDisplay, SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells


def main(n_samples=800, image_size=64, max_epochs=15, n_shown=4, folder="."):
    print("modality     accuracy  chosen pixels on cell  cell's share of image  picture", flush=True)
    n_train = n_samples * 3 // 4
    for modality in ["opd", "hologram", "event", "brightfield"]:
        cells = make_cells(
            n_samples,
            modality=modality,
            image_size=image_size,
            difficulty=0.2,
            return_masks=True,
            random_state=0,
        )
        # A quarter turn would slant the fringes of a hologram the other way.
        augment = None if modality == "hologram" else "dihedral"
        clf = SparseAttnClassifier(augment=augment, max_epochs=max_epochs, random_state=0)
        clf.fit(cells.images[:n_train], cells.target[:n_train])
        X_test, y_test = cells.images[n_train:], cells.target[n_train:]

        display = AttentionDisplay.from_estimator(
            clf, X_test, y_test, max_images=n_shown, class_names=cells.target_names
        )
        file = Path(folder) / f"attention_{modality}.png"
        display.figure_.savefig(file, dpi=120)
        plt.close(display.figure_)

        on_cell = cells.masks[n_train:].reshape(len(X_test), -1) > 0
        chosen = np.take_along_axis(on_cell, clf.attention_maps(X_test).pixels, axis=1)
        accuracy = clf.score(X_test, y_test)
        print(
            f"{modality:<11}  {accuracy:>8.3f}  {chosen.mean():>21.0%}  {on_cell.mean():>21.0%}  {file}",
            flush=True,
        )


if __name__ == "__main__":
    main()
