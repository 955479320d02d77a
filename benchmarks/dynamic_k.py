"""Where the constants of DynamicK take k, on simulated courses of the loss.

    python benchmarks/dynamic_k.py    # writes dynamic_k.json and the table in benchmarks/README.md

Losses are a smooth course times (1 + noise): falling exponentially over the whole fit, flat from the start,
or falling and then flat. k starts at 8000/18225 of the image.
"""

import json
from pathlib import Path

import numpy as np
from report import machine, put_into

from sklearn_sparseattn.training.dynamic_k import (
    EMA_DECAY,
    GROW,
    K_MAX,
    K_MIN,
    MOMENTUM,
    SHRINK,
    DynamicK,
    next_k,
)

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "dynamic_k.json", HERE / "README.md"
N_PIXELS = 135 * 135
K_INIT = 8000
N_RUNS = 200
SEED = 0

PAPER = DynamicK.paper()
PUBLISHED = (PAPER.shrink / N_PIXELS, PAPER.grow / N_PIXELS, PAPER.ema_decay)
# shrink, grow (shares of the image), ema_decay
CONSTANTS = [
    (SHRINK, GROW, EMA_DECAY),
    (SHRINK, GROW, 0.5),
    (SHRINK, GROW, 0.9),
    (0.025, 0.035, EMA_DECAY),
    (SHRINK, SHRINK, EMA_DECAY),
    PUBLISHED,
]


def course(n_falling, tau, n_flat=0, floor=0.1):
    t = np.minimum(np.arange(n_falling + n_flat), n_falling - 1)
    return floor + (1 - floor) * np.exp(-t / tau)


# name -> course of the loss, relative noise; the last is seen batch by batch, the rest epoch by epoch
COURSES = {
    "falling, 15 epochs": (course(15, 7), 0.03),
    "falling, 30 epochs": (course(30, 10), 0.03),
    "falling, 60 epochs, noisy": (course(60, 20), 0.06),
    "flat, 60 epochs": (np.ones(60), 0.03),
    "falling for 20, flat for 40": (course(20, 7, 40), 0.03),
    "falling, 1000 batches, noisy": (course(1000, 300), 0.2),
}


def final_share(losses, shrink, grow, ema_decay):
    k, ema = float(K_INIT), losses[0]
    for loss in losses[1:]:
        k, ema = next_k(
            k,
            loss,
            ema,
            k_min=K_MIN * N_PIXELS,
            k_max=K_MAX * N_PIXELS,
            shrink=shrink * N_PIXELS,
            grow=grow * N_PIXELS,
            ema_decay=ema_decay,
            momentum=MOMENTUM,
        )
    return k / N_PIXELS


def measure():
    rows = []
    for constants in CONSTANTS:
        for name, (smooth, noise) in COURSES.items():
            rng = np.random.default_rng(SEED)
            shares = [
                final_share(smooth * (1 + noise * rng.standard_normal(len(smooth))), *constants)
                for _ in range(N_RUNS)
            ]
            low, median, high = np.quantile(shares, [0.1, 0.5, 0.9])
            rows.append({"constants": constants, "course": name, "k": [low, median, high]})
    return {"seed": SEED, "runs": N_RUNS, "machine": machine(), "rows": rows}


def table(results):
    lines = [
        "| shrink | grow | ema_decay | " + " | ".join(COURSES) + " |",
        "|---" * (3 + len(COURSES)) + "|",
    ]
    for constants in CONSTANTS:
        shrink, grow, ema_decay = constants
        label = f"{shrink:.3g} | {grow:.3g} | {ema_decay:g}"
        if constants == CONSTANTS[0]:
            label = " | ".join(f"**{part}**" for part in label.split(" | "))
        cells = [
            "{1:.0%} ({0:.0%}-{2:.0%})".format(*row["k"])
            for row in results["rows"]
            if tuple(row["constants"]) == constants
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = measure()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    put_into(README, "dynamic_k", table(found))
    print(table(found))
