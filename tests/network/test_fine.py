"""The fine attention against equations 5-13 of the paper, written out head by head."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sklearn_sparseattn.network import FineAttention, PixelEmbedding

EPSILON = 1e-6
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}

shapes = st.fixed_dictionaries(
    {
        "n_images": st.integers(1, 3),
        "k": st.integers(1, 40),
        "embed_dim": st.integers(1, 12),
        "n_heads": st.integers(1, 5),
        "seed": st.integers(0, 2**32 - 1),
    }
).filter(lambda s: s["n_heads"] <= s["embed_dim"])


def make_fine(embed_dim, n_heads, seed):
    """Float64, all weights normal: larger than PyTorch's default, so that mistakes show."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    fine = FineAttention(embed_dim, n_heads).double()
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.normal_(generator=generator)
    return fine


def make_case(n_images, k, embed_dim, n_heads, seed):
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.normal(size=(n_images, k, embed_dim)))
    return make_fine(embed_dim, n_heads, seed), tokens


def literal(tokens, cls, w_query, w_key, w_value, n_heads):
    """Equations 5-13 for one image in NumPy; W as the paper multiplies it, from the right.

    Gives z_fine, the attention of the tokens, and w for all k + 1 rows.
    """
    embeddings = np.vstack([tokens, cls])
    values = embeddings @ w_value
    head_dim = len(cls) // n_heads
    z_fine = np.zeros(len(cls))
    attention = np.zeros(len(embeddings))
    w = np.zeros(len(embeddings))
    for h in range(n_heads):
        columns = slice(h * head_dim, (h + 1) * head_dim)
        key = np.maximum(embeddings @ w_key[:, columns], 0) + EPSILON
        a = np.empty_like(key)
        for c in range(head_dim):
            a[:, c] = key[:, c] / key[:, c].sum()
        context = a.T @ values
        query = cls @ w_query[:, columns]
        z_fine += query @ context / n_heads
        attention += a.sum(axis=1) / (n_heads * head_dim)
        w += a @ query / n_heads
    return z_fine, attention[:-1], w


def weights_of(fine):
    """The parameters as `literal` takes them."""
    linear = [layer.weight.detach().numpy().T for layer in (fine.query, fine.key, fine.value)]
    return fine.cls_token.detach().numpy()[0, 0], *linear, fine.n_heads


def assert_literal(fine, tokens, found):
    """`found` is (z_fine, attention, contribution), the last one optional."""
    for b, image in enumerate(tokens.detach().numpy()):
        z_fine, attention, w = literal(image, *weights_of(fine))
        for got, expected in zip(found, (z_fine, attention, w[:-1]), strict=False):
            np.testing.assert_allclose(got[b].detach().numpy(), expected, **TOLERANCE)


@given(shape=shapes)
@example(shape={"n_images": 2, "k": 1, "embed_dim": 1, "n_heads": 1, "seed": 0})
@example(shape={"n_images": 2, "k": 1, "embed_dim": 7, "n_heads": 3, "seed": 0})
@example(shape={"n_images": 1, "k": 300, "embed_dim": 32, "n_heads": 2, "seed": 1})
def test_forward_is_the_literal_form(shape):
    fine, tokens = make_case(**shape)
    assert_literal(fine, tokens, fine(tokens))
    assert_literal(fine, tokens, fine.attend(tokens))


@given(shape=shapes, hidden_dim=st.integers(1, 9))
def test_the_folded_projection_changes_nothing(shape, hidden_dim):
    fine, _ = make_case(**shape)
    rng = np.random.default_rng(shape["seed"])
    hidden = torch.from_numpy(rng.normal(size=(shape["n_images"], shape["k"], hidden_dim)))
    projection = nn.Linear(hidden_dim, shape["embed_dim"]).double()
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    assert_literal(fine, projection(hidden), fine.attend(hidden, projection))


