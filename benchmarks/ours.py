"""Our estimator as efficiency.py and scaling.py measure it: images, fits, its engine, where the time goes.

The engine is the compiled code that predicts; where there is none, nothing is measured.
"""

import copy
import itertools
import time

import numpy as np
import torch
from timing import in_turns

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import PixelScale, chunk_slices
from sklearn_sparseattn.inference import Engine
from sklearn_sparseattn.inference.engine import PARTS
from sklearn_sparseattn.network import SparseAttnNet
from sklearn_sparseattn.parameters import to_pixels

# Shares of the pixels that ours is measured with: the third is 1,500 of 135×135.
SHARES = (0.02, 0.04, 1500 / 135**2, 0.16, 1.0)
MAIN = SHARES[2]


def label(share):
    return "all" if share == 1 else f"{100 * share:.2g}%"


def cells(n, size, seed=0):
    """Images in uint8, as a camera gives them, and classes."""
    bunch = make_cells(n, image_size=size, random_state=seed)
    low, high = bunch.images.min(), bunch.images.max()
    return np.round(255 * (bunch.images - low) / (high - low)).astype(np.uint8), bunch.target


def fitted(images, target, k, **params):
    """Ours with k held fixed, after one epoch; it predicts with as many threads as PyTorch has."""
    recipe = {"k_init": k, "k_min": k, "k_max": k, "max_epochs": 1, "random_state": 0}
    recipe["n_jobs"] = torch.get_num_threads()
    clf = SparseAttnClassifier(**recipe | params).fit(images, target)
    if clf.device == "cpu":
        engine_of(clf)
    return clf


def predicting_with(clf, **params):
    """The same fit with other parameters of prediction, `predict_k` or `n_jobs`."""
    return copy.copy(clf).set_params(**params)


def engine_of(clf):
    """An engine of its own for a fitted estimator; the program ends if there can be none."""
    engine = Engine.of(clf.network_, clf.image_shape_, PixelScale(clf.data_range_))
    if engine is None:
        raise SystemExit(
            "The compiled engine did not run: nothing is measured. Was sklearn_sparseattn.inference._engine "
            "built? `pip install .` does it, given GCC or Clang."
        )
    return engine


def predicting(clf, images):
    def unit():
        clf.predict_proba(images)
        return len(images)

    return unit


def one_by_one(clf, images):
    """Calls with a single image, another one every time."""
    turn = itertools.cycle(range(len(images)))

    def call():
        i = next(turn)
        clf.predict_proba(images[i : i + 1])
        return 1

    return call


def in_chunks(clf, images):
    """Images as the engine takes them, as many at a time as `predict_proba` gives it."""
    rows = images.reshape(len(images), *clf.image_shape_)
    return [rows[chunk] for chunk in chunk_slices(len(rows), clf.image_shape_)]


# ---- arithmetic ----


def n_chosen_tiles(clf):
    """Tiles of an image that go on, as `predict_k` is now."""
    height, width, _ = clf.image_shape_
    k = None if clf.predict_k is None else to_pixels(clf.predict_k, clf.network_.area_of(height, width))
    return clf.network_.n_chosen(height, width, k)


def multiply_adds(clf):
    """Of the compiled engine for one image, by step.

    Only convolutions and products with weights or tokens count; sigmoids, comparisons, pooling and norms do
    not. Weights are folded: batch norms and the last layer of the tokens are free. A layer between tiles is
    counted in full, though it may skip neighbours that were not chosen.
    """
    network = clf.network_
    coarse, tokens, fine, fusion = network.coarse, network.tokens, network.fine, network.fusion
    n_rows, n_columns = clf.image_shape_[:2]
    counts = dict.fromkeys(("look", "tokens", "layers", "attention", "head"), 0)
    for convolution, *_ in (coarse.early, coarse.middle):
        stride = convolution.stride[0]
        n_rows, n_columns = (n_rows - 1) // stride + 1, (n_columns - 1) // stride + 1
        counts["look"] += n_rows * n_columns * convolution.weight.numel()
    counts["look"] += n_rows * n_columns * coarse.score.weight.numel()
    n = n_chosen_tiles(clf)
    counts["tokens"] = n * tokens.first.weight.numel()
    counts["layers"] = n * sum(layer.weight.numel() for layer in tokens.layers)
    # Keys, the weight of each token in the answer, the sum of the tokens by these; the rest once an image.
    counts["attention"] = n * (fine.key.weight.numel() + fine.key.out_features + fine.key.in_features)
    counts["attention"] += tokens.out.weight.numel() + fine.value.weight.numel()
    counts["head"] = sum(
        linear.weight.numel() for linear in (fusion.first[0], fusion.residual[0], fusion.out)
    )
    return counts


