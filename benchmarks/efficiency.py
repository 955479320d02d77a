"""What does a prediction cost? Ours, and ResNet50 and MobileNetV2 in the runtimes that suit them best.

    python benchmarks/efficiency.py                   # all of it, about 15 minutes on an idle machine
    python benchmarks/efficiency.py --only throughput,latency   # these anew, at the settings found before
    python benchmarks/efficiency.py --device cuda     # on a GPU instead, where there is one
    python benchmarks/efficiency.py --quick           # a trial with few small images
    python benchmarks/efficiency.py --tables          # only rewrite the tables of README.md

Ours is asked as a user asks, `predict_proba` of an array of uint8 images, validation and scaling included.
The peers get batches of float32 that are scaled already and lie in memory, which favours them. Every peer in
every runtime is first tried at several batch sizes and streams; those chosen, and ours, are then measured in
turns, in an order drawn anew in every round. Runtimes (extra `benchmarks`) that are not installed are left
out; without the compiled engine nothing is measured. Sections are written to efficiency.json as they are
done.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import data_sets
import joblib
import numpy as np
import torch
from accuracy import names_of
from efficiency_tables import fastest, tables
from gpu import on_gpu
from memory_use import in_child
from ours import OURS, cells, exactness, fitted, multiply_adds, one_by_one, predicting, profile
from report import put_into, record, recorded
from runtimes import BUILDERS, NEEDS, RUNTIMES, Peer, environment, left_out, missing, open_peers
from timing import in_turns, rate
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "efficiency.json", HERE / "README.md"

LONGEST = 3.0  # seconds for a unit of work, beyond which no larger batch is tried


class Plan(NamedTuple):
    """How much is measured."""

    size: int = 135
    k: int = 2146
    n_images: int = 512
    batches: tuple = (1, 4, 8, 16, 32, 64)
    compiled_batches: tuple = (1, 16)  # each is compiled by itself, half a minute or more
    seconds: float = 1.0
    rounds: int = 7
    calls: int = 1400
    peer_calls: int = 350
    memory_images: int = 2000
    profile_images: int = 256
    profile_rounds: int = 21
    exact_images: int = 5000  # of noise, and of cells
    exact_real_images: int = 2000


QUICK = Plan(32, 120, 16, (1, 2), (1,), 0.02, 2, 20, 10, 16, 8, 2, 20, 0)


# ---- time ----


def calibrate(peer, runtime, plan):
    """Throughput at every setting, until a unit takes too long."""
    found = []
    batches = plan.compiled_batches if runtime.compiles else plan.batches
    for streams in (n for n in runtime.streams if n <= peer.threads):
        for batch in batches:
            unit = runtime.open(peer, batch, streams)
            unit()
            start = time.perf_counter()
            speed = rate(unit, plan.seconds / 2)
            found.append({"batch": batch, "streams": streams, "images_per_second": speed})
            if time.perf_counter() - start > LONGEST:
                break
    return found


def best_setting(found):
    """Batch and streams with the highest throughput."""
    best = max(found, key=lambda setting: setting["images_per_second"])
    return {"batch": best["batch"], "streams": best["streams"]}


def calibrate_all(peers, plan):
    for peer in peers.values():
        for name, runtime in RUNTIMES.items():
            key = f"{peer.name}/{name}"
            if lacking := missing(runtime.needs):
                left_out(key, f"not installed: {', '.join(lacking)} (extra `benchmarks`)")
                continue
            try:
                found = calibrate(peer, runtime, plan)
            except Exception as error:  # no compiler, an operation it does not know: the others go on
                left_out(key, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
                continue
            record(RESULTS, f"calibration/{key}", {"settings": found, "machine": environment()})
            best = best_setting(found)
            speed = max(setting["images_per_second"] for setting in found)
            print(f"{key}: {speed:.0f} images/s at {best}", flush=True)


def chosen_settings(results, peers):
    """(peer, runtime) -> its best setting, of those that were calibrated."""
    keys = (key.split("/")[1:] for key in results if key.startswith("calibration/"))
    return {
        (peer, name): best_setting(results[f"calibration/{peer}/{name}"]["settings"])
        for peer, name in keys
        if peer in peers and not missing(RUNTIMES[name].needs)
    }


def throughput(ours, peers, images, plan, settings):
    """All in turns; each warms up with one unit every time."""
    units = {name: predicting(clf, images) for name, clf in ours.items()}
    about = {name: {"model": name, "runtime": "predict_proba", "precision": OURS[name][1]} for name in ours}
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


# ---- parameters, multiply-adds, memory ----


def cost(network, image_shape):
    """Parameters, and multiply-adds for one image."""
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *image_shape))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def cost_of_ours(clf, images):
    """The same, with the multiply-adds that the engine needs for these images."""
    parameters = sum(p.numel() for p in clf.network_.parameters())
    return {"parameters": parameters, "multiply_adds": round(sum(multiply_adds(clf, images).values()))}


def memory(ours, peers, images, plan, results, folder):
    """Of ours on many images from a memory map; of each peer where it is fastest in fp32, and of all."""
    np.save(folder / "images.npy", images[np.arange(plan.memory_images) % len(images)])
    common = {"threads": torch.get_num_threads(), "images": str(folder / "images.npy")}
    found = {}
    for name, clf in ours.items():
        joblib.dump(clf, folder / "clf.joblib")
        found[name] = in_child(work="predict", model=str(folder / "clf.joblib"), **common)
    for name, peer in peers.items():
        contestants = results["throughput"]["contestants"]
        for key in {fastest(contestants, name, ("fp32",)), fastest(contestants, name)}:
            if key is None or contestants[key]["runtime"] == "compile":
                continue  # its memory would be the compiler's
            run = contestants[key]
            setting = {"batch": run["batch"], "streams": run["streams"]}
            spec = {"peer": name, "runtime": run["runtime"], "setting": setting, "onnx": peer.onnx}
            found[key] = in_child(work="peer", **spec, **common)
    return found


# ---- how exact ours is ----


def batches(make, n, size=250):
    """`make(number, seed)` of a few images at a time, n in all."""
    for seed, start in enumerate(range(0, n, size)):
        yield make(min(size, n - start), seed + 1)


def accuracy(clf, plan):
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
        clf = fitted(images[some], target[some], round(0.1 * 64**2), max_epochs=5)
        found["stained white blood cells, 64×64 RGB"] = exactness(clf, [images[some]])
    return {"sets": found}


# ---- all of it ----

SECTIONS = ("cost", "calibration", "throughput", "latency", "memory", "profile", "accuracy")


def measure(plan, only, names, threads):
    """The sections of `only`, each written as soon as it is done; settings come from the file."""
    torch.set_num_threads(threads)
    images, target = cells(plan.n_images, plan.size)
    ours = {name: fitted(images, target, plan.k, **params) for name, (params, _) in OURS.items()}
    with tempfile.TemporaryDirectory() as folder:
        peers = open_peers(names, images, threads, folder)
        if "calibration" in only:
            calibrate_all(peers, plan)
        settings = chosen_settings(recorded(RESULTS), peers)

        def save(key, **found):
            # `fitted` has seen to it that there is an engine.
            record(RESULTS, key, found | {"engine": True, "machine": environment()})
            print(f"{key} done", flush=True)

        if "cost" in only:
            some, shape = images[: plan.profile_images], (1, plan.size, plan.size)
            models = {name: cost_of_ours(clf, some) for name, clf in ours.items()}
            save("cost", models=models | {name: cost(peer.network, shape) for name, peer in peers.items()})
        if "throughput" in only:
            save("throughput", contestants=throughput(ours, peers, images, plan, settings))
        if "latency" in only:
            save("latency", calls=latency(ours, peers, images, plan, settings))
        if "memory" in only and "throughput" in recorded(RESULTS):
            save("memory", growth=memory(ours, peers, images, plan, recorded(RESULTS), Path(folder)))
        if "profile" in only:
            some, n = images[: plan.profile_images], plan.profile_rounds
            save("profile", models={name: profile(clf, some, n) for name, clf in ours.items()})
        if "accuracy" in only:
            save("accuracy", **accuracy(next(iter(ours.values())), plan))


def measure_on_gpu(plan, names, threads):
    if not torch.cuda.is_available():
        left_out("cuda", "there is no CUDA device here")
        return
    images, target = cells(plan.n_images, plan.size)
    peers = {name: Peer(name, images, threads) for name in names if not missing(NEEDS[name])}
    record(RESULTS, "cuda", on_gpu(images, target, peers, plan) | {"machine": environment()})


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=names_of(SECTIONS), default=SECTIONS, help="sections, by commas")
    parser.add_argument("--peers", type=names_of(BUILDERS), default=["mobilenetv2", "resnet50"])
    parser.add_argument("--threads", type=int, default=2, help="for ours and for the peers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few small images: a trial, no measurement")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    if options.device == "cuda" and not options.tables:
        measure_on_gpu(plan, options.peers, options.threads)
    elif not options.tables:
        measure(plan, options.only, options.peers, options.threads)
    put_into(README, "efficiency", tables(recorded(RESULTS)))


if __name__ == "__main__":
    main()
