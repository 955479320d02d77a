"""What does it cost when data is poor? Few or wrong labels in the fit, other light and stains in the test.

    python benchmarks/robustness.py                              # all that robustness.json does not hold yet
    python benchmarks/robustness.py --data pbc5,jurkat --seeds 5 --jobs 1
    python benchmarks/robustness.py --tables                     # only rewrite the table of README.md

A run is a data set, a condition and a split. Conditions that change nothing but the test images are scored
from one fit. Results are written as they come, and a run that was stopped is taken up again.
"""

import argparse
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import data_sets
import numpy as np
import torch
from accuracy import describe, difference, names_of, ours, scores, spread, where
from joblib import Parallel, delayed, parallel_config
from report import machine, put_into, record, recorded
from skimage.color import hed_from_rgb, rgb_from_hed
from sklearn.metrics import recall_score
from threadpoolctl import threadpool_limits

from sklearn_sparseattn.training.augmentation import dihedral

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "robustness.json", HERE / "README.md"
DATA = ("pbc5", "event")


# ---- conditions: (X_train, y_train, X_test, y_test, rng) -> the four, changed; none is written into ----


def as_it_is(X_train, y_train, X_test, y_test, rng):
    return X_train, y_train, X_test, y_test


def ten_a_class(X_train, y_train, X_test, y_test, rng):
    """Ten training rows of each class; of a class with fewer, all."""
    rows = [rng.permutation(np.flatnonzero(y_train == label))[:10] for label in np.unique(y_train)]
    kept = np.sort(np.concatenate(rows))
    return X_train[kept], y_train[kept], X_test, y_test


def wrong_labels(X_train, y_train, X_test, y_test, rng, share=0.1):
    """Some training rows get the label of another class, each of the others as likely."""
    labels, codes = np.unique(y_train, return_inverse=True)
    rows = rng.choice(len(codes), round(share * len(codes)), replace=False)
    # Round the classes by one step at least and less than a full turn: never the same label.
    codes[rows] = (codes[rows] + rng.integers(1, len(labels), len(rows))) % len(labels)
    return X_train, labels[codes], X_test, y_test


def constant_images(X_train, y_train, X_test, y_test, rng, share=0.05):
    """Some training images are replaced by black and white ones, half and half; they keep their labels."""
    rows = rng.choice(len(X_train), round(share * len(X_train)), replace=False)
    black, white = value_range(X_train)
    X_train = X_train.copy()
    X_train[rows[::2]], X_train[rows[1::2]] = black, white
    return X_train, y_train, X_test, y_test


def brightness(X_train, y_train, X_test, y_test, rng, factor=1.2):
    return X_train, y_train, as_dtype(X_test * factor, X_test.dtype), y_test


def darkness(X_train, y_train, X_test, y_test, rng):
    return brightness(X_train, y_train, X_test, y_test, rng, factor=0.8)


def stains(X_train, y_train, X_test, y_test, rng, factors=(0.8, 1.2)):
    """More or less of haematoxylin, eosin and DAB, drawn for each test image."""
    drawn = rng.uniform(*factors, (len(X_test), 3))
    shifted = [restain(image, factor) for image, factor in zip(X_test, drawn, strict=True)]
    return X_train, y_train, np.stack(shifted), y_test


def restain(image, factors):
    """The rgb2hed of skimage, times the factors, and hed2rgb, but without clipping negative stains; uint8.

    Colours that those three stains cannot mix have a negative one. Clipped, as in skimage, Giemsa-stained
    cells come back by 8 grey levels off on average even if all factors are 1, and the shift would drown.
    """
    density = -np.log(np.maximum(image, 0.5) / 255)  # half a level: 0 has no logarithm
    shifted = density @ hed_from_rgb * factors @ rgb_from_hed
    return as_dtype(255 * np.exp(-shifted), np.uint8)


def noise(X_train, y_train, X_test, y_test, rng, share=0.02):
    """Gaussian noise on the test images, its sd a share of the data's range."""
    black, white = value_range(X_train)
    noisy = X_test + rng.normal(scale=share * (white - black), size=X_test.shape)
    return X_train, y_train, as_dtype(noisy, X_test.dtype), y_test


