"""DynamicK in real skorch nets: k by worth, the published rule of eq. 21-23, bounds and parameters."""

import functools
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import Callback, Checkpoint
from torch import nn

from sklearn_sparseattn.network import SparseAttnNet
from sklearn_sparseattn.parameters import to_pixels
from sklearn_sparseattn.training import DynamicK, dynamic_k
from sklearn_sparseattn.training.counts import resolve_bounds
from sklearn_sparseattn.training.dynamic_k import K_MAX, K_MIN, TOLERANCE
from sklearn_sparseattn.training.loss_trend_k import LossTrendK, next_k

N = 18225  # 135 x 135
START = 8000.0
RULES = {"worth": DynamicK, "paper": lambda **params: DynamicK.paper(**{"k_min": 1} | params)}

counts = st.one_of(st.integers(1, 50_000), st.floats(0, 1, exclude_min=True))
steps = st.one_of(st.integers(0, 50_000), st.floats(0, 1, exclude_min=True))
fractions = st.floats(0, 1, exclude_max=True)
finite = st.floats(allow_nan=False, allow_infinity=False)


# --------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("k_min", "k_max", "n_pixels", "expected"),
    [
        (K_MIN, K_MAX, N, (1, N)),
        (K_MIN, K_MAX, 1, (1, 1)),
        (1500, K_MAX, 64, (64, 64)),  # above N means N
        (1500, 2000, 64, (64, 64)),
        (2000, 1500, 64, (64, 64)),  # the same once clipped
        (0.25, 0.5, 100, (25, 50)),
        (0.001, 0.5, 100, (1, 50)),  # a share of less than a pixel
        (10, 0.5, 100, (10, 50)),
        (1, 1.0, 100, (1, 100)),
        (1.0, K_MAX, 100, (100, 100)),
        (K_MIN, 3, 100, (1, 3)),
        (K_MIN, 0.05, 100, (1, 5)),
        (K_MIN, 1, 100, (1, 1)),  # the int 1 is one pixel, not the default 1.0
        (np.int64(3), np.float32(0.5), 100, (3, 50)),
    ],
)
def test_bounds(k_min, k_max, n_pixels, expected):
    assert resolve_bounds(k_min, k_max, n_pixels) == pytest.approx(expected)


@pytest.mark.parametrize(("k_min", "k_max"), [(50, 20), (0.5, 0.2), (50, 0.2), (2, 1), (1.0, 0.5)])
def test_bounds_that_cross_are_refused(k_min, k_max):
    with pytest.raises(ValueError, match=f"k_min={k_min} is above k_max={k_max}: .* 100 pixels"):
        resolve_bounds(k_min, k_max, 100)


@given(k_min=counts, k_max=counts, n_pixels=st.integers(1, 40_000))
def test_resolved_bounds_are_bounds(k_min, k_max, n_pixels):
    try:
        low, high = resolve_bounds(k_min, k_max, n_pixels)
    except ValueError:
        low, high = (min(max(to_pixels(b, n_pixels), 1), n_pixels) for b in (k_min, k_max))
        assert low > high
    else:
        assert 1 <= low <= high <= n_pixels


# ------------------------------------------------------------- k by worth: a loss known for each k


class Known(nn.Module):
    """Its answer to each row (B, H, W) is the loss by `law`, which k and the row's own value decide."""

    def __init__(self, law, k=16.0):
        super().__init__()
        self.law, self.ks_seen, self.k_by_image = law, [], None
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("k", torch.tensor(k, dtype=torch.float64))

    def forward(self, X):
        ks = [self.k.item()] * len(X) if self.k_by_image is None else self.k_by_image.tolist()
        if torch.is_grad_enabled() and self.training:
            self.ks_seen.append(ks)
        values = [self.law(k, row[0, 0].item()) for k, row in zip(ks, X, strict=True)]
        return self.weight * torch.tensor(values, dtype=torch.float64)


class Mean(nn.Module):
    def forward(self, answers, target):
        return answers.mean()


def known_net(law, callback, k=16.0, lr=0.0, batch_size=4, **params):
    return NeuralNet(
        Known,
        module__law=law,
        module__k=k,
        criterion=Mean,
        lr=lr,
        batch_size=batch_size,
        train_split=None,
        iterator_train__shuffle=False,
        callbacks=[("dynamic_k", callback)],
        verbose=0,
        **params,
    )


ROWS = np.arange(12, dtype=np.float64)[:, None, None] * np.ones((12, 16, 16))
TARGET = np.zeros(12, dtype=np.int64)
# In batches of two: so many that an epoch has several comparisons.
MANY = np.arange(24, dtype=np.float64)[:, None, None] * np.ones((24, 16, 16)), np.zeros(24, dtype=np.int64)


def knee_at(knee, gain):
    """Each doubling of k lowers the loss by `gain`, up to a knee."""
    return lambda k, value: 1 + gain * max(0.0, math.log2(knee / k))


@pytest.mark.parametrize("gain", [0.02, 0.5])
@pytest.mark.parametrize("knee", [5.0, 90.0])
def test_k_ends_where_more_pixels_are_no_longer_worth_it(knee, gain, monkeypatch):
    """From below and from above: where the gain of the last doubling falls under the tolerance."""
    monkeypatch.setattr(dynamic_k, "_DECAY", 0.7)  # as quick for few comparisons as usual for many
    share = 0.01 / gain  # of the last doubling that is below the knee
    ends = []
    for k in (2.0, 200.0):
        callback = DynamicK(tolerance=0.01)
        ks = known_net(knee_at(knee, gain), callback, k, batch_size=2).fit(*MANY, epochs=50).history[:, "k"]
        early = np.diff(ks)[:5]
        assert (early > 0).all() if k < knee else early[0] < 0
        ends.append(ks[-1])
    expected = 2 * knee / 2**share
    np.testing.assert_allclose(ends, expected, rtol=0.3)


@pytest.mark.parametrize(("gain", "end"), [(0.1, 256), (0.0, 1), (-0.1, 1)])
def test_k_goes_to_its_bound_where_there_is_no_knee(gain, end):
    net = known_net(lambda k, value: -gain * math.log2(k), DynamicK(tolerance=0.01))
    assert net.fit(ROWS, TARGET, epochs=60).history[-1, "k"] == pytest.approx(end, rel=0.3)


