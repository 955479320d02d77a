"""Is it as accurate as the networks it replaces? Ours and the peers on the same images, splits and turns.

    python benchmarks/accuracy.py                                  # all that accuracy.json does not hold yet
    python benchmarks/accuracy.py --models tiles,twin --data pbc5_few,event --seeds 10 --jobs 2
    python benchmarks/accuracy.py --tables                         # only rewrite the tables of README.md

A run is a data set, a model and a split. Results are written as they come: a run that was stopped is taken
up again, and several invocations may run side by side. Without `--models` ours and the dense twins are run;
the other peers, whose figures are there, only if they are named. ResNet50 and MobileNetV2 need the extra
`benchmarks`.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

import data_sets
import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from ours import SHARES
from peers import PEERS, TWINS, Cnn
from report import machine, paired_interval, put_into, record, recorded
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_recall_fscore_support
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.training.counts import resolve_bounds

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "accuracy.json", HERE / "README.md"
# A CNN that stops early sees each of so few rows eight times an epoch: ten epochs of five batches would end
# it at chance. Ours and the dense twins run through their cycle whatever the number of rows.
FEW = 500


def ours(**params):
    """A factory as those of the peers; `params` go before what all our models have in common."""

    def make(*, augment, batch_size, random_state):
        recipe = {"augment": augment, "batch_size": batch_size, "random_state": random_state}
        return SparseAttnClassifier(**recipe | params)

    return make


OURS = {"tiles": ours()}
# The default of commit 87ba256. Its runs are kept, to be compared with; it cannot be run any more.
FORMER = "sparseattn"
MODELS = {**OURS, **PEERS}
NAMES = {FORMER: "former default (87ba256)"}  # in the tables

# Fits of a peer that went astray; its difference is shown once more without them, in its favour.
ASTRAY = {("pbc5", "resnet50"): ("seed4", "seed6", "seed8")}


# ---- one run ----


def calibration_error(probabilities, target, n_bins=15):
    """Expected calibration error: |accuracy - mean top probability| in bins of equal width, by their rows."""
    top = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == target
    # A probability on an edge belongs to the bin below it, as in Guo et al. 2017.
    bins = np.clip(np.ceil(top * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=right - top.astype(float), minlength=n_bins)
    return float(np.abs(gaps).sum() / len(target))


def scores(probabilities, target):
    predicted = probabilities.argmax(axis=1)
    macro = precision_recall_fscore_support(target, predicted, average="macro", zero_division=0)
    return {
        "accuracy": float(accuracy_score(target, predicted)),
        **dict(zip(("macro_precision", "macro_recall", "macro_f1"), map(float, macro[:3]), strict=True)),
        "balanced_accuracy": float(balanced_accuracy_score(target, predicted)),
        "ece": calibration_error(probabilities, target),
    }


def describe(estimator):
    """The final k, its share and whether it is at a bound where there is one, parameters, epochs."""
    found = {"epochs": estimator.n_iter_}
    if hasattr(estimator, "k_"):
        n_pixels = np.prod(estimator.image_shape_[:2])
        found |= {
            "k": int(estimator.k_),
            "share": float(estimator.k_ / n_pixels),
            "at_bound": is_at_bound(estimator),
        }
        found["parameters"] = sum(p.numel() for p in estimator.network_.parameters())
    else:
        found["parameters"] = estimator.n_parameters_
    return {name: value for name, value in found.items() if value is not None}


def is_at_bound(estimator):
    """Whether as many tiles are chosen as one of the estimator's bounds on k would choose."""
    network, (height, width, _) = estimator.network_, estimator.image_shape_
    bounds = resolve_bounds(estimator.k_min, estimator.k_max, network.area_of(height, width))
    return network.n_chosen(height, width) in [network.n_chosen(height, width, bound) for bound in bounds]