# The steps whose time each part of the engine holds.
STEPS = {"coarse": ("look",), "tokens": ("tokens", "layers", "attention"), "head": ("head",)}


# ---- where our time goes ----

READING, PYTHON = "reading", "Python and validation"


def profile(clf, images, rounds):
    """Microseconds an image in each part, on one thread, and the ceiling of the arithmetic, all in turns.

    The parts are the engine's own times; "reading", what it spends besides, is mostly the scaling of pixels.
    "Python and validation" is what `predict_proba` takes longer than the engine. The ceiling is what a
    product of two float32 matrices reaches here, at its best.
    """
    engine, one_thread, square = engine_of(clf), predicting_with(clf, n_jobs=1), torch.rand(1024, 1024)
    chunks = in_chunks(clf, images)

    def run_engine():
        engine.seconds[:] = 0
        start = time.perf_counter()
        for chunk in chunks:
            engine.run(chunk, timed=True)
        return np.array([*engine.seconds, time.perf_counter() - start])

    def predict():
        start = time.perf_counter()
        one_thread.predict_proba(images)
        return time.perf_counter() - start

    def multiply():
        start = time.perf_counter()
        torch.mm(square, square)
        return time.perf_counter() - start

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works = {"engine": run_engine, "predict": predict, "product": multiply}
        found = in_turns(works, rounds, lambda work: (work(), work())[1])  # the first warms up
    finally:
        torch.set_num_threads(n_threads)
    *parts, whole = np.median(found["engine"], axis=0)
    seconds = dict(zip(PARTS, parts, strict=True))
    seconds |= {READING: whole - sum(parts), PYTHON: np.median(found["predict"]) - whole}
    counts = multiply_adds(clf)
    return {
        "microseconds": {part: 1e6 * float(s) / len(images) for part, s in seconds.items()},
        "multiply_adds": {part: sum(counts[step] for step in steps) for part, steps in STEPS.items()},
        "ceiling_gflops": 2e-9 * 1024**3 / min(found["product"]),
    }


# ---- how exact it is ----


def exactness(clf, batches):
    """The engine against the same network in float64 in PyTorch, given the tiles that the engine chose.

    Largest differences of a probability, and of a score divided by max(1, |score|); the largest score; the
    share of images for which float64 chooses other tiles. `batches` are arrays of images; a few images are
    run at a time.
    """
    engine, scale = engine_of(clf), PixelScale(clf.data_range_)
    exact = copy.deepcopy(clf.network_).double().eval()
    n, n_other, n_failed = 0, 0, 0
    most = dict.fromkeys(("probability", "score", "largest_score"), 0.0)
    for images in batches:
        for chunk in in_chunks(clf, images):
            found = engine.run(chunk, maps=True)
            tiles, own = torch.from_numpy(found["tiles"]).long(), []

            def choose(images, scores, tiles=tiles, own=own):
                own.append(SparseAttnNet.choose(exact, images, scores))
                return tiles

            exact.choose = choose
            with torch.inference_mode():
                expected = exact(torch.from_numpy(scale.finite(chunk)).double())
                logits = torch.from_numpy(found["logits"]).double()
                scores = torch.from_numpy(found["scores"]).double().flatten(1)
                exact_scores = expected.scores.flatten(1)
            counts = torch.from_numpy(~found["failed"])  # those that failed are run in float64 anyway
            for name, of_each in {
                "probability": logits.softmax(1) - expected.logits.softmax(1),
                "score": (scores - exact_scores) / exact_scores.abs().clamp(min=1),
                "largest_score": exact_scores,
            }.items():
                most[name] = max([most[name], *of_each.abs().amax(1)[counts].tolist()])
            n_other += int((own[0].sort(1)[0] != tiles.sort(1)[0]).any(1)[counts].sum())
            n, n_failed = n + len(chunk), n_failed + int((~counts).sum())
    return most | {"images": n, "other_tiles": n_other / n, "left_to_float64": n_failed}
