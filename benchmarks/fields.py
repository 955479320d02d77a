"""Does ours look at the one cell of a field that decides? Accuracy and cost, against a dense twin.

    python benchmarks/fields.py                       # all fits that fields.json does not hold yet
    python benchmarks/fields.py --sizes 256 --seeds 3
    python benchmarks/fields.py --time                # then what a prediction costs; nothing beside it
    python benchmarks/fields.py --tables              # only rewrite the table of README.md

Ours and the dense twin, by the recipe of accuracy.py, at growing size. Beside the share of test fields in
which an attended tile overlaps the deciding cell stands what as many random tiles would reach: a cell covers
many tiles.
"""

import argparse
import sys
import tempfile
import time
import traceback
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accuracy import MODELS, interval, names_of, runs_of, scores, spread
from data_sets import BATCH_SIZE
from efficiency import best_setting, calibrate, cost
from joblib import Parallel, delayed, parallel_config
from ours import fitted, multiply_adds, predicting
from report import machine, paired_interval, put_into, record, recorded
from runtimes import RUNTIMES, Peer, environment, missing
from scipy.special import gammaln
from threadpoolctl import threadpool_limits
from timing import in_turns, rate

from sklearn_sparseattn.datasets import make_fields

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "fields.json", HERE / "README.md"
SIZES = (128, 256, 512)
N_TRAIN, N_TEST = 1000, 500
DECIDING = 2  # in the masks


@lru_cache(maxsize=1)
def load(size, seed):
    """Fields to train on and others to score on."""
    return [
        make_fields(n, image_size=size, random_state=2 * seed + i) for i, n in enumerate((N_TRAIN, N_TEST))
    ]


# ---- where it looks ----


