"""What attention_maps costs beside predict_proba: processor time of one thread, 135×135, k = 2146.

python benchmarks/maps.py
"""

import time

import numpy as np
import torch

from sklearn_sparseattn import SparseAttnClassifier


def seconds(method, X):
    start = time.process_time()
    method(X)
    return time.process_time() - start


def main(n_images=500, image_size=135, k=2146, n_rounds=15):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, size=(n_images, image_size, image_size), dtype=np.uint8)
    clf = SparseAttnClassifier(k_init=k, k_min=k, k_max=k, max_epochs=1, random_state=0)
    clf.fit(X[:32], np.arange(32) % 2)
    print("images   predict_proba (s)  attention_maps (s)  ratio")
    for dtype in ("uint8", "float32", "float64"):
        images = X.astype(dtype)
        rounds = [
            [seconds(method, images) for method in (clf.predict_proba, clf.attention_maps)]
            for _ in range(n_rounds)
        ]
        proba, maps = np.median(rounds, axis=0)
        print(f"{dtype:<7}  {proba:>17.3f}  {maps:>18.3f}  {maps / proba:>5.2f}", flush=True)


if __name__ == "__main__":
    main()
