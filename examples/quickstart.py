"""The first ten lines: make cell images, fit, score, and ask for probabilities and attention maps.

python examples/quickstart.py
"""

from sklearn.model_selection import train_test_split

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells


def main(n_samples=600, max_epochs=20):
    cells = make_cells(n_samples, modality="opd", image_size=48, difficulty=0.2, random_state=0)
    X_train, X_test, y_train, y_test = train_test_split(cells.images, cells.target, random_state=0)
    clf = SparseAttnClassifier(augment="dihedral", max_epochs=max_epochs, random_state=0, verbose=1)
    clf.fit(X_train, y_train)
    print(f"accuracy on {len(X_test)} images: {clf.score(X_test, y_test):.3f}")
    print("probabilities of", *cells.target_names)
    print(clf.predict_proba(X_test[:3]).round(2))
    maps = clf.attention_maps(X_test)
    print(f"{clf.k_} pixels chosen of each image, {clf.k_ / X_test[0].size:.1%}")
    print("coarse attention", maps.coarse.shape, "fine attention", maps.fine.shape)
    clf.set_params(predict_k=0.5)  # other numbers of pixels need no new fit
    print(f"accuracy by half of the pixels: {clf.score(X_test, y_test):.3f}")


if __name__ == "__main__":
    main()