@pytest.mark.parametrize(("tolerance", "rises"), [(0.0, True), (0.04, True), (0.06, False)])
def test_the_tolerance_parts_growth_from_decline(tolerance, rises):
    net = known_net(knee_at(1e9, 0.05), DynamicK(tolerance=tolerance))
    assert (net.fit(ROWS, TARGET, epochs=4).history[-1, "k"] > 16) == rises


def test_k_does_not_grow_by_noise():
    """Rows that do not agree: the same mean gain, but a standard error beside it."""
    moves = []
    for noise in (0.0, 0.3):

        def law(k, value, noise=noise):
            return -(0.02 + noise * (-1) ** value) * math.log2(k)

        torch.manual_seed(0)  # shuffles the rows
        net = known_net(law, DynamicK(tolerance=0.01), batch_size=2)
        net.set_params(iterator_train__shuffle=True)
        moves.append(np.log(net.fit(*MANY, epochs=10).history[-1, "k"] / 16))
    assert moves[0] > 0.9
    assert moves[1] < 0.5 * moves[0]


class Reference:
    """The rule as it is written down, with NumPy's floats, for `Known`."""

    def __init__(self, law, callback, k=16.0, rates=None):
        self.law, self.k, self.rates = law, k, rates
        self.low, self.high = resolve_bounds(callback.k_min or K_MIN, callback.k_max or K_MAX, 256)
        self.tolerance = TOLERANCE if callback.tolerance is None else callback.tolerance
        self.step, self.n_checks = callback.step, callback.n_checks
        self.differences, self.history, self.n_seen = [], [], 0

    def averages(self):
        """Mean and standard error: by the first few alike, then with weights that fade."""
        worth, spread = None, 0.0
        for n, d in enumerate(self.differences, 1):
            share = max(1 - dynamic_k._DECAY, 1 / n)
            before = d if worth is None else worth
            worth = (1 - share) * before + share * d
            spread = (1 - share) * spread + share * (d - before) * (d - worth)
        n = min(len(self.differences), (1 + dynamic_k._DECAY) / (1 - dynamic_k._DECAY))
        return worth, math.sqrt(spread / n)

    def share_of_step(self, worth, noise):
        """How far worth is beyond the tolerance by more than its noise, less the drift; within [-1, 1]."""
        beyond = worth - self.tolerance
        beyond = math.copysign(max(abs(beyond) - noise, 0.0), beyond)
        share = beyond / (noise + self.tolerance / 2 + dynamic_k._TINY) - dynamic_k._DRIFT
        return min(max(share, -1), 1)

    def run(self, n_epochs):
        for epoch in range(n_epochs):
            rate = 1.0 if self.rates is None else self.rates[epoch] / max(self.rates[: epoch + 1])
            if epoch:
                move = self.step * rate * self.share_of_step(*self.averages())
                self.k = min(max(self.k * math.exp(move), self.low), self.high)
            losses = []
            every = max(dynamic_k._EVERY, (3 if epoch else 0) // self.n_checks)
            for batch in range(3):
                if self.n_seen % every == 0 and len(losses) < self.n_checks:
                    rows = range(4 * batch, 4 * batch + 4)
                    more = min(max(self.k, 2 * self.low), self.high)
                    pair = [
                        sum(self.law(k, float(row)) for row in rows) / 4
                        for k in (max(more / 2, self.low), more)
                    ]
                    losses.append(pair)
                    self.differences.append(pair[0] - pair[1])
                self.n_seen += 1
            self.history.append((self.k, *(np.mean(losses, axis=0) if losses else (np.nan, np.nan))))
        return np.array(self.history)


def wild(k, value):
    """A knee that differs from batch to batch."""
    return 0.3 * math.sin(3 * value) + 0.02 * (1 + value % 3) * max(0.0, math.log2((8 + 5 * value) / k))


class Rates(Callback):
    """Sets the learning rate of each epoch."""

    def __init__(self, rates):
        self.rates = rates

    def on_epoch_begin(self, net, **kwargs):
        net.optimizer_.param_groups[0]["lr"] = self.rates[len(net.history) - 1]


COLUMNS = ("k", "loss_at_half_k", "loss_at_k")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"tolerance": 0.02, "step": 0.3},
        {"k_min": 12, "k_max": 0.08},
        {"n_checks": 1, "tolerance": 0.0},
        {"tolerance": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("rates", [None, [0.1, 0.2, 0.4, 0.1, 0.02, 0.3, 0.01, 0.4, 0.0, 0.2, 0.1, 0.1]])
def test_k_and_the_losses_compared_follow_the_rule(params, rates):
    callback = DynamicK(**params)
    reference = Reference(wild, callback, rates=rates)
    expected = reference.run(12)
    net = known_net(wild, callback)
    if rates is not None:
        # The weights of `Known` would move: they have no gradient to go by.
        net.set_params(callbacks=[("rates", Rates([1e-9 * rate for rate in rates])), *net.callbacks])
    net.fit(ROWS, TARGET, epochs=12)
    np.testing.assert_allclose(net.history[:, COLUMNS], expected, rtol=1e-6)
    fitted = dict(net.callbacks_)["dynamic_k"]
    np.testing.assert_allclose((fitted.worth_, fitted.noise_), reference.averages(), rtol=1e-6, atol=1e-9)
    assert len(set(expected[:, 0])) > 2
    assert np.isfinite(expected[:, 1]).sum() >= 3


def test_a_long_epoch_is_compared_on_as_many_batches_as_told():
    """Evenly, once its length is known."""
    rows = np.ones((200, 4, 4))
    counted = []

    class Counting(DynamicK):
        def _compare(self, net, *args):
            counted.append((len(net.history), self.n_batches_))
            super()._compare(net, *args)

    net = known_net(knee_at(8, 0.1), Counting(n_checks=5), batch_size=2)
    net.fit(rows, np.zeros(200, dtype=np.int64), epochs=3)
    for epoch in (1, 2, 3):
        batches = [batch for e, batch in counted if e == epoch]
        assert len(batches) == 5
        if epoch > 1:
            assert set(np.diff(batches)) == {20}


@pytest.mark.parametrize("start", [1.0, 16.0, 256.0])
@pytest.mark.parametrize("bounds", [{}, {"k_min": 9, "k_max": 0.1}])
def test_drawn_k_is_within_its_bounds_and_at_last_near_k(start, bounds, monkeypatch):
    monkeypatch.setattr(dynamic_k, "_EXPLORE", 0.0)  # not beside the learning rate
    low, high = resolve_bounds(bounds.get("k_min", 1), bounds.get("k_max", 1.0), 256)
    centres = []

    class Watch(Callback):
        def on_batch_end(self, net, training=False, **kwargs):
            centres.append(net.module_.k.item())

    net = known_net(knee_at(16, 0.1), DynamicK(**bounds), start, lr=1e-9)
    # The rate falls to nothing: from then on only k / 2 to 2 k.
    rates = [1e-9] * 40 + [1e-15] * 40
    net.set_params(callbacks=[("rates", Rates(rates)), *net.callbacks, ("watch", Watch())])
    net.fit(ROWS, TARGET, epochs=80)
    ks, centres = np.array(net.module_.ks_seen), np.array(centres)
    assert ks.shape == (240, 4)  # each of a batch of four has its own
    assert ks.min() >= low
    assert ks.max() <= high
    assert len(set(ks.ravel())) > 400
    # The module keeps its own k throughout an epoch.
    np.testing.assert_array_equal(centres, np.repeat(net.history[:, "k"], 3))
    late, around = ks[120:], centres[120:, None]
    assert (late >= np.maximum(around / 2, low) - 1e-9).all()
    assert (late <= np.minimum(around * 2, high) + 1e-9).all()
    # Log-uniformly: as often below the middle of what is possible as above.
    below = late < np.sqrt(np.maximum(around / 2, low) * np.minimum(around * 2, high))
    assert 0.35 < below.mean() < 0.65


def test_at_high_rates_k_is_drawn_from_the_whole_range_and_later_still_at_times():
    net = known_net(knee_at(16, 0.1), DynamicK(k_min=2), 200.0)
    rates = [1e-9] * 40 + [1e-15] * 60
    net.set_params(callbacks=[("rates", Rates(rates)), *net.callbacks])
    ks = np.array(net.fit(ROWS, TARGET, epochs=100).module_.ks_seen)
    early, late = ks[:120], ks[120:]
    assert net.module_.k_by_image is None
    assert ks.min() >= 256 / 64  # not from the lower bound, where that is far off
    assert 0.35 < (early < 32).mean() < 0.65  # of 4 to 256, log-uniformly
    around = np.repeat(net.history[40:, "k"], 3)[:, None]
    far = ((late < around / 2 - 1e-9) | (late > 2 * around + 1e-9)).mean()
    assert 0.3 * dynamic_k._EXPLORE < far < dynamic_k._EXPLORE + 0.1


def test_draws_come_from_its_own_generator_which_starts_by_the_seed_of_pytorch():
    def drawn(seed):
        torch.manual_seed(seed)
        return known_net(wild, DynamicK()).fit(ROWS, TARGET, epochs=3).module_.ks_seen

    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    left = []
    for callback in (DynamicK(), DynamicK.paper()):  # which draws nothing
        torch.manual_seed(0)
        known_net(wild, callback).fit(ROWS, TARGET, epochs=3)
        left.append(torch.get_rng_state().tolist())
    assert left[0] == left[1]


@pytest.mark.parametrize("n", [1, 2, 4, 7, 32, 33])
def test_each_quarter_of_a_batch_has_a_k(n):
    net = known_net(wild, DynamicK(), batch_size=12).fit(ROWS, TARGET, epochs=1)
    callback = dict(net.callbacks_)["dynamic_k"]
    for _ in range(20):
        drawn = callback.draw(16.0, n)
        assert drawn.shape == (n,)
        assert drawn.dtype == torch.float64
        values, lengths = torch.unique_consecutive(drawn, return_counts=True)
        assert len(values) == min(n, 4)
        assert lengths.max() - lengths.min() <= 1


def test_after_a_fit_k_is_drawn_as_at_its_end():
    """For the statistics of batch norm: from the whole range as often as in the last batches."""
    far = {}
    for name, rates in {"constant": [1e-9] * 6, "fallen": [1e-9] * 5 + [1e-15]}.items():
        net = known_net(knee_at(16, 0.1), DynamicK())
        net.set_params(callbacks=[("rates", Rates(rates)), *net.callbacks]).fit(ROWS, TARGET, epochs=6)
        drawn = torch.stack([dict(net.callbacks_)["dynamic_k"].draw(16.0, 4) for _ in range(300)])
        far[name] = ((drawn < 8) | (drawn > 32)).double().mean().item()
    # A third of the whole range, by its logarithm, is near: 4 to 256 and 8 to 32.
    assert far["constant"] == pytest.approx(2 / 3, abs=0.08)
    assert far["fallen"] == pytest.approx(2 / 3 * dynamic_k._EXPLORE, abs=0.06)
    assert DynamicK.paper().draw(16.0, 4) is None


class Normed(nn.Module):
    """Batch norms of several kinds, before a k that its answer depends on."""

    def __init__(self):
        super().__init__()
        self.norms = nn.Sequential(
            nn.BatchNorm2d(1), nn.BatchNorm2d(1, momentum=None), nn.BatchNorm2d(1, track_running_stats=False)
        )
        self.dropped = nn.BatchNorm1d(100, momentum=0.7)
        self.linear = nn.Linear(100, 2)
        self.register_buffer("k", torch.tensor(40.0))

    def forward(self, X):
        return (self.k.log() * self.linear(self.dropped(self.norms(X).flatten(1)))).softmax(1)


def test_comparing_leaves_no_trace():
    net = scripted([1.0], DynamicK(), Normed).initialize()
    callback = dict(net.callbacks_)["dynamic_k"]
    X, y = (torch.from_numpy(part) for part in data())
    net.module_.train()
    net.infer(X)
    before = {name: value.clone() for name, value in net.module_.state_dict().items()}
    kinds = [(norm.momentum, norm.track_running_stats) for norm in [*net.module_.norms, net.module_.dropped]]
    net.history.new_epoch()
    net.history.new_batch()
    callback.on_train_begin(net)
    callback.on_epoch_begin(net)
    callback.on_batch_begin(net, batch=(X, y), training=True)
    assert len(callback.compared_) == 1
    assert callback.compared_[0][0] != callback.compared_[0][1]
    after = net.module_.state_dict()
    assert net.module_.k_by_image.shape == (len(X),)  # drawn, for the batch that now comes
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in net.module_.parameters())
    assert kinds == [
        (norm.momentum, norm.track_running_stats) for norm in [*net.module_.norms, net.module_.dropped]
    ]
    callback.on_batch_end(net, training=True)
    assert net.module_.k_by_image is None


