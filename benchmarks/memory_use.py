"""How much memory a process allocates: predictions and fits, each in a process of its own.

Only anonymous memory counts (RssAnon): mapped files, as the images and the libraries, do not.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import torch
from ours import fitted


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


CHILD_WORK = {"predict": child_predicts, "fit": child_fits}


def child(spec):
    """In a fresh process: idle with everything imported, then the work; the model counts as growth."""
    torch.set_num_threads(spec["threads"])
    extra = {}
    with peak_memory() as found:
        CHILD_WORK[spec["work"]](spec, extra)
    print(json.dumps(found | extra))


def in_child(**spec):
    """Growth of memory, and seconds where they are taken, of work in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(spec)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{spec} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
