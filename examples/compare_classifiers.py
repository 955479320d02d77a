"""Cross-validate SparseAttnClassifier against scikit-learn's own classifiers on the same images.

They all read the same rows of pixels; SparseAttnClassifier sees that these are square images.

    python examples/compare_classifiers.py
"""

from time import perf_counter

from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells


def main(n_samples=800, image_size=48, max_epochs=20, modality="opd", cv=3):
    cells = make_cells(n_samples, modality=modality, image_size=image_size, difficulty=0.2, random_state=0)
    X, y = cells.images.reshape(n_samples, -1), cells.target
    classifiers = {
        "SparseAttnClassifier": SparseAttnClassifier(
            augment="dihedral", max_epochs=max_epochs, random_state=0
        ),
        "LogisticRegression": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)),
        "PCA + SVC": make_pipeline(StandardScaler(), PCA(60, random_state=0), SVC(C=10)),
        "RandomForest": RandomForestClassifier(300, random_state=0),
        "PCA + HistGradientBoosting": make_pipeline(
            PCA(60, random_state=0), HistGradientBoostingClassifier(random_state=0)
        ),
    }
    print(f"{n_samples} images ({modality}, {image_size}×{image_size}), {cv}-fold cross-validation\n")
    print("classifier                  accuracy     sd  seconds", flush=True)
    for name, classifier in classifiers.items():
        start = perf_counter()
        scores = cross_val_score(classifier, X, y, cv=cv)
        seconds = perf_counter() - start
        print(f"{name:<26}  {scores.mean():>8.3f}  {scores.std():>5.3f}  {seconds:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
