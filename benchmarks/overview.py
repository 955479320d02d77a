"""The figures of the README: accuracy (from accuracy.json), place of the chosen pixels, cost of a prediction.

    python benchmarks/overview.py            # measure what overview.json does not hold yet, then the README
    python benchmarks/overview.py --readme   # only rewrite the tables of the README from the JSONs

Results are written as they come.
"""

import json
import sys
import time
from pathlib import Path

import accuracy
import data_sets
import numpy as np
import ours
from accuracy import spread
from joblib import Parallel, delayed
from report import machine, put_into, recorded
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "overview.json"
README = HERE.parent / "README.md"
SEEDS = (0, 1, 2)
CNNS = {"resnet50": "ResNet50", "mobilenetv2": "MobileNetV2"}


def attention(modality):
    def measure(seed):
        """Share of the chosen pixels that lies on the cell, against the cell's share of the image."""
        cells = make_cells(1000, modality=modality, image_size=64, return_masks=True, random_state=seed)
        clf = SparseAttnClassifier(random_state=seed).fit(cells.images[:800], cells.target[:800])
        on_cell = cells.masks[800:].reshape(200, -1) > 0
        chosen = clf.attention_maps(cells.images[800:]).chosen.reshape(200, -1)
        return {"chosen_on_cell": float(on_cell[chosen].mean()), "cell_share": float(on_cell.mean())}

    return measure


def digits(seed):
    X, y = load_digits(return_X_y=True)
    scores = cross_val_score(SparseAttnClassifier(random_state=seed), X, y, cv=3)
    return {"accuracy": float(scores.mean())}


def cost(seed):
    """Parameters, multiply-adds and throughput at the paper's size, k = 1500 of 135×135, three classes."""
    cells = make_cells(256, image_size=135, random_state=seed)
    fixed = {"k_init": 1500, "k_min": 1500, "k_max": 1500}
    clf = SparseAttnClassifier(**fixed, max_epochs=1, n_jobs=-1, random_state=seed)
    clf.fit(cells.images, cells.target)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        clf.predict_proba(cells.images)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(p.numel() for p in clf.network_.parameters()),
        "multiply_adds": sum(ours.multiply_adds(clf).values()),
        "images_per_second": len(cells.images) / float(np.median(seconds)),
    }


MODALITIES = ("opd", "hologram", "event", "brightfield")
JOBS = {
    **{f"digits/{seed}": (digits, seed) for seed in SEEDS},
    **{f"attention-{m}/0": (attention(m), 0) for m in MODALITIES},
    "cost/0": (cost, 0),
}


def run_job(name):
    measure, seed = JOBS[name]
    return name, {"seed": seed, **measure(seed), "machine": machine()}


def measure_all():
    """Two jobs at a time on one thread each; what is timed comes last and alone."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [name for name in JOBS if name not in results]
    for timed, n_jobs in ((False, 2), (True, 1)):
        names = [name for name in missing if name.startswith("cost") == timed]
        found = Parallel(n_jobs, return_as="generator_unordered")(delayed(run_job)(name) for name in names)
        for name, result in found:
            results[name] = result
            print(name, result, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def accuracy_row(results, data, title):
    """Ours, the dense twin, and the better of the two large CNNs, each on the splits that it was run on."""

    def accuracy_of(runs, *note):
        notes = ", ".join([*note, f"n = {len(runs)}"])
        return f"{spread(runs, 'accuracy')} ({notes})" if runs else "not run yet"

    ours, twin = (list(accuracy.runs_of(results, data, name).values()) for name in ("tiles", "twin"))
    peers = {name: list(accuracy.runs_of(results, data, name).values()) for name in CNNS}
    peers = {name: runs for name, runs in peers.items() if runs}
    best = max(peers, key=lambda name: np.mean([run["accuracy"] for run in peers[name]]), default=None)
    cnn = accuracy_of(peers[best], CNNS[best]) if best else "not run yet"
    figures = " | ".join(spread(ours, column) for column in ("accuracy", "macro_f1", "share"))
    return f"| {title} | {ours[0]['n_train']} | {len(ours)} | {figures} | {accuracy_of(twin)} | {cnn} |"


def tables(results, results_of_accuracy):
    """Markdown from the results, and from nothing else."""
    if not set(JOBS) <= set(results):
        return "Not measured yet."
    lines = [
        "| images | training images | n | accuracy % | macro F1 % | k, % of the image "
        "| a dense CNN of our size, accuracy % | a large CNN's accuracy % |",
        "|---|---|---|---|---|---|---|---|",
        *(
            accuracy_row(results_of_accuracy, data, title)
            for data, title in data_sets.TITLES.items()
            if accuracy.runs_of(results_of_accuracy, data, "tiles")
        ),
    ]
    digit_runs = [run for job, run in results.items() if job.startswith("digits")]
    looks = [results[f"attention-{m}/0"] for m in MODALITIES]
    on_cell = ", ".join(f"{look['chosen_on_cell']:.0%}" for look in looks)
    run = results["cost/0"]
    lines += [
        "",
        "n: splits (80/20 by seed, folds of jurkat, donors of T cells, draws of the labelled), mean ± "
        "standard deviation. The dense CNN is `twin`, trained by the same recipe; the large one is the "
        "better of ResNet50 and MobileNetV2, as far as run, from scratch. A tenth of the training images "
        "was held out from all of them. More models, differences with intervals and how it was done: "
        "[benchmarks](benchmarks/README.md).",
        "",
        "scikit-learn's digits, `cross_val_score` with `cv=3` and default settings: "
        f"{spread(digit_runs, 'accuracy')} % ({len(digit_runs)} seeds).",
        "",
        f"Share of the chosen pixels on the cell ({', '.join(MODALITIES)}; 64×64, one seed): {on_cell}. "
        f"The cell covers {np.mean([look['cell_share'] for look in looks]):.0%} of the image.",
        "",
        f"At 135×135, one channel, k = 1500: {run['parameters']:,} parameters, "
        f"{run['multiply_adds'] / 1e6:.1f} M multiply-adds, {run['images_per_second']:,.0f} images/s through "
        f"`predict_proba` with n_jobs=-1 on {run['machine']['cores']} cores.",
        "",
        f"Machine: {run['machine']['processor']}, torch {run['machine']['torch']}, scikit-learn "
        f"{run['machine']['scikit-learn']}; accuracies: those that "
        "[benchmarks](benchmarks/README.md#accuracy-against-other-models) "
        "names. Made from `benchmarks/accuracy.json` and `overview.json` by `benchmarks/overview.py`.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--readme" not in sys.argv[1:]:
        measure_all()
    put_into(README, "overview", tables(recorded(RESULTS), recorded(accuracy.RESULTS)))
