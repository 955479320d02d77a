"""One HTML file about a fitted classifier that opens in any browser: scores, mistakes, and where it looked.

python examples/write_report.py
"""

from pathlib import Path

from sklearn.model_selection import train_test_split

from sklearn_sparseattn import SparseAttnClassifier, write_report
from sklearn_sparseattn.datasets import make_cells


def main(n_samples=1200, image_size=64, max_epochs=25, output="report.html"):
    cells = make_cells(
        n_samples,
        modality="brightfield",
        n_classes=5,
        image_size=image_size,
        difficulty=0.3,
        random_state=0,
    )
    names = [f"cell_{i:04d}.tif" for i in range(n_samples)]
    X_train, X_test, y_train, y_test, _, names_test = train_test_split(
        cells.images, cells.target, names, stratify=cells.target, random_state=0
    )
    clf = SparseAttnClassifier(augment="dihedral", max_epochs=max_epochs, random_state=0, verbose=1)
    clf.fit(X_train, y_train)
    write_report(clf, X_test, y_test, output, class_names=cells.target_names, names=names_test)
    print(f"{len(X_test)} images, {Path(output).stat().st_size / 1e6:.1f} MB: open {output} in a browser")


if __name__ == "__main__":
    main()