def value_range(images):
    """Black and white: of bytes 0 and 255, else the extremes that occur.

    Event frames count a few events a pixel. The bounds of int8 would be no white to them but a change of
    units, of which the scaling of all the other images would suffer.
    """
    return (0, 255) if images.dtype == np.uint8 else (float(images.min()), float(images.max()))


def as_dtype(values, dtype):
    """Round to integers and clip to what the dtype holds; floats only change their precision."""
    if np.issubdtype(dtype, np.integer):
        bounds = np.iinfo(dtype)
        values = np.clip(np.rint(values), bounds.min, bounds.max)
    return values.astype(dtype)


AT_FIT = {
    "ten_a_class": ten_a_class,
    "label_noise_10%": wrong_labels,
    "constant_images_5%": constant_images,
}
AT_TEST = {"brighter": brightness, "darker": darkness, "stain_shift": stains, "noise": noise}
# The same tests of a fit to images whose light changes.
IN_CHANGING_LIGHT = {
    "changing_light": as_it_is,
    "changing_light_brighter": brightness,
    "changing_light_darker": darkness,
}
CONDITIONS = {"as_it_is": as_it_is, **AT_FIT, **AT_TEST, **IN_CHANGING_LIGHT}


def with_changing_light(turn, images, rng, factors=(0.7, 1.3)):
    """An augmentation, and then each image times a factor of its own."""
    drawn = rng.uniform(*factors, (len(images), 1, 1, 1)).astype(np.float32)
    return (dihedral if turn == "dihedral" else turn)(images, rng) * drawn


def shared_fits(images):
    """Conditions that one fit will do for, by groups."""
    coloured = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
    at_test = [name for name in AT_TEST if name != "stain_shift" or coloured]
    return [["as_it_is", *at_test], *([name] for name in AT_FIT), list(IN_CHANGING_LIGHT)]


# ---- one fit ----


def rarest_class(target):
    """The class with the fewest images, or None if others have as few."""
    counts = np.bincount(target)
    return int(counts.argmin()) if (counts == counts.min()).sum() == 1 else None


