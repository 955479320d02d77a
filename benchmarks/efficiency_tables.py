"""The tables of efficiency.py: Markdown from the results, and from nothing else."""

import numpy as np
from ours import OURS

# What is to be reached: throughput as ratios, by peer and precision; latency as a share of the peer's.
LEAST_TIMES = {("mobilenetv2", "fp32"): 6.4, ("resnet50", "fp32"): 29.6}
LEAST_TIMES_BF16 = {"mobilenetv2/openvino_bf16": 3.0}
MOST_SHARE_OF_P50 = {"mobilenetv2": 0.5}
MOST_P99_TO_P50 = 3.0
MOST_DIFFERENCE = 1e-5


def speed(run):
    return float(np.median(run["rates"]))


def fastest(contestants, model, precisions=("fp32", "bf16")):
    """Key of a model's fastest contestant in these precisions, None if there is none."""
    keys = [k for k, run in contestants.items() if run["model"] == model and run["precision"] in precisions]
    return max(keys, key=lambda key: speed(contestants[key]), default=None)


def quickest(results, model, precisions=("fp32", "bf16")):
    """Key of a model's contestant with the least p50 of single calls, None if there is none."""
    calls, contestants = results.get("latency", {}).get("calls", {}), results["throughput"]["contestants"]
    keys = [
        key
        for key in calls
        if key in contestants
        and contestants[key]["model"] == model
        and contestants[key]["precision"] in precisions
    ]
    return min(keys, key=lambda key: calls[key]["p50"], default=None)