def share_of_tiles(mask, tile):
    """(n, H, W) of truth values -> (n, rows, columns): whether a tile holds a true pixel."""
    _, height, width = mask.shape
    padded = np.pad(mask, ((0, 0), (0, -height % tile), (0, -width % tile)))
    n, height, width = padded.shape
    return padded.reshape(n, height // tile, tile, width // tile, tile).any(axis=(2, 4))


def hit_by_chance(n_hits, n_tiles, n_chosen):
    """Probability that one of `n_chosen` random tiles of `n_tiles` is among `n_hits` of them."""

    def log_choices(n):
        return gammaln(n + 1) - gammaln(n_chosen + 1) - gammaln(np.maximum(n - n_chosen, 0) + 1)

    left = n_tiles - np.asarray(n_hits)
    none = np.exp(log_choices(left) - log_choices(n_tiles))
    return np.where(left < n_chosen, 1.0, 1 - none)


def looks(clf, fields):
    """Share of the field that is attended to; how often, and how much of, the deciding cell is in it."""
    attended, inside, hit, chance = [], [], [], []
    tile = clf.network_.tile
    for start in range(0, len(fields.images), 50):  # maps of all fields take much memory
        rows = slice(start, start + 50)
        found = clf.attention_maps(fields.images[rows])
        deciding = fields.masks[rows] == DECIDING
        kept = deciding.any(axis=(1, 2))
        chosen, deciding = found.chosen[kept], deciding[kept]
        attended += [*found.chosen.mean(axis=(1, 2))]
        inside += [*((chosen & deciding).sum(axis=(1, 2)) / deciding.sum(axis=(1, 2)))]
        hit += [*(chosen & deciding).any(axis=(1, 2))]
        tiles = share_of_tiles(deciding, tile)
        chance += [*hit_by_chance(tiles.sum(axis=(1, 2)), tiles[0].size, found.tiles.shape[1])]
    names = ("attended", "deciding_inside", "deciding_hit", "hit_by_chance")
    return dict(zip(names, (float(np.mean(one)) for one in (attended, inside, hit, chance)), strict=True))


# ---- fits ----


def run(size, model, seed):
    training, test = load(size, seed)
    torch.set_num_threads(1)
    with threadpool_limits(1):
        estimator = MODELS[model](augment="dihedral", batch_size=BATCH_SIZE, random_state=seed)
        start = time.process_time()
        estimator.fit(training.images, training.target)
        seconds = time.process_time() - start
        found = scores(estimator.predict_proba(test.images), test.target)
        if model == "tiles":
            found |= {"k": estimator.k_, **looks(estimator, test)}
    about = {"data": str(size), "model": model, "split": f"seed{seed}", "fit_seconds": seconds}
    return {**about, **found, "machine": machine()}


def run_job(path, size, model, seed):
    key = f"{size}/{model}/seed{seed}"
    if key in recorded(path):
        return True
    try:
        record(path, key, run(size, model, seed))
    except Exception:  # the other runs go on
        print(f"{key} failed:\n{traceback.format_exc()}", flush=True)
        return False
    print(f"{key} done", flush=True)
    return True


def measure(path, sizes, models, n_seeds, n_jobs):
    """Run what `path` does not hold yet; True if all went well."""
    jobs = [(path, size, model, seed) for size in sizes for seed in range(n_seeds) for model in models]
    jobs = [job for job in jobs if "{1}/{2}/seed{3}".format(*job) not in recorded(path)]
    with parallel_config(backend="loky", inner_max_num_threads=1):
        return all(Parallel(n_jobs)(delayed(run_job)(*job) for job in jobs))


# ---- cost ----


class TimePlan:
    """How the twin's best setting is found."""

    batches, seconds = (8, 32), 1.0


def measure_time(path, sizes, rounds=7, seconds=1.0, n_images=128):
    """Multiply-adds and images a second on one thread, in turns: ours at the mean k of its fits, the twin."""
    torch.set_num_threads(1)
    for size in sizes:
        runs = list(runs_of(fits(recorded(path)), str(size), "tiles").values())
        if not runs:
            print(f"{size} left out: no fits yet", flush=True)
            continue
        made = make_fields(n_images, image_size=size, random_state=0)
        share = float(np.mean([one["attended"] for one in runs]))
        clf = fitted(made.images, made.target, share, batch_size=16)
        peer = Peer("twin", made.images, 1)
        shape = tuple(peer.images.shape[1:])
        found = {
            "tiles": {"multiply_adds": sum(multiply_adds(clf).values())},
            "twin": cost(peer.network.network, shape),
        }
        units = {"tiles": predicting(clf, made.images)}
        with tempfile.TemporaryDirectory() as folder:
            peer.export(folder)
            for name, runtime in RUNTIMES.items():
                if runtime.precision == "fp32" and not missing(runtime.needs):
                    best = best_setting(calibrate(peer, runtime, TimePlan))
                    units[f"twin/{name}"] = runtime.open(peer, **best)
            rates = in_turns(units, rounds, lambda unit: (unit(), rate(unit, seconds))[1])
        found["rates"] = rates
        record(path, f"time/{size}", found | {"machine": environment()})
        print(f"time/{size} done", flush=True)


def fits(results):
    return {key: one for key, one in results.items() if not key.startswith("time/")}


# ---- tables ----


def cost_columns(timed):
    """Multiply-adds and images a second of both, and ours to the twin."""
    if timed is None:
        return ["-"] * 3
    rates = {name: float(np.median(values)) for name, values in timed["rates"].items()}
    ours, twin = rates.pop("tiles"), max(rates.values(), default=float("nan"))
    macs = [timed[name]["multiply_adds"] / 1e6 for name in ("tiles", "twin")]
    return [
        f"{macs[0]:.1f} / {macs[1]:.1f} M = {macs[0] / macs[1]:.2f}",
        f"{ours:,.0f} / {twin:,.0f}",
        f"{ours / twin:.2f} ×",
    ]


def table(results):
    lines = [
        "| side | n | accuracy %, ours | twin | difference, points | attended, % of the field "
        "| deciding cell met, % | by chance | of its area | multiply-adds | images/s, one thread | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted({int(one["data"]) for one in fits(results).values()}):
        ours, twin = (runs_of(fits(results), str(size), model) for model in ("tiles", "twin"))
        common = sorted(ours.keys() & twin.keys())
        difference = "-"
        if common:
            pairs = [[100 * found[split]["accuracy"] for split in common] for found in (ours, twin)]
            difference = interval(*paired_interval(*pairs))
        names = ("attended", "deciding_hit", "hit_by_chance", "deciding_inside")
        columns = [str(len(ours)), spread(ours.values(), "accuracy"), spread(twin.values(), "accuracy")]
        columns += [difference, *(spread(ours.values(), name) for name in names)]
        lines.append(f"| {size} | {' | '.join(columns + cost_columns(results.get(f'time/{size}')))} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=list(SIZES))
    parser.add_argument("--models", type=names_of(("tiles", "twin")), default=["tiles", "twin"])
    parser.add_argument("--seeds", type=int, default=3, help="how many fits of each")
    parser.add_argument("--jobs", type=int, default=2, help="fits at a time, of one thread each")
    parser.add_argument("--time", action="store_true", help="measure costs, and no accuracies")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    well = True
    if options.time:
        measure_time(RESULTS, options.sizes)
    elif not options.tables:
        well = measure(RESULTS, options.sizes, options.models, options.seeds, options.jobs)
    put_into(README, "fields", table(recorded(RESULTS)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
