"""Maps of where a model's answer came from, and how good such a map is.

A map is an array (n, H, W), a higher value for more; it may be signed. Those of explanation.py's models are
made here: `maps_of_ours` and `maps_of_cnn`; `controls` need no model. The measures take any map.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from peers import with_channels
from scipy.integrate import trapezoid
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

from sklearn_sparseattn.images import PixelScale
from sklearn_sparseattn.inference.evidence import evidence

# Of the pixels, removed or revealed; the steps are short where the curves are steep.
SHARES = np.array([0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 1])


# ---- measures ----


def mass_within(maps, masks):
    """Share of each map's sum that lies where its mask is true; negative values count as nothing."""
    maps = np.maximum(maps, 0).reshape(len(maps), -1).astype(float)
    inside = (maps * masks.reshape(len(maps), -1)).sum(axis=1)
    total = maps.sum(axis=1)
    # A map that says nothing says it everywhere alike.
    return np.where(total > 0, inside / np.where(total > 0, total, 1), masks.mean(axis=(1, 2)))


def pointing_game(maps, masks):
    """Whether each map's highest value lies where its mask is true."""
    best = maps.reshape(len(maps), -1).argmax(axis=1)
    return masks.reshape(len(maps), -1)[np.arange(len(maps)), best]


def frame_of(shape, share=0.05):
    """Mask of the outermost pixels, (H, W): a strip along each side, `share` of that side wide."""
    height, width = shape
    strip = max(1, round(share * min(height, width)))
    frame = np.ones(shape, dtype=bool)
    frame[strip : height - strip, strip : width - strip] = False
    return frame


def background(images):
    """What stands for a removed pixel: each image's median along its sides, by channel, (n, 1, 1, C)."""
    rows = with_channels(images)
    outer = rows[:, frame_of(rows.shape[1:3], 0.0)]
    return np.median(outer, axis=1).astype(images.dtype)[:, None, None]


