"""Does k find the same place wherever it starts? Two tasks in which whole cells count, two rules, two starts.

    python benchmarks/dynamic_k.py              # all that dynamic_k.json does not hold yet
    python benchmarks/dynamic_k.py --tables     # only rewrite the table of README.md

The harness is that of accuracy.py, whose runs of `tiles` are k by worth from 44 % of the image, the default.
"""

import argparse
import sys
from pathlib import Path

import accuracy
import numpy as np
from ablation import published_rule
from accuracy import interval, measure_all, ours, runs_of, spread
from report import paired_interval, put_into, recorded

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "dynamic_k.json", HERE / "README.md"
DATA = ("opd", "jurkat")
MODELS = {
    "worth, from 5%": ours(k_init=0.05),
    "published, from 44%": ours(callbacks=[published_rule()]),
    "published, from 5%": ours(callbacks=[published_rule()], k_init=0.05),
}
PAIRS = {"worth": ("tiles", "worth, from 5%"), "published": ("published, from 44%", "published, from 5%")}


def row(data, rule, high, low):
    """Final k and accuracies of both starts; the factor between them, and the difference, by split."""
    common = sorted(high.keys() & low.keys())
    runs = [[found[split] for split in common] for found in (high, low)]
    shares = np.array([[run["share"] for run in found] for found in runs])
    factors = np.exp(np.abs(np.log(shares[0] / shares[1])))
    pairs = [[100 * run["accuracy"] for run in found] for found in runs]
    columns = [str(len(common)), *(spread(found, "share") for found in runs)]
    columns += [f"{factors.mean():.2f} (at most {factors.max():.2f})"]
    columns += [spread(found, "accuracy") for found in runs]
    return f"| {data} | {rule} | {' | '.join(columns)} | {interval(*paired_interval(*pairs))} |"


def table(results, results_of_default):
    lines = [
        "| images | rule | n | k from 44 %, % of the image | k from 5 % | factor between them "
        "| accuracy from 44 %, % | from 5 % | difference, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    everything = results_of_default | results
    for data in DATA:
        for rule, pair in PAIRS.items():
            high, low = (runs_of(everything, data, model) for model in pair)
            if high.keys() & low.keys():
                lines.append(row(data, rule, high, low))
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many splits of each data set, at most 30")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    well = options.tables or measure_all(RESULTS, MODELS, DATA, options.seeds, options.jobs)
    put_into(README, "dynamic_k", table(recorded(RESULTS), recorded(accuracy.RESULTS)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
