"""What does each part add? One thing at a time is changed in SparseAttnClassifier, by the same splits.

    python benchmarks/ablation.py                                  # all that ablation.json does not hold yet
    python benchmarks/ablation.py --variants random_tiles,coarse_only --data pbc5_few --seeds 10 --jobs 2
    python benchmarks/ablation.py --tables                         # only rewrite the tables of README.md

The harness is that of accuracy.py, and its runs of `tiles` are the default that the variants are held
against: measure those first, as `random_tiles` takes its k from them. Parts are taken out or replaced in the
network itself, when its training begins, by `Change`; everything else of the fit stays as it is.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import accuracy
import data_sets
import numpy as np
import torch
from accuracy import difference, measure_all, names_of, ours, runs_of, spread
from report import put_into, recorded
from skorch.callbacks import Callback

from sklearn_sparseattn import DynamicK
from sklearn_sparseattn.network import SparseAttnNet, SparseAttnOutput, TileTokens
from sklearn_sparseattn.network.sparse_attn_net import SIZES

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "ablation.json", HERE / "README.md"
DATA = ("pbc5_few", "event", "jurkat", "pbc5_128_few")


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


def become(kind, network):
    """Let a network compute as another kind of SparseAttnNet does; weights and all else stay."""
    network.__class__ = kind


class Withheld(SparseAttnNet):
    """Some of the fused features are zero: the classifier does not see them, and nothing learns by them."""

    withheld = ()

    def forward(self, images):
        """As that of SparseAttnNet, but for these."""
        scores, z_coarse, maps = self.coarse.look(images)
        tiles = self.choose(images, scores)
        kept = self.kept(tiles, *images.shape[2:])
        tokens = self.tile_tokens(scores, maps, tiles, kept)
        z_fine, attention, contribution = self.fine.attend(tokens, self.tokens.out, kept)
        parts = {"pooled": self.fine_norm(z_fine), "maximum": tokens.amax(1), "coarse": z_coarse}
        features = torch.cat(
            [torch.zeros_like(part) if name in self.withheld else part for name, part in parts.items()], dim=1
        )
        return SparseAttnOutput(self.fusion(features), features, scores, tiles, attention, contribution)


class CoarseOnly(Withheld):
    """All that comes from tiles is withheld."""

    withheld = ("pooled", "maximum")


class NoMaximum(Withheld):
    """Tokens are pooled by attention alone."""

    withheld = ("maximum",)


class NoCoarse(Withheld):
    """The classifier sees tokens alone."""

    withheld = ("coarse",)


class Open(SparseAttnNet):
    """No gate closes towards the threshold of the choice."""

    def openness(self, scores, tiles, kept=None):
        """1 throughout."""
        return torch.ones_like(tiles, dtype=scores.dtype) * (1 if kept is None else kept)


class RandomTiles(Open):
    """As many tiles as the scores would choose, drawn anew in every pass."""

    def choose(self, images, scores):
        """Tiles in random order."""
        flat = scores.flatten(1)
        return torch.rand_like(flat).argsort(1)[:, : self.n_chosen(*images.shape[2:])]


def with_layers(n_layers, network):
    """Another number of layers between tiles."""
    old, coarse = network.tokens, network.coarse
    channels = coarse.early[0].out_channels, coarse.middle[0].out_channels
    network.tokens = TileTokens(channels, old.stride, old.out.in_features, n_layers)


# ---- rules of k ----


class Undrawn(DynamicK):
    """k by worth, but each image is trained with k itself."""

    def draw(self, k, n, exploring=None):
        """None is drawn."""


def held(share, *changes):
    """Hold k at a share of the pixels; images are trained with k drawn about it, as by default."""
    return {"k_init": share, "callbacks": [DynamicK(step=1e-12), *changes]}


def published_rule():
    """Its constants as shares of 135×135 pixels, of which they were published."""
    n = 135**2
    return DynamicK.paper(k_min=1500 / n, k_max=1.0, shrink=50 / n, grow=80 / n)


def changed(change, **params):
    return {"callbacks": [Change(change)], **params}


# name -> parameters of SparseAttnClassifier that differ from the defaults.
VARIANTS = {
    "coarse_only": changed(partial(become, CoarseOnly), distillation_weight=0.0),
    "random_tiles": None,  # see `variants_for`
    "all_tiles": {"k_min": 1.0},
    **{
        f"layers={n}": changed(partial(with_layers, n))
        for n in (0, 1, 2, 3)
        if n != SIZES["default"]["n_layers"]
    },
    "no_token_maximum": changed(partial(become, NoMaximum)),
    "no_z_coarse": changed(partial(become, NoCoarse)),
    "no_ramp": changed(partial(become, Open)),
    "k=8.2%": held(1500 / 135**2),
    "published_rule": {"callbacks": [published_rule()]},
    "k_init=5%": {"k_init": 0.05},
    "k_not_drawn": {"callbacks": [Undrawn()]},
    "no_contrastive": {"contrastive_weight": 0.0},
    "no_distillation": {"distillation_weight": 0.0},
    "focal": {"focal_gamma": 2.0},
    "weight_decay=1e-4": {"weight_decay": 1e-4},
}


def variants_for(data, names, results_of_default):
    """Factories by name; random tiles are held at the mean share that the default's fits ended with."""
    params = {name: VARIANTS[name] for name in names}
    if "random_tiles" in params:
        shares = [run["share"] for run in runs_of(results_of_default, data, "tiles").values()]
        if shares:
            change = Change(partial(become, RandomTiles))
            params["random_tiles"] = held(float(np.mean(shares)), change)
        else:
            print(f"{data}/random_tiles left out: run accuracy.py --models tiles first", flush=True)
            del params["random_tiles"]
    return {name: ours(**changes) for name, changes in params.items()}


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
        default = runs_of(results_of_default, data, "tiles")
        variants = {name: runs_of(results, data, name) for name in VARIANTS}
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
    return "\n".join([*lines, accuracy.where(results)]) if lines else "Not measured yet."


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", type=names_of(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--data", type=names_of(data_sets.DATA_SETS), default=list(DATA))
    parser.add_argument("--seeds", type=int, default=5, help="how many splits of each data set, at most 30")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    well = True
    for data in () if options.tables else options.data:
        models = variants_for(data, options.variants, recorded(accuracy.RESULTS))
        well &= measure_all(RESULTS, models, [data], options.seeds, options.jobs)
    put_into(README, "ablation", tables(recorded(RESULTS), recorded(accuracy.RESULTS)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
