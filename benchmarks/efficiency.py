"""What does a prediction cost? Ours, and ResNet50 and MobileNetV2 in the runtimes that suit them best.

    python benchmarks/efficiency.py                   # all of it, about 12 minutes on an idle machine
    python benchmarks/efficiency.py --only throughput,latency   # these anew, at the settings found before
    python benchmarks/efficiency.py --device cuda     # on a GPU instead, where there is one
    python benchmarks/efficiency.py --quick           # a trial with few small images
    python benchmarks/efficiency.py --tables          # only rewrite the tables of README.md

Ours is asked as a user asks, `predict_proba` of an array of uint8 images, validation and scaling included.
The peers get batches of float32 that are scaled already and lie in memory, which favours them. Every peer in
every runtime is first tried at several batch sizes and streams; those chosen, and ours, are then measured in
turns, in an order drawn anew in every round. Runtimes (extra `benchmarks`) that are not installed are left
out. Sections are written to efficiency.json as they are done.
"""

import argparse
import contextlib
import copy
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
from peers import Logits, lenet, mobilenetv2, resnet50
from report import machine, put_into, record, recorded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import PixelScale, validate_images

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "efficiency.json", HERE / "README.md"

# name -> parameters of SparseAttnClassifier that differ from the defaults, precision of its predictions.
OURS = {"sparseattn": ({}, "fp32")}
BUILDERS = {"mobilenetv2": mobilenetv2, "resnet50": resnet50, "lenet": lenet}
NEEDS = {"mobilenetv2": ("transformers",), "resnet50": ("transformers",), "lenet": ()}
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


QUICK = Plan(32, 120, 16, (1, 2), (1,), 0.02, 2, 20, 10, 16)


# ---- models ----


def cells(n, size, seed=0):
    """Images in uint8, as a camera gives them, and classes."""
    bunch = make_cells(n, image_size=size, random_state=seed)
    low, high = bunch.images.min(), bunch.images.max()
    return np.round(255 * (bunch.images - low) / (high - low)).astype(np.uint8), bunch.target


def fitted(images, target, k, **params):
    """Ours with k held fixed, after one epoch; it predicts with as many threads as PyTorch has."""
    recipe = {"k_init": k, "k_min": k, "k_max": k, "max_epochs": 1, "random_state": 0}
    recipe["n_jobs"] = torch.get_num_threads()
    return SparseAttnClassifier(**recipe | params).fit(images, target)


class Peer:
    """A network in evaluation mode, its ONNX file and its batches."""

    def __init__(self, name, images, threads, onnx=None):
        self.name, self.threads, self.onnx = name, threads, onnx
        self.images = torch.from_numpy(images[:, None].astype(np.float32) / 255)

    @cached_property
    def network(self):
        """Channels last; batch norms set to these images: fresh ones let values fade to denormals."""
        network = Logits(BUILDERS[self.name], (*self.images.shape[2:], 1), 3)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            network.train()(self.images[:16])
        return network.eval()

    @cached_property
    def compiled(self):
        """By inductor; frozen, so that batch norms are folded and weights packed."""
        return torch.compile(self.network, dynamic=False, options={"freezing": True})

    def batch(self, n):
        """Some images, again from the first where there are fewer."""
        return self.images[torch.arange(n) % len(self.images)].contiguous()

    def export(self, folder):
        """Write the ONNX file, for any batch size."""
        self.onnx = str(Path(folder) / f"{self.name}.onnx")
        names = {"input_names": ["images"], "output_names": ["logits"]}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter calls itself deprecated; the new one fuses less
            axes = {"images": {0: "n"}, "logits": {0: "n"}}
            torch.onnx.export(
                self.network, (self.batch(2),), self.onnx, dynamic_axes=axes, dynamo=False, **names
            )


# ---- runtimes: (peer, batch, streams) -> a unit of work that returns how many images it did ----


def eager(peer, batch, streams, channels_last=True, bfloat16=False, compiled=False):
    images = peer.batch(batch)
    network = peer.compiled if compiled else peer.network
    if not channels_last:
        network = copy.deepcopy(peer.network.network).to(memory_format=torch.contiguous_format)

    def unit():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            network(images)
        return batch

    return unit