def test_k_is_its_own_after_an_error_while_comparing():
    def failing(k, value):
        if k < 16:
            raise RuntimeError("disk gone")
        return 1.0

    net = known_net(failing, DynamicK())
    with pytest.raises(RuntimeError, match="disk gone"):
        net.fit(ROWS, TARGET, epochs=1)
    assert net.module_.k.item() == 16


def test_nothing_drawn_is_left_after_training_was_interrupted_within_a_batch():
    class Interrupt(Callback):
        def on_grad_computed(self, net, named_parameters, **kwargs):
            assert net.module_.k_by_image is not None
            raise KeyboardInterrupt

    net = known_net(wild, DynamicK())
    net.set_params(callbacks=[*net.callbacks, ("interrupt", Interrupt())]).fit(ROWS, TARGET, epochs=1)
    assert net.module_.k_by_image is None
    assert net.module_.k.item() == 16


def test_in_a_net_of_its_own_kind():
    """A SparseAttnNet as a plain classifier: the losses compared are those of its batches."""

    class Logits(SparseAttnNet):
        def forward(self, images):
            return super().forward(images).logits

    net = NeuralNetClassifier(
        Logits(1, 2, k=100),
        criterion=nn.CrossEntropyLoss,
        callbacks=[DynamicK()],
        max_epochs=3,
        batch_size=6,
        train_split=None,
        verbose=0,
    )
    rng = np.random.default_rng(0)
    X, y = rng.uniform(size=(24, 1, 32, 32)).astype(np.float32), np.arange(24) % 2
    history = net.fit(X, y).history
    assert np.isfinite(history[:, "loss_at_k"]).any()
    assert all(1 <= k <= 32 * 32 for k in history[:, "k"])


