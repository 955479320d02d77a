"""The figures of the README: accuracy on real and generated cells, cost of a prediction.

    python benchmarks/overview.py            # measure what overview.json does not hold yet, then the README
    python benchmarks/overview.py --readme   # only rewrite the tables of the README from overview.json

Real images are read from SPARSEATTN_DATA (by default ../shared/data); without them their rows stay as they
are. Results are written as they come.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from report import machine, put_into
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from sklearn.model_selection import cross_val_score, train_test_split
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import load_image_folder, make_cells
from sklearn_sparseattn.network import SparseAttnNet

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "overview.json"
README = HERE.parent / "README.md"
DATA = Path(os.environ.get("SPARSEATTN_DATA", HERE.parent.parent / "shared" / "data"))
SEEDS = (0, 1, 2)


def split_and_score(images, target, seed, **params):
    """Fit on 80 %, stratified; score on the rest."""
    parts = train_test_split(images, target, test_size=0.2, stratify=target, random_state=seed)
    X_train, X_test, y_train, y_test = parts
    clf = SparseAttnClassifier(random_state=seed, **params)
    clf.fit(X_train, y_train)
    predicted = clf.predict(X_test)
    return {
        "accuracy": float(np.mean(predicted == y_test)),
        "macro_f1": float(f1_score(y_test, predicted, average="macro")),
        "k": clf.k_,
        "share": clf.k_ / (clf.image_shape_[0] * clf.image_shape_[1]),
        "n_images": len(images),
    }


def pbc5(seed):
    cells = load_image_folder(DATA / "pbc5", crop="square", image_size=64)
    return split_and_score(cells.images, cells.target, seed, augment="dihedral", max_epochs=20)


def generated(modality):
    def measure(seed):
        cells = make_cells(1500, modality=modality, image_size=96, random_state=seed)
        # Turned by a quarter, a hologram's carrier runs in a direction that no camera sees.
        augment = None if modality == "hologram" else "dihedral"
        return split_and_score(cells.images, cells.target, seed, augment=augment)

    return measure


def attention(modality):
    def measure(seed):
        """Share of the chosen pixels that lies on the cell, against the cell's share of the image."""
        cells = make_cells(1000, modality=modality, image_size=64, return_masks=True, random_state=seed)
        clf = SparseAttnClassifier(random_state=seed).fit(cells.images[:800], cells.target[:800])
        on_cell = cells.masks[800:].reshape(200, -1) > 0
        chosen = np.take_along_axis(on_cell, clf.attention_maps(cells.images[800:]).pixels, axis=1)
        return {"chosen_on_cell": float(chosen.mean()), "cell_share": float(on_cell.mean())}

    return measure


def digits(seed):
    X, y = load_digits(return_X_y=True)
    scores = cross_val_score(SparseAttnClassifier(random_state=seed), X, y, cv=3)
    return {"accuracy": float(scores.mean())}


def cost(seed):
    """Parameters, multiply-adds and throughput at the paper's size, k = 2146 of 135×135, three classes."""
    network = SparseAttnNet(1, 3, k=2146).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 135, 135))
    cells = make_cells(256, image_size=135, random_state=seed)
    clf = SparseAttnClassifier(k_init=2146, k_min=2146, k_max=2146, max_epochs=1, random_state=seed)
    clf.fit(cells.images, cells.target)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        clf.predict_proba(cells.images)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
        "images_per_second": len(cells.images) / float(np.median(seconds)),
    }


MODALITIES = ("opd", "hologram", "event", "brightfield")
JOBS = {
    **{f"pbc5/{seed}": (pbc5, seed) for seed in SEEDS},
    **{f"{m}/{seed}": (generated(m), seed) for seed in SEEDS[:1] for m in MODALITIES},
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
    if not (DATA / "pbc5").is_dir():
        missing = [name for name in missing if not name.startswith("pbc5")]
    for timed, n_jobs in ((False, 2), (True, 1)):
        names = [name for name in missing if name.startswith("cost") == timed]
        found = Parallel(n_jobs, return_as="generator_unordered")(delayed(run_job)(name) for name in names)
        for name, result in found:
            results[name] = result
            print(name, result, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def spread(runs, column):
    """Mean in per cent, with the standard deviation if there are several runs."""
    values = 100 * np.array([run[column] for run in runs])
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def tables(results):
    """Markdown from the results, and from nothing else."""
    names = {
        "pbc5": "stained white blood cells (real, pbc5, 5 classes, 64×64 RGB)",
        **{m: f"generated, {m} (3 classes, 96×96)" for m in MODALITIES},
    }
    lines = [
        "| images | number | seeds | accuracy % | macro F1 % | k, % of the image |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        runs = [run for job, run in results.items() if job.split("/")[0] == key]
        figures = " | ".join(spread(runs, column) for column in ("accuracy", "macro_f1", "share"))
        lines.append(f"| {name} | {runs[0]['n_images']} | {len(runs)} | {figures} |")
    digit_runs = [run for job, run in results.items() if job.startswith("digits")]
    looks = [results[f"attention-{m}/0"] for m in MODALITIES]
    on_cell = ", ".join(f"{look['chosen_on_cell']:.0%}" for look in looks)
    run = results["cost/0"]
    where = run["machine"]
    lines += [
        "",
        "80 % for training, the rest for the score. scikit-learn's digits, `cross_val_score` with `cv=3` and "
        f"default settings: {spread(digit_runs, 'accuracy')} % ({len(digit_runs)} seeds).",
        "",
        f"Share of the chosen pixels on the cell ({', '.join(MODALITIES)}; 64×64, one seed): {on_cell}. "
        f"The cell covers {np.mean([look['cell_share'] for look in looks]):.0%} of the image.",
        "",
        f"At 135×135, one channel, k = 2146: {run['parameters']:,} parameters, "
        f"{run['multiply_adds'] / 1e6:.1f} M multiply-adds, {run['images_per_second']:.0f} images/s through "
        f"`predict_proba` (float64) on {where['threads']} threads.",
        "",
        f"Machine: {where['processor']}, torch {where['torch']}, scikit-learn {where['scikit-learn']}. Made "
        "from `benchmarks/overview.json` by `benchmarks/overview.py`.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--readme" not in sys.argv[1:]:
        measure_all()
    put_into(README, "overview", tables(json.loads(RESULTS.read_text())))
