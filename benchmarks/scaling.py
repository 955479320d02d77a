"""How time and memory grow with k, with the size and the number of images; how fast training is.

    python benchmarks/scaling.py                      # all that scaling.json does not hold yet
    python benchmarks/scaling.py --only k,size --again    # these anew
    python benchmarks/scaling.py --plots FOLDER       # and draw PNG files
    python benchmarks/scaling.py --quick              # a trial with few small images
    python benchmarks/scaling.py --tables             # only rewrite the tables of README.md

Prediction is `predict_proba` of uint8 images, memory the growth of RssAnon in a process of its own. Training
is timed by a callback in skorch's loop, the same for ours and for the peers: reading and scaling a batch,
forward, losses, backward and the step of AdamW; no validation. Both threads are there for all.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
from accuracy import names_of
from memory_use import in_child
from ours import MAIN, cells, fitted, predicting, predicting_with
from peers import TWINS, Cnn, lenet, mobilenetv2
from report import put_into, record, recorded
from runtimes import NEEDS, RUNTIMES, environment, left_out, missing, open_peers
from skorch.callbacks import Callback
from timing import in_turns, rate
from torch.nn import functional as F

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "scaling.json", HERE / "README.md"

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BUILDERS = {**TWINS, "mobilenetv2": mobilenetv2, "lenet": lenet}


class Plan(NamedTuple):
    """How much is measured."""

    size: int = 135
    shares: tuple = SHARES
    sizes: tuple = (32, 64, 128, 256, 512, 1024)
    counts: tuple = (1_000, 10_000, 50_000, 200_000)
    pixels: int = 256 * 135**2  # of the images in a call
    rounds: int = 5
    seconds: float = 0.5
    batch_size: int = 64
    batches: tuple = (16, 5)  # of ours, of a peer
    large_k: int = 8000
    epoch_size: int = 64
    epoch_images: int = 320
    epochs: tuple = (30, 2)  # of ours, since k falls over a fit; of a peer


QUICK = Plan(32, (0.1, 1.0), (16, 32), (8, 16), 8 * 32**2, 2, 0.01, 4, (3, 3), 400, 32, 12, (2, 1))


# ---- lines through the points ----


def line(x, y):
    """Least squares y = intercept + slope x; the share of variance explained; the log-log exponent."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = y - intercept - slope * x, y - y.mean()
    explained = 1 - float(rest @ rest) / float(spread @ spread) if spread.any() else 1.0
    exponent = float(np.polyfit(np.log(x), np.log(y), 1)[0]) if (y > 0).all() else float("nan")
    return {"slope": float(slope), "intercept": float(intercept), "r2": explained, "exponent": exponent}


# ---- prediction ----


def resized(images, size):
    """Images of another size, uint8."""
    floats = torch.from_numpy(images[:, None]).float()
    return F.interpolate(floats, (size, size), mode="bilinear")[:, 0].round().byte().numpy()


def repeated(images, n):
    return images[np.arange(n) % len(images)]


def prediction_memory(clf, images, folder, **spec):
    """Growth of memory in a fresh process, model included."""
    joblib.dump(clf, folder / "clf.joblib")
    np.save(folder / "images.npy", images)
    paths = {"model": str(folder / "clf.joblib"), "images": str(folder / "images.npy")}
    return in_child(work="predict", threads=torch.get_num_threads(), **paths, **spec)


def points(variants, plan, folder, others=()):
    """Time an image, in turns, and memory of (clf, images) by x; `others` are further units by name."""
    units = {x: predicting(clf, images) for x, (clf, images) in variants.items()} | dict(others)

    def measure(unit):
        unit()
        return rate(unit, plan.seconds)

    rates = in_turns(units, plan.rounds, measure)
    found = {}
    for x in units:
        found[str(x)] = {"microseconds": 1e6 / float(np.median(rates[x]))}
        if x in variants:
            found[str(x)]["memory_mb"] = prediction_memory(*variants[x], folder)["growth_mb"]
    return {"points": found}