# ------------------------------------------------------------- the published rule, its arithmetic


def course(losses, k=START, *, n_pixels=N, **params):
    """k after each loss, in the pure arithmetic; the first loss only sets the average."""
    callback = DynamicK.paper(**{"k_min": 1} | params)
    k_min, k_max = resolve_bounds(callback.k_min, callback.k_max, n_pixels)
    pixels = {
        "k_min": k_min,
        "k_max": k_max,
        "shrink": to_pixels(callback.shrink, n_pixels),
        "grow": to_pixels(callback.grow, n_pixels),
        "ema_decay": callback.ema_decay,
        "momentum": callback.momentum,
    }
    k, ema, out = min(max(k, k_min), k_max), losses[0], []
    out.append(k)
    for loss in losses[1:]:
        k, ema = next_k(k, loss, ema, **pixels)
        out.append(k)
    return np.array(out)


@settings(max_examples=300)
@given(
    losses=st.lists(finite, min_size=1, max_size=30),
    k=st.floats(-1e6, 1e6),
    bounds=st.tuples(counts, counts),
    shrink=steps,
    grow=steps,
    decay=fractions,
    momentum=fractions,
    n_pixels=st.integers(1, 40_000),
)
def test_k_stays_within_its_bounds(losses, k, bounds, shrink, grow, decay, momentum, n_pixels):
    low, high = sorted(min(max(to_pixels(b, n_pixels), 1), n_pixels) for b in bounds)
    k_min, k_max = sorted(bounds, key=lambda b: min(max(to_pixels(b, n_pixels), 1), n_pixels))
    params = {"shrink": shrink, "grow": grow, "ema_decay": decay, "momentum": momentum}
    ks = course(losses, k, n_pixels=n_pixels, k_min=k_min, k_max=k_max, **params)
    assert ks.min() >= low
    assert ks.max() <= high
    assert np.all(np.floor(ks + 0.5) >= 1)
    assert np.all(np.floor(ks + 0.5) <= n_pixels)


def paper_reference(losses, k, k_min, k_max, shrink, grow, beta, alpha):
    """Equations 21-23 as they are printed, in exact fractions."""
    k, k_min, k_max, shrink, grow, beta, alpha, *losses = (
        Fraction(v) for v in (k, k_min, k_max, shrink, grow, beta, alpha, *losses)
    )
    ema, out = losses[0], [k]
    for loss in losses[1:]:
        previous, ema = ema, beta * ema + (1 - beta) * loss
        delta = ema - previous
        moved = max(k - shrink, k_min) if delta < 0 else min(k + grow, k_max)
        k = alpha * k + (1 - alpha) * moved
        out.append(k)
    return np.array([float(v) for v in out])


@given(
    # Multiples of 1/4 and few of them: then every sign is as exact in floats as in fractions.
    losses=st.lists(st.integers(-20, 20).map(lambda v: v / 4), min_size=1, max_size=15),
    k=st.floats(1, N),
    bounds=st.tuples(st.integers(1, N), st.integers(1, N)).map(sorted),
    shrink=st.integers(0, 500),
    grow=st.integers(0, 500),
    beta=st.sampled_from([0, 0.25, 0.5, 0.75]),
    alpha=fractions,
)
def test_steps_follow_the_equations(losses, k, bounds, shrink, grow, beta, alpha):
    k = min(max(k, bounds[0]), bounds[1])
    expected = paper_reference(losses, k, *bounds, shrink, grow, beta, alpha)
    ks = course(
        losses,
        k,
        k_min=bounds[0],
        k_max=bounds[1],
        shrink=shrink,
        grow=grow,
        ema_decay=beta,
        momentum=alpha,
    )
    np.testing.assert_allclose(ks, expected, rtol=1e-12)


