"""The tables of efficiency.py, and its figure: from the results, and from nothing else."""

import numpy as np
from accuracy import runs_of
from ours import MAIN, SHARES, label
from peers import TWINS

MAIN_KEY = f"tiles/{label(MAIN)}"

# What is to be reached with all threads: throughput as ratios, by peer and precision; p50 in seconds.
LEAST_TIMES = {("mobilenetv2", "fp32"): 25.0, ("twin", "fp32"): 2.0, ("twin", "bf16"): 1.0}
MOST_P50 = 0.25e-3
MOST_DIFFERENCE = 1e-5


def speed(run):
    return float(np.median(run["rates"]))


def fastest(contestants, model, precisions=("fp32", "bf16")):
    """Key of a model's fastest contestant in these precisions, None if there is none."""
    keys = [k for k, run in contestants.items() if run["model"] == model and run["precision"] in precisions]
    return max(keys, key=lambda key: speed(contestants[key]), default=None)


def ratio(ours, peer):
    """Ours to the peer: median of the rounds' ratios, the smallest and the greatest."""
    ratios = np.divide(ours, peer)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def numbers_of_threads(results):
    return sorted(int(key.split("/")[1]) for key in results if key.startswith("throughput/"))


def throughput_table(results, threads):
    """Every contestant, slowest first; the ratio is that of ours at 8.2 % to it."""
    contestants = results[f"throughput/{threads}"]["contestants"]
    calls = results.get(f"latency/{threads}", {}).get("calls", {})
    heading = "one thread" if threads == 1 else f"{threads} threads"
    lines = [
        "",
        f"| {heading} | runtime | precision | batch × streams | images/s | `{MAIN_KEY}` is faster by "
        "| one image, p50 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, run in sorted(contestants.items(), key=lambda item: speed(item[1])):
        times, low, high = ratio(contestants[MAIN_KEY]["rates"], run["rates"])
        setting = f"{run['batch']} × {run['streams']}" if "batch" in run else "its own"
        quantiles = [f"{1e3 * calls[key][q]:.2f} ms" if key in calls else "-" for q in ("p50", "p99")]
        lines.append(
            f"| `{run['model']}` | {run['runtime']} | {run['precision']} | {setting} | {speed(run):,.0f} "
            f"| {times:.2f} × ({low:.2f}-{high:.2f}) | {' | '.join(quantiles)} |"
        )
    return lines


def summary(results, threads):
    """Against the fastest of each peer by precision, beside what is to be reached."""
    contestants = results[f"throughput/{threads}"]["contestants"]
    lines = ["", f"| `{MAIN_KEY}`, {threads} threads | figure | to be reached | |", "|---|---|---|---|"]
    for model in sorted({run["model"] for run in contestants.values() if "batch" in run}):
        for precision in ("fp32", "bf16"):
            key = fastest(contestants, model, (precision,))
            if key is None:
                continue
            times, low, high = ratio(contestants[MAIN_KEY]["rates"], contestants[key]["rates"])
            what = f"images/s, against `{model}` in {precision}, {contestants[key]['runtime']}"
            least = LEAST_TIMES.get((model, precision))
            bar = () if least is None else (f"≥ {least:g} ×", times >= least)
            lines.append(row(what, f"{times:.2f} × ({low:.2f}-{high:.2f})", *bar))
    calls = results.get(f"latency/{threads}", {}).get("calls", {})
    if MAIN_KEY in calls:
        p50 = calls[MAIN_KEY]["p50"]
        lines.append(
            row("one image, p50", f"{1e3 * p50:.2f} ms", f"≤ {1e3 * MOST_P50:g} ms", p50 <= MOST_P50)
        )
    return lines


def row(what, figure, bar=None, holds=None):
    return f"| {what} | {figure} | {bar or '-'} | {'' if bar is None else 'yes' if holds else '**no**'} |"


# ---- exactness, cost, profile, GPU ----


def accuracy_table(results):
    lines = [
        "",
        f"| against float64; bold: above {MOST_DIFFERENCE:g} | images | largest difference of a probability "
        "| of a score, divided by max(1, its size) | largest score | float64 chooses other tiles |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in results["accuracy"]["sets"].items():
        differences = [run[column] for column in ("probability", "score")]
        figures = [f"{most:.1e}" if most <= MOST_DIFFERENCE else f"**{most:.1e}**" for most in differences]
        lines.append(
            f"| {name} | {run['images']:,} | {' | '.join(figures)} | {run['largest_score']:.1f} "
            f"| {run['other_tiles']:.2%} |"
        )
    return lines


def cost_table(results):
    lines = ["", "| model | parameters | multiply-adds |", "|---|---|---|"]
    for name, run in results["cost"]["models"].items():
        lines.append(f"| `{name}` | {run['parameters']:,} | {run['multiply_adds'] / 1e6:,.1f} M |")
    return lines


def profile_table(results):
    """Time and arithmetic of each part, on one thread, against the ceiling."""
    lines = []
    for name, run in results["profile"]["models"].items():
        micros, macs, ceiling = run["microseconds"], run["multiply_adds"], run["ceiling_gflops"]
        parts = [(part, us, macs.get(part, 0)) for part, us in micros.items()]
        total = sum(micros.values()), sum(macs.values())
        lines += [
            "",
            f"| `{name}`, one thread | µs an image | share | multiply-adds | GFLOP/s | of the ceiling |",
            "|---|---|---|---|---|---|",
        ]
        for part, us, n in [*parts, ("`predict_proba`", *total)]:
            line = f"| {part} | {us:.1f} | {us / total[0]:.1%} | "
            reached = 2e-3 * n / us
            line += f"{n / 1e6:.2f} M | {reached:.1f} | {reached / ceiling:.1%} |" if n else "- | - | - |"
            lines.append(line)
        lines += ["", f"Ceiling, a product of float32 matrices on one thread: {ceiling:.0f} GFLOP/s."]
    return lines


def gpu_table(results):
    run = results["cuda"]
    lines = ["", f"{run['gpu']}:", "", "| model | batch 64 | best batch |", "|---|---|---|"]
    for name, speeds in run["speeds"].items():
        best = max(speeds, key=speeds.get)
        lines.append(f"| `{name}` | {speeds['64']:,.0f} | {speeds[best]:,.0f} ({best}) |")
    return lines


def tables(results):
    """All of them, of the sections that there are."""
    lines, threads = [], numbers_of_threads(results)
    for n in threads:
        lines += throughput_table(results, n)
    lines += summary(results, threads[-1]) if threads else []
    for section, table in (
        ("accuracy", accuracy_table),
        ("cost", cost_table),
        ("profile", profile_table),
        ("cuda", gpu_table),
    ):
        lines += table(results) if section in results else []
    where = next((run["machine"] for run in results.values()), None)
    if where is None:
        return "Not measured yet."
    libraries = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    place = f"Machine: {where['processor']} ({', '.join(where['vectors'])}), {where['cores']} cores; "
    place += f"compiled engine: {where['engine']}; {libraries}."
    return "\n".join([*lines, "", place]).strip()


# ---- accuracy against images/s ----


def points_of(results, runs, threads):
    """Images/s and accuracy in %, by name, of ours by k and of the peers that have both."""
    contestants = results[f"throughput/{threads}"]["contestants"]
    found = {}
    for share in SHARES:
        column = "accuracy_all" if share == 1 else f"accuracy_share_{share:.3g}"
        values = [run[column] for run in runs["tiles"]]
        found[f"tiles/{label(share)}"] = speed(contestants[f"tiles/{label(share)}"]), 100 * np.mean(values)
    for name in (*TWINS, "mobilenetv2"):
        for precision in ("fp32", "bf16"):
            key = fastest(contestants, name, (precision,))
            if key is not None and runs.get(name):
                found[f"{name}, {precision}"] = (
                    speed(contestants[key]),
                    100 * np.mean([run["accuracy"] for run in runs[name]]),
                )
    return found


def figure(results, results_of_accuracy, path, data=("pbc5_few", "event", "jurkat")):
    """Draw accuracy against images/s with all threads; a panel for each data set, over the common splits.

    MobileNetV2 is drawn over those of its splits that ours has. Speeds are of 135×135 pixels throughout.
    """
    from matplotlib.figure import Figure

    threads = numbers_of_threads(results)
    if not threads:
        raise SystemExit("No throughput is measured yet: run efficiency.py first.")
    panels = {}
    for name in data:
        by_model = {
            model: runs_of(results_of_accuracy, name, model) for model in ("tiles", *TWINS, "mobilenetv2")
        }
        common = set(by_model["tiles"]).intersection(*(by_model[twin] for twin in TWINS if by_model[twin]))
        if common:
            panels[name] = {
                model: [run for split, run in runs.items() if split in common]
                for model, runs in by_model.items()
            }
    if not panels:
        raise SystemExit("No accuracy of ours is measured yet: run accuracy.py first.")
    drawn = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    for ax, (name, runs) in zip(
        drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        points = points_of(results, runs, threads[-1])
        ours = [point for key, point in points.items() if key.startswith("tiles")]
        ax.plot(*zip(*ours, strict=True), "o-", color="C0", label="tiles, by k")
        for color, precision in (("C1", "fp32"), ("C2", "bf16")):
            twins = [points[key] for twin in TWINS if (key := f"{twin}, {precision}") in points]
            if twins:
                ax.plot(*zip(*twins, strict=True), "s-", color=color, label=f"dense twins, {precision}")
        if "mobilenetv2, fp32" in points:
            ax.plot(*points["mobilenetv2, fp32"], "^", color="C3", label="MobileNetV2, fp32")
        for share, point in zip(SHARES, ours, strict=True):
            ax.annotate(label(share), point, textcoords="offset points", xytext=(4, 4), fontsize=8)
        ax.set(xscale="log", xlabel="images/s (135×135)", ylabel="accuracy, %")
        ax.set_title(f"{name} (n = {len(runs['tiles'])})")
    drawn.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)
