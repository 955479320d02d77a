"""What a fitted model and a fit survive: many callers, kill -9, a full disk, a long run, bad input.

    python benchmarks/faults.py                    # all of it, about half an hour on two cores
    python benchmarks/faults.py kill soak          # these parts
    python benchmarks/faults.py --quick            # a trial with small numbers, whose results go nowhere
    python benchmarks/faults.py --tables           # only rewrite the table of README.md

Each part writes its result to faults.json as it comes. "full_disk" mounts a tmpfs, which takes root.
"""

import argparse
import contextlib
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
from memory_use import anonymous_memory
from report import machine, put_into, record, recorded
from skorch.callbacks import Callback

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.training.checkpoint import Checkpoint

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "faults.json", HERE / "README.md"


class Plan(NamedTuple):
    """How much is done."""

    threads: int = 8
    calls: int = 1000
    processes: int = 100
    kills: int = 30
    epochs: int = 40
    images: int = 1_000_000
    cases: int = 1400  # of each test of bad input


QUICK = Plan(4, 10, 4, 2, 6, 20_000, 10)


def cells(n=96, size=24):
    made = make_cells(n, modality="brightfield", n_classes=3, image_size=size, random_state=0)
    return made.images, made.target


# ---- callers ----


def answer(clf, images):
    return clf.predict_proba(images), clf.transform(images), clf.attention_maps(images).tiles


def same(found, expected):
    return all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def callers(plan):
    """How many calls gave the same bits as the first, by kind of caller."""
    images, target = cells()
    clf = SparseAttnClassifier(max_epochs=2, random_state=0).fit(images, target)
    images = images[:8]
    expected = answer(clf, images)
    found = {}

    def calls(_):
        return sum(same(answer(clf, images), expected) for _ in range(plan.calls))

    start = time.perf_counter()
    with ThreadPoolExecutor(plan.threads) as pool:
        right = sum(pool.map(calls, range(plan.threads)))
    found[f"{plan.threads} threads"] = {"right": right, "calls": plan.threads * plan.calls}
    found[f"{plan.threads} threads"]["seconds"] = time.perf_counter() - start
    for backend in ("threading", "loky"):
        parallel = joblib.Parallel(2, backend=backend, timeout=300)
        answers = parallel(joblib.delayed(answer)(clf, images) for _ in range(plan.processes))
        right = sum(same(one, expected) for one in answers)
        found[f"joblib, {backend}"] = {"right": right, "calls": plan.processes}
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            pending = [pool.apply_async(answer, (clf, images)) for _ in range(plan.processes)]
            right = sum(same(one.get(timeout=300), expected) for one in pending)
        found[method] = {"right": right, "calls": plan.processes}
    return found


# ---- kill -9 ----


def in_fork(work, *arguments):
    """Start work in a forked process, which writes nothing on its way out."""
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def fit_and_save(folder, result, epochs):
    """Fit, and save the estimator with the last state of its training."""
    images, target = cells()
    remove = Checkpoint.remove

    def keep(self):
        (result.with_suffix(".checkpoint")).write_bytes(self.path.read_bytes())
        remove(self)

    clf = SparseAttnClassifier(
        max_epochs=epochs, early_stopping=True, patience=epochs, random_state=0, checkpoint_dir=folder
    )
    Checkpoint.remove = keep
    try:
        clf.fit(images, target, sample_weight=np.linspace(1, 2, len(target)))
    finally:
        Checkpoint.remove = remove
    joblib.dump(clf, result)


def state_of(result):
    """All that a fit left, as leaves of a tree; times aside."""
    content = result.with_suffix(".checkpoint").read_bytes()[16:]
    (result.parent / "content").write_bytes(content)
    state = torch.load(result.parent / "content", weights_only=True)
    for row in state["history"]:
        row.pop("dur")
    clf = joblib.load(result)
    history = {name: list(column) for name, column in clf.history_.items() if name != "duration"}
    return torch.utils._pytree.tree_flatten([state, dict(clf.network_.state_dict()), history])


def same_state(one, other):
    return one[1] == other[1] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one[0], other[0], strict=True)
    )


