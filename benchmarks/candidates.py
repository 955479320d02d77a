"""Other forms of the sparse branch for ablation.py: what a token knows, how tokens are pooled.

Each is a function that changes a SparseAttnNet (`variant="context"`) in place, before it is trained.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from sklearn_sparseattn.network import pixel_tokens
from sklearn_sparseattn.network.fine import EPSILON, FineAttention

# ---- what a token knows of its surroundings ----


def single_pixel(network):
    """Position and values of the pixel alone, as in the paper; choice and gates as they are."""
    for convolve in network.context.convolve:
        nn.init.zeros_(convolve[1].weight)
    network.context.requires_grad_(False)


def coarse_features(network):
    """The coarse features at the pixel's own cells, without a convolution."""
    for convolve in network.context.convolve:
        nn.init.zeros_(convolve[0].weight)
        nn.init.ones_(convolve[0].weight[..., 1, 1])
        convolve[0].weight.requires_grad_(False)


def patches(size, beside_context, network):
    """The size x size pixels around each, instead of what the coarse network saw there, or beside it."""
    network.compiled = False
    n_channels, embed_dim = network.form["n_channels"], network.form["embed_dim"]
    network.patches = nn.Conv2d(n_channels, embed_dim, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(network.patches.weight, nonlinearity="relu")
    if not beside_context:
        network.context.requires_grad_(False)
    network.hidden_tokens = partial(tokens_of_patches, network, beside_context)


def tokens_of_patches(network, beside_context, images, pixels, scores, maps):
    """In place of `hidden_tokens`: the patches of the chosen pixels, and no others, times the kernels."""
    width, side = images.shape[-1], network.patches.kernel_size[0]
    framed = F.pad(images - network.coarse.background, [side // 2] * 4)
    row = pixels.div(width, rounding_mode="floor")
    first = row * framed.shape[-1] + pixels - row * width  # upper left corner of each patch
    within = torch.arange(side, device=pixels.device)
    at = first.unsqueeze(-1) + (within.unsqueeze(1) * framed.shape[-1] + within).flatten()
    around = framed.flatten(2).gather(2, at.flatten(1).unsqueeze(1).expand(-1, framed.shape[1], -1))
    around = around.unflatten(2, at.shape[1:]).transpose(1, 2).flatten(2)
    known = around @ network.patches.weight.flatten(1).T
    if beside_context:
        known = known + network.context(maps, pixels, width)
    hidden = network.embedding.hidden(pixel_tokens(images, pixels), known)
    return hidden * network.gates(scores, pixels).unsqueeze(-1)


# ---- how tokens are pooled ----


def attended(fine, queries, tokens):
    """Attention of eq. 6-12, E = [tokens ; cls]: what each query, (B, n, heads, columns), reads, and A.

    Gives means (B, n, D) over the heads, and A without its last row, (B, heads, k, columns).
    """
    joint = torch.cat([tokens, fine.cls_token.expand(len(tokens), 1, -1)], dim=1)
    key = F.relu(fine.key(joint)).unflatten(-1, (fine.n_heads, -1)).transpose(1, 2) + EPSILON
    attention = key / key.sum(2, keepdim=True)
    context = attention.transpose(2, 3) @ fine.value(joint).unsqueeze(1)
    return torch.einsum("bnhc,bhcd->bnd", queries, context) / fine.n_heads, attention[:, :, :-1]


def image_query(network):
    """The query is the CLS token's and one of the image's pooled features together."""
    network.compiled = False
    width = network.fine.query.out_features
    network.image_query = nn.Linear(network.coarse.n_features, width, bias=False)
    network.attend = partial(attend_with_image_query, network)


def attend_with_image_query(network, images, pixels, scores, maps):
    """In place of `attend`."""
    fine, cells = network.fine, maps[-1].flatten(2)
    tokens = network.embedding.out(network.hidden_tokens(images, pixels, scores, maps))
    of_image = network.image_query(torch.cat([cells.mean(-1), cells.amax(-1)], dim=1))
    query = (of_image + fine.query(fine.cls_token[0])).unflatten(-1, (fine.n_heads, -1))
    read, attention = attended(fine, query.unsqueeze(1), tokens)
    contribution = torch.einsum("bhc,bhkc->bk", query, attention) / fine.n_heads
    return read[:, 0], attention.mean((1, 3)), contribution


def second_layer(network):
    """Two layers of attention over the tokens: in the first every token asks, at a cost linear in k, too."""
    network.compiled = False
    embed_dim = network.form["embed_dim"]
    network.first_layer = FineAttention(embed_dim, network.form["n_heads"])
    network.first_norm = nn.LayerNorm(embed_dim)
    network.attend = partial(attend_twice, network)


def attend_twice(network, images, pixels, scores, maps):
    """In place of `attend`."""
    first = network.first_layer
    tokens = network.embedding.out(network.hidden_tokens(images, pixels, scores, maps))
    read, _ = attended(first, first.query(tokens).unflatten(-1, (first.n_heads, -1)), tokens)
    return network.fine.attend(tokens + network.first_norm(read))


# ---- a cheaper coarse network ----


def every_fourth(network):
    """First convolution at every fourth pixel instead of every second: a quarter of the cells everywhere."""
    network.coarse.early[0].stride = (4, 4)
    network.coarse.steps = network.context.steps = (4, 8)
