"""The figures of the README: accuracy on real and generated cells, cost of a prediction.

    python benchmarks/overview.py            # measure what overview.json does not hold yet, then the README
    python benchmarks/overview.py --readme   # only rewrite the tables of the README from overview.json

Real images are read from SPARSEATTN_DATA (by default ../shared/data); without them their rows stay as they
are. Results are written as they come.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
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


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }


def split_and_score(images, target, seed, **params):
    """Fit on 80 %, stratified; score on the rest."""
    parts = train_test_split(images, target, test_size=0.2, stratify=target, random_state=seed)
    X_train, X_test, y_train, y_test = parts
    clf = SparseAttnClassifier(random_state=seed, **params)
    start = time.perf_counter()
    clf.fit(X_train, y_train)
    fit_seconds = time.perf_counter() - start
    predicted = clf.predict(X_test)
    return {
        "accuracy": float(np.mean(predicted == y_test)),
        "macro_f1": float(f1_score(y_test, predicted, average="macro")),
        "k": clf.k_,
        "share": clf.k_ / (clf.image_shape_[0] * clf.image_shape_[1]),
        "fit_seconds": fit_seconds,
        "n_images": len(images),
    }


def pbc5(seed):
    cells = load_image_folder(DATA / "pbc5", crop="square", image_size=64, n_jobs=2)
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
    start = time.perf_counter()
    scores = cross_val_score(SparseAttnClassifier(random_state=seed), X, y, cv=3)
    return {"accuracy": float(scores.mean()), "seconds": time.perf_counter() - start}


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
    **{f"{m}/{seed}": (generated(m), seed) for seed in SEEDS[:2] for m in MODALITIES},
    **{f"digits/{seed}": (digits, seed) for seed in SEEDS},
    **{f"attention-{m}/0": (attention(m), 0) for m in MODALITIES},
    "cost/0": (cost, 0),
}


def measure_all():
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (measure, seed) in JOBS.items():
        if name in results or (name.startswith("pbc5") and not (DATA / "pbc5").is_dir()):
            continue
        results[name] = {"seed": seed, **measure(seed), "machine": machine()}
        print(name, results[name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def spread(values, scale=100, digits=1):
    values = scale * np.asarray(values)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def tables(results):
    """Markdown from the results, and from nothing else."""
    names = {
        "pbc5": "stained white blood cells (real, pbc5, 5 classes, 64×64 RGB)",
        **{m: f"generated, {m} (3 classes, 96×96)" for m in MODALITIES},
    }
    lines = [
        "| images | number | accuracy % | macro F1 % | k, % of the image | fit, s |",
        "|---|---|---|---|---|---|",
    ]
    for key, name in names.items():
        runs = [run for job, run in results.items() if job.split("/")[0] == key]
        share = spread([run["share"] for run in runs])
        accuracy, f1 = (spread([run[column] for run in runs]) for column in ("accuracy", "macro_f1"))
        seconds = np.mean([run["fit_seconds"] for run in runs])
        lines.append(f"| {name} | {runs[0]['n_images']} | {accuracy} | {f1} | {share} | {seconds:.0f} |")
    digit_runs = [run for job, run in results.items() if job.startswith("digits")]
    accuracy = spread([run["accuracy"] for run in digit_runs])
    looks = [results[f"attention-{m}/0"] for m in MODALITIES]
    on_cell = ", ".join(f"{look['chosen_on_cell']:.0%}" for look in looks)
    run = results["cost/0"]
    where = run["machine"]
    lines += [
        "",
        f"80 % for training, mean ± sd over {len(SEEDS)} seeds (two for the generated cells). "
        f"scikit-learn's digits, `cross_val_score` with `cv=3` and default settings: {accuracy} %.",
        "",
        f"Share of the chosen pixels on the cell ({', '.join(MODALITIES)}; 64×64, one seed): {on_cell}. "
        f"The cell covers {np.mean([look['cell_share'] for look in looks]):.0%} of the image.",
        "",
        f"At 135×135, one channel, k = 2146: {run['parameters']:,} parameters, "
        f"{run['multiply_adds'] / 1e6:.1f} M multiply-adds, {run['images_per_second']:.0f} images/s through "
        "`predict_proba` (float64).",
        "",
        f"Machine: {where['processor']}, {where['threads']} threads (fits: one thread, beside other "
        f"jobs, so that their times are upper bounds), torch {where['torch']}, scikit-learn "
        f"{where['scikit-learn']}. Made from `benchmarks/overview.json` by `benchmarks/overview.py`.",
    ]
    return "\n".join(lines)


def write_readme(results):
    begin, end = "<!-- overview: begin -->", "<!-- overview: end -->"
    text = README.read_text()
    head, rest = text.split(begin)
    README.write_text(f"{head}{begin}\n{tables(results)}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    if "--readme" not in sys.argv[1:]:
        measure_all()
    write_readme(json.loads(RESULTS.read_text()))
