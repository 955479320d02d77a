"""What a batch costs, what a single row does, batch norm over the data, and what a fit starts from."""

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.utils.class_weight import compute_class_weight
from skorch.callbacks import PassthroughScoring
from torch import nn

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.images import ImageRows, PixelScale
from sklearn_sparseattn.network import SparseAttnNet, strides_for
from sklearn_sparseattn.training import consistency_loss, contrastive_loss, distillation_loss, focal_loss
from sklearn_sparseattn.training.augmentation import dihedral
from sklearn_sparseattn.training.batches import Batches, LabelledImages
from sklearn_sparseattn.training.net import (
    LOSS_TERMS,
    LearningRate,
    ProgressBar,
    SparseAttnLoss,
    SparseAttnTrainer,
    keeping_up,
    recompute_batch_norm,
)
from sklearn_sparseattn.training.setup import (
    class_weights,
    k_defaults,
    label_images,
    make_generators,
    new_network,
)

ALPHA = torch.tensor([1.0, 3.0, 0.5])
SETTINGS = {
    "focal_gamma": 1.5,
    "class_weight": ALPHA,
    "contrastive_weight": 0.3,
    "temperature": 0.2,
    "distillation_weight": 0.7,
}


def make_network(seed=0, k=40, **options):
    network = SparseAttnNet(1, 3, k, **options)
    network.reset_parameters(torch.Generator().manual_seed(seed))
    return network


def make_batch(n=7, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.uniform(size=(n, 1, 10, 11)).astype(np.float32))
    target = torch.from_numpy(rng.integers(0, 3, n))
    weight = torch.from_numpy(rng.uniform(0.1, 3, n).astype(np.float32))
    return images, target, weight


# ---- the loss ----