def caught(action, *arguments):
    """What an action returns, and the texts of its warnings, each once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = action(*arguments)
    return result, list(dict.fromkeys(f"{one.category.__name__}: {one.message}" for one in found))


def describe_fit(estimator):
    """The share of k and its path, whether the loss stayed finite and where it ended, epochs."""
    found = describe(estimator)
    height, width, _ = estimator.image_shape_
    shares = np.append(estimator.history_["k"] / (height * width), found["share"])
    loss = estimator.history_["train_loss"]
    return {
        **found,
        "least_share": float(shares.min()),
        "greatest_share": float(shares.max()),
        "finite_loss": bool(np.isfinite(loss).all()),
        "last_loss": float(loss[-1]),
    }


def score(estimator, X, target, rarest):
    probabilities, texts = caught(estimator.predict_proba, X)
    found = scores(probabilities, target)
    if rarest is not None:
        found["rarest_recall"] = float(recall_score(target == rarest, probabilities.argmax(axis=1) == rarest))
    return found, texts


def run_group(data, split, conditions, make):
    """Fit once, on the training rows of the first condition, and score each: results by condition."""
    images, target, splits = data_sets.load(data)
    seed = [other for other, _, _ in splits].index(split)
    _, train, test = splits[seed]
    rows = images[train], target[train], images[test], target[test]

    def changed(name):
        # By name: the draw stays the same whatever else is run.
        return CONDITIONS[name](*rows, np.random.default_rng([seed, zlib.crc32(name.encode())]))

    X_train, y_train, _, _ = changed(conditions[0])
    augment = data_sets.augmentation(data)
    if conditions[0] in IN_CHANGING_LIGHT:
        augment = partial(with_changing_light, augment)
    estimator = make(augment=augment, batch_size=data_sets.BATCH_SIZE, random_state=seed)
    torch.set_num_threads(1)
    results = {}
    with threadpool_limits(1):
        start = time.perf_counter()
        _, in_fit = caught(estimator.fit, X_train, y_train)
        fit = {**describe_fit(estimator), "fit_seconds": time.perf_counter() - start}
        for name in conditions:
            _, _, X_test, y_test = changed(name)
            found, in_test = score(estimator, X_test, y_test, rarest_class(target))
            results[name] = {
                "data": data,
                "condition": name,
                "split": split,
                **found,
                **fit,
                "warnings": in_fit + in_test,
                "n_train": len(X_train),
                "n_test": len(X_test),
                "machine": machine(),
            }
    return results


# ---- all runs ----


def run_job(path, data, split, conditions, make):
    """Measure and write down, unless another process has been quicker; True if that went well."""
    done = recorded(path)
    conditions = [name for name in conditions if f"{data}/{name}/{split}" not in done]
    if not conditions:
        return True
    try:
        results = run_group(data, split, conditions, make)
    except Exception:  # the other runs, hours of them, go on
        print(f"{data}/{conditions[0]}/{split} failed:\n{traceback.format_exc()}", flush=True)
        return False
    for condition, result in results.items():
        record(path, f"{data}/{condition}/{split}", result)
        figures = {column: round(result[column], 4) for column in ("accuracy", "ece", "share", "fit_seconds")}
        print(f"{data}/{condition}/{split}", figures, *result["warnings"], flush=True)
    return True


def measure_all(path, data, n_splits, n_jobs, make):
    """Run what `path` does not hold yet, the first splits of all conditions first. True if all went well."""
    done, jobs = recorded(path), []
    for name in data:
        try:
            images, _, splits = data_sets.load(name)
        except FileNotFoundError as error:
            print(f"{name} left out: {error}", flush=True)
            continue
        for split, _, _ in splits[:n_splits]:
            groups = (
                [condition for condition in group if f"{name}/{condition}/{split}" not in done]
                for group in shared_fits(images)
            )
            # What is left of a group shares a fit still: only groups of one change training rows.
            jobs += [(path, name, split, group, make) for group in groups if group]
    with parallel_config(backend="loky", inner_max_num_threads=1):
        return all(Parallel(n_jobs)(delayed(run_job)(*job) for job in jobs))


# ---- table ----


def condition_row(name, runs, reference):
    found = list(runs.values())
    columns = [spread(found, column) for column in ("accuracy", "balanced_accuracy")]
    columns += [spread(found, "ece", factor=1, digits=3), spread(found, "rarest_recall")]
    least = 100 * min(run["least_share"] for run in found)
    greatest = 100 * max(run["greatest_share"] for run in found)
    columns.append(f"{spread(found, 'share')} ({least:.1f}-{greatest:.1f})")
    differences = [""] * 2
    if name != "as_it_is" and runs.keys() & reference.keys():
        differences = difference(runs, reference, "accuracy")
    return f"| `{name}` | {len(runs)} | {' | '.join([*columns, *differences])} |"


def remarks(runs):
    """Fits that diverged, and warnings, by condition."""
    lost = [f"{run['condition']}/{run['split']}" for run in runs if not run["finite_loss"]]
    losses = f"Training loss not finite: {', '.join(lost)}." if lost else "Training losses: all finite."
    texts = Counter((run["condition"], text) for run in runs for text in run["warnings"])
    told = [f"- {n} × `{condition}`: {' '.join(text.split())}" for (condition, text), n in texts.items()]
    return [f"{losses} Warnings:", "", *told, ""] if told else [f"{losses} Warnings: none.", ""]


def tables(results):
    """One table for each data set that has runs, then what went on in them, and the machine."""
    lines = []
    for data, title in data_sets.TITLES.items():
        runs = {
            name: {r["split"]: r for r in results.values() if (r["data"], r["condition"]) == (data, name)}
            for name in CONDITIONS
        }
        if any(runs.values()):
            lines += [
                f"### {title[0].upper()}{title[1:]}",
                "",
                "| condition | n | accuracy % | balanced accuracy % | calibration error "
                "| recall of the rarest class % | k, % of the image (range in the fits) "
                "| accuracy against `as_it_is`, points | |",
                "|---|---|---|---|---|---|---|---|---|",
                *(condition_row(name, found, runs["as_it_is"]) for name, found in runs.items() if found),
                "",
                *remarks([run for found in runs.values() for run in found.values()]),
            ]
    return "\n".join([*lines, where(results)]) if lines else "Not measured yet."


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=names_of(data_sets.DATA_SETS), default=list(DATA))
    parser.add_argument("--seeds", type=int, default=3, help="how many splits of each data set, at most 5")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    well = options.tables or measure_all(RESULTS, options.data, options.seeds, options.jobs, ours())
    put_into(README, "robustness", tables(recorded(RESULTS)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
