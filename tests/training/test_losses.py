"""The losses against their equations, written out in loops in float64, and at their edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_sparseattn.training import consistency_loss, contrastive_loss, distillation_loss, focal_loss

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 100.0])
dtypes = st.sampled_from([torch.float32, torch.float64])


def tensor(values, dtype=torch.float64, grad=False):
    return torch.tensor(np.asarray(values), dtype=dtype, requires_grad=grad)


def close(loss, reference, *, rtol=None, atol=None):
    """Held to the precision of the loss's own dtype."""
    eps = torch.finfo(loss.dtype).eps
    rtol, atol = rtol or 200 * eps, atol or 200 * eps
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference, rel=rtol, abs=atol)


def gradient(loss, leaf):
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(grad).all()
    return grad


def log_softmax(row):
    shift = max(row)
    total = math.log(sum(math.exp(value - shift) for value in row))
    return [value - shift - total for value in row]


# ---------------------------------------------------------------------------------------- focal


def focal_reference(logits, target, gamma, class_weight=None, sample_weight=None):
    total, norm = 0.0, 0.0
    for i, (row, y) in enumerate(zip(logits, target, strict=True)):
        log_p = log_softmax(row)
        # 1 - p_y as the sum of the others, which does not cancel
        miss = sum(math.exp(value) for c, value in enumerate(log_p) if c != y)
        alpha = 1.0 if class_weight is None else class_weight[y]
        weight = 1.0 if sample_weight is None else sample_weight[i]
        total += -weight * alpha * miss**gamma * log_p[y]
        norm += weight
    return total / norm


@given(
    seed=seeds,
    scale=scales,
    dtype=dtypes,
    n=st.integers(1, 9),
    n_classes=st.integers(2, 5),
    gamma=st.sampled_from([0.0, 0.3, 1.0, 2.0, 3.5]),
    weights=st.tuples(st.booleans(), st.booleans()),
)
def test_focal_follows_the_equation(seed, scale, dtype, n, n_classes, gamma, weights):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes)) * min(scale, 10.0)
    logits = tensor(logits, dtype)
    target = rng.integers(n_classes, size=n)
    alpha = rng.uniform(0.1, 3, n_classes) if weights[0] else None
    weight = rng.uniform(0.1, 3, n) if weights[1] else None
    loss = focal_loss(
        logits,
        torch.tensor(target),
        gamma=gamma,
        class_weight=None if alpha is None else tensor(alpha, dtype),
        sample_weight=None if weight is None else tensor(weight, dtype),
    )
    assert loss.dtype == dtype
    close(loss, focal_reference(logits.tolist(), target, gamma, alpha, weight))


def test_focal_without_gamma_is_cross_entropy():
    logits, target = torch.randn(7, 4, generator=torch.manual_seed(0)) * 5, torch.arange(7) % 4
    torch.testing.assert_close(
        focal_loss(logits, target, gamma=0.0),
        torch.nn.functional.cross_entropy(logits, target),
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [[0, 1, 2, 1], [1, 1, 1, 1]], ids=["mixed", "one class"])
def test_focal_gradient(gamma, target):
    rng = np.random.default_rng(0)
    logits = tensor(rng.normal(size=(4, 3)), grad=True)
    alpha, weight = tensor([0.5, 1.0, 2.0]), tensor([1.0, 0.0, 2.0, 0.3])
    assert torch.autograd.gradcheck(
        lambda x: focal_loss(x, torch.tensor(target), gamma=gamma, class_weight=alpha, sample_weight=weight),
        logits,
    )


def test_focal_gradient_of_one_sample():
    logits = tensor([[0.3, -0.2]], grad=True)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, torch.tensor([1])), logits)


@pytest.mark.parametrize("gap", [20.0, 60.0, 1e3, 1e30])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_at_probabilities_of_zero_and_one(dtype, gamma, gap):
    logits = tensor([[gap, 0.0]], dtype, grad=True)
    right, wrong = (focal_loss(logits, torch.tensor([y]), gamma=gamma) for y in (0, 1))
    assert 0 <= right.item() < 1e-5
    assert gradient(right, logits).abs().max() < 1e-4
    close(wrong, gap, rtol=1e-6)
    torch.testing.assert_close(gradient(wrong, logits), tensor([[1.0, -1.0]], dtype), rtol=0, atol=1e-5)