def ranking(maps, ties, side=1):
    """Row-major indices (n, H * W) of the pixels, highest value first; equal ones by `ties`, (n, H, W).

    With `side` they come in squares of that side, in the order of the squares' sums: maps of different grain
    are then compared by the places that they name.
    """
    height, width = maps.shape[1:]
    square = (np.arange(height) // side)[:, None] * -(-width // side) + np.arange(width) // side
    orders = []
    for values, tie in zip(maps, ties, strict=True):
        key, second = (np.bincount(square.ravel(), part.ravel())[square].ravel() for part in (values, tie))
        orders.append(np.lexsort((square.ravel(), second, key))[::-1])
    return np.stack(orders)


def perturbed(image, blank, order, shares, *, insert):
    """One image with the first pixels of `order` removed, or with these alone: (len(shares), H, W, C)."""
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(len(order))
    first = rank < np.round(np.asarray(shares)[:, None] * len(order))
    first = first.reshape(len(shares), *image.shape[:2], 1)
    return np.where(first == insert, image, blank)


def curves(predict_proba, images, labels, orders, *, insert, shares=SHARES):
    """Probability of `labels` (column numbers) while pixels are removed, or revealed: (n, len(shares))."""
    rows, blank = with_channels(images), background(images)
    found = []
    for i, (label, order) in enumerate(zip(labels, orders, strict=True)):
        stack = perturbed(rows[i], blank[i], order, shares, insert=insert)
        found.append(predict_proba(stack.reshape(-1, *images.shape[1:]))[:, label])
    return np.array(found)


def area(curve, shares=SHARES):
    """Area under each curve, by trapezoids."""
    return trapezoid(curve, shares, axis=-1)


# ---- maps that need no model, or any ----


def controls(images, rng):
    """Pixels at random, by brightness, and by how far they are from the background."""
    rows = with_channels(images).astype(float)
    return {
        "random": rng.random(rows.shape[:3]),
        "brightness": rows.mean(axis=3),
        "contrast": np.abs(rows - background(images)).mean(axis=3),
    }


def grad_cam(network, layer, inputs, labels):
    """Grad-CAM of a layer, positive part, interpolated to the image size."""
    from captum.attr import LayerAttribution, LayerGradCam

    maps = LayerGradCam(network, layer).attribute(inputs, labels, relu_attributions=True)
    return LayerAttribution.interpolate(maps, inputs.shape[2:], "bilinear")[:, 0].detach().numpy()


def integrated_gradients(network, inputs, labels, blank, n_steps=16):
    """Integrated gradients from `blank` on, absolute values summed over the channels."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(network)
    maps = method.attribute(inputs, blank.expand_as(inputs), labels, n_steps=n_steps)
    return maps.abs().sum(1).detach().numpy()


def scaled(scale, images):
    """Images as the networks take them."""
    return torch.from_numpy(np.ascontiguousarray(scale(with_channels(images))))


# ---- ours ----


class OursLogits(nn.Module):
    """A copy in PyTorch that gives logits alone."""

    def __init__(self, network):
        super().__init__()
        self.network = copy.deepcopy(network).eval()

    def forward(self, images):
        """(B, C, H, W) -> (B, n_classes)."""
        return self.network(images).logits


class Parts(NamedTuple):
    """A pass of SparseAttnNet, taken apart."""

    scores: torch.Tensor  # (B, rows, columns)
    tiles: torch.Tensor  # (B, n)
    tokens: torch.Tensor  # (B, n, D)
    z_coarse: torch.Tensor  # (B, F)


@torch.no_grad()
def take_apart(network, inputs):
    scores, z_coarse, maps = network.coarse.look(inputs)
    tiles = network.choose(inputs, scores)
    return Parts(scores, tiles, network.tile_tokens(scores, maps, tiles), z_coarse)


def pooled(network, tokens):
    """What the classifier is given of the tokens: their attention-weighted sum, normed, and their maximum."""
    z_fine = network.fine.attend(tokens, network.tokens.out)[0]
    return torch.cat([network.fine_norm(z_fine), tokens.amax(1)], dim=1)


def answer(network, of_tokens, z_coarse):
    """Logits of the two halves of the fused features."""
    return network.fusion(torch.cat([of_tokens, z_coarse], dim=1))


def sum_by_tile(maps, tile):
    """(n, H, W) -> (n, tiles), in raster order."""
    _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (0, -height % tile), (0, -width % tile)))
    n, height, width = padded.shape
    return padded.reshape(n, height // tile, tile, width // tile, tile).sum(axis=(2, 4)).reshape(n, -1)


def without_tokens(network, parts, maps, labels, share=0.1):
    """Probability of the label when a share of the tokens is dropped, those of the highest values, (B,)."""
    values = torch.from_numpy(sum_by_tile(maps, network.tile)).gather(1, parts.tiles)
    kept = values.argsort(1, descending=True)[:, round(share * values.shape[1]) :]
    tokens = parts.tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, parts.tokens.shape[2]))
    with torch.no_grad():
        logits = answer(network, pooled(network, tokens), parts.z_coarse)
        return logits.softmax(1).gather(1, labels[:, None])[:, 0].numpy()


def paths(network, parts, target):
    """Accuracy without one half of the fused features, which is put to its mean over the images."""
    with torch.no_grad():
        halves = {"tokens": pooled(network, parts.tokens), "pooled": parts.z_coarse}
        found = {}
        for name, half in halves.items():
            logits = answer(network, *(halves | {name: half.mean(0, keepdim=True).expand_as(half)}).values())
            found[f"without_{name}"] = float(np.mean(logits.argmax(1).numpy() == target))
    return found


def gradient_times_input(network, inputs, labels, blank):
    """How the log-odds of the label change, to first order, when a pixel comes out of the background."""
    inputs = inputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_odds(network(inputs), labels).sum(), inputs)
    return ((inputs - blank) * gradient).sum(1).detach().numpy()


def log_odds(logits, labels):
    """Of each row's label against all the others, (B,)."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return own - others.logsumexp(1)


def maps_of_ours(estimator, images, labels, *, quick=False):
    """Maps by name; with `quick` those alone that the estimator gives."""
    found = estimator.attention_maps(images)
    evidence_maps = estimator.evidence_maps(images, estimator.classes_[labels])
    maps = {
        "fine attention": found.fine,
        "chosen pixels": found.chosen.astype(float),
        "coarse attention": found.coarse,
        "contribution, absolute": np.abs(found.contribution),
        "evidence": evidence_maps,
        "evidence, absolute": np.abs(evidence_maps),
    }
    if quick:
        return maps
    scale = PixelScale(estimator.data_range_)
    inputs, target = scaled(scale, images), torch.as_tensor(labels)
    blank = scaled(scale, background(images))
    logits = OursLogits(estimator.network_)
    of_tokens, _ = evidence(logits.network, inputs, target)
    product = in_parts(gradient_times_input, logits, inputs, target, blank)
    contrast = np.abs(with_channels(images).astype(float) - background(images)).mean(axis=3)
    return maps | {
        "evidence of the tokens": of_tokens.numpy(),
        "fine attention, spread": spread_out(found.fine),
        "fine attention, spread, × contrast": spread_out(found.fine) * contrast,
        "gradient × input": product,
        "gradient × input, absolute": np.abs(product),
        "integrated gradients": in_parts(integrated_gradients, logits, inputs, target, blank),
        "Grad-CAM": grad_cam(logits, logits.network.coarse.middle, inputs, target),
        "occlusion": estimator.occlusion_maps(images, estimator.classes_[labels]),
    }


def spread_out(maps, sigma=5.0):
    """Each map blurred: what a token begins with comes from about 15×15 pixels."""
    return np.stack([gaussian_filter(one, sigma) for one in maps])


def in_parts(method, network, inputs, labels, blank, size=8):
    """As many images at a time as memory holds well."""
    parts = [slice(i, i + size) for i in range(0, len(inputs), size)]
    return np.concatenate([method(network, inputs[part], labels[part], blank[part]) for part in parts])


# ---- convolutional networks ----


def maps_of_cnn(peer, images, labels):
    """Grad-CAM of the last layer and of the last at a sixteenth of the size, and integrated gradients."""
    network = peer.trainer_.module_.eval()
    inputs, target = scaled(peer.scale_, images), torch.as_tensor(labels)
    blank = scaled(peer.scale_, background(images))
    backbone = network.network.mobilenet_v2
    return {
        "Grad-CAM": grad_cam(network, backbone.conv_1x1, inputs, target),
        "Grad-CAM, stride 16": grad_cam(network, backbone.layer[12], inputs, target),
        "integrated gradients": in_parts(integrated_gradients, network, inputs, target, blank),
    }