def at_other_k(estimator, X, target):
    """Accuracy of the same fit with half and twice its k, with all pixels, and by share of the pixels."""
    others = {"half_k": max(1, estimator.k_ // 2), "twice_k": 2 * estimator.k_, "all": 1.0}
    others |= {f"share_{share:.3g}": share for share in SHARES if share < 1}
    found = {}
    for name, k in others.items():
        predicted = estimator.set_params(predict_k=k).predict(X)
        found[f"accuracy_{name}"] = float(accuracy_score(target, predicted))
    estimator.set_params(predict_k=None)
    return found


def run_one(data, split, name, estimator_factory):
    """Fit on the training rows of a split, score on its test rows; ablation.py measures by this, too.

    A stratified tenth of the training rows, the same for all models, is for validation. `name` only goes
    into the result. `estimator_factory` takes augment, batch_size and random_state, which is the number of
    the split, and gives something with fit(X, y, X_val=..., y_val=...) and predict_proba. Times are those of
    the processor, one thread of it: what else runs on the machine hardly counts.
    """
    images, target, splits = data_sets.load(data)
    seed = [other for other, _, _ in splits].index(split)
    _, train, test = splits[seed]
    fitting, validation = train_test_split(train, test_size=0.1, stratify=target[train], random_state=seed)
    estimator = estimator_factory(
        augment=data_sets.augmentation(data),
        batch_size=data_sets.BATCH_SIZE,
        random_state=seed,
    )
    if len(fitting) < FEW and isinstance(estimator, Cnn):
        fitting = np.tile(fitting, 8)
    torch.set_num_threads(1)
    # Of our models only those of ablation.py draw from the global generator: random tiles, new layers.
    with threadpool_limits(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = time.process_time()
        estimator.fit(images[fitting], target[fitting], X_val=images[validation], y_val=target[validation])
        fitted = time.process_time()
        probabilities = estimator.predict_proba(images[test])
        predicted = time.process_time()
        others = {}
        if hasattr(estimator, "k_"):
            others = at_other_k(estimator, images[test], target[test])
    return {
        "data": data,
        "model": name,
        "split": split,
        **scores(probabilities, target[test]),
        **others,
        **describe(estimator),
        "fit_seconds": fitted - start,
        "images_per_second": len(test) / (predicted - fitted),
        "n_train": len(train),
        "n_test": len(test),
        "machine": machine(),
    }


# ---- all runs ----


def run_job(path, data, split, name, estimator_factory):
    """Measure and write down, unless another process has been quicker; True if that went well."""
    key = f"{data}/{name}/{split}"
    if key in recorded(path):
        return True
    try:
        result = run_one(data, split, name, estimator_factory)
    except Exception:  # the other runs, hours of them, go on
        print(f"{key} failed:\n{traceback.format_exc()}", flush=True)
        return False
    record(path, key, result)
    figures = {column: round(result[column], 4) for column in ("accuracy", "macro_f1", "ece", "fit_seconds")}
    print(key, figures, flush=True)
    return True


def measure_all(path, models, data, n_splits, n_jobs):
    """Run what `path` does not hold yet; `models` are factories by name. True if all went well.

    The first splits of all models come first, so that a measurement that is stopped can be compared.
    """
    done, jobs = recorded(path), []
    for name in data:
        try:
            splits = [split for split, _, _ in data_sets.load(name)[2]][:n_splits]
        except FileNotFoundError as error:
            print(f"{name} left out: {error}", flush=True)
            continue
        wanted = [(split, model) for split in splits for model in models]
        jobs += [
            (path, name, split, model, models[model])
            for split, model in wanted
            if f"{name}/{model}/{split}" not in done
        ]
    with parallel_config(backend="loky", inner_max_num_threads=1):
        return all(Parallel(n_jobs)(delayed(run_job)(*job) for job in jobs))


# ---- tables ----


def runs_of(results, data, model):
    """Runs by split."""
    chosen = (run for run in results.values() if (run["data"], run["model"]) == (data, model))
    return {run["split"]: run for run in chosen}


def spread(runs, column, factor=100, digits=1):
    """Mean ± standard deviation; a dash for what a model does not have."""
    values = factor * np.array([run[column] for run in runs if column in run], dtype=float)
    if not len(values):
        return "-"
    sd = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{sd}"


def seconds(runs):
    values = [run["fit_seconds"] for run in runs]
    return f"{np.mean(values):.0f} s" if np.mean(values) < 600 else f"{np.mean(values) / 60:.0f} min"


def name_of(model):
    return NAMES.get(model, f"`{model}`")


def model_row(model, runs):
    parameters = f"{runs[0]['parameters']:,}" if "parameters" in runs[0] else "-"
    columns = [
        name_of(model),
        str(len(runs)),
        *(spread(runs, column) for column in ("accuracy", "macro_f1", "balanced_accuracy")),
        spread(runs, "ece", factor=1, digits=3),
        spread(runs, "share"),
        parameters,
        seconds(runs),
    ]
    return f"| {' | '.join(columns)} |"


def score_tables(results, models):
    """One table for each data set that has runs."""
    lines = []
    for data, title in data_sets.TITLES.items():
        runs = {model: list(runs_of(results, data, model).values()) for model in models}
        rows = [model_row(model, found) for model, found in runs.items() if found]
        if rows:
            lines += [
                f"### {title[0].upper()}{title[1:]}",
                "",
                "| model | n | accuracy % | macro F1 % | balanced accuracy % | calibration error "
                "| k, % of the image | parameters | fit |",
                "|---|---|---|---|---|---|---|---|---|",
                *rows,
                "",
            ]
    return "\n".join([*lines, where(results)])


def where(results):
    places = {f"{run['machine']['processor']}, torch {run['machine']['torch']}" for run in results.values()}
    return f"Machine: {'; '.join(sorted(places)) or 'nothing measured yet'}; one thread a run."


def difference(a, b, column):
    """Mean and interval in points, and what is to be thought of it."""
    common = [split for split in a if split in b]
    pairs = [[100 * runs[split][column] for split in common] for runs in (a, b)]
    mean, low, high = paired_interval(*pairs)
    if np.isnan(low):
        return interval(mean, low, high), "one run"
    verdict = "inside the noise" if low <= 0 <= high else "better" if mean > 0 else "worse"
    return interval(mean, low, high), verdict


def k_table(results, model):
    """By data set: the k that a model's fits ended with, and their accuracies at other k against that."""
    lines = [
        "| images | n | k, % of the image | range | fits at a bound | all pixels against k, points "
        "| twice k | half k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in data_sets.TITLES:
        runs = list(runs_of(results, data, model).values())
        if not runs:
            continue
        shares = [100 * run["share"] for run in runs]
        columns = [str(len(runs)), spread(runs, "share"), f"{min(shares):.1f}-{max(shares):.1f}"]
        columns.append(str(sum(run["at_bound"] for run in runs)))
        for other in ("all", "twice_k", "half_k"):
            pairs = [[100 * run[name] for run in runs] for name in (f"accuracy_{other}", "accuracy")]
            columns.append(interval(*paired_interval(*pairs)))
        lines.append(f"| {data} | {' | '.join(columns)} |")
    return "\n".join(lines if len(lines) > 2 else ["Not measured yet."])


def interval(mean, low, high):
    return f"{mean:+.2f}" if np.isnan(low) else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def difference_table(results, first, others):
    """Each of `first` against each of `others`, over the splits that both have."""
    lines = [
        "| images | model | against | n | accuracy, points | | macro F1, points | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in data_sets.TITLES:
        for a, b in [(a, b) for a in first for b in others]:
            ours, theirs = (runs_of(results, data, model) for model in (a, b))
            astray = sorted(theirs.keys() & set(ASTRAY.get((data, b), ())))
            against = {name_of(b): theirs}
            if astray:
                rest = {split: run for split, run in theirs.items() if split not in astray}
                against[f"{name_of(b)} without {', '.join(astray)}"] = rest
            for label, runs in against.items():
                if n := len(ours.keys() & runs.keys()):
                    columns = [*difference(ours, runs, "accuracy"), *difference(ours, runs, "macro_f1")]
                    lines.append(f"| {data} | {name_of(a)} | {label} | {n} | {' | '.join(columns)} |")
    return "\n".join(lines if len(lines) > 2 else ["Not measured yet."])


def write_tables(path, document):
    results = recorded(path)
    hours = sum(run["fit_seconds"] for run in results.values() if run["model"] in PEERS) / 3600
    took = f"The peers' fits took {hours:.1f} h in all."
    put_into(document, "accuracy", f"{score_tables(results, [*OURS, FORMER, *PEERS])} {took}")
    put_into(document, "differences", difference_table(results, OURS, [FORMER, *PEERS]))
    put_into(document, "k", k_table(results, "tiles"))


def names_of(known):
    def parse(text):
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=names_of(MODELS), default=[*OURS, *TWINS])
    parser.add_argument("--data", type=names_of(data_sets.DATA_SETS), default=list(data_sets.DATA_SETS))
    parser.add_argument("--seeds", type=int, default=5, help="how many splits of each data set, at most 30")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    models = {name: MODELS[name] for name in options.models}
    well = options.tables or measure_all(RESULTS, models, options.data, options.seeds, options.jobs)
    write_tables(RESULTS, README)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
