"""What does a prediction cost? Ours at several k, dense twins and MobileNetV2 in the runtimes that suit them.

    python benchmarks/efficiency.py                   # all of it, about 15 minutes on an idle machine
    python benchmarks/efficiency.py --only throughput,latency   # these anew, at the settings found before
    python benchmarks/efficiency.py --figure          # only draw accuracy against images/s
    python benchmarks/efficiency.py --device cuda     # on a GPU instead, where there is one
    python benchmarks/efficiency.py --quick           # a trial with few small images
    python benchmarks/efficiency.py --tables          # only rewrite the tables of README.md

Ours is asked as a user asks, `predict_proba` of an array of uint8 images; the peers go from bytes to
probabilities, too, but their batches lie ready in memory. All is measured with one thread and with all. Every
peer in every runtime is first tried at several batch sizes and streams; those chosen, and ours, are then
measured in turns, in an order drawn anew in every round. Runtimes (extra `benchmarks`) that are not installed
are left out; without the compiled engine nothing is measured. Sections are written to efficiency.json as they
are done.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import accuracy
import data_sets
import numpy as np
import torch
from accuracy import names_of
from efficiency_tables import MAIN_KEY, figure, tables
from gpu import on_gpu
from ours import (
    MAIN,
    SHARES,
    cells,
    exactness,
    fitted,
    label,
    multiply_adds,
    one_by_one,
    predicting,
    predicting_with,
    profile,
)
from report import put_into, record, recorded
from runtimes import (
    BUILDERS,
    NEEDS,
    RUNTIMES,
    Peer,
    environment,
    has_bfloat16,
    left_out,
    missing,
    open_peers,
    runtimes_of,
)
from timing import in_turns, rate
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "efficiency.json", HERE / "README.md"
FIGURE = HERE / "images" / "accuracy_speed.png"
DEFAULT_PEERS = ["twin_small", "twin", "twin_large", "mobilenetv2"]


class Plan(NamedTuple):
    """How much is measured."""

    size: int = 135
    n_images: int = 512
    batches: tuple = (8, 32, 64)
    seconds: float = 1.0
    rounds: int = 7
    calls: int = 1400
    peer_calls: int = 350
    profile_images: int = 256
    profile_rounds: int = 21
    exact_images: int = 5000  # of noise, and of cells
    exact_real_images: int = 2000

    @property
    def k(self):
        """Pixels: 1,500 of 135×135."""
        return round(MAIN * self.size**2)


QUICK = Plan(32, 16, (1, 2), 0.02, 2, 20, 10, 8, 2, 20, 0)


# ---- time ----


def calibrate(peer, runtime, plan):
    """Throughput at every setting."""
    found = []
    for streams in sorted({1, peer.threads}):
        for batch in plan.batches:
            unit = runtime.open(peer, batch, streams)
            unit()
            speed = rate(unit, plan.seconds / 2)
            found.append({"batch": batch, "streams": streams, "images_per_second": speed})
    return found


def best_setting(found):
    """Batch and streams with the highest throughput."""
    best = max(found, key=lambda setting: setting["images_per_second"])
    return {"batch": best["batch"], "streams": best["streams"]}


def calibrate_all(peers, plan):
    for peer in peers.values():
        for name, runtime in runtimes_of(peer.name).items():
            key = f"{peer.name}/{name}"
            if lacking := missing(runtime.needs):
                left_out(key, f"not installed: {', '.join(lacking)} (extra `benchmarks`)")
                continue
            if runtime.precision == "bf16" and not has_bfloat16():
                left_out(key, "the processor has no bfloat16")
                continue
            try:
                found = calibrate(peer, runtime, plan)
            except Exception as error:  # an operation it does not know: the others go on
                left_out(key, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
                continue
            record(
                RESULTS, f"calibration/{peer.threads}/{key}", {"settings": found, "machine": environment()}
            )
            speed = max(setting["images_per_second"] for setting in found)
            print(f"{key}, {peer.threads} threads: {speed:.0f} images/s at {best_setting(found)}", flush=True)


def chosen_settings(results, peers):
    """(peer, runtime) -> its best setting, of those that were calibrated with as many threads."""
    found = {}
    for name, peer in peers.items():
        for runtime in runtimes_of(name):
            key = f"calibration/{peer.threads}/{name}/{runtime}"
            if key in results and not missing(RUNTIMES[runtime].needs):
                found[name, runtime] = best_setting(results[key]["settings"])
    return found


def throughput(ours, peers, images, plan, settings):
    """All in turns; each warms up with one unit every time."""
    units = {name: predicting(clf, images) for name, clf in ours.items()}
    about = {name: {"model": name, "runtime": "predict_proba", "precision": "fp32"} for name in ours}
    for (peer, name), setting in settings.items():
        units[f"{peer}/{name}"] = RUNTIMES[name].open(peers[peer], **setting)
        precision = RUNTIMES[name].precision
        about[f"{peer}/{name}"] = {"model": peer, "runtime": name, "precision": precision, **setting}

    def measure(unit):
        unit()
        return rate(unit, plan.seconds)

    rates = in_turns(units, plan.rounds, measure)
    return {name: about[name] | {"rates": rates[name]} for name in units}


def latency(ours, peers, images, plan, settings):
    """Seconds of single calls with one image, p50 and p99, in turns."""
    calls = {name: (one_by_one(clf, images), plan.calls) for name, clf in ours.items()}
    for peer, name in settings:
        calls[f"{peer}/{name}"] = RUNTIMES[name].open(peers[peer], 1, 1), plan.peer_calls

    def measure(call_and_n):
        call, n = call_and_n
        call()
        seconds = []
        for _ in range(-(-n // plan.rounds)):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    found = {name: np.concatenate(s) for name, s in in_turns(calls, plan.rounds, measure).items()}
    return {
        name: {"n": len(s), "p50": float(np.median(s)), "p99": float(np.quantile(s, 0.99))}
        for name, s in found.items()
    }


# ---- parameters, multiply-adds ----


def cost(network, image_shape):
    """Parameters, and multiply-adds for one image (C, H, W)."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *image_shape))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def cost_of_ours(clf):
    """The same, with the multiply-adds that the engine needs."""
    parameters = sum(p.numel() for p in clf.network_.parameters())
    return {"parameters": parameters, "multiply_adds": sum(multiply_adds(clf).values())}