@given(seed=seeds, factor=st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_focal_weights_are_relative_and_order_is_nothing(seed, factor):
    rng = np.random.default_rng(seed)
    logits, target = tensor(rng.normal(size=(6, 3))), torch.tensor(rng.integers(3, size=6))
    alpha, weight = tensor(rng.uniform(0, 2, 3)), tensor(rng.uniform(0.1, 2, 6))
    order = torch.tensor(rng.permutation(6))
    loss = focal_loss(logits, target, class_weight=alpha, sample_weight=weight)
    for same in (
        focal_loss(logits, target, class_weight=alpha, sample_weight=factor * weight),
        focal_loss(logits[order], target[order], class_weight=alpha, sample_weight=weight[order]),
        focal_loss(logits, target, class_weight=factor * alpha, sample_weight=weight) / factor,
        focal_loss(logits + factor, target, class_weight=alpha, sample_weight=weight),
    ):
        torch.testing.assert_close(same, loss, rtol=1e-9, atol=1e-12)


def test_focal_weights_are_repetitions():
    logits, target = tensor([[1.0, 0.0], [0.2, 0.4], [3.0, 1.0]]), torch.tensor([0, 0, 1])
    repeated = [0, 0, 0, 2]
    torch.testing.assert_close(
        focal_loss(logits, target, sample_weight=tensor([3.0, 0.0, 1.0])),
        focal_loss(logits[repeated], target[repeated]),
    )


def test_focal_with_all_weights_zero_is_zero():
    logits = tensor([[2.0, 0.0], [0.0, 50.0]], grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0]), sample_weight=torch.zeros(2).double())
    assert loss.item() == 0
    assert (gradient(loss, logits) == 0).all()


# ---------------------------------------------------------------------------------- contrastive


def contrastive_reference(features, target, temperature, sample_weight=None):
    lengths = [math.sqrt(sum(v * v for v in row)) for row in features]
    unit = [
        [v / length if length else 0.0 for v in row] for row, length in zip(features, lengths, strict=True)
    ]
    n = len(unit)
    per_anchor = []
    for i in range(n):
        positives = [p for p in range(n) if p != i and target[p] == target[i]]
        if not positives:
            continue
        similarity = {
            a: sum(u * v for u, v in zip(unit[i], unit[a], strict=True)) / temperature
            for a in range(n)
            if a != i
        }
        top = max(similarity.values())
        log_total = top + math.log(sum(math.exp(s - top) for s in similarity.values()))
        terms = [similarity[p] - log_total for p in positives]
        weight = 1.0 if sample_weight is None else sample_weight[i]
        per_anchor.append(-weight * sum(terms) / len(positives))
    return sum(per_anchor) / len(per_anchor) if per_anchor else 0.0


@given(
    seed=seeds,
    scale=scales,
    dtype=dtypes,
    n=st.integers(1, 9),
    n_classes=st.integers(1, 5),
    temperature=st.sampled_from([0.01, 0.07, 1.0]),
    is_weighted=st.booleans(),
)
def test_contrastive_follows_the_equation(seed, scale, dtype, n, n_classes, temperature, is_weighted):
    rng = np.random.default_rng(seed)
    features = tensor(rng.normal(size=(n, 3)) * scale, dtype)
    target = rng.integers(n_classes, size=n)
    weight = tensor(rng.uniform(0, 3, n), dtype) if is_weighted else None
    loss = contrastive_loss(features, torch.tensor(target), temperature=temperature, sample_weight=weight)
    assert loss.dtype == dtype
    reference = contrastive_reference(
        features.tolist(), target, temperature, None if weight is None else weight.tolist()
    )
    close(loss, reference, atol=50 * torch.finfo(dtype).eps / temperature)


@pytest.mark.parametrize(
    "target",
    [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0], [0, 1, 2, 3, 3]],
    ids=["mixed", "one class", "one pair"],
)
def test_contrastive_gradient(target):
    features = tensor(np.random.default_rng(0).normal(size=(5, 3)), grad=True)
    assert torch.autograd.gradcheck(
        lambda x: contrastive_loss(x, torch.tensor(target), temperature=0.3), features
    )


