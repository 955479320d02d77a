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

# name -> parameters of SparseAttnClassifier that differ from the defaults, precision of its predictions.
OURS = {"sparseattn": ({}, "fp32")}


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


def n_distinct_cells(pixels, image_width, step, n_rows, n_columns):
    """Cells of a map, n_rows x n_columns, that are nearest to some of the pixels (b, k); summed over b."""
    row, column = (pixels // image_width + step // 2) // step, (pixels % image_width + step // 2) // step
    cell = np.minimum(row, n_rows - 1) * n_columns + np.minimum(column, n_columns - 1)
    return sum(len(np.unique(cells_of_one)) for cells_of_one in cell)


def multiply_adds(clf, images):
    """Of the engine by part, for one image: the mean over these images, with the pixels chosen in them.

    Only convolutions and products with weights or tokens count; scores between cells, comparisons, sigmoids,
    pooling and norms do not. Weights are folded, so that batch norms and the keys' second layer are free.
    """
    network, engine = clf.network_, engine_of(clf)
    height, width, _ = clf.image_shape_
    coarse, fine, fusion, embedding = network.coarse, network.fine, network.fusion, network.embedding
    k, sizes, counts = network.n_chosen(height * width), [], dict.fromkeys(PARTS, 0.0)
    n_rows, n_columns = height, width
    for stage in coarse.stages():
        for convolution, *_ in stage:
            stride = convolution.stride[0]
            n_rows, n_columns = (n_rows - 1) // stride + 1, (n_columns - 1) // stride + 1
            counts["coarse"] += n_rows * n_columns * convolution.weight.numel()  # every cell
        sizes.append((n_rows, n_columns))
    counts["coarse"] += np.prod(sizes[1]) * coarse.score.weight.numel()  # a score for each cell of the second
    if network.context is not None:  # 3x3 convolutions of both maps, where pixels were chosen
        for chunk in in_chunks(clf, images):
            pixels = engine.run(chunk, maps=True)["pixels"]
            for convolution, step, size in zip(network.context.convolve, coarse.steps, sizes, strict=False):
                n_cells = n_distinct_cells(pixels, width, step, *size)
                n_weights = sum(weight.numel() for weight in convolution.parameters())
                counts["tokens"] += n_cells * n_weights / len(images)
    counts["tokens"] += k * embedding.first.weight.numel()  # position and values of each token
    counts["tokens"] += k * fine.key.weight.numel()  # its keys
    counts["tokens"] += k * fine.key.out_features  # its weight in the answer, from the keys
    counts["tokens"] += k * fine.key.in_features  # the sum of the tokens by these weights
    counts["tokens"] += embedding.out.weight.numel() + fine.value.weight.numel()  # once, on the sum
    for linear in (fusion.first[0], fusion.residual[0], fusion.out):
        counts["head"] += linear.weight.numel()
    return {part: float(count) for part, count in counts.items()}


# ---- where our time goes ----

READING, PYTHON = "reading", "Python and validation"


def profile(clf, images, rounds):
    """Microseconds an image in each part, on one thread, and the ceiling of the arithmetic, all in turns.

    The parts are the engine's own times; "reading", what it spends besides, is mostly the scaling of pixels.
    "Python and validation" is what `predict_proba` takes longer than the engine. The ceiling is what a
    product of two float32 matrices reaches here, at its best.
    """
    engine, one_thread, square = engine_of(clf), copy.copy(clf).set_params(n_jobs=1), torch.rand(1024, 1024)
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
    return {
        "microseconds": {part: 1e6 * float(s) / len(images) for part, s in seconds.items()},
        "multiply_adds": multiply_adds(clf, images),
        "ceiling_gflops": 2e-9 * 1024**3 / min(found["product"]),
    }


# ---- how exact it is ----


def exactness(clf, batches):
    """The engine against the same network in float64 in PyTorch, given the pixels that the engine chose.

    Largest differences of a probability, of a score and of a score after its sigmoid (the map that users
    get); the largest score; the share of images for which float64 chooses other pixels. `batches` are arrays
    of images; a few images are run at a time.
    """
    engine, scale = engine_of(clf), PixelScale(clf.data_range_)
    exact = copy.deepcopy(clf.network_).double().eval()
    n, n_other, n_failed = 0, 0, 0
    most = dict.fromkeys(("probability", "score", "map", "largest_score"), 0.0)
    for images in batches:
        for chunk in in_chunks(clf, images):
            found = engine.run(chunk, maps=True)
            pixels, own = torch.from_numpy(found["pixels"]).long(), []

            def choose(images, scores, pixels=pixels, own=own):
                own.append(SparseAttnNet.choose(exact, images, scores))
                return pixels

            exact.choose = choose
            with torch.inference_mode():
                expected = exact(torch.from_numpy(scale.finite(chunk)).double())
                logits = torch.from_numpy(found["logits"]).double()
                scores, exact_scores = torch.from_numpy(found["scores"]).double(), expected.scores.flatten(1)
            counts = torch.from_numpy(~found["failed"])  # those that failed are run in float64 anyway
            for name, of_each in {
                "probability": logits.softmax(1) - expected.logits.softmax(1),
                "score": scores - exact_scores,
                "map": scores.sigmoid() - exact_scores.sigmoid(),
                "largest_score": exact_scores,
            }.items():
                most[name] = max([most[name], *of_each.abs().amax(1)[counts].tolist()])
            n_other += int((own[0] != pixels).any(1)[counts].sum())
            n, n_failed = n + len(chunk), n_failed + int((~counts).sum())
    return most | {"images": n, "other_pixels": n_other / n, "left_to_float64": n_failed}
