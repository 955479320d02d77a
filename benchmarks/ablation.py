"""What does each part add? One thing at a time is changed in SparseAttnClassifier, by the same splits.

    python benchmarks/ablation.py                                  # all that ablation.json does not hold yet
    python benchmarks/ablation.py --variants random_pixels,coarse_only --data pbc5,event --seeds 5 --jobs 2
    python benchmarks/ablation.py --costs                          # what candidates cost; nothing beside it
    python benchmarks/ablation.py --tables                         # only rewrite the tables of README.md

The harness is that of accuracy.py, and its runs of `sparseattn` are what the variants are held against; its
runs of our other forms (`OTHERS`) are among the variants. Parts are taken out or replaced in the network
itself, when its training begins, by `Change`; everything else of the fit stays as it is.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import accuracy
import candidates
import data_sets
import numpy as np
import torch
from accuracy import difference, measure_all, names_of, ours, runs_of, spread
from report import machine, put_into, record, recorded
from skorch.callbacks import Callback, GradientNormClipping
from timing import in_turns, rate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sklearn_sparseattn.network import SparseAttnNet, pixel_tokens, select_pixel_set
from sklearn_sparseattn.network.coarse import CoarseLook
from sklearn_sparseattn.network.selection import turns

HERE = Path(__file__).resolve().parent
RESULTS, COSTS, README = HERE / "ablation.json", HERE / "ablation_costs.json", HERE / "README.md"
OTHERS = (  # of accuracy.py
    "sparseattn_paper_form",
    "sparseattn_consistent",
    "sparseattn_7x7",
    "sparseattn_consistent_7x7",
    "sparseattn_deep_7x7",
    "sparseattn_consistent_deep_7x7",
    "sparseattn_consistent_deep_7x7_long",
)
DATA = ("pbc5", "pbc5_few", "jurkat", "event", "tcell")


# ---- controls: what replaces a part of the network ----


class Change(Callback):
    """Change the network before it is trained; what is changed stays so in the fitted estimator.

    Weights that come in with a change are drawn from PyTorch's global generator, and trained as the others.
    """

    def __init__(self, change):
        self.change = change

    def on_train_begin(self, net, X=None, y=None, **kwargs):
        """Apply it."""
        before = set(net.module_.parameters())
        self.change(net.module_)
        new = [weight for weight in net.module_.parameters() if weight not in before]
        net.optimizer_.param_groups[0]["params"].extend(new)


class Nothing(nn.Module):
    """Zeros in place of what comes in."""

    def forward(self, features):
        """Keep the shape."""
        return torch.zeros_like(features)


class WithoutPooled(nn.Module):
    """A coarse network whose pooled features are withheld."""

    def __init__(self, coarse):
        super().__init__()
        self.coarse = coarse

    def look(self, images):
        """Zeros for z_coarse."""
        scores, z_coarse, maps = self.coarse.look(images)
        return CoarseLook(scores, torch.zeros_like(z_coarse), maps)


def coarse_only(network):
    network.fine_norm = Nothing()


def fine_only(network):
    network.coarse = WithoutPooled(network.coarse)


def choose_by(rank, network):
    """Choose the pixels of the highest `rank` (images -> (B, H, W)) instead of those of the highest score."""
    without("margin", network)  # above the ranks of others: of no meaning here
    network.choose = partial(chosen_by, rank, network.k)


def chosen_by(rank, k, images, scores):
    n_pixels = scores[0].numel()
    return select_pixel_set(rank(images), min(max(int(k.item() + 0.5), 1), n_pixels))


def at_random(images):
    return torch.rand(images.shape[0], *images.shape[2:], device=images.device)


def evenly(images):
    """Pixels that lie evenly over the image: as scores that are all alike are spread."""
    height, width = images.shape[2:]
    tile = torch.from_numpy(-turns(4)).to(images)
    return tile.repeat(-(-height // 4), -(-width // 4))[:height, :width].expand(len(images), -1, -1)


def brightness(images):
    return images.mean(1)


def darkness(images):
    return -images.mean(1)


def gradient(images):
    """Squared length of the gradient, by central differences."""
    padded = nn.functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    return down.square() + right.square()


def without(name, network):
    network.form = network.form | {name: 0.0}


def ungated(network):
    network.compiled = False
    network.hidden_tokens = partial(tokens_without_gate, network.embedding, network.context)


def tokens_without_gate(embedding, context, images, pixels, scores, maps):
    return embedding.hidden(pixel_tokens(images, pixels), context(maps, pixels, images.shape[-1]))


def changed(change, **params):
    return {"callbacks": [Change(change)], **params}


def cheaper_coarse_only(network):
    """What the sparse branch is worth on top of a coarse network of a quarter of the cells."""
    candidates.every_fourth(network)
    coarse_only(network)


def cheaper_coarse_and_patches(network):
    """Instead of what that network does not see, the image itself around the chosen pixels."""
    candidates.every_fourth(network)
    candidates.patches(5, True, network)


def fixed_k(share):
    return {"k_init": share, "k_min": share, "k_max": share}


# name -> parameters of SparseAttnClassifier that differ from the defaults.
VARIANTS = {
    "coarse_only": changed(coarse_only),
    "coarse_only_deep": changed(coarse_only, variant="paper"),
    "fine_only": changed(fine_only),
    "paper_form": {"variant": "paper"},
    "random_pixels": changed(partial(choose_by, at_random)),
    "even_pixels": changed(partial(choose_by, evenly)),
    "brightest_pixels": changed(partial(choose_by, brightness)),
    "darkest_pixels": changed(partial(choose_by, darkness)),
    "steepest_pixels": changed(partial(choose_by, gradient)),
    "not_spread": changed(partial(without, "spread")),
    "no_margin": changed(partial(without, "margin")),
    "ungated": changed(ungated),
    "single_pixel_tokens": changed(candidates.single_pixel),
    "coarse_feature_tokens": changed(candidates.coarse_features),
    **{f"patch_tokens_{n}x{n}": changed(partial(candidates.patches, n, False)) for n in (3, 5, 7)},
    "context_and_patch_tokens_5x5": changed(partial(candidates.patches, 5, True)),
    "image_query": changed(candidates.image_query),
    "second_layer": changed(candidates.second_layer),
    "cheaper_coarse": changed(candidates.every_fourth, kernel_size=5),
    "cheaper_coarse_and_patches": changed(cheaper_coarse_and_patches, kernel_size=5),
    "cheaper_coarse_only": changed(cheaper_coarse_only, kernel_size=5),
    "no_contrastive": {"contrastive_weight": 0.0},
    "no_distillation": {"distillation_weight": 0.0},
    "distillation_as_printed": {"distillation_emphasis": None},
    "consistent": {"consistency_weight": 1.0},
    "open_gates": {"gate_init": 0.88},
    "less_consistent_open_gates": {"consistency_weight": 0.5, "gate_init": 0.88},
    "clipped_consistent_open_gates": {
        "callbacks": [GradientNormClipping(1.0)],
        "consistency_weight": 1.0,
        "gate_init": 0.88,
    },
    "focal": {"focal_gamma": 2.0},
    **{f"k={share}%": fixed_k(share / 100) for share in (0.5, 1, 2, 5, 10, 15, 30, 100)},
    **{
        f"random_pixels_k={share}%": changed(partial(choose_by, at_random), **fixed_k(share / 100))
        for share in (0.5, 1, 2)
    },
    "k_init=0.2": {"k_init": 0.2},
    "k_init=1": {"k_init": 1.0},
    "k_update=batch": {"k_update": "batch"},
    "embed_dim=16": {"embed_dim": 16},
    "embed_dim=64": {"embed_dim": 64},
    "n_heads=1": {"n_heads": 1},
    "n_heads=4": {"n_heads": 4},
    "hidden_dim=64": {"hidden_dim": 64},
    "hidden_dim=512": {"hidden_dim": 512},
    "temperature=0.2": {"temperature": 0.2},
    "lr=5e-3": {"lr": 5e-3},
    "lr=2e-2": {"lr": 2e-2},
    "lr=1e-3": {"lr": 1e-3},
    "lr=1e-3_plateau": {"lr": 1e-3, "lr_schedule": "plateau"},
    "max_epochs=15": {"max_epochs": 15},
    "max_epochs=30": {"max_epochs": 30},
    "max_epochs=120": {"max_epochs": 120},
    "batch_size=64": {"batch_size": 64},
    "weight_decay=0": {"weight_decay": 0.0},
    "weight_decay=1e-2": {"weight_decay": 1e-2},
    "weight_decay=1e-1": {"weight_decay": 1e-1},
    "early_stopping": {"early_stopping": True},
}


# ---- costs ----

CANDIDATES = (
    *("default", "paper_form", "single_pixel_tokens", "coarse_feature_tokens"),
    *(f"patch_tokens_{n}x{n}" for n in (3, 5, 7)),
    *("context_and_patch_tokens_5x5", "image_query", "second_layer", "cheaper_coarse"),
    *("cheaper_coarse_and_patches", "cheaper_coarse_only", "coarse_only", "coarse_only_deep", "embed_dim=64"),
)


def network_of(name):
    """One channel, three classes, in evaluation; all but the selection is PyTorch's, on the same footing.

    Without a sparse branch the coarse network is all that has to be computed, but for the last layers.
    """
    variant = VARIANTS.get(name, {})
    form = {key: value for key, value in variant.items() if key != "callbacks"}
    network = SparseAttnNet(1, 3, 2146, **form)
    for callback in variant.get("callbacks", ()):
        callback.change(network)
    network.compiled = network.coarse.compiled = False
    return (network.coarse if "coarse_only" in name else network).eval()


def measure_costs(path, size=135, n_images=32, n_rounds=9, seconds=0.5):
    """Parameters, multiply-adds and images a second of each candidate, in turns, on one thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.rand(n_images, 1, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks = {name: network_of(name) for name in CANDIDATES}
            rates = in_turns(
                networks, n_rounds, lambda network: rate(lambda: len(network(images)[0]), seconds)
            )
            for name, network in networks.items():
                with FlopCounterMode(display=False) as counter:
                    network(images[:1])
                cost = {
                    "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
                    "multiply_adds": counter.get_total_flops() // 2,
                    "images_per_second": rates[name],
                    "machine": machine(),
                }
                record(path, name, cost)
    finally:
        torch.set_num_threads(n_threads)


def cost_table(costs):
    """By candidate: the median of the rounds, and the ratios to the round's own default with their range."""
    lines = [
        "| variant | parameters | multiply-adds, M | images/s | against default |",
        "|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        rates, default = (np.array(costs[each]["images_per_second"]) for each in (name, "default"))
        figures = f"{cost['parameters']:,} | {cost['multiply_adds'] / 1e6:.1f} | {np.median(rates):.0f}"
        ratios = rates / default
        span = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
        lines.append(f"| `{name}` | {figures} | {span} |")
    return "\n".join([*lines, "", accuracy.where(costs)])


# ---- tables ----


def variant_row(name, runs, default):
    found = list(runs.values())
    columns = [spread(found, column) for column in ("accuracy", "balanced_accuracy")]
    columns += [spread(found, "ece", factor=1, digits=3), spread(found, "share")]
    differences = [""] * 4
    if name != "default" and runs.keys() & default.keys():
        differences = [
            text for column in ("accuracy", "balanced_accuracy") for text in difference(runs, default, column)
        ]
    return f"| `{name}` | {len(runs)} | {' | '.join([*columns, *differences])} |"


def tables(results, results_of_default):
    lines = []
    for data, title in data_sets.TITLES.items():
        default = runs_of(results_of_default, data, "sparseattn")
        variants = {name: runs_of(results_of_default, data, name) for name in OTHERS}
        variants |= {name: runs_of(results, data, name) for name in VARIANTS}
        if any(variants.values()):
            rows = {"default": default, **variants}
            lines += [
                f"### {title[0].upper()}{title[1:]}",
                "",
                "| variant | n | accuracy % | balanced accuracy % | calibration error | k, % of the image "
                "| accuracy against default, points | | balanced accuracy, points | |",
                "|---|---|---|---|---|---|---|---|---|---|",
                *(variant_row(name, runs, default) for name, runs in rows.items() if runs),
                "",
            ]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", type=names_of(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--data", type=names_of(data_sets.DATA_SETS), default=list(DATA))
    parser.add_argument("--seeds", type=int, default=5, help="how many splits of each data set, at most 30")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--costs", action="store_true", help="measure what the candidates cost, and no more")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    models = {name: ours(**VARIANTS[name]) for name in options.variants}
    well = True
    if options.costs:
        measure_costs(COSTS)
    elif not options.tables:
        well = measure_all(RESULTS, models, options.data, options.seeds, options.jobs)
    put_into(README, "ablation", tables(recorded(RESULTS), recorded(accuracy.RESULTS)))
    if costs := recorded(COSTS):
        put_into(README, "candidates", cost_table(costs))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