@pytest.mark.parametrize("target", [[0], [0, 1], [3, 1, 2, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contrastive_without_a_pair_is_exactly_zero(target, dtype):
    features = tensor(np.random.default_rng(0).normal(size=(len(target), 3)), dtype, grad=True)
    loss = contrastive_loss(features, torch.tensor(target))
    assert loss.item() == 0
    assert (gradient(loss, features) == 0).all()


def test_contrastive_of_only_two_rows_of_a_class_is_zero():
    # The only other row is the positive: it has the whole share.
    assert contrastive_loss(tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1])).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zeros", [[0], [0, 1], [0, 1, 2, 3]])
def test_contrastive_with_zero_vectors(zeros, dtype):
    values = np.random.default_rng(0).normal(size=(4, 3))
    values[zeros] = 0
    features, target = tensor(values, dtype, grad=True), torch.tensor([0, 1, 0, 1])
    loss = contrastive_loss(features, target)
    close(loss, contrastive_reference(features.tolist(), target.tolist(), 0.07), rtol=1e-5)
    assert gradient(loss, features).abs().max() < 1e3


@pytest.mark.parametrize("temperature", [1e-3, 0.07])
def test_contrastive_is_stable_at_the_extremes(temperature):
    # Opposite twins: similarities of +-1/temperature, where exp() itself would overflow.
    features = tensor([[1.0, 0], [-1.0, 0], [1.0, 0], [-1.0, 0]], torch.float32, grad=True)
    apart, together = (
        contrastive_loss(features, torch.tensor(target), temperature=temperature)
        for target in ([0, 0, 1, 1], [0, 1, 0, 1])
    )
    close(apart, 2 / temperature, rtol=1e-5)
    close(together, 0.0, atol=1e-6)
    gradient(apart, features)


@given(seed=seeds, factor=st.sampled_from([1e-6, 0.5, 30.0, 1e6]))
def test_contrastive_knows_neither_order_nor_length_nor_names(seed, factor):
    rng = np.random.default_rng(seed)
    features, target = tensor(rng.normal(size=(7, 4))), torch.tensor(rng.integers(3, size=7))
    lengths = tensor(rng.uniform(0.5, 2, size=(7, 1))) * factor
    order = torch.tensor(rng.permutation(7))
    loss = contrastive_loss(features, target)
    for same in (
        contrastive_loss(features[order], target[order]),
        contrastive_loss(features * lengths, target),
        contrastive_loss(features, 7 - target),
    ):
        torch.testing.assert_close(same, loss, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------- distillation


def distillation_reference(scores, attention, emphasis, sample_weight=None):
    def distribution(row, printed):
        if emphasis is None:
            return log_softmax([printed(v) for v in row])
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row))
        return log_softmax([emphasis * (v - mean) / (deviation + 1e-6) for v in row])

    total = 0.0
    for i, (score_row, attention_row) in enumerate(zip(scores, attention, strict=True)):
        coarse = distribution(score_row, lambda v: 1 / (1 + math.exp(-v)))
        fine = distribution(attention_row, lambda v: v)
        weight = 1.0 if sample_weight is None else sample_weight[i]
        total += weight * sum(math.exp(c) * (c - f) for c, f in zip(coarse, fine, strict=True))
    return total / len(scores)


@given(
    seed=seeds,
    scale=scales,
    dtype=dtypes,
    n=st.integers(1, 4),
    k=st.integers(1, 12),
    emphasis=st.sampled_from([None, 0.5, 2.0, 5.0]),
    is_weighted=st.booleans(),
)
def test_distillation_follows_the_equation(seed, scale, dtype, n, k, emphasis, is_weighted):
    rng = np.random.default_rng(seed)
    scores = tensor(rng.normal(size=(n, k)) * scale, dtype)
    attention = tensor(rng.dirichlet(np.ones(k + 1), size=n)[:, :k], dtype)
    weight = tensor(rng.uniform(0, 3, n), dtype) if is_weighted else None
    loss = distillation_loss(scores, attention, emphasis=emphasis, sample_weight=weight)
    assert loss.dtype == dtype
    weights = None if weight is None else weight.tolist()
    reference = distillation_reference(scores.tolist(), attention.tolist(), emphasis, weights)
    close(loss, reference, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6)