def onnx_runtime(peer, batch, streams):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = peer.threads // streams, 1
    sessions = [
        onnxruntime.InferenceSession(peer.onnx, options, providers=["CPUExecutionProvider"])
        for _ in range(streams)
    ]
    feed = {"images": peer.batch(batch).numpy()}
    n_each = max(1, 32 // batch) if streams > 1 else 1
    pool = ThreadPoolExecutor(streams)

    def work(session):
        for _ in range(n_each):
            session.run(None, feed)

    def unit():
        list(pool.map(work, sessions)) if streams > 1 else work(sessions[0])
        return streams * n_each * batch

    return unit


def openvino(peer, batch, streams, precision="f32"):
    import openvino as ov

    core = ov.Core()
    model = core.read_model(peer.onnx)
    model.reshape([batch, *peer.images.shape[1:]])
    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # by itself it takes bf16 where the processor has it
        "PERFORMANCE_HINT": "THROUGHPUT" if streams > 1 else "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": peer.threads,
        "ENABLE_HYPER_THREADING": True,
    }
    compiled = core.compile_model(model, "CPU", settings)
    images = ov.Tensor(peer.batch(batch).numpy(), shared_memory=True)
    if streams == 1:
        request = compiled.create_infer_request()
        request.set_input_tensor(images)

        def one():
            request.infer()
            return batch

        return one
    queue, n_batches = ov.AsyncInferQueue(compiled, streams), streams * max(1, 32 // batch)
    for request in queue:
        request.set_input_tensor(images)

    def unit():
        for _ in range(n_batches):
            queue.start_async()
        queue.wait_all()
        return n_batches * batch

    return unit


class Runtime(NamedTuple):
    """How a peer is run."""

    open: object
    precision: str = "fp32"
    needs: tuple = ()
    streams: tuple = (1,)
    compiles: bool = False


RUNTIMES = {
    "eager": Runtime(partial(eager, channels_last=False)),
    "channels_last": Runtime(eager),
    "channels_last_bf16": Runtime(partial(eager, bfloat16=True), "bf16"),
    "compile": Runtime(partial(eager, compiled=True), compiles=True),
    "onnxruntime": Runtime(onnx_runtime, "fp32", ("onnx", "onnxruntime"), (1, 2)),
    "openvino": Runtime(openvino, "fp32", ("onnx", "openvino"), (1, 2)),
    "openvino_bf16": Runtime(partial(openvino, precision="bf16"), "bf16", ("onnx", "openvino"), (1, 2)),
}


def missing(names):
    return [name for name in names if util.find_spec(name) is None]


def left_out(what, reason):
    print(f"{what} left out: {reason}", flush=True)


def open_peers(names, images, threads, folder):
    """Build and export those that can be; the others are said to be left out."""
    peers = {}
    for name in names:
        if lacking := missing(NEEDS[name]):
            left_out(name, f"not installed: {', '.join(lacking)} (extra `benchmarks`)")
            continue
        peers[name] = Peer(name, images, threads)
        if not missing(("onnx",)):
            peers[name].export(folder)
    return peers


# ---- measuring ----


def rate(unit, seconds):
    """Images a second, of whole units."""
    n, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not n:
        n += unit()
    return n / elapsed


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


def in_turns(contestants, n_rounds, measure, seed=0):
    """`measure(contestant)` of each in every round, in an order drawn anew; lists by name."""
    rng, found = np.random.default_rng(seed), {name: [] for name in contestants}
    for _ in range(n_rounds):
        for i in rng.permutation(len(contestants)):
            name = list(contestants)[i]
            time.sleep(0.05)  # threads of the one before that still spin
            found[name].append(measure(contestants[name]))
    return found


def predicting(clf, images):
    def unit():
        clf.predict_proba(images)
        return len(images)

    return unit


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


def one_by_one(clf, images):
    """Calls with a single image, another one every time."""
    turn = itertools.cycle(range(len(images)))

    def call():
        i = next(turn)
        clf.predict_proba(images[i : i + 1])
        return 1

    return call


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


def anonymous_memory():
    """RssAnon of this process in MB: what it has allocated, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextlib.contextmanager
def peak_memory():
    """A dict that holds, at the end, by how many MB the memory rose at most."""
    found, done, start = {}, threading.Event(), anonymous_memory()
    found["growth_mb"] = 0.0

    def watch():
        while not done.wait(0.005):
            found["growth_mb"] = max(found["growth_mb"], anonymous_memory() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    found["growth_mb"] = max(found["growth_mb"], anonymous_memory() - start)


def child_predicts(spec, found):
    clf, images = joblib.load(spec["model"]), np.load(spec["images"], mmap_mode="r")
    images = images[: spec.get("n", len(images))]
    start = time.perf_counter()
    clf.predict_proba(images)
    found["seconds"] = time.perf_counter() - start


def child_fits(spec, found):
    images, target = np.load(spec["images"], mmap_mode="r"), np.load(spec["target"])
    fitted(images, target, spec["k"], batch_size=spec["batch_size"])


def child_runs_peer(spec, found):
    images = np.load(spec["images"], mmap_mode="r")[:16]
    peer = Peer(spec["peer"], images, spec["threads"], spec["onnx"])
    unit = RUNTIMES[spec["runtime"]].open(peer, **spec["setting"])
    for _ in range(5):
        unit()


CHILD_WORK = {"predict": child_predicts, "fit": child_fits, "peer": child_runs_peer}


def child(spec):
    """In a fresh process: idle with everything imported, then the work; the model counts as growth."""
    torch.set_num_threads(spec["threads"])
    if spec["work"] == "peer" and "transformers" in NEEDS[spec["peer"]]:
        from transformers import MobileNetV2ForImageClassification, ResNetForImageClassification  # noqa: F401
    extra = {}
    with peak_memory() as found:
        CHILD_WORK[spec["work"]](spec, extra)
    print(json.dumps(found | extra))


def in_child(**spec):
    """Growth of memory, and seconds where they are taken, of work in a process of its own."""
    command = [sys.executable, str(HERE / "efficiency.py"), "--child", json.dumps(spec)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{spec} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


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


# ---- where our time goes ----


def profile(clf, images, seconds):
    """Microseconds an image in each part, through PyTorch in float32, 16 images at a time, and the ceiling.

    Validation and scaling are timed as `predict_proba` does them. The ceiling is the arithmetic that a
    product of matrices reaches here.
    """
    network = copy.deepcopy(clf.network_).float().eval()
    scale, chunk, taken = PixelScale(clf.data_range_), images[:16], {}

    def part(name, work):
        start = time.perf_counter()
        result = work()
        taken.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def once():
        rows, _ = part("validation", lambda: validate_images(clf, chunk, reset=False))
        batch = part("scaling", lambda: torch.from_numpy(scale.finite(rows.read(slice(None)))))
        scores, z_coarse, maps = part("coarse", lambda: network.coarse.look(batch))
        pixels = part("selection", lambda: network.choose(batch, scores))
        hidden = part("tokens", lambda: network.hidden_tokens(batch, pixels, scores, maps))
        z_fine = part("attention", lambda: network.fine.attend(hidden, network.embedding.out))[0]
        features = torch.cat([network.fine_norm(z_fine), z_coarse], dim=1)
        part("head", lambda: network.fusion(features).softmax(1))
        return len(chunk)

    with torch.inference_mode():
        once()
        taken.clear()
        rate(once, seconds)
        square = torch.rand(1024, 1024)
        products = rate(lambda: (square @ square, 1)[1], seconds)
    micros = {name: 1e6 * float(np.median(s)) / len(chunk) for name, s in taken.items()}
    return {"microseconds": micros, "ceiling_gflops": products * 2 * 1024**3 / 1e9}


# ---- on a GPU ----


def on_gpu(images, target, peers, plan):
    """Images a second by batch size; ours from uint8 arrays, peers from the memory of the GPU."""
    clf = fitted(images, target, plan.k, device="cuda")
    many, found = images[np.arange(2048) % len(images)], {}
    for batch in (64, 256, 2048):
        found.setdefault("sparseattn", {})[batch] = predicting(clf, many[:batch])
    for name, peer in peers.items():
        network = peer.network.cuda()
        for precision in ("fp32", "bf16"):
            for batch in (64, 256, 1024):
                work = gpu_unit(network, peer.batch(batch).cuda(), precision == "bf16")
                found.setdefault(f"{name}/{precision}", {})[batch] = work
    speeds = {}
    for name, units in found.items():
        for unit in units.values():
            unit()
        speeds[name] = {str(batch): rate(unit, plan.seconds) for batch, unit in units.items()}
    return {"speeds": speeds, "gpu": torch.cuda.get_device_name()}


def gpu_unit(network, images, bfloat16):
    def unit():
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            for _ in range(8):  # one wait for eight batches
                network(images)
        torch.cuda.synchronize()
        return 8 * len(images)

    return unit


# ---- tables ----


def speed(run):
    return float(np.median(run["rates"]))


def fastest(contestants, model, precisions=("fp32", "bf16")):
    """Key of a model's fastest contestant in these precisions, None if there is none."""
    keys = [k for k, run in contestants.items() if run["model"] == model and run["precision"] in precisions]
    return max(keys, key=lambda key: speed(contestants[key]), default=None)


def ratio(ours, peer):
    """Ours to the peer: median of the rounds' ratios, the smallest and the greatest."""
    ratios = np.divide(ours, peer)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def throughput_table(results, ours):
    """Every contestant, slowest first; the ratio is that of `ours` to it."""
    contestants = results["throughput"]["contestants"]
    calls = results.get("latency", {}).get("calls", {})
    lines = [
        "",
        f"| model | runtime | precision | batch × streams | images/s | `{ours}` is faster by "
        "| one image, p50 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, run in sorted(contestants.items(), key=lambda item: speed(item[1])):
        times, low, high = ratio(contestants[ours]["rates"], run["rates"])
        setting = f"{run['batch']} × {run['streams']}" if "batch" in run else "its own"
        quantiles = [f"{1e3 * calls[key][q]:.2f} ms" if key in calls else "-" for q in ("p50", "p99")]
        lines.append(
            f"| `{run['model']}` | {run['runtime']} | {run['precision']} | {setting} | {speed(run):,.0f} "
            f"| {times:.2f} × ({low:.2f}-{high:.2f}) | {' | '.join(quantiles)} |"
        )
    return lines


def summary(results, ours):
    """Against the fastest of each peer: in float32, in any precision, and with one image at a time."""
    contestants = results["throughput"]["contestants"]
    calls, lines = results.get("latency", {}).get("calls", {}), []
    for model in sorted({run["model"] for run in contestants.values()} - set(OURS)):
        said = []
        for what, precisions in (("fp32", ("fp32",)), ("any precision", ("fp32", "bf16"))):
            key = fastest(contestants, model, precisions)
            if key is not None:
                times, _, _ = ratio(contestants[ours]["rates"], contestants[key]["rates"])
                said.append(f"{times:.1f} × the fastest `{model}` in {what} ({contestants[key]['runtime']})")
        quickest = min((key for key in calls if key.startswith(f"{model}/")), default=None, key=p50_of(calls))
        if quickest is not None and ours in calls:
            share = calls[ours]["p50"] / calls[quickest]["p50"]
            said.append(f"one image at a time in {share:.2f} of its least p50 ({quickest.split('/')[1]})")
        lines += ["", f"`{ours}`: {'; '.join(said)}."]
    return lines


def p50_of(calls):
    return lambda key: calls[key]["p50"]


def cost_table(results):
    lines = ["", "| model | parameters | multiply-adds | memory |", "|---|---|---|---|"]
    used = results.get("memory", {}).get("growth", {})
    for name, run in results["cost"]["models"].items():
        grown = [
            f"{found['growth_mb']:.0f} MB" + (f" ({key.split('/')[1]})" if "/" in key else "")
            for key, found in used.items()
            if key.split("/")[0] == name
        ]
        macs = f"{run['multiply_adds'] / 1e6:,.1f} M"
        lines.append(f"| `{name}` | {run['parameters']:,} | {macs} | {', '.join(grown) or '-'} |")
    return lines


def profile_lines(results):
    """Shares of the parts, and of the ceiling."""
    lines = []
    for name, run in results["profile"]["models"].items():
        total = sum(run["microseconds"].values())
        parts = ", ".join(f"{part} {us / total:.0%}" for part, us in run["microseconds"].items())
        line = f"`{name}`, part by part through PyTorch: {total:.0f} µs an image; {parts}."
        if "throughput" in results and "cost" in results:
            macs = results["cost"]["models"][name]["multiply_adds"]
            reached = 2e-9 * macs * speed(results["throughput"]["contestants"][name]) / run["ceiling_gflops"]
            line += f" `predict_proba` does {reached:.1%} of the arithmetic of a product of matrices "
            line += f"({run['ceiling_gflops']:.0f} GFLOP/s)."
        lines += ["", line]
    return lines


def gpu_table(results):
    run = results["cuda"]
    lines = ["", f"{run['gpu']}:", "", "| model | batch 64 | best batch |", "|---|---|---|"]
    for name, speeds in run["speeds"].items():
        best = max(speeds, key=speeds.get)
        lines.append(f"| `{name}` | {speeds['64']:,.0f} | {speeds[best]:,.0f} ({best}) |")
    return lines


def tables(results):
    """Markdown from the results, and from nothing else."""
    lines = []
    for ours in OURS:
        if "throughput" in results and ours in results["throughput"]["contestants"]:
            lines += throughput_table(results, ours) + summary(results, ours)
    lines += cost_table(results) if "cost" in results else []
    lines += profile_lines(results) if "profile" in results else []
    lines += gpu_table(results) if "cuda" in results else []
    where = next((run["machine"] for run in results.values()), None)
    if where is None:
        return "Machine: nothing measured yet."
    libraries = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return "\n".join(
        [*lines, "", f"Machine: {where['processor']}, {where['threads']} threads; {libraries}."]
    ).strip()


# ---- all of it ----


def environment():
    """The machine with the versions of what ran."""
    names = ("torch", "onnxruntime", "openvino", "transformers")
    return machine() | {"versions": {n: metadata.version(n) for n in names if not missing((n,))}}


SECTIONS = ("cost", "calibration", "throughput", "latency", "memory", "profile")


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
            record(RESULTS, key, found | {"machine": environment()})
            print(f"{key} done", flush=True)

        if "cost" in only:
            networks = {name: clf.network_ for name, clf in ours.items()}
            networks |= {name: peer.network for name, peer in peers.items()}
            shape = (1, plan.size, plan.size)
            save("cost", models={name: cost(network, shape) for name, network in networks.items()})
        if "throughput" in only:
            save("throughput", contestants=throughput(ours, peers, images, plan, settings))
        if "latency" in only:
            save("latency", calls=latency(ours, peers, images, plan, settings))
        if "memory" in only and "throughput" in recorded(RESULTS):
            save("memory", growth=memory(ours, peers, images, plan, recorded(RESULTS), Path(folder)))
        if "profile" in only:
            save("profile", models={name: profile(clf, images, plan.seconds) for name, clf in ours.items()})


def measure_on_gpu(plan, names, threads):
    if not torch.cuda.is_available():
        left_out("cuda", "there is no CUDA device here")
        return
    images, target = cells(plan.n_images, plan.size)
    peers = {name: Peer(name, images, threads) for name in names if not missing(NEEDS[name])}
    record(RESULTS, "cuda", on_gpu(images, target, peers, plan) | {"machine": environment()})


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
    parser.add_argument("--only", type=names_of(SECTIONS), default=SECTIONS, help="sections, by commas")
    parser.add_argument("--peers", type=names_of(BUILDERS), default=["mobilenetv2", "resnet50"])
    parser.add_argument("--threads", type=int, default=2, help="for ours and for the peers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few small images: a trial, no measurement")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child)
        return
    plan = QUICK if options.quick else Plan()
    if options.device == "cuda" and not options.tables:
        measure_on_gpu(plan, options.peers, options.threads)
    elif not options.tables:
        measure(plan, options.only, options.peers, options.threads)
    put_into(README, "efficiency", tables(recorded(RESULTS)))


if __name__ == "__main__":
    main()
