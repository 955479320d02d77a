"""What attention_maps costs beside predict_proba: processor time of one thread, 135×135, k = 1500.

python benchmarks/maps.py    # writes maps.json and the table in benchmarks/README.md
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from report import machine, put_into

from sklearn_sparseattn import SparseAttnClassifier

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "maps.json", HERE / "README.md"


def seconds(method, X):
    start = time.process_time()
    method(X)
    return time.process_time() - start


def measure(n_images=500, image_size=135, k=1500, n_rounds=15):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, size=(n_images, image_size, image_size), dtype=np.uint8)
    clf = SparseAttnClassifier(k_init=k, k_min=k, k_max=k, max_epochs=1, random_state=0)
    clf.fit(X[:32], np.arange(32) % 2)
    found = {}
    for dtype in ("uint8", "float32", "float64"):
        images = X.astype(dtype)
        rounds = [
            [seconds(method, images) for method in (clf.predict_proba, clf.attention_maps)]
            for _ in range(n_rounds)
        ]
        proba, maps = 1e6 * np.median(rounds, axis=0) / n_images
        found[dtype] = {"predict_proba": proba, "attention_maps": maps}
    return {"microseconds": found, "machine": machine()}


def table(results):
    lines = ["| images | `predict_proba`, µs an image | `attention_maps` | ratio |", "|---|---|---|---|"]
    for dtype, found in results["microseconds"].items():
        proba, maps = found.values()
        lines.append(f"| {dtype} | {proba:.0f} | {maps:.0f} | {maps / proba:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    put_into(README, "maps", table(results))