@given(seed=seeds, dtype=dtypes, emphasis=st.sampled_from([None, 2.0]), is_weighted=st.booleans())
def test_distillation_of_as_many_pixels_as_each_image_has(seed, dtype, emphasis, is_weighted):
    """What stands behind them, in its scores and in its attention, does not count; nor does it learn."""
    rng = np.random.default_rng(seed)
    scores, attention = tensor(rng.normal(size=(3, 9)), dtype, grad=True), tensor(rng.random((3, 9)), dtype)
    weight = tensor(rng.uniform(0, 3, 3), dtype) if is_weighted else None
    ns = rng.integers(1, 10, 3)
    kept = torch.from_numpy(np.arange(9) < ns[:, None])
    loss = distillation_loss(scores, attention, emphasis=emphasis, sample_weight=weight, kept=kept)
    alone = [
        distillation_reference([a[:n]], [b[:n]], emphasis, None)
        for a, b, n in zip(scores.tolist(), attention.tolist(), ns, strict=True)
    ]
    weights = [1.0] * 3 if weight is None else weight.tolist()
    expected = sum(w * one for w, one in zip(weights, alone, strict=True)) / 3
    close(loss, expected, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6)
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad[~kept].any()


@pytest.mark.parametrize("emphasis", [None, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(3, 6), (1, 5), (2, 1), (1, 1)])
def test_distillation_gradient(shape, emphasis):
    rng = np.random.default_rng(0)
    scores, attention = tensor(rng.normal(size=shape), grad=True), tensor(rng.random(shape))
    assert torch.autograd.gradcheck(
        # A fixed factor: zero gradients, at k = 1, would otherwise be all there is to compare.
        lambda x: distillation_loss(x, attention, emphasis=emphasis) + 0.1 * x.sum(),
        scores,
    )


@pytest.mark.parametrize("emphasis", [None, 2.0])
def test_distillation_teaches_the_coarse_side_only(emphasis):
    rng = np.random.default_rng(0)
    scores, attention = (tensor(rng.random((2, 5)), grad=True) for _ in range(2))
    distillation_loss(scores, attention, emphasis=emphasis).backward()
    assert attention.grad is None
    assert scores.grad.abs().max() > 1e-4


@given(seed=seeds, dtype=dtypes, emphasis=st.sampled_from([0.5, 2.0, 4.0]))
def test_distillation_is_zero_where_both_sides_agree(seed, dtype, emphasis):
    attention = tensor(np.random.default_rng(seed).random((3, 9)), dtype)
    scores = 3 * attention - 5
    close(distillation_loss(scores, attention, emphasis=emphasis), 0.0, atol=1e-4)
    assert distillation_loss(-scores, attention, emphasis=emphasis).item() > 0.1


@given(seed=seeds, emphasis=st.sampled_from([None, 2.0]))
def test_distillation_knows_no_order(seed, emphasis):
    rng = np.random.default_rng(seed)
    scores, attention = tensor(rng.normal(size=(3, 8))), tensor(rng.random((3, 8)))
    pixels, images = torch.tensor(rng.permutation(8)), torch.tensor(rng.permutation(3))
    loss = distillation_loss(scores, attention, emphasis=emphasis)
    for same in (
        distillation_loss(scores[:, pixels], attention[:, pixels], emphasis=emphasis),
        distillation_loss(scores[images], attention[images], emphasis=emphasis),
        distillation_loss(scores.repeat(2, 1), attention.repeat(2, 1), emphasis=emphasis),
    ):
        torch.testing.assert_close(same, loss, rtol=1e-9, atol=1e-12)


@given(seed=seeds, factor=st.sampled_from([0.1, 3.0, 100.0]), shift=st.sampled_from([-5.0, 40.0]))
def test_distillation_with_emphasis_knows_no_scale(seed, factor, shift):
    rng = np.random.default_rng(seed)
    scores, attention = tensor(rng.normal(size=(3, 8))), tensor(rng.random((3, 8)))
    torch.testing.assert_close(
        distillation_loss(factor * scores + shift, factor * attention + shift),
        distillation_loss(scores, attention),
        rtol=1e-3,  # the 1e-6 beside the deviation
        atol=1e-6,
    )