@pytest.mark.parametrize("k", [1, 5])
def test_keys_that_are_all_zero_share_alike(k):
    fine = make_fine(8, 2, seed=0)
    with torch.no_grad():
        fine.key.weight.abs_()
        fine.cls_token.abs_().neg_()
    tokens = -torch.rand(2, k, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fine.attend(tokens)
    assert_literal(fine, tokens, found)
    torch.testing.assert_close(found[1], torch.full((2, k), 1 / (k + 1), dtype=torch.float64))


def test_epsilon_counts_where_keys_are_small():
    """Tokens about as small as epsilon itself, where leaving it out anywhere is a large error."""
    fine, tokens = make_case(n_images=2, k=6, embed_dim=6, n_heads=2, seed=3)
    with torch.no_grad():
        fine.cls_token *= 1e-6
    tokens = tokens * 1e-6
    for got, b in itertools.product(range(3), range(2)):
        z_fine, attention, w = literal(tokens[b].numpy(), *weights_of(fine))
        expected = (z_fine, attention, w[:-1])[got]
        found = fine.attend(tokens)[got][b].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@given(shape=shapes)
def test_attention_is_a_distribution_with_the_cls_share(shape):
    fine, tokens = make_case(**shape)
    attention = fine(tokens)[1]
    assert (attention >= 0).all()
    # What is left over belongs to the CLS token, whose attention the literal form gives.
    embeddings = torch.cat([tokens, fine.cls_token.expand(len(tokens), 1, -1)], dim=1)
    key = fine.key(embeddings).relu() + EPSILON
    cls_share = (key[:, -1] / key.sum(1)).mean(1)
    torch.testing.assert_close(attention.sum(1) + cls_share, torch.ones_like(cls_share))


@given(shape=shapes)
def test_contribution_is_the_signed_weight_of_each_token(shape):
    fine, tokens = make_case(**shape)
    z_fine, _, contribution = (part.detach().numpy() for part in fine.attend(tokens))
    cls, _, _, w_value, _ = weights_of(fine)
    for b, image in enumerate(tokens.numpy()):
        w_cls = literal(image, *weights_of(fine))[2][-1]
        pooled = contribution[b] @ image + w_cls * cls
        np.testing.assert_allclose(z_fine[b], pooled @ w_value, **TOLERANCE)


def test_contribution_has_both_signs():
    fine, tokens = make_case(n_images=1, k=50, embed_dim=8, n_heads=2, seed=0)
    contribution = fine.attend(tokens)[2]
    assert contribution.min() < 0 < contribution.max()


@given(shape=shapes, data=st.data())
def test_the_order_of_the_tokens_does_not_matter(shape, data):
    fine, tokens = make_case(**shape)
    order = torch.tensor(data.draw(st.permutations(range(shape["k"]))))
    z_fine, attention, contribution = fine.attend(tokens)
    permuted = fine.attend(tokens[:, order])
    torch.testing.assert_close(permuted[0], z_fine, **TOLERANCE)
    torch.testing.assert_close(permuted[1], attention[:, order], **TOLERANCE)
    torch.testing.assert_close(permuted[2], contribution[:, order], **TOLERANCE)


@given(shape=shapes, data=st.data())
def test_images_can_have_fewer_tokens_than_others(shape, data):
    """What stands behind the tokens of an image has no part in the answer."""
    fine, tokens = make_case(**shape)
    n = data.draw(st.lists(st.integers(1, shape["k"]), min_size=len(tokens), max_size=len(tokens)))
    kept = torch.arange(shape["k"]) < torch.tensor(n).unsqueeze(1)
    together = fine.attend(tokens, kept=kept)
    for b in range(len(tokens)):
        z_fine, attention, w = literal(tokens[b, : n[b]].numpy(), *weights_of(fine))
        for found, expected in zip(together, (z_fine, attention, w[:-1]), strict=True):
            found = found[b].detach().numpy()
            np.testing.assert_allclose(found[: len(expected)], expected, **TOLERANCE)
            assert not found[len(expected) :].any()


def test_images_do_not_mix():
    fine, tokens = make_case(n_images=4, k=9, embed_dim=6, n_heads=3, seed=5)
    together = fine.attend(tokens)
    for b in range(4):
        for whole, alone in zip(together, fine.attend(tokens[b : b + 1]), strict=True):
            torch.testing.assert_close(alone[0], whole[b], **TOLERANCE)


def literal_torch(fine, tokens):
    """The literal form with autograd: C^h and a value for every token."""
    cls = fine.cls_token.expand(len(tokens), 1, -1)
    embeddings = torch.cat([tokens, cls], dim=1)
    values = fine.value(embeddings)
    z_fine, attention, w = 0, 0, 0
    heads = zip(fine.key.weight.chunk(fine.n_heads), fine.query.weight.chunk(fine.n_heads), strict=True)
    for w_key, w_query in heads:
        key = (embeddings @ w_key.T).relu() + EPSILON
        a = key / key.sum(1, keepdim=True)
        query = cls @ w_query.T
        z_fine = z_fine + (query @ (a.transpose(1, 2) @ values)).squeeze(1) / fine.n_heads
        attention = attention + a[:, :-1].mean(2) / fine.n_heads
        w = w + (a[:, :-1] @ query.transpose(1, 2)).squeeze(2) / fine.n_heads
    return z_fine, attention, w


@pytest.mark.parametrize("folded", [False, True])
@settings(max_examples=40)
@given(shape=shapes)
def test_gradients_are_those_of_the_literal_form(shape, folded):
    fine, tokens = make_case(**shape)
    tokens.requires_grad_()
    embedding = nn.Linear(shape["embed_dim"], shape["embed_dim"]).double() if folded else None
    leaves = [tokens, *fine.parameters(), *(embedding.parameters() if folded else ())]
    fast = fine.attend(tokens, embedding)
    slow = literal_torch(fine, embedding(tokens) if folded else tokens)
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(fast, slow, strict=True):
        upstream = torch.randn(a.shape, dtype=torch.float64, generator=generator)
        expected = torch.autograd.grad(b, leaves, upstream, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(a, leaves, upstream, retain_graph=True, allow_unused=True)
        for leaf, one, other in zip(leaves, found, expected, strict=True):
            zero = torch.zeros_like(leaf)
            one, other = (zero if g is None else g for g in (one, other))
            torch.testing.assert_close(one, other, **TOLERANCE)


def test_gradcheck():
    fine, tokens = make_case(n_images=2, k=4, embed_dim=5, n_heads=2, seed=11)
    module = _Attend(fine)
    names, values = zip(*module.named_parameters(), strict=True)

    def attend(tokens, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), tokens)

    assert torch.autograd.gradcheck(attend, (tokens.requires_grad_(), *values))


class _Attend(nn.Module):
    """`attend` as a forward pass, for functional_call."""

    def __init__(self, fine):
        super().__init__()
        self.fine = fine

    def forward(self, tokens):
        return self.fine.attend(tokens)


def test_parameters_are_those_of_the_paper():
    shapes = {name: tuple(p.shape) for name, p in FineAttention(32, 2).named_parameters()}
    assert shapes == {
        "cls_token": (1, 1, 32),
        "query.weight": (32, 32),
        "key.weight": (32, 32),
        "value.weight": (32, 32),
    }
    assert FineAttention(7, 3).key.weight.shape == (6, 7)


@pytest.mark.parametrize(("embed_dim", "n_heads"), [(4, 0), (4, 5), (4, -1)])
def test_heads_must_fit(embed_dim, n_heads):
    with pytest.raises(ValueError, match=f"n_heads={n_heads} does not fit embed_dim={embed_dim}"):
        FineAttention(embed_dim, n_heads)


def test_reset_draws_from_the_generator_alone():
    state = torch.get_rng_state()
    first, second = FineAttention(6, 2), FineAttention(6, 2)
    torch.set_rng_state(state)
    for fine in (first, second):
        fine.reset_parameters(torch.Generator().manual_seed(4))
    assert torch.equal(first.cls_token, second.cls_token)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.cls_token.std() > 0


# ---- the embedding ----


def test_embedding_is_one_network_for_every_pixel():
    embedding = PixelEmbedding(3, 6).double()
    pixels = torch.randn(2, 7, 5, dtype=torch.float64)
    first, last = embedding.first, embedding.out
    hidden = np.maximum(pixels.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    expected = hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    np.testing.assert_allclose(embedding(pixels).detach().numpy(), expected, **TOLERANCE)


def test_embedding_is_joint_in_place_and_value():
    """Were it code(x, y) + code(v), this mixed difference would vanish."""
    embedding = PixelEmbedding(1, 32).double()
    embedding.first.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    here, there = [-0.5, 0.3], [0.7, -0.2]
    pixels = [[*place, value] for place in (here, there) for value in (0.1, 0.9)]
    tokens = embedding(torch.tensor([pixels], dtype=torch.float64))[0]
    mixed = tokens[0] - tokens[1] - tokens[2] + tokens[3]
    assert mixed.abs().max() > 1e-3


def test_the_embedding_is_its_hidden_layer_and_one_linear_layer_more():
    embedding = PixelEmbedding(2, 5).double()
    pixels = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = (value.detach().numpy() for value in (embedding.first.weight, embedding.first.bias))
    expected = np.maximum(pixels.numpy() @ weight.T + bias, 0)
    np.testing.assert_allclose(embedding.hidden(pixels).detach().numpy(), expected, **TOLERANCE)
    assert torch.equal(embedding(pixels), embedding.out(embedding.hidden(pixels)))