def test_first_steps_by_hand():
    pixels = {"k_min": 10.0, "k_max": 100.0, "shrink": 5.0, "grow": 8.0}
    rates = {"ema_decay": 0.2, "momentum": 0.25}
    assert next_k(50.0, 1.0, 2.0, **pixels, **rates) == pytest.approx((46.25, 1.2))
    assert next_k(50.0, 2.0, 1.0, **pixels, **rates) == pytest.approx((56.0, 1.8))
    assert next_k(50.0, 1.0, 1.0, **pixels, **rates) == pytest.approx((56.0, 1.0))
    assert next_k(11.0, 1.0, 2.0, **pixels, **rates)[0] == pytest.approx(10.25)
    assert next_k(99.0, 2.0, 1.0, **pixels, **rates)[0] == pytest.approx(99.75)


@pytest.mark.parametrize("loss", [0.1, 1 / 3, 0.7, 1e-8, 12345.678])
@pytest.mark.parametrize("ema_decay", [0.0, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_k_rises_at_every_step_of_a_constant_loss(loss, ema_decay):
    # Rounding in beta L + (1 - beta) L alone would let it fall.
    ks = course([loss] * 12, ema_decay=ema_decay)
    assert np.all(np.diff(ks) > 0)
    assert ks[-1] < N


def test_published_constants_do_not_follow_a_falling_loss():
    # 15 epochs of 60 batches; single batches scatter by a fifth.
    levels = 0.1 + 0.9 * np.exp(-np.arange(900) / 300)
    noise = [1 + 0.2 * np.random.default_rng(seed).standard_normal(900) for seed in range(10)]
    assert np.median([course(levels * factor, k_min=1500)[-1] for factor in noise]) > 0.9 * N


def test_published_constants():
    rule = DynamicK.paper(n_pixels=99, shrink=7)
    assert isinstance(rule, LossTrendK)
    assert rule.get_params() == {
        "k_min": 1500,
        "k_max": 1.0,
        "shrink": 7,
        "grow": 80,
        "ema_decay": 0.2,
        "momentum": 0.2,
        "update": "batch",
        "n_pixels": 99,
    }
    assert DynamicK.paper().shrink == 50


# --------------------------------------------------------------------------------- in skorch nets


class Buffered(nn.Module):
    """A classifier with a k that its answer does not depend on."""

    def __init__(self, k=40.0, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(100, 2)
        self.register_buffer("k", torch.tensor(k, dtype=dtype))

    def forward(self, X):
        return self.linear(X.flatten(1)).softmax(1)


class Plain(nn.Module):
    def __init__(self, k=40):
        super().__init__()
        self.linear = nn.Linear(100, 2)
        self.k = k

    def forward(self, X):
        return self.linear(X.flatten(1)).softmax(1)


class WithoutK(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(100, 2)

    def forward(self, X):
        return self.linear(X.flatten(1)).softmax(1)


class Scripted(NeuralNetClassifier):
    """Reports the losses it is told to, batch by batch."""

    def infer(self, X, **fit_params):
        self.n_inferred += 1
        return super().infer(X, **fit_params)

    def train_step(self, batch, **fit_params):
        step = super().train_step(batch, **fit_params)
        self.ks_seen.append(float(torch.as_tensor(self.module_.k, dtype=torch.float64).item()))
        return {**step, "loss": torch.tensor(self.losses.pop(0), dtype=torch.float64)}


def scripted(losses, callback, module=Buffered, **params):
    net = Scripted(
        module,
        max_epochs=1,
        batch_size=5,
        train_split=None,
        iterator_train__shuffle=False,
        callbacks=[("dynamic_k", callback)],
        verbose=0,
        **params,
    )
    net.losses, net.ks_seen, net.n_inferred = list(losses), [], 0
    return net


def data(n=12, shape=(1, 10, 10)):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, *shape)).astype(np.float32), (np.arange(n) % 2).astype(np.int64)


BATCHES = 3  # of 5, 5 and 2 rows, in an epoch of 12


def epoch_means(losses):
    return [np.average(losses[i : i + BATCHES], weights=[5, 5, 2]) for i in range(0, len(losses), 3)]


def losses_of(n_epochs, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 2, n_epochs * BATCHES).tolist()


@pytest.mark.parametrize("module", [Buffered, Plain])
def test_by_epochs_k_follows_the_mean_loss(module):
    losses = losses_of(6)
    net = scripted(losses, DynamicK.paper(k_min=1, shrink=3, grow=0.05, update="epoch"), module)
    net.set_params(max_epochs=6).fit(*data())
    # The step after an epoch is that of the next one: six epochs see the steps of five losses.
    expected = course(epoch_means(losses)[:-1], 40, n_pixels=100, shrink=3, grow=5)
    np.testing.assert_allclose(net.history[:, "k"], [40, *expected], rtol=1e-12)
    np.testing.assert_allclose(net.ks_seen, np.repeat([40, *expected], BATCHES), rtol=1e-12)
    assert float(net.module_.k) == net.history[-1, "k"]
    assert len(set(expected)) > 3


def test_the_mean_of_an_epoch_counts_rows_and_not_batches():
    # Of 5, 5 and 2 rows: by rows the mean falls to 0.93, by batches it would rise to 1.07.
    losses = [1.0, 1.0, 1.0, 0.8, 0.8, 1.6] + [1.0] * 3
    net = scripted(losses, DynamicK.paper(k_min=1, update="epoch")).set_params(max_epochs=3)
    assert net.fit(*data()).history[-1, "k"] < 40


@pytest.mark.parametrize("module", [Buffered, Plain])
def test_by_batches_k_follows_every_loss(module):
    losses = losses_of(3)
    net = scripted(losses, DynamicK.paper(k_min=20, shrink=3, grow=5), module)
    net.set_params(max_epochs=3).fit(*data())
    expected = course(losses, 40, n_pixels=100, k_min=20, shrink=3, grow=5)
    np.testing.assert_allclose(net.ks_seen, [40, *expected[:-1]], rtol=1e-12)
    np.testing.assert_allclose(net.history[:, "k"], expected[BATCHES - 1 :: BATCHES], rtol=1e-12)
    assert float(net.module_.k) == net.history[-1, "k"]


def test_the_published_rule_compares_nothing():
    net = scripted(losses_of(3), DynamicK.paper(k_min=1)).set_params(max_epochs=3).fit(*data())
    assert "k" in net.history[-1]
    assert not {"loss_at_half_k", "loss_at_k"} & net.history[-1].keys()
    assert net.n_inferred == 9  # one pass for each batch


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("update", ["epoch", "batch"])
def test_a_loss_that_is_not_finite_changes_nothing_of_the_published_rule(update, bad):
    losses = losses_of(6)
    rule = {"k_min": 1, "update": update}
    net = scripted(losses, DynamicK.paper(**rule)).set_params(max_epochs=6).fit(*data())
    at = 7 if update == "batch" else 6
    with_bad = losses[:at] + [bad] * (1 if update == "batch" else BATCHES) + losses[at:]
    net_bad = scripted(with_bad, DynamicK.paper(**rule))
    n_epochs, extra = (6, 1) if update == "batch" else (7, BATCHES)
    net_bad.losses += [1.0] * (n_epochs * BATCHES - len(with_bad))
    net_bad.set_params(max_epochs=n_epochs).fit(*data())
    kept = net_bad.ks_seen[: at + 1] + net_bad.ks_seen[at + 1 + extra :]
    if update == "epoch":
        kept = net_bad.ks_seen[: at + BATCHES] + net_bad.ks_seen[at + 2 * BATCHES :]
    assert kept == net.ks_seen[: len(kept)]
    assert np.isfinite(net_bad.history[:, "k"]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_comparison(bad):
    """Where it would be the first, at every start, or with more pixels alone."""
    for laws in (lambda k, value: bad, lambda k, value: bad if k < 16 else 1.0):
        net = known_net(laws, DynamicK()).fit(ROWS, TARGET, epochs=4)
        assert net.history[:, "k"] == [16.0] * 4
        assert np.isnan(net.history[:, ("loss_at_half_k", "loss_at_k")]).all()
        assert dict(net.callbacks_)["dynamic_k"].worth_ is None


def test_a_restored_k_is_where_it_goes_on():
    class Restore(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.module_.k.fill_(70.0)

    net = scripted([1.0] * 9, DynamicK.paper(k_min=1, grow=10, momentum=0.0, update="epoch"))
    net.set_params(max_epochs=3, callbacks=[*net.callbacks, ("restore", Restore())]).fit(*data())
    assert net.ks_seen == [40.0] * 3 + [70.0] * 3 + [80.0] * 3
    net = known_net(knee_at(1e9, 0.5), DynamicK(step=0.2))
    net.set_params(callbacks=[*net.callbacks, ("restore", Restore())]).fit(ROWS, TARGET, epochs=3)
    np.testing.assert_allclose(net.history[:, "k"], [16, 70 * math.exp(0.2), 70 * math.exp(0.2)])


# ---- both rules: going on, parameters, images ----


def long_known(callback):
    return known_net(wild, callback)


def states(net):
    """What a fit has come to, times aside."""
    callback = dict(net.callbacks_)["dynamic_k"]
    columns = [column for column in ("k", "loss_at_half_k", "loss_at_k") if column in net.history[-1]]
    return np.array(net.history[:, tuple(columns)]), callback.state_dict(), net.module_.ks_seen


def assert_same(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1:] == other[1:]


RESUMED = {
    "worth": lambda: DynamicK(tolerance=0.02),
    "paper by batch": lambda: DynamicK.paper(k_min=2, shrink=2, grow=3),
    "paper by epoch": lambda: DynamicK.paper(k_min=2, shrink=2, grow=3, update="epoch"),
}


@pytest.mark.parametrize("rule", RESUMED)
def test_partial_fit_goes_on_where_fit_stopped(rule):
    whole = long_known(RESUMED[rule]()).fit(ROWS, TARGET, epochs=8)
    pieces = long_known(RESUMED[rule]())
    for n_epochs in (1, 3, 4):
        pieces.partial_fit(ROWS, TARGET, epochs=n_epochs)
    assert_same(states(whole), states(pieces))
    assert len(set(whole.history[:, "k"])) > 3


@pytest.mark.parametrize("rule", RESUMED)
def test_state_carries_over_to_a_new_net_to_the_last_bit(rule):
    """With the module's k, and a generator that has come as far."""
    whole = long_known(RESUMED[rule]()).fit(ROWS, TARGET, epochs=9)
    first = long_known(RESUMED[rule]()).fit(ROWS, TARGET, epochs=4)
    state = dict(first.callbacks_)["dynamic_k"].state_dict()
    assert all(value is None or type(value) in (int, float) for value in state.values())
    second = long_known(RESUMED[rule]()).initialize()
    second.module_.load_state_dict(first.module_.state_dict())
    goes_on = dict(second.callbacks_)["dynamic_k"]
    goes_on.load_state_dict(state)
    goes_on.rng_ = pickle.loads(pickle.dumps(dict(first.callbacks_)["dynamic_k"].rng_))
    second.partial_fit(ROWS, TARGET, epochs=5)
    history, state, ks_seen = states(second)
    expected = states(whole)
    np.testing.assert_array_equal(np.concatenate([states(first)[0], history]), expected[0])
    assert state == expected[1]
    assert first.module_.ks_seen + ks_seen == expected[2]


@pytest.mark.parametrize("rule", RESUMED)
def test_initialize_starts_anew(rule):
    net = long_known(RESUMED[rule]()).fit(ROWS, TARGET, epochs=5)
    first = states(net)
    assert_same(states(net.fit(ROWS, TARGET, epochs=5)), first)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("rule", RESUMED)
def test_a_checkpoint_holds_the_k_of_its_epoch(tmp_path, order, rule):
    checkpoint = Checkpoint(dirname=tmp_path, f_params="p{last_epoch[epoch]}.pt", monitor=None)
    net = long_known(RESUMED[rule]())
    net.set_params(callbacks=[*net.callbacks, ("checkpoint", checkpoint)][::order])
    net.fit(ROWS, TARGET, epochs=4)
    saved = [float(torch.load(tmp_path / f"p{i}.pt")["k"]) for i in range(1, 5)]
    if (rule, order) != ("paper by batch", -1):
        assert saved == net.history[:, "k"]
    assert len(set(saved)) > 2


@pytest.mark.parametrize("rule", RESUMED)
def test_validation_batches_are_not_counted(rule):
    without = states(long_known(RESUMED[rule]()).fit(ROWS, TARGET, epochs=4))
    net = long_known(RESUMED[rule]())

    def split(dataset, y=None):
        subset = torch.utils.data.Subset
        return subset(dataset, range(12)), subset(dataset, range(12, 20))

    net.set_params(train_split=split, iterator_valid__shuffle=False)
    net.fit(np.concatenate([ROWS, ROWS[:8]]), np.concatenate([TARGET, TARGET[:8]]), epochs=4)
    assert_same(states(net), without)
    assert len(net.history[:, "valid_loss"]) == 4


@pytest.mark.parametrize(
    ("k", "changes", "expected"),
    [
        (40.0, {"k_max": 0.3}, 30),
        (40.0, {"k_min": 55}, 55),
        (1e6, {}, 100),
        (0.0, {}, 1),
        (40.0, {"k_max": 1}, 1),
    ],
)
@pytest.mark.parametrize("module", [Buffered, Plain])
@pytest.mark.parametrize("n_pixels", [None, 100])
@pytest.mark.parametrize("rule", RULES)
def test_k_is_clipped_when_training_starts(k, changes, expected, module, n_pixels, rule):
    net = scripted([1.0] * 3, RULES[rule](n_pixels=n_pixels, **changes), module, module__k=k)
    net.fit(*data())
    assert net.history[0, "k"] == pytest.approx(expected) or rule == "paper"
    if rule == "paper":
        assert net.ks_seen[0] == pytest.approx(expected)


def test_k_is_clipped_after_set_params():
    net = scripted([1.0] * 12, DynamicK.paper(k_min=1, grow=10, momentum=0.0, n_pixels=100, update="epoch"))
    net.set_params(max_epochs=2).fit(*data())
    assert net.ks_seen[-1] == 40
    net.set_params(callbacks__dynamic_k__k_max=25, callbacks__dynamic_k__k_min=5)
    net.partial_fit(*data())
    assert net.ks_seen[6:] == [25] * 6  # grown from 25, and held there
    net = known_net(knee_at(1e9, 0.5), DynamicK()).fit(ROWS, TARGET, epochs=1)
    net.set_params(callbacks__dynamic_k__k_max=9).partial_fit(ROWS, TARGET, epochs=2)
    assert net.history[:2, "k"] == [16, 9]
    assert np.max(net.module_.ks_seen[3:]) <= 9


@pytest.mark.parametrize("rule", RULES)
def test_new_image_sizes_bring_new_bounds(rule):
    class Any(Buffered):
        def forward(self, X):
            return self.linear(X.flatten(1)[:, :9].repeat(1, 12)[:, :100]).softmax(1)

    net = scripted([1.0] * 9, RULES[rule](k_min=0.2), Any)
    net.fit(*data(shape=(10, 10)))
    net.partial_fit(*data(shape=(1, 3, 3)))
    assert min(net.ks_seen[:3]) >= 20
    assert max(net.ks_seen[3:]) <= 9


class Nested(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.inner, self.form = Buffered(), form
        self.register_buffer("k", torch.tensor(99.0))

    def forward(self, X=None, image=None, other=None):
        return self.inner(X[0] if self.form == "tuple" else image if self.form == "dict" else X)


@pytest.mark.parametrize("form", ["array", "dict", "tuple"])
@pytest.mark.parametrize("rule", RULES)
def test_images_are_found_in_every_form_of_batch(form, rule):
    X, y = data(shape=(10, 10))
    other = np.zeros((12, 2), dtype=np.float32)
    Xs = {"array": X, "dict": {"image": X, "other": other}, "tuple": (X, other)}[form]
    net = scripted([1.0] * 3, RULES[rule](k_max=0.5), Nested, module__form=form)
    net.fit(Xs, y)
    assert net.history[-1, "k"] == 50.0
    assert max(net.ks_seen) <= 50.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("rule", ["worth", "paper"])
def test_a_buffer_stays_the_same_tensor(dtype, shape, rule):
    class Shaped(Buffered):
        def __init__(self):
            super().__init__(40, dtype)
            self.k = self.k.reshape(shape)

    # By 0.6 of a pixel
    callback = (
        DynamicK()
        if rule == "worth"
        else DynamicK.paper(k_min=1, grow=1, shrink=1, momentum=0.4, update="epoch")
    )
    net = scripted([1.0] * 15, callback, Shaped).initialize()
    buffer = net.module_.k
    net.set_params(max_epochs=5).partial_fit(*data())
    assert net.module_.k is buffer
    assert (buffer.dtype, buffer.shape) == (dtype, shape)
    if rule == "paper":
        assert buffer.item() == pytest.approx(43 if dtype == torch.int64 else 41.8)
    else:
        assert buffer.item() == pytest.approx(net.history[-1, "k"])


def test_a_parameter_can_be_moved_too():
    class Parameter(Plain):
        def __init__(self):
            super().__init__()
            del self.k
            self.k = nn.Parameter(torch.tensor(40.0))

    net = scripted([1.0] * 9, DynamicK.paper(k_min=1, grow=10, update="epoch"), Parameter)
    assert net.set_params(max_epochs=3).fit(*data()).history[-1, "k"] == 48


@pytest.mark.parametrize("net_class", [NeuralNetClassifier, NeuralNet])
@pytest.mark.parametrize("rule", RULES)
def test_in_a_plain_net_with_its_printed_table(net_class, rule, capsys):
    params = {"criterion": nn.NLLLoss} if net_class is NeuralNet else {}
    net = net_class(Buffered, max_epochs=4, callbacks=[RULES[rule]()], train_split=None, **params)
    X, y = data(40)
    net.fit(X, y)
    head, *rows = capsys.readouterr().out.splitlines()
    compared = ["loss_at_half_k", "loss_at_k"] if rule == "worth" else []
    assert head.split() == ["epoch", "k", *compared, "train_loss", "dur"]
    assert [float(row.split()[1]) for row in rows[1:]] == pytest.approx(net.history[:, "k"], abs=1e-3)
    for column in ("k", *compared):  # JSON needs it
        assert all(type(value) is float for value in net.history[:, column])


def test_an_answer_that_does_not_depend_on_k_lets_it_fall():
    net = NeuralNetClassifier(Buffered, max_epochs=8, callbacks=[DynamicK()], train_split=None, verbose=0)
    ks = net.fit(*data(40)).history[:, "k"]
    assert (np.diff(ks) < 0).all()


def test_clone_pickle_and_parameters(monkeypatch):
    # skorch 1.1 leaves this to PyTorch, which since 2.6 refuses what skorch itself has written.
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    for rule in (DynamicK(k_min=3, step=0.2), DynamicK.paper(k_min=3, update="epoch")):
        copy = clone(rule)
        assert type(copy) is type(rule)
        assert copy.get_params() == rule.get_params()
        assert copy.get_params()["k_min"] == 3
    net = known_net(wild, DynamicK())
    net.set_params(callbacks__dynamic_k__step=0.3, module__law=None)
    assert net.get_params()["callbacks__dynamic_k__step"] == 0.3
    net = scripted(losses_of(4), DynamicK()).fit(*data())
    assert not hasattr(dict(clone(net).callbacks)["dynamic_k"], "worth_")
    again = pickle.loads(pickle.dumps(net))
    for each in (net, again):
        each.set_params(max_epochs=3).partial_fit(*data())
    assert again.history[:, "k"] == net.history[:, "k"]
    assert again.ks_seen == net.ks_seen
    assert len(set(net.history[:, "k"])) > 1


@pytest.mark.parametrize("rule", RULES)
def test_what_it_keeps_for_itself_is_no_parameter(rule):
    """skorch takes attributes for parameters, which a clone is made with."""
    callback = RULES[rule]()
    names = callback.get_params().keys()
    callback.use(k_min=3, k_max=0.9, tolerance=0.5, n_pixels=100, rng=np.random.default_rng(0))
    scripted([1.0] * 3, callback).fit(*data())
    assert callback.get_params().keys() == names
    assert clone(callback).get_params() == callback.get_params()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_warned_about(rule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scripted([1.0] * 6, RULES[rule]()).set_params(max_epochs=2).fit(*data())


# ---- what SparseAttnClassifier gives it ----


def test_defaults_stand_in_the_place_of_none_only():
    rng = np.random.default_rng(0)
    callback = DynamicK(k_max=0.5)
    callback.use(k_min=3, k_max=0.9, tolerance=0.5, n_pixels=64, rng=rng)
    net = known_net(knee_at(1e9, 0.4), callback, k=99.0)
    net.fit(ROWS, TARGET, epochs=3)
    assert net.history[0, "k"] == 32  # half of the 64 pixels that it was told of
    assert net.history[-1, "k"] < 32  # 0.4 for a doubling is below the tolerance
    assert callback.get_params()["tolerance"] is None
    assert rng.bit_generator.state != np.random.default_rng(0).bit_generator.state
    own = DynamicK(tolerance=0.1)
    own.use(k_min=3, k_max=0.9, tolerance=0.5, n_pixels=64, rng=rng)
    net = known_net(knee_at(1e9, 0.4), own, k=9.0).fit(ROWS, TARGET, epochs=3)
    assert net.history[-1, "k"] > 9


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        (DynamicK(), []),
        (DynamicK(k_min=2, tolerance=0.1), ["k_min", "k_tolerance"]),
        (DynamicK(k_max=0.5), ["k_max"]),
        (DynamicK.paper(k_min=None, k_max=None), ["k_tolerance"]),
        (DynamicK.paper(), ["k_min", "k_max", "k_tolerance"]),
    ],
    ids=["nothing", "k_min and tolerance", "k_max", "paper without bounds", "paper"],
)
def test_a_rule_names_what_it_has_itself(rule, names):
    assert rule.own_parameters() == names


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *(
            (make, name, v)
            for make in (DynamicK, DynamicK.paper)
            for name in ("k_min", "k_max")
            for v in (0, -3, 0.0, 1.5, math.nan, True, "9")
        ),
        *((make, "n_pixels", v) for make in (DynamicK, DynamicK.paper) for v in (0, 10.0, True, "all")),
        *((DynamicK, "tolerance", v) for v in (-0.1, math.nan, math.inf, True, "a")),
        *((DynamicK, "step", v) for v in (0, -1, math.nan, True, None)),
        *((DynamicK, "n_checks", v) for v in (0, 2.0, True, None)),
        *((DynamicK.paper, name, v) for name in ("shrink", "grow") for v in (-1, 0.0, 50.0, None, False)),
        *(
            (DynamicK.paper, name, v)
            for name in ("ema_decay", "momentum")
            for v in (1, 1.0, -0.1, "a", math.nan)
        ),
        *((DynamicK.paper, "update", v) for v in ("epochs", None)),
    ],
)
def test_parameters_out_of_range_are_named(make, name, value):
    callback = make(**{name: value})  # nothing is checked here, as scikit-learn wants it
    with pytest.raises(ValueError, match=rf"^{name}={value!r} in DynamicK: .*(int|number|\[0, 1\)|batch)"):
        callback.initialize()
    net = scripted([1.0] * 3, make()).initialize()
    net.set_params(**{f"callbacks__dynamic_k__{name}": value})
    with pytest.raises(ValueError, match=f"^{name}="):
        net.partial_fit(*data())


def test_zero_steps_hold_k():
    net = scripted(losses_of(4), DynamicK.paper(k_min=1, shrink=0, grow=0)).set_params(max_epochs=4)
    assert net.fit(*data()).history[:, "k"] == [40.0] * 4


@pytest.mark.parametrize("rule", RULES)
def test_a_module_without_k_is_named(rule):
    net = scripted([1.0] * 3, RULES[rule](), WithoutK)
    with pytest.raises(AttributeError, match="`k` of the module, and WithoutK has none"):
        net.fit(*data())


@pytest.mark.parametrize("rule", RULES)
def test_crossing_bounds_are_refused_when_training_starts(rule):
    with pytest.raises(ValueError, match=r"k_min=50 is above k_max=0\.2: 50 and 20 of the 100"):
        scripted([1.0] * 3, RULES[rule](k_min=50, k_max=0.2)).fit(*data())


@pytest.mark.parametrize("rule", RULES)
def test_flat_rows_need_n_pixels(rule):
    X, y = data(shape=(100,))
    with pytest.raises(ValueError, match=r"n_pixels=None .* shape \(5, 100\) .* give n_pixels"):
        scripted([1.0] * 3, RULES[rule]()).fit(X, y)
    net = scripted([1.0] * 3, RULES[rule](n_pixels=100, k_max=0.3)).fit(X, y)
    assert max(net.ks_seen) <= 30
