"""Keep a fitted classifier in a file with joblib, and load it again.

As with every pickle: load only files that you trust.

    python examples/persistence.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import joblib
import numpy as np

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells


def main(folder, n_samples=300, image_size=48, max_epochs=5):
    cells = make_cells(n_samples, modality="brightfield", image_size=image_size, random_state=0)
    clf = SparseAttnClassifier(max_epochs=max_epochs, random_state=0).fit(cells.images, cells.target)

    file = Path(folder) / "cells.joblib"
    joblib.dump(clf, file)
    loaded = joblib.load(file)

    same = np.array_equal(clf.predict_proba(cells.images), loaded.predict_proba(cells.images))
    print(f"file size           {file.stat().st_size / 1024:.0f} KiB")
    print(f"parameters          {sum(p.numel() for p in loaded.network_.parameters()):,}")
    print(f"same probabilities  {'yes, to the bit' if same else 'no'}")
    return loaded


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(folder)
