"""Is what the model shows true? Where its maps lie, and what removing or revealing the pixels they name does.

    python benchmarks/explanation.py                                   # all that explanation.json lacks
    python benchmarks/explanation.py --models tiles --images 100
    python benchmarks/explanation.py --tables                          # only rewrite the table of README.md

Cells with masks: wbc_jtsc (real, stained; three folds) and `make_cells`. Each model's maps are those of the
class that it predicts. Results are written as they come; fitted models are kept among temporary files.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from accuracy import names_of
from attributions import (
    OursLogits,
    area,
    background,
    controls,
    curves,
    frame_of,
    maps_of_cnn,
    maps_of_ours,
    mass_within,
    paths,
    pointing_game,
    ranking,
    scaled,
    take_apart,
    without_tokens,
)
from explanation_data import JOBS, MODELS, fitted, tested
from peers import with_channels
from report import machine, put_into, record, recorded

from sklearn_sparseattn.images import PixelScale

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "explanation.json", HERE / "README.md"
N_IMAGES = 96  # of each split
PLACES = ("cell", "nucleus", "frame", "on_cell")
COLUMNS = (*PLACES, "deletion", "insertion", "deletion_squares", "insertion_squares")
OF_TOKENS = ("fine attention", "contribution, absolute", "evidence of the tokens")
TITLES = {
    "wbc_jtsc": "Stained white blood cells (wbc_jtsc: real, 4 classes, 120×120 RGB)",
    "opd": "Generated, opd (3 classes, 64×64)",
}
NAMES = {
    "tiles": "SparseAttnClassifier",
    "sparseattn": "SparseAttnClassifier, former default (87ba256)",
    "mobilenetv2": "MobileNetV2",
    "shuffled": "SparseAttnClassifier fitted to shuffled labels",
    "untrained": "SparseAttnClassifier with random weights (5 seeds)",
    "pbc5": "SparseAttnClassifier fitted to pbc5 (64×64)",
}


# ---- measuring ----


def maps_of(model, estimator, images, labels):
    """The model's own maps, and the controls."""
    if model == "mobilenetv2":
        own = maps_of_cnn(estimator, images, labels)
    else:
        own = maps_of_ours(estimator, images, labels, quick=model != "tiles")
    return own | controls(images, np.random.default_rng(0))


def are_not_blank(predict_proba, images, labels):
    """Whether an image's answer is another than that to its empty background; an array of bool.

    An empty slide gets an answer, too. Where it is the image's own, it stays while everything is removed,
    and is there before anything is revealed: deletion and insertion mean nothing.
    """
    empty = np.broadcast_to(background(images), with_channels(images).shape).reshape(images.shape)
    # In one call with the images: empty ones alone would be warned of, as of another unit.
    return predict_proba(np.concatenate([images, empty]))[len(images) :].argmax(axis=1) != labels


