"""Learning rate and number of epochs: what the defaults were chosen by.

    python benchmarks/choices.py    # writes choices.json and the table in benchmarks/README.md

scikit-learn's digits as they come, 3-fold cross-validation. Results are written as they come.
"""

import json
from pathlib import Path

import numpy as np
from report import machine, put_into
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score

from sklearn_sparseattn import SparseAttnClassifier

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "choices.json", HERE / "README.md"
SEEDS = (0, 1, 2)
CHOICES = {
    "default": {},
    "lr=3e-3": {"lr": 3e-3},
    "lr=1e-3": {"lr": 1e-3},
    "lr=1e-3, lr_schedule='plateau' (the paper's)": {"lr": 1e-3, "lr_schedule": "plateau"},
    "max_epochs=15": {"max_epochs": 15},
    "max_epochs=30": {"max_epochs": 30},
}


def measure_all():
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine(), "runs": {}}
    X, y = load_digits(return_X_y=True)
    for name, params in CHOICES.items():
        for seed in SEEDS:
            key = f"{name}/{seed}"
            if key not in results["runs"]:
                clf = SparseAttnClassifier(random_state=seed, **params)
                results["runs"][key] = float(cross_val_score(clf, X, y, cv=3).mean())
                print(key, results["runs"][key], flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results):
    lines = ["| setting | accuracy %, mean ± sd over 3 seeds |", "|---|---|"]
    for name in CHOICES:
        scores = 100 * np.array([results["runs"][f"{name}/{seed}"] for seed in SEEDS])
        lines.append(f"| `{name}` | {scores.mean():.1f} ± {scores.std(ddof=1):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    put_into(README, "choices", table(measure_all()))