# ---- how exact ours is ----


def batches(make, n, size=250):
    """`make(number, seed)` of a few images at a time, n in all."""
    for seed, start in enumerate(range(0, n, size)):
        yield make(min(size, n - start), seed + 1)


def exact_on(clf, plan):
    """By kind of image: noise and generated cells; real ones, where there are, by a model fitted to them."""

    def noise(n, seed):
        return np.random.default_rng(seed).integers(0, 256, (n, plan.size, plan.size), dtype=np.uint8)

    def generated(n, seed):
        return cells(n, plan.size, seed)[0]

    size, found = f"{plan.size}×{plan.size}", {}
    found[f"uniform noise, {size}"] = exactness(clf, batches(noise, plan.exact_images))
    found[f"generated cells, {size}"] = exactness(clf, batches(generated, plan.exact_images))
    if plan.exact_real_images and not (data_sets.DATA / "pbc5").is_dir():
        left_out("real images", f"there is no {data_sets.DATA / 'pbc5'}")
    elif plan.exact_real_images:
        images, target, _ = data_sets.load("pbc5")
        some = np.random.default_rng(0).permutation(len(images))[: plan.exact_real_images]
        clf = fitted(images[some], target[some], MAIN, max_epochs=5)
        found["stained white blood cells, 64×64 RGB"] = exactness(clf, [images[some]])
    return {"sets": found}


# ---- all of it ----

SECTIONS = ("cost", "calibration", "throughput", "latency", "profile", "accuracy")


def measure(plan, only, names, all_threads):
    """The sections of `only`, each written as soon as it is done; settings come from the file."""
    images, target = cells(plan.n_images, plan.size)
    clf = fitted(images, target, plan.k)

    def save(key, **found):
        record(RESULTS, key, found | {"machine": environment()})
        print(f"{key} done", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        peers = open_peers(names, images, 1, folder)
        by_k = {f"tiles/{label(share)}": predicting_with(clf, predict_k=share) for share in SHARES}
        if "cost" in only:
            models = {name: cost_of_ours(one) for name, one in by_k.items()}
            shape = (1, plan.size, plan.size)
            # Without the softmax and the scaling, in which nothing is multiplied with weights.
            save("cost", models=models | {n: cost(peer.network.network, shape) for n, peer in peers.items()})
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            ours = {name: predicting_with(one, n_jobs=threads) for name, one in by_k.items()}
            for peer in peers.values():
                peer.threads = threads
            if "calibration" in only:
                calibrate_all(peers, plan)
            settings = chosen_settings(recorded(RESULTS), peers)
            if "throughput" in only:
                found = throughput(ours, peers, images, plan, settings)
                save(f"throughput/{threads}", contestants=found)
            if "latency" in only:
                main = {MAIN_KEY: ours[MAIN_KEY]}
                save(f"latency/{threads}", calls=latency(main, peers, images, plan, settings))
        if "profile" in only:
            some = images[: plan.profile_images]
            save("profile", models={MAIN_KEY: profile(clf, some, plan.profile_rounds)})
        if "accuracy" in only:
            save("accuracy", **exact_on(clf, plan))


def measure_on_gpu(plan, names, threads):
    if not torch.cuda.is_available():
        left_out("cuda", "there is no CUDA device here")
        return
    images, target = cells(plan.n_images, plan.size)
    peers = {name: Peer(name, images, threads) for name in names if not missing(NEEDS.get(name, ()))}
    record(RESULTS, "cuda", on_gpu(images, target, peers, plan) | {"machine": environment()})


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=names_of(SECTIONS), default=SECTIONS, help="sections, by commas")
    parser.add_argument("--peers", type=names_of(BUILDERS), default=DEFAULT_PEERS)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="beside one; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few small images: a trial, no measurement")
    parser.add_argument("--figure", action="store_true", help="measure nothing, draw")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    if options.figure:
        figure(recorded(RESULTS), recorded(accuracy.RESULTS), FIGURE)
        return
    if options.device == "cuda" and not options.tables:
        measure_on_gpu(plan, options.peers, options.threads)
    elif not options.tables:
        measure(plan, options.only, options.peers, options.threads)
    put_into(README, "efficiency", tables(recorded(RESULTS)))


if __name__ == "__main__":
    main()
