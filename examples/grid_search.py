"""Search the weights of the two further losses with GridSearchCV.

python examples/grid_search.py
"""

from sklearn.model_selection import GridSearchCV

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells


def main(n_samples=400, image_size=40, max_epochs=10, n_jobs=2):
    cells = make_cells(n_samples, modality="opd", image_size=image_size, difficulty=0.2, random_state=0)
    search = GridSearchCV(
        SparseAttnClassifier(augment="dihedral", max_epochs=max_epochs, random_state=0),
        {"contrastive_weight": [0.0, 0.1, 0.3], "distillation_weight": [0.0, 0.02]},
        cv=3,
        n_jobs=n_jobs,
    )
    search.fit(cells.images, cells.target)

    results = search.cv_results_  # pandas.DataFrame(results) shows all of it
    print("rank  contrastive_weight  distillation_weight  accuracy     sd  fit (s)")
    for i in results["rank_test_score"].argsort():
        print(
            f"{results['rank_test_score'][i]:>4}"
            f"  {results['param_contrastive_weight'][i]:>18}"
            f"  {results['param_distillation_weight'][i]:>19}"
            f"  {results['mean_test_score'][i]:>8.3f}"
            f"  {results['std_test_score'][i]:>5.3f}"
            f"  {results['mean_fit_time'][i]:>7.1f}"
        )
    print(f"best: {search.best_params_}, accuracy {search.best_score_:.3f}")
    return search


if __name__ == "__main__":
    main()
