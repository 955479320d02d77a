"""DynamicK: the arithmetic of eq. 21-23, the bounds, and the callback in real skorch nets."""

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

from sklearn_sparseattn.training import DynamicK
from sklearn_sparseattn.training.dynamic_k import K_MAX, K_MIN, next_k, resolve_bounds, to_pixels

N = 18225  # 135 x 135
START = 8000.0


def course(losses, k=START, *, n_pixels=N, **params):
    """k after each loss, in the pure arithmetic; the first loss only sets the average."""
    callback = DynamicK(**params)
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


# --------------------------------------------------------------------------------- arithmetic

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.one_of(st.integers(1, 50_000), st.floats(0, 1, exclude_min=True))
steps = st.one_of(st.integers(0, 50_000), st.floats(0, 1, exclude_min=True))
fractions = st.floats(0, 1, exclude_max=True)


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


def reference(losses, k, k_min, k_max, shrink, grow, beta, alpha):
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
    expected = reference(losses, k, *bounds, shrink, grow, beta, alpha)
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


# --------------------------------------------------------------- behaviour of the default constants


def noisy(levels, noise, seed):
    return levels * (1 + noise * np.random.default_rng(seed).standard_normal(len(levels)))


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
@pytest.mark.parametrize(("n_epochs", "tau"), [(15, 5), (30, 10), (60, 20)])
def test_k_falls_while_the_loss_falls(n_epochs, tau, noise):
    levels = 0.1 + 0.9 * np.exp(-np.arange(n_epochs) / tau)
    courses = np.array([course(noisy(levels, noise, seed)) for seed in range(40)])
    early = courses[:, :15]  # before the lower bound hides what happens
    assert (np.diff(early) < 0).mean() > 0.8
    assert np.median(early[:, 7]) < START - 0.08 * N
    assert np.median(early[:, -1]) < 0.5 * START
    assert early[:, -1].max() < START
    assert np.median(courses[:, -1]) < 0.22 * N


@pytest.mark.parametrize("start", [0.1, 8000 / 18225])
def test_k_rises_while_a_noisy_loss_stalls(start):
    courses = np.array([course(noisy(np.full(40, 0.5), 0.03, seed), start * N) for seed in range(100)])
    middle = np.median(courses, axis=0)
    assert middle[15] > middle[0]
    assert middle[39] > middle[15] > start * N
    assert (courses[:, -1] > start * N).mean() > 0.85
    # It falls as well as it rises on its way: it follows the loss, and does not run to a bound.
    assert 0.3 < (np.diff(courses) < 0).mean() < 0.6
    assert np.median(courses[:, 20]) < 0.95 * N