def ratio(ours, peer):
    """Ours to the peer: median of the rounds' ratios, the smallest and the greatest."""
    ratios = np.divide(ours, peer)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def throughput_table(results, ours):
    """Every contestant, slowest first; the ratio is that of `ours` to it."""
    contestants = results["throughput"]["contestants"]
    calls = results.get("latency", {}).get("calls", {})
    lines = [
        "",
        f"| model | runtime | precision | batch × streams | images/s | `{ours}` is faster by "
        "| one image, p50 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, run in sorted(contestants.items(), key=lambda item: speed(item[1])):
        times, low, high = ratio(contestants[ours]["rates"], run["rates"])
        setting = f"{run['batch']} × {run['streams']}" if "batch" in run else "its own"
        quantiles = [f"{1e3 * calls[key][q]:.2f} ms" if key in calls else "-" for q in ("p50", "p99")]
        lines.append(
            f"| `{run['model']}` | {run['runtime']} | {run['precision']} | {setting} | {speed(run):,.0f} "
            f"| {times:.2f} × ({low:.2f}-{high:.2f}) | {' | '.join(quantiles)} |"
        )
    return lines


# ---- what is to be reached ----


def summary(results, ours):
    """Throughput and latency against the fastest of each peer, and what is to be reached."""
    contestants = results["throughput"]["contestants"]
    lines = ["", f"| `{ours}` | figure | to be reached | |", "|---|---|---|---|"]
    peers = sorted({run["model"] for run in contestants.values()} - set(OURS))
    for model in peers:
        lines += throughput_rows(contestants, ours, model)
    if ours in results.get("latency", {}).get("calls", {}):
        for model in peers:
            lines += latency_rows(results, ours, model)
        lines += spread_row(results, ours)
    return lines


def row(what, figure, bar=None, holds=None):
    return f"| {what} | {figure} | {bar or '-'} | {'' if bar is None else 'yes' if holds else '**no**'} |"


def throughput_rows(contestants, ours, model):
    """Against the fastest in fp32, against OpenVINO in bf16, against the fastest of all."""
    fp32, bf16 = fastest(contestants, model, ("fp32",)), f"{model}/openvino_bf16"
    named = {bf16: ""} if bf16 in contestants else {}
    named[fastest(contestants, model)] = "the fastest in any precision, "
    named |= {} if fp32 is None else {fp32: "the fastest in fp32, "}
    rows = []
    for key in sorted(named, key=lambda key: speed(contestants[key])):
        times, low, high = ratio(contestants[ours]["rates"], contestants[key]["rates"])
        least = LEAST_TIMES.get((model, "fp32")) if key == fp32 else LEAST_TIMES_BF16.get(key)
        what = f"images/s, against `{model}`, {named[key]}{contestants[key]['runtime']}"
        figure = f"{times:.1f} × ({low:.1f}-{high:.1f})"
        rows.append(row(what, figure, *(() if least is None else (f"≥ {least:g} ×", times >= least))))
    return rows


def latency_rows(results, ours, model):
    """p50 of one image, as a share of the least p50 of a peer in fp32, and in any precision."""
    calls, contestants, rows = results["latency"]["calls"], results["throughput"]["contestants"], []
    for said, precisions in (("fp32", ("fp32",)), ("any precision", ("fp32", "bf16"))):
        key, most = quickest(results, model, precisions), MOST_SHARE_OF_P50.get(model)
        if key is not None:
            share = calls[ours]["p50"] / calls[key]["p50"]
            what = f"one image, p50, against `{model}`, the quickest in {said}, {contestants[key]['runtime']}"
            figure = f"{1e3 * calls[ours]['p50']:.2f} / {1e3 * calls[key]['p50']:.2f} ms = {share:.2f}"
            rows.append(row(what, figure, *(() if most is None else (f"≤ {most:g}", share <= most))))
    return rows


def spread_row(results, ours):
    """p99 to p50, ours and that of the quickest MobileNetV2."""
    calls, key = results["latency"]["calls"], quickest(results, "mobilenetv2")
    spread = calls[ours]["p99"] / calls[ours]["p50"]
    figure, bar, most = f"{spread:.2f}", f"≤ {MOST_P99_TO_P50:g}", MOST_P99_TO_P50
    if key is not None:
        own = calls[key]["p99"] / calls[key]["p50"]
        figure += f"; `mobilenetv2`'s own, {results['throughput']['contestants'][key]['runtime']}: {own:.2f}"
        bar, most = f"{bar}, or the peer's own", max(most, own)
    return [row("one image, p99 / p50", figure, bar, spread <= most)]


def accuracy_table(results):
    lines = [
        "",
        f"| against float64; bold: above {MOST_DIFFERENCE:g} | images | largest difference of a probability "
        "| of a score | of a score after its sigmoid | largest score | float64 chooses other pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results["accuracy"]["sets"].items():
        differences = [run[column] for column in ("probability", "score", "map")]
        figures = [f"{most:.1e}" if most <= MOST_DIFFERENCE else f"**{most:.1e}**" for most in differences]
        lines.append(
            f"| {name} | {run['images']:,} | {' | '.join(figures)} | {run['largest_score']:.1f} "
            f"| {run['other_pixels']:.2%} |"
        )
    return lines


# ---- cost, profile, GPU ----


def cost_table(results):
    lines = ["", "| model | parameters | multiply-adds | memory |", "|---|---|---|---|"]
    used = results.get("memory", {}).get("growth", {})
    for name, run in results["cost"]["models"].items():
        grown = [
            f"{found['growth_mb']:.0f} MB" + (f" ({key.split('/')[1]})" if "/" in key else "")
            for key, found in used.items()
            if key.split("/")[0] == name
        ]
        macs = f"{run['multiply_adds'] / 1e6:,.1f} M"
        lines.append(f"| `{name}` | {run['parameters']:,} | {macs} | {', '.join(grown) or '-'} |")
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
    lines = []
    for ours in OURS:
        if "throughput" in results and ours in results["throughput"]["contestants"]:
            lines += throughput_table(results, ours) + summary(results, ours)
    for section, table in (
        ("accuracy", accuracy_table),
        ("cost", cost_table),
        ("profile", profile_table),
        ("cuda", gpu_table),
    ):
        lines += table(results) if section in results else []
    where = next((run["machine"] for run in results.values()), None)
    if where is None:
        return "Machine: nothing measured yet."
    libraries = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    place = f"Machine: {where['processor']}, {where['threads']} threads; {libraries}."
    if any(run.get("engine") for run in results.values()):
        place += " The compiled engine ran."
    return "\n".join([*lines, "", place]).strip()
