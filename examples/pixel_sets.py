"""Chosen pixels as features of scikit-learn's own classifiers: PixelSetTransformer in a Pipeline.

Each image becomes its k best pixels, (x, y, value) each. What is best is the brightness, the gradient,
or the coarse attention of a fitted SparseAttnClassifier.

    python examples/pixel_sets.py
"""

from sklearn.ensemble import RandomForestClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from sklearn_sparseattn import PixelSetTransformer, SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells


def main(n_samples=800, image_size=48, max_epochs=15, k=0.15):
    cells = make_cells(n_samples, modality="opd", image_size=image_size, difficulty=0.2, random_state=0)
    X_train, X_test, y_train, y_test = train_test_split(
        cells.images, cells.target, stratify=cells.target, random_state=0
    )
    attention = SparseAttnClassifier(augment="dihedral", max_epochs=max_epochs, random_state=0)
    attention.fit(X_train, y_train)

    scores = {
        "intensity": "intensity",
        "gradient": "gradient",
        "coarse attention": FrozenEstimator(attention),
    }
    print(f"RandomForest on {k:.0%} of the pixels of {n_samples} images\n")
    print("pixels chosen by  features  accuracy", flush=True)
    for name, score in scores.items():
        model = make_pipeline(
            PixelSetTransformer(k=k, score=score), RandomForestClassifier(300, random_state=0)
        )
        model.fit(X_train, y_train)
        n_features = model[-1].n_features_in_
        print(f"{name:<16}  {n_features:>8}  {model.score(X_test, y_test):>8.3f}", flush=True)
    print(f"\nSparseAttnClassifier itself: {attention.score(X_test, y_test):.3f}, by {attention.k_} pixels")


if __name__ == "__main__":
    main()