def measure(predict_proba, images, labels, maps, ties, masks, kept):
    """All figures of one map by column, means over the images, of curves over those that are `kept`."""
    side = -(-images.shape[1] // 16)
    found = {
        "cell": mass_within(maps, masks > 0),
        "nucleus": mass_within(maps, masks == 255),
        "frame": mass_within(maps, np.broadcast_to(frame_of(masks.shape[1:]), masks.shape)),
        "on_cell": pointing_game(maps, masks > 0),
    }
    for suffix, grain in (("", 1), ("_squares", side)):
        order = ranking(maps, ties, grain)
        for name, insert in (("deletion", False), ("insertion", True)):
            shown = curves(predict_proba, images[kept], labels[kept], order[kept], insert=insert)
            found[name + suffix] = area(shown) if kept.any() else 0.0
    return {name: float(np.mean(values)) for name, values in found.items()}


def inside_of(estimator, images, target, labels, maps):
    """What the tokens are worth to the answer: without a tenth of them, without all, without the rest."""
    network = OursLogits(estimator.network_).network
    parts = take_apart(network, scaled(PixelScale(estimator.data_range_), images))
    dropped = {
        name: float(np.mean(without_tokens(network, parts, maps[name], torch.as_tensor(labels))))
        for name in (*OF_TOKENS, "random")
        if name in maps
    }
    probability = float(np.mean(estimator.predict_proba(images).max(axis=1)))
    return {"probability": probability, "dropped": dropped, **paths(network, parts, target)}


def run(data, model, split, n_images):
    """All maps of one fitted model on cells that it has not seen."""
    torch.set_num_threads(1)
    estimator = fitted(data, model, split)
    images, target, masks = (part[:n_images] for part in tested(data, model, split))
    labels = estimator.predict_proba(images).argmax(axis=1)
    maps = maps_of(model, estimator, images, labels)
    # What a map leaves equal goes by the coarse attention, if the model has one.
    ties = maps.get("coarse attention", maps["random"])
    kept = are_not_blank(estimator.predict_proba, images, labels)
    frame = frame_of(masks.shape[1:])
    shares = {"cell": masks > 0, "nucleus": masks == 255, "frame": frame}
    inside = {} if model == "mobilenetv2" else inside_of(estimator, images, target, labels, maps)
    return {
        "data": data,
        "model": model,
        "split": split,
        "n": len(images),
        "n_not_blank": int(kept.sum()),
        "accuracy": float(np.mean(labels == target)),
        "area": {name: float(where.mean()) for name, where in shares.items()},
        "maps": {
            name: measure(estimator.predict_proba, images, labels, one, ties, masks, kept)
            for name, one in maps.items()
        },
        **inside,
        "machine": machine(),
    }


# ---- tables ----


def mean_of(runs, *path):
    """Weighted by the number of images that went in."""
    values, is_area = [], path[-1].startswith(("deletion", "insertion"))
    for found in runs:
        for key in path:
            found = found[key]
        values.append(found)
    weights = [found["n_not_blank" if is_area else "n"] for found in runs]
    return float(np.average(values, weights=weights)) if any(weights) else float("nan")


def rows_of(name, runs):
    """One row a map."""
    yield (
        f"| **{NAMES[name]}**, accuracy {100 * mean_of(runs, 'accuracy'):.0f} %, "
        f"n = {sum(found['n'] for found in runs)}, {sum(found['n_not_blank'] for found in runs)} of "
        "them removed and revealed | " + " | ".join([""] * len(COLUMNS)) + " |"
    )
    for one in runs[0]["maps"]:
        figures = (f"{mean_of(runs, 'maps', one, column):.3f}" for column in COLUMNS)
        yield f"| {one} | {' | '.join(figures)} |"


def inside_row(name, runs):
    """What the tokens are worth to one model."""
    figures = [
        mean_of(runs, column) for column in ("accuracy", "without_tokens", "without_pooled", "probability")
    ]
    figures += [
        mean_of(runs, "dropped", one) if one in runs[0]["dropped"] else None for one in ("random", *OF_TOKENS)
    ]
    return f"| {NAMES[name]} | " + " | ".join("-" if f is None else f"{f:.3f}" for f in figures) + " |"


def tables(results):
    """One for each set of images."""
    lines = []
    for data, title in TITLES.items():
        of_data = [found for found in results.values() if found["data"] == data]
        if not of_data:
            continue
        by_model = {name: [found for found in of_data if found["model"].startswith(name)] for name in NAMES}
        by_model = {name: runs for name, runs in by_model.items() if runs}
        first = next(iter(by_model.values()))
        share = {part: mean_of(first, "area", part) for part in ("cell", "nucleus", "frame")}
        lines += [
            f"### {title}",
            "",
            "| map | cell | nucleus | frame | highest on the cell | deletion | insertion "
            "| deletion, squares | insertion, squares |",
            "|---|---|---|---|---|---|---|---|---|",
            "| *area* | " + " | ".join(f"{value:.3f}" for value in share.values()) + " | | | | | |",
        ]
        for name, runs in by_model.items():
            lines += rows_of(name, runs)
        lines += [
            "",
            "| model | accuracy | without the tokens | without the pooled features | probability of the "
            "answer | a tenth of the tokens dropped at random | by fine attention "
            "| by contribution, absolute | by evidence of the tokens |",
            "|---|---|---|---|---|---|---|---|---|",
            *(inside_row(name, runs) for name, runs in by_model.items() if "dropped" in runs[0]),
            "",
        ]
    if not lines:
        return "Not measured yet."
    where = sorted(
        {f"{found['machine']['processor']}, torch {found['machine']['torch']}" for found in results.values()}
    )
    return "\n".join([*lines, f"Machine: {'; '.join(where)}."])


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=names_of(MODELS), default=list(MODELS))
    parser.add_argument("--images", type=int, default=N_IMAGES, help="of each split")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    for data, model, split in JOBS:
        key = f"{data}/{model}/{split}"
        if options.tables or model not in options.models or key in recorded(RESULTS):
            continue
        record(RESULTS, key, run(data, model, split, options.images))
        print(key, "done", flush=True)
    put_into(README, "explanation", tables(recorded(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
