"""What the benchmarks share: the machine, results in a file, intervals, tables put into a document."""

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import sklearn
import torch
from scipy import stats

# Flags of /proc/cpuinfo that say what arithmetic a processor has; asimd is NEON.
VECTORS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),
)


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return {
        "processor": names[0] if names else platform.processor(),
        "vectors": [flag for flag in VECTORS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }


def put_into(document, name, text):
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = document.read_text().split(begin)
    document.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def recorded(path):
    """Read the results a file holds by now; none if there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


@contextlib.contextmanager
def _locked(path):
    import fcntl  # not on Windows, where the other benchmarks run nevertheless

    # Beside the results, the lock would lie in the repository. Locks end with their process, killed or not.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"sparseattn-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def record(path, key, value):
    """Add one result to a JSON file that other processes may be adding to."""
    with _locked(path):
        results = recorded(path) | {key: value}
        # In one step: whoever is killed here, or reads meanwhile, finds a whole file.
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(new, path)


def paired_interval(a, b, level=0.95):
    """Mean of a - b with its two-sided t interval: (mean, low, high). One pair has no interval, but NaN."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    n, mean = len(difference), float(np.mean(difference))
    if n < 2:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf((1 + level) / 2, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    return mean, float(mean - half), float(mean + half)