def test_distillation_as_printed_teaches_little():
    rng = np.random.default_rng(0)
    scores, attention = tensor(rng.normal(size=(4, 200))), tensor(rng.dirichlet(np.ones(200), 4))
    printed, emphasised = (
        distillation_loss(scores, attention, emphasis=emphasis).item() for emphasis in (None, 2.0)
    )
    assert 0 < printed < emphasised / 50


@pytest.mark.parametrize("emphasis", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", ["scores", "attention", "both"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
def test_distillation_of_constant_rows(shape, constant, dtype, emphasis):
    rng = np.random.default_rng(0)
    scores = np.full(shape, 0.7) if constant != "attention" else rng.normal(size=shape)
    attention = np.full(shape, 0.1) if constant != "scores" else rng.random(shape)
    scores, attention = tensor(scores, dtype, grad=True), tensor(attention, dtype)
    loss = distillation_loss(scores, attention, emphasis=emphasis)
    gradient(loss, scores)
    if constant == "both" or shape[1] == 1:
        close(loss, 0.0)
    else:
        assert loss.item() > 0


@pytest.mark.parametrize("emphasis", [None, 2.0])
def test_distillation_of_extreme_scores(emphasis):
    scores = tensor([[1e4, -1e4, 0.0, 3.0]], torch.float32, grad=True)
    attention = tensor([[1.0, 0.0, 0.0, 0.0]], torch.float32)
    gradient(distillation_loss(scores, attention, emphasis=emphasis), scores)


# ------------------------------------------------------------------------------------------ all


@settings(max_examples=20)
@given(seed=seeds, weights=st.booleans())
def test_float32_and_float64_agree(seed, weights):
    rng = np.random.default_rng(seed)
    values, target = rng.normal(size=(32, 20)), torch.tensor(rng.integers(3, size=32))
    attention, weight = rng.random((32, 20)), rng.uniform(0, 2, 32)

    def losses(dtype):
        x = tensor(values, dtype)
        return torch.stack(
            [
                focal_loss(x, target, sample_weight=tensor(weight, dtype) if weights else None),
                contrastive_loss(x, target),
                distillation_loss(x, tensor(attention, dtype)),
            ]
        )

    torch.testing.assert_close(losses(torch.float32).double(), losses(torch.float64), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- consistency


def consistency_reference(logits, sample_weight=None):
    """Both directions of KL, written out as sums of p log(p / q)."""
    n, total = len(logits) // 2, 0.0
    for i, (row, other) in enumerate(zip(logits[:n], logits[n:], strict=True)):
        log_p, log_q = log_softmax(row), log_softmax(other)
        forth = sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        back = sum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
        total += (1.0 if sample_weight is None else sample_weight[i]) * (forth + back) / 2
    return total / n


@given(
    seed=seeds,
    scale=scales,
    dtype=dtypes,
    n=st.integers(1, 6),
    n_classes=st.integers(2, 5),
    is_weighted=st.booleans(),
)
def test_consistency_follows_the_equation(seed, scale, dtype, n, n_classes, is_weighted):
    rng = np.random.default_rng(seed)
    logits = tensor(rng.normal(size=(2 * n, n_classes)) * scale, dtype)
    weight = tensor(rng.uniform(0, 3, n), dtype).repeat(2) if is_weighted else None
    loss = consistency_loss(logits, sample_weight=weight)
    assert loss.dtype == dtype
    assert loss >= 0
    reference = consistency_reference(logits.tolist(), None if weight is None else weight.tolist())
    close(loss, reference, rtol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_consistency_needs_pairs(n):
    with pytest.raises(ValueError, match=f"{n} rows of logits"):
        consistency_loss(torch.zeros(n, 3))


@pytest.mark.parametrize("shape", [(2, 2), (8, 3)])
def test_consistency_gradient(shape):
    logits = tensor(np.random.default_rng(0).normal(size=shape), grad=True)
    assert torch.autograd.gradcheck(consistency_loss, logits)
    found = gradient(consistency_loss(logits), logits)
    assert found[: shape[0] // 2].any()  # both views learn
    assert found[shape[0] // 2 :].any()


def test_consistency_is_zero_for_one_answer_and_finite_at_the_extremes():
    view = tensor(np.random.default_rng(0).normal(size=(3, 4)), torch.float32)
    assert consistency_loss(torch.cat([view, view + 5])).item() == pytest.approx(0, abs=1e-6)
    far = tensor([[1e4, 0.0], [0.0, 1e4]], torch.float32, grad=True)
    close(consistency_loss(far), 1e4)
    gradient(consistency_loss(far), far)


@given(seed=seeds)
def test_consistency_knows_neither_order_nor_direction(seed):
    rng = np.random.default_rng(seed)
    one, other = (tensor(rng.normal(size=(5, 3))) for _ in range(2))
    order = torch.tensor(rng.permutation(5))
    loss = consistency_loss(torch.cat([one, other]))
    for same in (torch.cat([other, one]), torch.cat([one[order], other[order]])):
        torch.testing.assert_close(consistency_loss(same), loss)


# ------------------------------------------------------------------------------- sample weights

TERMS = {
    "focal": lambda rows, weight: focal_loss(rows["logits"], rows["target"], sample_weight=weight),
    "contrastive": lambda rows, weight: contrastive_loss(
        rows["logits"], rows["target"], sample_weight=weight
    ),
    "distillation": lambda rows, weight: distillation_loss(
        rows["logits"], rows["attention"], sample_weight=weight
    ),
    # Row i of eight and row i + 4 are two views of an image.
    "consistency": lambda rows, weight: consistency_loss(rows["logits"], sample_weight=weight),
}


def some_rows(seed, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return {
        "logits": tensor(rng.normal(size=(8, 5)), dtype),
        "target": torch.tensor([0, 1, 0, 1, 2, 2, 0, 1]),
        "attention": tensor(rng.random((8, 5)), dtype),
    }


def views(term, weight):
    """Both views of an image have one weight."""
    return torch.cat([weight[:4], weight[:4]]) if term == "consistency" else weight


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_are_none(term, dtype):
    rows = some_rows(0, dtype)
    torch.testing.assert_close(TERMS[term](rows, torch.ones(8, dtype=dtype)), TERMS[term](rows, None))


@pytest.mark.parametrize("term", ["contrastive", "distillation", "consistency"])
@given(seed=seeds)
def test_a_term_is_a_sum_over_rows_by_their_weights(term, seed):
    """So a weight of 2 counts the term of a row twice, and a weight of 0 not at all."""
    rows = some_rows(seed)
    weight = tensor(np.random.default_rng(seed).uniform(0, 3, 8))
    n_rows = 4 if term == "consistency" else 8
    of_each = torch.stack([TERMS[term](rows, views(term, torch.eye(8).double()[i])) for i in range(n_rows)])
    assert (of_each >= -1e-12).all()
    close(TERMS[term](rows, views(term, weight)), (weight[:n_rows] @ of_each).item(), rtol=1e-9)
    twice = torch.ones(8, dtype=torch.float64)
    twice[2] = 2
    close(TERMS[term](rows, views(term, twice)), (TERMS[term](rows, None) + of_each[2]).item(), rtol=1e-9)


@pytest.mark.parametrize("term", TERMS)
def test_rows_without_weight_teach_nothing_of_their_own(term):
    rows = some_rows(0)
    rows["logits"].requires_grad_()
    weight = views(term, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    found = gradient(TERMS[term](rows, weight), rows["logits"])
    silent = weight == 0
    if term == "contrastive":  # to others they are still what is alike or not
        assert found.any(1).all()
    else:
        assert not found[silent].any()
        assert found[~silent].any(1).all()
    assert not gradient(TERMS[term](rows, torch.zeros(8).double()), rows["logits"]).any()


@pytest.mark.parametrize("term", TERMS)
def test_gradient_with_weights(term):
    rows = some_rows(1)
    weight = views(term, tensor(np.random.default_rng(0).uniform(0, 2, 8)))
    logits = rows["logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TERMS[term]({**rows, "logits": x}, weight), logits)