@pytest.mark.parametrize("loss", [0.1, 1 / 3, 0.7, 1e-8, 12345.678])
@pytest.mark.parametrize("ema_decay", [0.0, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_k_rises_at_every_step_of_a_constant_loss(loss, ema_decay):
    # Rounding in beta L + (1 - beta) L alone would let it fall.
    ks = course([loss] * 12, ema_decay=ema_decay)
    assert np.all(np.diff(ks) > 0)
    assert ks[-1] < N


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_k_turns_when_the_loss_does(noise):
    levels = 0.1 + 0.9 * np.exp(-np.minimum(np.arange(60), 20) / 7)
    courses = np.array([course(noisy(levels, noise, seed)) for seed in range(40)])
    assert np.median(courses[:, 20]) < 0.5 * START
    assert np.median(courses[:, -1]) > np.median(courses[:, 20]) + 0.05 * N
    assert (courses[:, 30:].max(1) > courses[:, 20]).all()


def test_published_constants_do_not_follow_a_falling_loss():
    # 15 epochs of 60 batches; single batches scatter by a fifth.
    levels = 0.1 + 0.9 * np.exp(-np.arange(900) / 300)
    params = DynamicK.paper().get_params() | {"n_pixels": N}
    ends = [course(noisy(levels, 0.2, seed), **params)[-1] for seed in range(10)]
    assert np.median(ends) > 0.9 * N


def test_published_constants():
    assert DynamicK.paper(n_pixels=99, shrink=7).get_params() == {
        "k_min": 1500,
        "k_max": 1.0,
        "shrink": 7,
        "grow": 80,
        "ema_decay": 0.2,
        "momentum": 0.2,
        "update": "batch",
        "grow_with_lr": False,
        "n_pixels": 99,
    }
    assert DynamicK.paper().shrink == 50


# -------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("k_min", "k_max", "n_pixels", "expected"),
    [
        (K_MIN, K_MAX, N, (1500, N)),
        (K_MIN, K_MAX, 4, (1, 4)),  # a share of less than a pixel
        (1500, K_MAX, 64, (64, 64)),  # above N means N
        (1500, 2000, 64, (64, 64)),
        (2000, 1500, 64, (64, 64)),  # the same once clipped
        (0.25, 0.5, 100, (25, 50)),
        (10, 0.5, 100, (10, 50)),
        (1, 1.0, 100, (1, 100)),
        (1.0, K_MAX, 100, (100, 100)),
        (K_MIN, 3, 100, (3, 3)),  # the given one wins
        (K_MIN, 0.05, 100, (5, 5)),
        (K_MIN, 1, 100, (1, 1)),  # the int 1 is one pixel, not the default 1.0
        (np.int64(3), np.float32(0.5), 100, (3, 50)),
    ],
)
def test_bounds(k_min, k_max, n_pixels, expected):
    assert resolve_bounds(k_min, k_max, n_pixels) == pytest.approx(expected)


@pytest.mark.parametrize(("k_min", "k_max"), [(50, 20), (0.5, 0.2), (50, 0.2), (2, 1), (1.0, 0.5)])
def test_given_bounds_that_cross_are_refused(k_min, k_max):
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
    net.losses, net.ks_seen = list(losses), []
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
    net = scripted(losses, DynamicK(shrink=3, grow=0.05), module)
    net.set_params(max_epochs=6).fit(*data())
    # The step after an epoch is that of the next one: six epochs see the steps of five losses.
    expected = course(epoch_means(losses)[:-1], 40, n_pixels=100, shrink=3, grow=5)
    np.testing.assert_allclose(net.history[:, "k"], [40, *expected], rtol=1e-12)
    np.testing.assert_allclose(net.ks_seen, np.repeat([40, *expected], BATCHES), rtol=1e-12)
    assert float(net.module_.k) == net.history[-1, "k"]
    assert len(set(expected)) > 3


def test_the_mean_of_an_epoch_counts_rows_and_not_batches():
    # Of 5, 5 and 2 rows: by rows the mean falls to 0.93, by batches it would rise to 1.07.
    net = scripted([1.0, 1.0, 1.0, 0.8, 0.8, 1.6] + [1.0] * 3, DynamicK()).set_params(max_epochs=3)
    assert net.fit(*data()).history[-1, "k"] < 40


@pytest.mark.parametrize("module", [Buffered, Plain])
def test_by_batches_k_follows_every_loss(module):
    losses = losses_of(3)
    net = scripted(losses, DynamicK.paper(k_min=20, shrink=3, grow=5), module)
    net.set_params(max_epochs=3).fit(*data())
    expected = course(losses, 40, n_pixels=100, k_min=20, shrink=3, grow=5, ema_decay=0.2)
    np.testing.assert_allclose(net.ks_seen, [40, *expected[:-1]], rtol=1e-12)
    np.testing.assert_allclose(net.history[:, "k"], expected[BATCHES - 1 :: BATCHES], rtol=1e-12)
    assert float(net.module_.k) == net.history[-1, "k"]


class Rates(Callback):
    """Sets the learning rate of each epoch."""

    def __init__(self, rates):
        self.rates = rates

    def on_epoch_begin(self, net, **kwargs):
        net.optimizer_.param_groups[0]["lr"] = self.rates[len(net.history) - 1]


@pytest.mark.parametrize("grow_with_lr", [True, False])
def test_steps_up_shrink_with_the_learning_rate_and_steps_down_do_not(grow_with_lr):
    callback = DynamicK(grow=10, shrink=4, momentum=0.0, k_min=5, ema_decay=0.5, grow_with_lr=grow_with_lr)
    losses = [1.0, 1.0, 2.0, 3.0, 4.0, 0.1, 5.0]  # by epoch; a step follows each, but the last
    rates = [0.1, 0.2, 0.4, 0.1, 0.02, 0.01, 0.0]
    net = scripted(np.repeat(losses, BATCHES), callback)
    net.set_params(max_epochs=7, callbacks=[("rates", Rates(rates)), *net.callbacks]).fit(*data())
    # 0.4 is the highest: a quarter of a step at 0.1, a twentieth at 0.02.
    expected = [0, 0, 10, 2.5, 0.5, 0.25, -4] if grow_with_lr else [0, 0, 10, 10, 10, 10, -4]
    np.testing.assert_allclose(net.history[:, "k"], 40 + np.cumsum(expected), rtol=1e-12)


def test_the_published_rule_does_not_look_at_the_learning_rate():
    assert DynamicK.paper().grow_with_lr is False


@pytest.mark.parametrize("update", ["epoch", "batch"])
def test_partial_fit_goes_on_where_fit_stopped(update):
    losses = losses_of(6)
    whole = scripted(losses, DynamicK(update=update)).set_params(max_epochs=6).fit(*data())
    pieces = scripted(losses, DynamicK(update=update))
    for _ in range(6):
        pieces.partial_fit(*data())
    assert pieces.history[:, "k"] == whole.history[:, "k"]
    assert pieces.ks_seen == whole.ks_seen


@pytest.mark.parametrize("update", ["epoch", "batch"])
def test_state_carries_over_to_a_new_net(update):
    losses = losses_of(6)
    whole = scripted(losses, DynamicK(update=update)).set_params(max_epochs=6).fit(*data())
    first = scripted(losses[:9], DynamicK(update=update)).set_params(max_epochs=3).fit(*data())
    second = scripted(losses[9:], DynamicK(update=update)).set_params(max_epochs=3).initialize()
    second.module_.load_state_dict(first.module_.state_dict())
    state = dict(first.callbacks_)["dynamic_k"].state_dict()
    dict(second.callbacks_)["dynamic_k"].load_state_dict(state)
    second.partial_fit(*data())
    assert first.history[:, "k"] + second.history[:, "k"] == whole.history[:, "k"]


@pytest.mark.parametrize("update", ["epoch", "batch"])
def test_initialize_starts_anew(update):
    losses = losses_of(3)
    net = scripted(losses + losses, DynamicK(update=update)).set_params(max_epochs=3)
    first = net.fit(*data()).history[:, "k"]
    assert net.fit(*data()).history[:, "k"] == first


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("update", ["epoch", "batch"])
def test_a_loss_that_is_not_finite_changes_nothing(update, bad):
    losses = losses_of(6)
    net = scripted(losses, DynamicK(update=update)).set_params(max_epochs=6).fit(*data())
    at = 7 if update == "batch" else 6
    with_bad = losses[:at] + [bad] * (1 if update == "batch" else BATCHES) + losses[at:]
    net_bad = scripted(with_bad, DynamicK(update=update))
    n_epochs, extra = (6, 1) if update == "batch" else (7, BATCHES)
    net_bad.losses += [1.0] * (n_epochs * BATCHES - len(with_bad))
    net_bad.set_params(max_epochs=n_epochs).fit(*data())
    kept = net_bad.ks_seen[: at + 1] + net_bad.ks_seen[at + 1 + extra :]
    if update == "epoch":
        kept = net_bad.ks_seen[: at + BATCHES] + net_bad.ks_seen[at + 2 * BATCHES :]
    assert kept == net.ks_seen[: len(kept)]
    assert np.isfinite(net_bad.history[:, "k"]).all()


def test_a_restored_k_is_where_it_goes_on():
    class Restore(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.module_.k.fill_(70.0)

    net = scripted([1.0] * 9, DynamicK(grow=10, momentum=0.0))
    net.set_params(max_epochs=3, callbacks=[*net.callbacks, ("restore", Restore())]).fit(*data())
    assert net.ks_seen == [40.0] * 3 + [70.0] * 3 + [80.0] * 3


@pytest.mark.parametrize("order", [1, -1])
def test_a_checkpoint_holds_the_k_of_its_epoch(tmp_path, order):
    checkpoint = Checkpoint(dirname=tmp_path, f_params="p{last_epoch[epoch]}.pt", monitor=None)
    net = scripted(losses_of(4), DynamicK())
    net.set_params(callbacks=[*net.callbacks, ("checkpoint", checkpoint)][::order], max_epochs=4)
    net.fit(*data())
    saved = [float(torch.load(tmp_path / f"p{i}.pt")["k"]) for i in range(1, 5)]
    assert saved == net.history[:, "k"]
    assert len(set(saved)) > 2


def test_validation_batches_are_not_counted():
    X, y = data(20)
    losses = losses_of(4)
    for update in ("epoch", "batch"):
        net = scripted(losses, DynamicK(update=update)).set_params(max_epochs=4)
        without = net.fit(X[:12], y[:12]).history[:, "k"]
        net = scripted(losses, DynamicK(update=update))

        def split(dataset, y=None):
            subset = torch.utils.data.Subset
            return subset(dataset, range(12)), subset(dataset, range(12, 20))

        net.set_params(max_epochs=4, train_split=split).fit(X, y)
        assert net.history[:, "k"] == without
        assert len(net.history[:, "valid_loss"]) == 4


@pytest.mark.parametrize(
    ("k", "changes", "expected"),
    [
        (40.0, {"k_max": 0.3}, 30),
        (40.0, {"k_min": 55}, 55),
        (1e6, {}, 100),
        (0.0, {}, 100 * K_MIN),
        (40.0, {"k_max": 1}, 1),
    ],
)
@pytest.mark.parametrize("module", [Buffered, Plain])
@pytest.mark.parametrize("n_pixels", [None, 100])
def test_k_is_clipped_when_training_starts(k, changes, expected, module, n_pixels):
    net = scripted([1.0] * 3, DynamicK(n_pixels=n_pixels, **changes), module, module__k=k)
    net.fit(*data())
    assert net.ks_seen == pytest.approx([expected] * 3)


def test_k_is_clipped_after_set_params():
    net = scripted([1.0] * 12, DynamicK(grow=10, momentum=0.0, n_pixels=100))
    net.set_params(max_epochs=2).fit(*data())
    assert net.ks_seen[-1] == 40
    net.set_params(callbacks__dynamic_k__k_max=25, callbacks__dynamic_k__k_min=5)
    net.partial_fit(*data())
    assert net.ks_seen[6:] == [25] * 6  # grown from 25, and held there


def test_new_image_sizes_bring_new_bounds():
    class Any(Buffered):
        def forward(self, X):
            return self.linear(X.flatten(1)[:, :9].repeat(1, 12)[:, :100]).softmax(1)

    net = scripted([1.0] * 9, DynamicK(), Any)
    net.fit(*data(shape=(10, 10)))
    net.partial_fit(*data(shape=(1, 3, 3)))
    assert net.ks_seen == [40.0] * 3 + [9.0] * 3


class Nested(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.inner, self.form = Buffered(), form
        self.register_buffer("k", torch.tensor(99.0))

    def forward(self, X=None, image=None, other=None):
        return self.inner(X[0] if self.form == "tuple" else image if self.form == "dict" else X)


@pytest.mark.parametrize("form", ["array", "dict", "tuple"])
def test_images_are_found_in_every_form_of_batch(form):
    X, y = data(shape=(10, 10))
    other = np.zeros((12, 2), dtype=np.float32)
    Xs = {"array": X, "dict": {"image": X, "other": other}, "tuple": (X, other)}[form]
    net = scripted([1.0] * 3, DynamicK(k_max=0.5), Nested, module__form=form)
    net.fit(Xs, y)
    assert net.ks_seen == [50.0] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_buffer_stays_the_same_tensor(dtype, shape):
    class Shaped(Buffered):
        def __init__(self):
            super().__init__(40, dtype)
            self.k = self.k.reshape(shape)

    callback = DynamicK(grow=1, shrink=1, momentum=0.4)  # by 0.6 of a pixel
    net = scripted([1.0] * 15, callback, Shaped).initialize()
    buffer = net.module_.k
    net.set_params(max_epochs=5).partial_fit(*data())
    assert net.module_.k is buffer
    assert (buffer.dtype, buffer.shape) == (dtype, shape)
    assert buffer.item() == pytest.approx(43 if dtype == torch.int64 else 41.8)


def test_a_parameter_can_be_moved_too():
    class Parameter(Plain):
        def __init__(self):
            super().__init__()
            del self.k
            self.k = nn.Parameter(torch.tensor(40.0))

    net = scripted([1.0] * 9, DynamicK(grow=10), Parameter).set_params(max_epochs=3)
    assert net.fit(*data()).history[-1, "k"] == 48


@pytest.mark.parametrize("net_class", [NeuralNetClassifier, NeuralNet])
def test_in_a_plain_net_with_its_printed_table(net_class, capsys):
    params = {"criterion": nn.NLLLoss} if net_class is NeuralNet else {}
    net = net_class(Buffered, max_epochs=4, callbacks=[DynamicK()], train_split=None, **params)
    X, y = data(40)
    X[:, 0, 0] += 3 * (y[:, None] - 0.5)
    net.fit(X, y)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["epoch", "k", "train_loss", "dur"]
    assert [float(row.split()[1]) for row in rows[1:]] == pytest.approx(net.history[:, "k"], abs=1e-3)
    assert all(type(k) is float for k in net.history[:, "k"])  # JSON needs it
    # The loss of so simple a problem falls, and k with it.
    assert np.all(np.diff(net.history[:, "k"])[1:] < 0)


def test_clone_pickle_and_parameters():
    params = DynamicK(k_min=3, update="batch").get_params()
    assert params["k_min"] == 3
    copy = clone(DynamicK(k_min=3, update="batch"))
    assert copy.get_params() == params
    net = scripted(losses_of(4), DynamicK())
    assert not hasattr(dict(clone(net).initialize().callbacks_)["dynamic_k"], "k")
    net.set_params(callbacks__dynamic_k__shrink=7).fit(*data())
    assert net.get_params()["callbacks__dynamic_k__shrink"] == 7
    again = pickle.loads(pickle.dumps(net))
    for each in (net, again):
        each.set_params(max_epochs=3).partial_fit(*data())
    assert again.history[:, "k"] == net.history[:, "k"]
    assert len(set(net.history[:, "k"])) > 1


def test_nothing_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scripted([1.0] * 6, DynamicK()).set_params(max_epochs=2).fit(*data())


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, v) for name in ("k_min", "k_max") for v in (0, -3, 0.0, 1.5, math.nan, True, "9")),
        *((name, v) for name in ("shrink", "grow") for v in (-1, 0.0, 50.0, None, False)),
        *((name, v) for name in ("ema_decay", "momentum") for v in (1, 1.0, -0.1, "a", math.nan)),
        *(("update", v) for v in ("epochs", None)),
        *(("grow_with_lr", v) for v in (1, "yes", None)),
        *(("n_pixels", v) for v in (0, 10.0, True, "all")),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    callback = DynamicK(**{name: value})  # nothing is checked here, as scikit-learn wants it
    with pytest.raises(ValueError, match=rf"^{name}={value!r} in DynamicK: .*(int|\[0, 1\)|batch|True)"):
        callback.initialize()
    net = scripted([1.0] * 3, DynamicK()).initialize()
    net.set_params(**{f"callbacks__dynamic_k__{name}": value})
    with pytest.raises(ValueError, match=f"^{name}="):
        net.partial_fit(*data())


def test_zero_steps_hold_k():
    net = scripted(losses_of(4), DynamicK(shrink=0, grow=0)).set_params(max_epochs=4)
    assert net.fit(*data()).history[:, "k"] == [40.0] * 4


def test_a_module_without_k_is_named():
    net = scripted([1.0] * 3, DynamicK(), WithoutK)
    with pytest.raises(AttributeError, match="`k` of the module, and WithoutK has none"):
        net.fit(*data())


def test_crossing_bounds_are_refused_when_training_starts():
    with pytest.raises(ValueError, match=r"k_min=50 is above k_max=0\.2: 50 and 20 of the 100"):
        scripted([1.0] * 3, DynamicK(k_min=50, k_max=0.2)).fit(*data())


def test_flat_rows_need_n_pixels():
    X, y = data(shape=(100,))
    with pytest.raises(ValueError, match=r"n_pixels=None .* shape \(5, 100\) .* give n_pixels"):
        scripted([1.0] * 3, DynamicK()).fit(X, y)
    net = scripted([1.0] * 3, DynamicK(n_pixels=100, k_max=0.3)).fit(X, y)
    assert net.ks_seen == [30] * 3