def whole_epochs(folder):
    for path in folder.glob("*.checkpoint"):
        content = path.read_bytes()[16:]
        (folder / "content").write_bytes(content)
        return len(torch.load(folder / "content", weights_only=True)["history"])
    return 0


def kill(plan):
    """Kill fits at random moments; take each up; compare with one that was left alone."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.set_num_threads(1)  # threads do not outlive a fork
        fit_and_save(
            folder / "first", folder / "first.joblib", 1
        )  # what a first fit imports, it imports here
        start = time.perf_counter()
        _, status = os.waitpid(
            in_fork(fit_and_save, folder / "alone", folder / "alone.joblib", plan.epochs), 0
        )
        assert status == 0
        seconds = time.perf_counter() - start
        expected = state_of(folder / "alone.joblib")
        right, done = 0, []
        for i in range(plan.kills):
            place, result = folder / f"fit{i}", folder / f"{i}.joblib"
            child = in_fork(fit_and_save, place, result, plan.epochs)
            time.sleep(float(rng.uniform(0, seconds)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done.append(whole_epochs(place))
            _, status = os.waitpid(in_fork(fit_and_save, place, result, plan.epochs), 0)
            right += status == 0 and same_state(state_of(result), expected)
            left = [path.name for path in place.iterdir() if path.name != "content"]
            assert left == [], left
            print(f"kill {i + 1}: after {done[-1]} epochs; {right} right", flush=True)
    return {"kills": plan.kills, "right": right, "epochs": plan.epochs, "done": done, "seconds": seconds}


# ---- a full disk ----


@contextlib.contextmanager
def small_disk(kilobytes):
    """A tmpfs of its own; unmounted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        subprocess.run(mount, check=True, capture_output=True, text=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def fill(folder, free):
    """Fill a disk but for some bytes."""
    block = b"\1" * 4096
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(block)
    with open(folder / "filler", "r+b") as file:
        file.truncate(max(0, (folder / "filler").stat().st_size - free))


class Stopped(BaseException):
    """A fit that ends as if it were killed."""


class StopAt(Callback):
    """End a fit in the middle of an epoch; whichever, it is the same parameter."""

    epoch_ = None

    def on_batch_end(self, net, training=False, **kwargs):
        """Stop there."""
        if len(net.history) == self.epoch_:
            raise Stopped


def writers():
    """Each way to write a file, by name: a function of its path."""
    images, target = cells(48, 16)
    clf = SparseAttnClassifier(max_epochs=3, random_state=0).fit(images, target)
    found = {}
    with contextlib.suppress(ImportError):
        from sklearn_sparseattn import save_model

        found["save_model"] = lambda path: save_model(clf, path)
    with contextlib.suppress(ImportError):
        from sklearn_sparseattn import export_onnx

        found["export_onnx"] = lambda path: export_onnx(clf, path)

    def checkpoint(path, stop_at=None):
        stop = StopAt()
        stop.epoch_ = stop_at
        params = {"max_epochs": 3, "random_state": 0, "checkpoint_dir": path.parent, "callbacks": [stop]}
        SparseAttnClassifier(**params).fit(images, target)

    return {**found, "checkpoint": checkpoint}


def first_file(name, write, folder):
    """Write a file while there is room; a checkpoint as a fit leaves it that is killed."""
    if name != "checkpoint":
        write(folder / "model")
        return folder / "model"
    with contextlib.suppress(Stopped):
        write(folder / "model", stop_at=3)
    [path] = folder.glob("*.checkpoint")
    return path


def full_disk(plan):
    """Whether an error says so, and the file that was there is as it was, by free space in bytes."""
    found = {}
    for name, write in writers().items():
        outcomes = []
        with small_disk(4096) as folder:
            path = first_file(name, write, folder)
            content = path.read_bytes()
            for share in (0, 0.1, 0.5, 0.9):
                fill(folder, int(share * len(content)) // 4096 * 4096)
                try:
                    write(path)
                    said = False
                except OSError as error:
                    said = error.errno == errno.ENOSPC and "No space left" in str(error)
                others = {each.name for each in folder.iterdir()} - {"filler", path.name}
                outcomes.append(said and path.read_bytes() == content and not others)
                (folder / "filler").unlink()
            write(path)  # with room it works again
        found[name] = {"right": sum(outcomes), "cases": len(outcomes)}
        print(name, found[name], flush=True)
    return found


# ---- a long run ----


def soak(plan):
    """Memory and speed while very many images are predicted, in calls of 200."""
    images, target = cells(200, 32)
    clf = SparseAttnClassifier(max_epochs=2, random_state=0).fit(images, target)
    expected = clf.predict_proba(images)
    memory, rates, n_parts = [], [], 50
    for _ in range(n_parts):
        start = time.process_time()
        for _ in range(plan.images // n_parts // len(images)):
            right = np.array_equal(clf.predict_proba(images), expected)
            assert right
        rates.append(plan.images / n_parts / (time.process_time() - start))
        memory.append(anonymous_memory())
    tenth = n_parts // 10
    return {
        "images": plan.images,
        "growth_mb": max(memory[tenth:]) - memory[tenth - 1],
        # Of processor time, which other work on the machine does not change much.
        "per_second": float(np.median(rates)),
        "last_half_to_first": float(np.median(rates[n_parts // 2 :]) / np.median(rates[: n_parts // 2])),
    }


# ---- bad input ----


def bad_input(plan):
    """Run tests/test_bad_input.py with many more cases; count those that hypothesis counted."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_bad_input.py",
        "-q",
        "-n",
        "0",
        "--timeout",
        "7200",
    ]
    command += ["-p", "no:cacheprovider", "--hypothesis-show-statistics", "--import-mode=importlib"]
    environment = os.environ | {"BAD_INPUT_CASES": str(plan.cases)}
    run = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        print(run.stdout[-5000:], flush=True)
    cases = sum(map(int, re.findall(r"(\d+) passing, ", run.stdout)))
    passed, failed = (
        sum(map(int, re.findall(rf"(\d+) {word}", run.stdout))) for word in ("passed", "failed")
    )
    return {"cases": cases, "tests": passed + failed, "failed": failed}


# ---- all of it ----

PARTS = {
    "callers": callers,
    "kill": kill,
    "full_disk": full_disk,
    "soak": soak,
    "bad_input": bad_input,
}


def table(results):
    lines = ["| what | measured | bar |", "|---|---|---|"]
    for name, found in results.get("callers", {}).items():
        lines.append(f"| {name} | {found['right']:,} of {found['calls']:,} calls gave the same bits | all |")
    if "kill" in results:
        found = results["kill"]
        lines.append(
            f"| kill -9 at a random moment of a fit of {found['epochs']} epochs, taken up (after "
            f"{min(found['done'])} to {max(found['done'])} of them) | {found['right']} of {found['kills']} "
            "ended with the same bits | all |"
        )
    for name, found in results.get("full_disk", {}).items():
        lines.append(
            f"| full disk, {name} | {found['right']} of {found['cases']} times it said so and left the file "
            "that was there | all |"
        )
    if "soak" in results:
        found = results["soak"]
        lines.append(
            f"| {found['images']:,} images of 32×32 predicted | {found['growth_mb']:+.1f} MB after the first "
            f"tenth; speed of the second half {found['last_half_to_first']:.2f} of the first | 20 MB, 1 |"
        )
    if "bad_input" in results:
        found = results["bad_input"]
        lines.append(
            f"| bad input | {found['cases']:,} cases, {found['failed']} of {found['tests']} tests failed "
            "| 10,000, none |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all if none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", action="store_true")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else Plan()
    parts = [] if arguments.tables else arguments.parts or list(PARTS)
    if len(parts) > 1:  # each in a process of its own, as it forks and counts memory
        for name in parts:
            quick = ["--quick"] if arguments.quick else []
            subprocess.run([sys.executable, __file__, name, *quick], check=True)
        return
    for name in parts:
        found = PARTS[name](plan)
        print(name, found, flush=True)
        if not arguments.quick:
            record(RESULTS, name, found)
            record(RESULTS, "machine", machine())
    if not arguments.quick:
        put_into(README, "faults", table(recorded(RESULTS)))


if __name__ == "__main__":
    main()
