"""Keep a fitted classifier: joblib, a safe model file, and ONNX for programs without Python.

As with every pickle: load only joblib files that you trust. In a model file nothing is executed.

    python examples/persistence.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import joblib
import numpy as np

from sklearn_sparseattn import SparseAttnClassifier, export_onnx, load_model, save_model
from sklearn_sparseattn.datasets import make_cells


def main(folder, n_samples=300, image_size=48, max_epochs=5):
    folder = Path(folder)
    cells = make_cells(n_samples, modality="brightfield", image_size=image_size, random_state=0)
    clf = SparseAttnClassifier(max_epochs=max_epochs, random_state=0).fit(cells.images, cells.target)

    joblib.dump(clf, folder / "cells.joblib")
    save_model(clf, folder / "cells.safetensors")
    export_onnx(clf, folder / "cells.onnx")  # needs the extra `onnx`

    print(f"parameters          {sum(p.numel() for p in clf.network_.parameters()):,}")
    for load, name in [(joblib.load, "cells.joblib"), (load_model, "cells.safetensors")]:
        loaded = load(folder / name)
        same = np.array_equal(clf.predict_proba(cells.images), loaded.predict_proba(cells.images))
        print(f"{name:18}  {size_of(folder / name)}, {'the same bits' if same else 'OTHER PROBABILITIES'}")
    print(
        f"{'cells.onnx':18}  {size_of(folder / 'cells.onnx')}, {compare(clf, folder / 'cells.onnx', cells)}"
    )
    return loaded


def size_of(file):
    return f"{file.stat().st_size / 1024:.0f} KiB"


def compare(clf, file, cells):
    try:
        import onnxruntime
    except ImportError:
        return "for which onnxruntime is not installed here"
    session = onnxruntime.InferenceSession(file)
    [probabilities] = session.run(None, {"images": cells.images})
    apart = np.abs(probabilities - clf.predict_proba(cells.images)).max(axis=1)
    return f"in ONNX Runtime {100 * np.mean(apart < 1e-5):.0f} % of the images the same to 1e-5"


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(folder)