def against_k(plan, peers, folder):
    """One fit, its k set at prediction; also the dense twin in OpenVINO in float32, batches of 32."""
    images, target = cells(32, plan.size)
    many = repeated(images, max(1, plan.pixels // plan.size**2))
    clf, variants = fitted(images, target, MAIN), {}
    for share in plan.shares:
        k = max(1, round(share * plan.size**2))
        variants[k] = predicting_with(clf, predict_k=k), many
    runtime, others = RUNTIMES["openvino"], {}
    if "twin" in peers and not missing(runtime.needs):
        opened = open_peers(["twin"], images, torch.get_num_threads(), folder)
        others["twin"] = runtime.open(opened["twin"], 32, torch.get_num_threads())
    return points(variants, plan, folder, others)


def against_size(plan, peers, folder):
    """Time and memory with k a fixed share of the pixels."""
    images, target = cells(12, 64)
    variants = {}
    for size in plan.sizes:
        scaled = resized(images, size)
        k = max(1, round(MAIN * size**2))
        clf = fitted(scaled, target, k, batch_size=2 if size > 256 else 12)
        variants[size**2] = clf, repeated(scaled, max(2, min(512, plan.pixels // size**2)))
    return points(variants, plan, folder)


def against_n(plan, peers, folder):
    """One memory map of all images; each process reads the first n."""
    images, target = cells(32, plan.size)
    clf = fitted(images, target, max(1, round(MAIN * plan.size**2)))
    joblib.dump(clf, folder / "clf.joblib")
    path, most = folder / "many.npy", max(plan.counts)
    mapped = np.lib.format.open_memmap(path, "w+", images.dtype, (most, *images.shape[1:]))
    for start in range(0, most, 1000):
        mapped[start : start + 1000] = repeated(images, min(1000, most - start))
    mapped.flush()
    del mapped
    paths = {"model": str(folder / "clf.joblib"), "images": str(path)}
    found = {}
    for n in plan.counts:
        run = in_child(work="predict", n=n, threads=torch.get_num_threads(), **paths)
        found[str(n)] = {"seconds": run["seconds"], "memory_mb": run["growth_mb"]}
        print(f"n = {n}: {found[str(n)]}", flush=True)
    return {"points": found}


# ---- training ----


class BatchClock(Callback):
    """When each training batch ended; reads nothing of `net.history`."""

    def on_train_begin(self, net, **kwargs):
        """Start anew."""
        self.epochs = []

    def on_epoch_begin(self, net, **kwargs):
        """Note the beginning."""
        self.epochs.append([time.perf_counter()])

    def on_batch_end(self, net, training=False, **kwargs):
        """Note the end."""
        if training:
            self.epochs[-1].append(time.perf_counter())

    def batch_seconds(self):
        """Median time from one end to the next; the first batch of an epoch warms up."""
        return float(np.median(np.concatenate([np.diff(ends[1:]) for ends in self.epochs])))

    def epoch_seconds(self):
        """From the beginning to the end of the last batch, of each epoch."""
        return [ends[-1] - ends[0] for ends in self.epochs]


class ClockedCnn(Cnn):
    """A peer whose training is timed."""

    def __init__(self, build, clock, **options):
        super().__init__(build, **options)
        self.clock = clock

    def _trainer(self, image_shape, n_classes, validation):
        trainer = super()._trainer(image_shape, n_classes, validation)
        trainer.callbacks.append(("clock", self.clock))
        return trainer


def clocked(model, images, target, epochs, batch_size, **params):
    """The clock of a fit, of ours or of a peer; a peer validates on two rows, beside the clock."""
    clock = BatchClock()
    if model == "tiles":
        options = {"max_epochs": epochs, "batch_size": batch_size, "random_state": 0, "callbacks": [clock]}
        SparseAttnClassifier(**options | params).fit(images, target)
    else:
        peer = ClockedCnn(BUILDERS[model], clock, max_epochs=epochs, batch_size=batch_size)
        peer.fit(images, target, images[:2], target[:2])
    return clock


def training_models(peers):
    return ["tiles", *(name for name in peers if not missing(NEEDS.get(name, ())))]


def training(plan, peers, folder):
    """Images a second at a fixed k, from the median of the batches."""
    images, target = cells(64, plan.size)
    k, found = max(1, round(MAIN * plan.size**2)), {}
    for model in training_models(peers):
        ours = model == "tiles"
        n = plan.batch_size * plan.batches[0 if ours else 1]
        held = {"k_init": k, "k_min": k, "k_max": k} if ours else {}
        many, classes = repeated(images, n), repeated(target, n)
        clock = clocked(model, many, classes, 1, plan.batch_size, **held)
        found[model] = {"images_per_second": plan.batch_size / clock.batch_seconds()}
        print(f"training, {model}: {found[model]}", flush=True)
    return {"batch_size": plan.batch_size, "k": k, "models": found}


def training_memory(plan, peers, folder):
    """Two batches at a large k."""
    images, target = cells(2 * plan.batch_size, plan.size)
    np.save(folder / "images.npy", images)
    np.save(folder / "target.npy", target)
    paths = {"images": str(folder / "images.npy"), "target": str(folder / "target.npy")}
    size = {"k": plan.large_k, "batch_size": plan.batch_size}
    run = in_child(work="fit", threads=torch.get_num_threads(), **size, **paths)
    return size | {"memory_mb": run["growth_mb"]}


def epoch(plan, peers, folder):
    """Seconds an epoch on RGB images in batches of 32; ours over a whole fit with its dynamic k."""
    bunch = make_cells(plan.epoch_images, modality="brightfield", image_size=plan.epoch_size, random_state=0)
    found = {}
    for model in training_models(peers):
        clock = clocked(model, bunch.images, bunch.target, plan.epochs[0 if model == "tiles" else 1], 32)
        seconds = clock.epoch_seconds()
        found[model] = {"mean": float(np.mean(seconds)), "first": seconds[0], "last": seconds[-1]}
        print(f"epoch, {model}: {found[model]}", flush=True)
    return {"images": plan.epoch_images, "size": plan.epoch_size, "models": found}


SECTIONS = {
    "k": against_k,
    "size": against_size,
    "n": against_n,
    "training": training,
    "training_memory": training_memory,
    "epoch": epoch,
}


def measure(plan, only, peers, threads, again):
    """The sections that the file does not hold yet, each written as soon as it is done."""
    torch.set_num_threads(threads)
    for peer in peers:
        if lacking := missing(NEEDS.get(peer, ())):
            left_out(peer, f"not installed: {', '.join(lacking)} (extra `benchmarks`)")
    for name in only:
        if name in recorded(RESULTS) and not again:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = SECTIONS[name](plan, peers, Path(folder))
        record(RESULTS, name, found | {"machine": environment()})
        print(f"{name} done", flush=True)


# ---- tables and plots ----


def curve(run, column):
    """Coordinates of the points; a peer among them has no number for a name."""
    chosen = {int(x): point[column] for x, point in run["points"].items() if x.isdigit()}
    return list(chosen), list(chosen.values())


# section -> heading of x, column of time, heading of time, of the slope: (factor, unit).
CURVES = {
    "k": ("k", "microseconds", "µs an image", (1000, "µs for 1,000 more pixels chosen")),
    "size": ("pixels of an image", "microseconds", "µs an image", (1000, "µs for 1,000 more pixels")),
    "n": ("images", "seconds", "seconds", (1000, "s for 1,000 more images")),
}


def curve_table(name, run):
    heading, column, unit, (factor, of_slope) = CURVES[name]
    lines = ["", f"| {heading} | {unit} | memory |", "|---|---|---|"]
    for x, point in run["points"].items():
        label = f"{int(x):,}" if x.isdigit() else f"(`{x}`, OpenVINO fp32)"
        memory = f"{point['memory_mb']:.0f} MB" if "memory_mb" in point else "-"
        digits = 1 if column == "microseconds" else 2
        lines.append(f"| {label} | {point[column]:,.{digits}f} | {memory} |")
    time_line, memory_line = line(*curve(run, column)), line(*curve(run, "memory_mb"))
    lines += [
        "",
        f"{factor * time_line['slope']:.3g} {of_slope}, beside {time_line['intercept']:.3g} "
        f"(R² = {time_line['r2']:.3f}; exponent {time_line['exponent']:.2f}); memory "
        f"{factor * memory_line['slope']:.3g} MB for as many.",
    ]
    return lines


def against_ours(values, more_is_faster):
    """How many times ours is as fast as each."""
    ours = values["tiles"]
    return {name: ours / v if more_is_faster else v / ours for name, v in values.items()}


def training_table(results):
    lines = []
    if "training" in results:
        run = results["training"]
        values = {name: found["images_per_second"] for name, found in run["models"].items()}
        heading = f"training, images/s (batch {run['batch_size']}, k = {run['k']:,})"
        lines += ["", f"| model | {heading} | ours is faster by |", "|---|---|---|"]
        times = against_ours(values, more_is_faster=True)
        lines += [f"| `{name}` | {value:,.1f} | {times[name]:.1f} × |" for name, value in values.items()]
    if "training_memory" in results:
        run = results["training_memory"]
        lines += ["", f"Peak memory of training at k = {run['k']:,}, batch {run['batch_size']}: "]
        lines[-1] += f"{run['memory_mb']:,.0f} MB above the idle process."
    if "epoch" in results:
        run = results["epoch"]
        heading = f"an epoch of {run['images']} images, {run['size']}×{run['size']} RGB, batch 32"
        lines += ["", f"| model | {heading} | the first | the last | ours is faster by |"]
        lines += ["|---|---|---|---|---|"]
        times = against_ours({n: found["mean"] for n, found in run["models"].items()}, more_is_faster=False)
        for name, found in run["models"].items():
            columns = " | ".join(f"{found[column]:.2f} s" for column in ("mean", "first", "last"))
            lines.append(f"| `{name}` | {columns} | {times[name]:.1f} × |")
    return lines


def tables(results):
    """Markdown from the results, and from nothing else."""
    where = next((run["machine"] for run in results.values()), None)
    if where is None:
        return "Not measured yet."
    lines = [text for name in CURVES if name in results for text in curve_table(name, results[name])]
    lines += training_table(results)
    place = f"{where['processor']}, {where['threads']} threads, torch {where['torch']}"
    return "\n".join([*lines, "", f"Machine: {place}."]).strip()


def plot(results, folder):
    """One PNG a section, time and memory, both axes logarithmic."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name in (name for name in CURVES if name in results):
        heading, column, unit, _ = CURVES[name]
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, y_column, y_heading in zip(axes, (column, "memory_mb"), (unit, "memory, MB"), strict=True):
            ax.loglog(*curve(results[name], y_column), "o-")
            ax.set(xlabel=heading, ylabel=y_heading)
        figure.savefig(folder / f"scaling_{name}.png", dpi=150)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=names_of(SECTIONS), default=list(SECTIONS), help="by commas")
    parser.add_argument("--peers", type=names_of(BUILDERS), default=["twin", "mobilenetv2"])
    parser.add_argument("--threads", type=int, default=2, help="for ours and for the peers")
    parser.add_argument("--again", action="store_true", help="also what scaling.json holds")
    parser.add_argument("--quick", action="store_true", help="few small images: a trial, no measurement")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG files there")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if not options.tables:
        plan = QUICK if options.quick else Plan()
        measure(plan, options.only, options.peers, options.threads, options.again)
    put_into(README, "scaling", tables(recorded(RESULTS)))
    if options.plots:
        plot(recorded(RESULTS), options.plots)


if __name__ == "__main__":
    sys.exit(main())