@pytest.mark.parametrize("variant", ["tiles", "paper"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contrastive_weight": 0.0},
        {"distillation_weight": 0.0},
        {"contrastive_weight": 0.0, "distillation_weight": 0.0},
        {"focal_gamma": 0.0},
        {"consistency_weight": 0.6},
    ],
    ids=str,
)
def test_total_is_the_weighted_sum_of_the_terms(changes, variant):
    settings = {**SETTINGS, **changes}
    images, target, weight = make_batch(8)
    network = make_network(variant=variant).train()
    output = network(images)
    terms = SparseAttnLoss(**settings)(output, target, weight)
    assert list(terms) == [*LOSS_TERMS, "total"]

    log_p = output.logits.detach().double().log_softmax(1).gather(1, target[:, None])[:, 0]
    rows = -ALPHA[target] * (1 - log_p.exp()) ** settings["focal_gamma"] * log_p
    focal = (weight * rows).sum() / len(target)  # sum(w l) / B, not / sum(w)
    torch.testing.assert_close(terms["focal_loss"].double(), focal, rtol=1e-5, atol=1e-6)
    contrastive = contrastive_loss(
        output.features, target, temperature=settings["temperature"], sample_weight=weight
    )
    torch.testing.assert_close(terms["contrastive_loss"], contrastive)
    chosen = torch.stack([image.flatten()[t] for image, t in zip(output.scores, output.tiles, strict=True)])
    distillation = distillation_loss(chosen, output.attention, sample_weight=weight)
    torch.testing.assert_close(terms["distillation_loss"], distillation)
    total = (
        terms["focal_loss"]
        + settings["contrastive_weight"] * contrastive
        + settings["distillation_weight"] * distillation
    )
    if "consistency_weight" in settings:  # then the batch is four images and other views of them
        consistency = consistency_loss(output.logits, sample_weight=weight)
        torch.testing.assert_close(terms["consistency_loss"], consistency)
        assert consistency > 0
        total = total + 0.6 * consistency
    else:
        assert terms["consistency_loss"] == 0
    torch.testing.assert_close(terms["total"], total)

    # A weight of 0 leaves the gradients to the other terms; in the paper's form the scores learn by
    # distillation alone.
    found = torch.autograd.grad(terms["total"], network.parameters(), retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(total, network.parameters(), allow_unused=True)
    for (name, p), one, other in zip(network.named_parameters(), found, expected, strict=True):
        one, other = (torch.zeros_like(p) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)
        if name == "coarse.score.weight":
            assert one.any() == (variant == "tiles" or bool(settings["distillation_weight"]))


@pytest.mark.parametrize("name", [*LOSS_TERMS, "total"])
def test_sample_weights_reach_every_term(name):
    """Twice the weights are twice the loss, and a row without weight has no part in it but as a neighbour."""
    images, target, weight = make_batch(8)
    weight = weight[:4].repeat(2)  # two views of four images
    output = make_network().train()(images)
    loss = SparseAttnLoss(**SETTINGS, consistency_weight=0.6)
    whole = loss(output, target, weight)[name]
    assert whole > 0
    torch.testing.assert_close(loss(output, target, 2 * weight)[name], 2 * whole)
    of_each = [loss(output, target, weight * torch.eye(4)[i].repeat(2))[name] for i in range(4)]
    torch.testing.assert_close(sum(of_each), whole)


def test_weights_keep_their_meaning_from_batch_to_batch():
    """The mean of the batches' losses is the loss of all rows: no batch norms its own weights away."""
    images, target, weight = make_batch(8)
    loss = SparseAttnLoss(**SETTINGS)
    output = make_network().eval()(images)
    whole = loss.focal(output, target, weight)
    parts = [
        loss.focal(type(output)(*(part[rows] for part in output)), target[rows], weight[rows])
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)
    torch.testing.assert_close(loss.focal(output, target, 2 * weight), 2 * whole)


def test_class_weights_move_with_the_criterion():
    loss = SparseAttnLoss(**SETTINGS).double()
    assert loss.class_weight.dtype == torch.float64
    assert torch.equal(loss.state_dict()["class_weight"], ALPHA.double())


# ---- the skorch net ----


def make_dataset(n=9, seed=0):
    rng = np.random.default_rng(seed)
    images = ImageRows(rng.integers(0, 256, (n, 10, 11), dtype=np.uint8), (10, 11, 1))
    return label_images(images, rng.integers(0, 3, n), rng.uniform(0.5, 2, n), PixelScale((0.0, 255.0)))


def make_trainer(network, *, consistency_weight=0.0, **options):
    return SparseAttnTrainer(
        network,
        criterion=SparseAttnLoss(**SETTINGS, consistency_weight=consistency_weight),
        optimizer=torch.optim.SGD,
        lr=0.01,
        max_epochs=2,
        batch_size=4,
        iterator_train=Batches,
        iterator_valid=Batches,
        train_split=None,
        callbacks__print_log=None,
        verbose=0,
        **options,
    ).initialize()


def running_statistics(network):
    return {name: value.clone() for name, value in network.state_dict().items() if "running" in name}


def changed(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize(("n", "moves"), [(1, False), (2, True)])
@pytest.mark.parametrize("n_views", [1, 2])
def test_a_single_row_uses_the_running_statistics(n, moves, n_views):
    network = make_network()
    views = {"iterator_train__rng": np.random.default_rng(0), "iterator_train__augment": dihedral}
    options = {"consistency_weight": 0.5, "iterator_train__n_views": 2, **views} if n_views == 2 else {}
    trainer = make_trainer(network, **options)
    before, weights = running_statistics(network), [p.clone() for p in network.parameters()]
    trainer.partial_fit(make_dataset(n))
    assert bool(changed(before, running_statistics(network))) == moves
    assert any(not torch.equal(p, old) for p, old in zip(network.parameters(), weights, strict=True))


def test_terms_go_into_the_history():
    callbacks = [(name, PassthroughScoring(name, on_train=True)) for name in LOSS_TERMS]
    trainer = make_trainer(make_network(), callbacks=[*callbacks, ("lr", LearningRate())])
    trainer.partial_fit(make_dataset(12))
    for epoch in trainer.history:
        total = epoch["focal_loss"] + 0.3 * epoch["contrastive_loss"] + 0.7 * epoch["distillation_loss"]
        assert epoch["train_loss"] == pytest.approx(total, rel=1e-5)
        assert epoch["lr"] == 0.01


def test_validation_is_scored_by_the_focal_loss_and_accuracy_alone():
    network = make_network()
    trainer = make_trainer(network)
    dataset = make_dataset(8)
    images, labels = dataset.read(np.arange(8))
    trainer.history.new_epoch()
    trainer.history.new_batch()
    loss = trainer.validation_step((images, labels))["loss"]
    target, weight = labels
    logits = network.eval()(images).logits
    expected = focal_loss(logits, target, gamma=1.5, class_weight=ALPHA, sample_weight=weight) * weight.mean()
    torch.testing.assert_close(loss, expected.detach())
    right = (logits.argmax(1) == target).numpy()
    accuracy = np.average(right, weights=weight.numpy())
    assert trainer.history[-1, "batches", -1, "valid_score"] == pytest.approx(accuracy)


def test_progress_bar_follows_the_epochs(capsys):
    trainer = make_trainer(make_network())
    bar = ProgressBar(2)
    bar.on_train_begin(trainer)
    for loss in (1.25, 0.5):
        trainer.history.new_epoch()
        trainer.history.record("train_loss", loss)
        trainer.history.record("k", 11.7)
        bar.on_epoch_end(trainer)
    bar.on_train_end(trainer)
    assert bar.bar_.n == 2
    assert bar.bar_.disable
    text = capsys.readouterr().err
    assert "loss=0.5000" in text
    assert "k=12" in text


# ---- batch norm over the data ----


def first_layer(network, images):
    """What the first batch norm sees, (rows, H, W, channels), in NumPy."""
    conv = network.coarse.early[0]
    padded = np.pad(images.numpy().astype(float)[:, 0], ((0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))[:, :: conv.stride[0], :: conv.stride[1]]
    return np.einsum("bhwij,oij->bhwo", windows, conv.weight.detach().numpy()[:, 0].astype(float))


def test_batch_norm_gets_the_statistics_of_the_data():
    network = make_network()
    norm = network.coarse.early[1]
    norm.running_mean.fill_(1e3)
    norm.running_var.fill_(1e6)
    images = torch.cat([make_batch(seed=seed)[0] for seed in range(6)])[:40]
    batches = [(images[rows : rows + 10],) for rows in range(0, 40, 10)]
    recompute_batch_norm(network, batches, torch.device("cpu"))
    seen = first_layer(network, images)
    np.testing.assert_allclose(norm.running_mean.numpy(), seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    # Within batches, unbiased, as in training; what differs between batches' means is little.
    parts = [seen[rows : rows + 10].reshape(-1, seen.shape[-1]).var(0, ddof=1) for rows in range(0, 40, 10)]
    np.testing.assert_allclose(norm.running_var.numpy(), np.mean(parts, axis=0), rtol=1e-4)
    np.testing.assert_allclose(norm.running_var.numpy(), seen.var((0, 1, 2)), rtol=0.02)


def test_rows_sorted_by_class_do_not_narrow_batch_norm():
    """As folders give them: batches of one class each would miss what lies between the classes."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 40)
    X = (rng.integers(0, 60, (120, 12, 12)) + 60 * y[:, None, None]).astype(np.uint8)
    clf = SparseAttnClassifier(max_epochs=5, batch_size=20, random_state=0).fit(X, y)
    whole = copy.deepcopy(clf.network_)
    images = PixelScale(clf.data_range_)(X[..., None])
    recompute_batch_norm(whole, [(torch.from_numpy(images),)], torch.device("cpu"))
    ratio = clf.network_.fusion.first[1].running_var / whole.fusion.first[1].running_var
    assert 0.8 < ratio.median() < 1.25  # in the order of y: 0.15


def test_every_batch_norm_is_renewed_and_momentum_restored():
    network = make_network().train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.momentum = 0.01 * (i + 1)
        norm.running_mean.fill_(1e3)
        norm.running_var.fill_(1e6)
    weights = {name: p.clone() for name, p in network.named_parameters()}
    recompute_batch_norm(network, [make_batch(seed=s)[:1] for s in range(3)], torch.device("cpu"))
    assert not any(module.training for module in network.modules())
    assert [norm.momentum for norm in norms] == [0.01 * (i + 1) for i in range(len(norms))]
    # Nothing is left of what was there.
    assert all(norm.running_mean.abs().max() < 100 for norm in norms)
    assert all(norm.running_var.max() < 1e4 for norm in norms)
    assert not changed(weights, dict(network.named_parameters()))
    assert all(p.grad is None for p in network.parameters())


def test_statistics_are_those_of_the_ks_drawn():
    """As in training with these, not those of the network's own k."""
    images, ks = make_batch(12)[0], torch.linspace(4, 90, 12)
    drawn = []

    def draw(k, n):
        drawn.append((k, n))
        return ks

    network, expected = make_network(k=23.4), make_network(k=23.4)
    recompute_batch_norm(network, [(images,)], torch.device("cpu"), draw)
    assert drawn == [(pytest.approx(23.4), 12)]
    assert network.k.item() == 23.4
    assert network.k_by_image is None
    expected.k_by_image = ks
    norms = [m for m in expected.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    expected.eval()
    for norm in norms:
        norm.train()
    expected(images)
    assert changed(running_statistics(network), running_statistics(expected)) == []
    other = make_network(k=23.4)
    recompute_batch_norm(other, [(images,)], torch.device("cpu"))
    assert any(
        "tokens.norms" in name for name in changed(running_statistics(network), running_statistics(other))
    )


def test_a_batch_of_one_row_is_left_out():
    images = make_batch(9)[0]
    alone, among = make_network(), make_network()
    recompute_batch_norm(alone, [(images[1:5],), (images[5:],)], torch.device("cpu"))
    recompute_batch_norm(among, [(images[:1],), (images[1:5],), (images[5:],)], torch.device("cpu"))
    assert changed(running_statistics(alone), running_statistics(among)) == []
    only = make_network()
    before = running_statistics(only)
    recompute_batch_norm(only, [(images[:1],)], torch.device("cpu"))
    assert changed(before, running_statistics(only)) == []


def test_where_channels_differ_by_rounding_alone_rounding_does_not_decide():
    """Of images without content, one norm after the other would divide by the root of eps."""
    network, images = make_network(), torch.full_like(make_batch()[0][:10], 0.3)
    with torch.no_grad():
        network.fusion.first[0].weight *= 30
    recompute_batch_norm(network, [(images[:n],) for n in (10, 7, 3, 9)], torch.device("cpu"))
    expected = network(images).logits
    with torch.no_grad():
        network.fusion.first[1].running_mean *= 1 + 1e-7
    torch.testing.assert_close(network(images).logits, expected, rtol=0, atol=1e-4)


def test_running_statistics_keep_up_with_the_weights():
    network = make_network()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with keeping_up(network):
        assert [norm.momentum for norm in norms] == [0.5] * len(norms)
    assert [norm.momentum for norm in norms] == [0.1] * len(norms)


def test_validation_means_something_while_weights_move_fast():
    """Logits by the running statistics are near those by the batch's own, at the usual momentum far off."""
    images, target, weight = make_batch(24)
    off = {}
    for name, context in (("ours", keeping_up), ("usual", contextlib.nullcontext)):
        network, off[name] = make_network(), []
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        with context(network):
            for _ in range(25):
                optimizer.zero_grad()
                SparseAttnLoss(**SETTINGS)(network.train()(images), target, weight)["total"].backward()
                optimizer.step()
                with torch.no_grad():
                    own = copy.deepcopy(network).train()(images).logits
                    off[name].append((network.eval()(images).logits - own).abs().mean().item())
    assert np.mean(off["ours"]) < 0.5 * np.mean(off["usual"])
    assert off["ours"][-1] < 0.5 * off["usual"][-1]


def test_momentum_is_restored_after_an_exception():
    network = make_network()

    def batches():
        yield make_batch()[:1]
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        recompute_batch_norm(network, batches(), torch.device("cpu"), lambda k, n: torch.full((n,), k / 2))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.1] * len(norms)
    assert not any(norm.training for norm in norms)
    assert network.k.item() == 40
    assert network.k_by_image is None


# ---- what a fit starts from ----

PARAMS = SparseAttnClassifier().get_params(deep=False)


def draws(random_state):
    rng, generator = make_generators(random_state)
    return rng.integers(2**62, size=3).tolist(), torch.randint(2**62, (3,), generator=generator).tolist()


def test_generators_follow_random_state():
    assert draws(0) == draws(0)
    assert draws(0) == draws(np.random.RandomState(0))
    assert draws(0) != draws(1)
    assert draws(None) != draws(None)
    state = np.random.RandomState(0)
    assert draws(state) != draws(state)
    numpy_draws, torch_draws = draws(0)
    assert numpy_draws != torch_draws


@pytest.mark.parametrize("random_state", [None, 3])
def test_generators_leave_the_global_ones_alone(random_state):
    def states():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002

    before = states()
    make_generators(random_state)
    assert states() == before


def test_random_state_that_is_none():
    with pytest.raises(ValueError, match="cannot be used to seed"):
        make_generators("seed")


@pytest.mark.parametrize(
    ("image_shape", "steps", "k"),
    [
        ((135, 135, 1), (2, 4), 8000 / 18225 * 34 * 34 * 16),
        ((20, 20, 3), (1, 2), 8000 / 18225 * 400),
        ((8, 9, 1), (1, 1), 8000 / 18225 * 72),
    ],
)
def test_new_network_suits_the_images(image_shape, steps, k):
    network = new_network(PARAMS, image_shape, 5, torch.Generator().manual_seed(0)).eval()
    assert network.coarse.steps == steps
    assert network.k.item() == pytest.approx(k)
    height, width, channels = image_shape
    output = network(torch.zeros(1, channels, height, width))
    assert output.logits.shape == (1, 5)
    sizes = {**PARAMS, "embed_dim": 9, "n_heads": 3, "hidden_dim": 10, "k_init": 7}
    network = new_network(sizes, image_shape, 5, torch.Generator().manual_seed(0))
    assert network.fine.n_heads == 3
    assert network.fine.cls_token.shape == (1, 1, 9)
    assert network.fusion.out.in_features == 10
    assert network.k.item() == 7
    assert network.form["strides"] == strides_for(height, width)
    images = torch.zeros(1, channels, height, width)
    for own, n_features in (({}, 64 + 32), ({"size": "large"}, 64 + 64), ({"variant": "paper"}, 32 + 48)):
        other = new_network(PARAMS | own, image_shape, 5, torch.Generator().manual_seed(0)).eval()
        assert own.items() <= other.form.items()
        assert other(images).features.shape == (1, n_features)


def test_maps_come_as_tiles_are_gathered_from_them():
    network = new_network(PARAMS, (40, 40, 3), 5, torch.Generator().manual_seed(0)).eval()
    look = network.coarse.look(torch.rand(2, 3, 40, 40))
    assert all(cells.is_contiguous(memory_format=torch.channels_last) for cells in look.maps)


@pytest.mark.parametrize("name", ["embed_dim", "n_heads", "hidden_dim"])
def test_a_network_that_cannot_be_made_is_named(name):
    params = {**PARAMS, name: 10**12}
    with pytest.raises(ValueError, match=f"{name}=1000000000000"):
        new_network(params, (40, 40, 1), 5, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (2, 2), (9, 6)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_background_is_the_mean_of_the_outermost_pixels(height, width, dtype):
    images = np.random.default_rng(0).integers(0, 256, (5, height, width, 3)).astype(dtype)
    training = LabelledImages(
        ImageRows(images, images.shape[1:]), np.arange(5), np.ones(5), PixelScale((10.0, 110.0))
    )
    row, column = np.indices((height, width))
    at_border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    expected = (images[:, at_border].mean() - 10) / 100
    network = new_network(PARAMS, (height, width, 3), 5, torch.Generator().manual_seed(0), training)
    assert network.coarse.background.item() == pytest.approx(expected, rel=1e-6)
    other = new_network(PARAMS, (height, width, 3), 5, torch.Generator().manual_seed(0))
    assert other.coarse.background == 0
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), other.parameters(), strict=True))


def test_k_defaults_are_parameters_by_name():
    """Shares are those of whole tiles; a number of pixels that is the whole image means all tiles."""
    params = PARAMS | {"k_min": 3, "k_max": 0.5, "k_tolerance": 0.2}
    network = new_network(PARAMS, (135, 130, 1), 2, torch.Generator().manual_seed(0))
    expected = {"k_min": 16, "k_max": 0.5, "tolerance": 0.2, "n_pixels": 34 * 33 * 16}
    assert k_defaults(params, network, (135, 130, 1)) == expected
    everything = params | {"k_max": 135 * 130}
    assert k_defaults(everything, network, (135, 130, 1)) == expected | {"k_max": 1.0}


def with_weights(target, weight):
    target = np.asarray(target)
    images = ImageRows(np.zeros((len(target), 1)), (1, 1, 1))
    return label_images(images, target, np.asarray(weight, float), PixelScale((0.0, 1.0)))


def test_sample_weights_are_normalised_once():
    dataset = with_weights([0, 1, 1], [2.0, 4.0, 6.0])
    torch.testing.assert_close(dataset.weight, torch.tensor([0.5, 1.0, 1.5]))


def test_balanced_is_that_of_scikit_learn():
    target = np.array([0, 0, 1, 2, 2, 2])
    repeats = np.array([1, 2, 5, 1, 1, 1])
    classes = np.array(["a", "b", "c"])
    found = class_weights("balanced", classes, with_weights(target, np.ones(6)))
    expected = compute_class_weight("balanced", classes=classes, y=classes[target])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # A row of weight 5 counts as five rows.
    found = class_weights("balanced", classes, with_weights(target, repeats))
    expected = compute_class_weight("balanced", classes=classes, y=classes[np.repeat(target, repeats)])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_balanced_leaves_absent_classes_at_one():
    """In `partial_fit` a batch need not have them all."""
    found = class_weights("balanced", np.array([0, 1, 2]), with_weights([0, 0, 0, 2], np.ones(4)))
    np.testing.assert_allclose(found, [4 / (2 * 3), 1, 4 / (2 * 1)])


def test_class_weight_by_label_or_none():
    dataset, classes = with_weights([0, 1, 1], np.ones(3)), np.array(["no", "yes"])
    np.testing.assert_array_equal(class_weights(None, classes, dataset), [1, 1])
    np.testing.assert_array_equal(class_weights({"yes": 5, "no": 0.5}, classes, dataset), [0.5, 5])
    np.testing.assert_array_equal(class_weights({"yes": 5}, classes, dataset), [1, 5])
