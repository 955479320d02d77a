"""What the benchmarks compute beside their measuring: intervals, results in a file, splits, one tiny run."""

import copy
import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from skorch.callbacks import Callback

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.network import SparseAttnNet


@pytest.fixture
def few_cells(load_benchmark, monkeypatch):
    """The generated data sets with few and small images; `data_sets`."""
    data_sets = load_benchmark("data_sets")
    counts = {"opd": (30, 30, 30), "hologram": (30, 30, 30), "event": (30, 30)}
    monkeypatch.setattr(data_sets, "COUNTS", counts | {"brightfield": (20, 10, 40, 12, 8)})
    small = {name: lambda name=name: data_sets.generated(name, 32) for name in data_sets.COUNTS}
    monkeypatch.setattr(data_sets, "DATA_SETS", small)
    monkeypatch.setattr(data_sets, "N_MORE", 20)
    return data_sets


def test_paired_interval(load_benchmark):
    paired_interval = load_benchmark("report").paired_interval
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    expected = ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(paired_interval(a, b), [np.mean(a - b), *expected])
    mean, low, high = paired_interval([2.0], [1.5])
    assert mean == 0.5
    assert np.isnan([low, high]).all()


def test_record_with_many_writers(load_benchmark, tmp_path):
    report = load_benchmark("report")
    path = tmp_path / "results.json"
    # Each opens the lock for itself, so that threads exclude each other as processes do.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: report.record(path, f"run{i}", {"accuracy": i / 100}), range(100)))
    assert report.recorded(path) == {f"run{i}": {"accuracy": i / 100} for i in range(100)}
    assert list(tmp_path.iterdir()) == [path]
    report.record(path, "run0", "again")
    assert report.recorded(path)["run0"] == "again"


def test_paper_counts(load_benchmark):
    counts = load_benchmark("data_sets").COUNTS
    totals = {name: sum(count) for name, count in counts.items()}
    assert totals == {"opd": 7334, "hologram": 7334, "event": 1584, "brightfield": 4339}


@pytest.mark.parametrize("name", ["opd", "hologram", "event", "brightfield"])
def test_splits_of_generated_cells(few_cells, name):
    images, target, splits = few_cells.load(name)
    n_split = sum(few_cells.COUNTS[name])
    assert len(images) == len(target)
    assert 20 <= len(target) - n_split < 20 + len(few_cells.COUNTS[name])  # a class may be rounded up
    assert len(np.unique(images[n_split:], axis=0)) == len(target) - n_split
    assert [split for split, _, _ in splits] == [f"seed{i}" for i in range(30)]
    for _, train, test in splits:
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(target)))
        assert len(test) == pytest.approx(0.2 * n_split + len(target) - n_split, abs=1)
        assert set(test) >= set(range(n_split, len(target)))
        assert set(target[test]) == set(target[train]) == set(range(len(few_cells.COUNTS[name])))
    assert len({tuple(test) for _, _, test in splits}) == 30


def test_splits_with_few_labels(few_cells, monkeypatch):
    monkeypatch.setattr(few_cells, "N_LABELLED", 5)
    images, target, splits = few_cells.few_labels(few_cells.DATA_SETS["brightfield"])
    assert len(images) == len(target)
    assert len(splits) == len({tuple(train) for _, train, _ in splits}) == 30
    for _, train, test in splits:
        np.testing.assert_array_equal(np.bincount(target[train]), [5] * 5)
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(target)))


def test_calibration_error(load_benchmark):
    calibration_error = load_benchmark("accuracy").calibration_error
    # Of ten rows at 0.75 seven are right, of ten at 0.95 all: (0.05 + 0.05) / 2.
    probabilities = np.repeat([[0.75, 0.25], [0.95, 0.05]], 10, axis=0)
    target = np.array([0] * 7 + [1] * 3 + [0] * 10)
    assert calibration_error(probabilities, target) == pytest.approx(0.05)
    assert calibration_error(np.eye(3), np.arange(3)) == 0
    assert calibration_error(np.eye(3), np.array([1, 2, 0])) == 1
    # Errors of either sign in one bin cancel, in two bins they add.
    assert calibration_error(np.array([[0.51, 0.49], [0.52, 0.48]]), np.array([0, 1])) == pytest.approx(0.015)
    # Neighbouring bins do not make up for each other, up to the last two.
    for low in np.arange(8, 14) / 15 + 1 / 30:
        top = np.array([low, low + 1 / 15])
        found = calibration_error(np.column_stack([top, 1 - top]), np.array([1, 0]))
        assert found == pytest.approx((1 - 1 / 15) / 2)


@pytest.mark.parametrize("name", ["lenet", "hog_svc", "hist_gradient_boosting"])
@pytest.mark.parametrize("data", ["hologram", "brightfield"])
def test_peers(few_cells, load_benchmark, name, data):
    images, target, _ = few_cells.load(data)
    peer = load_benchmark("peers").PEERS[name](augment="dihedral", batch_size=32, random_state=0)
    peer.max_epochs = peer.max_iter = 2
    probabilities = peer.fit(images[20:], target[20:], images[:20], target[:20]).predict_proba(images[:20])
    assert probabilities.shape == (20, target.max() + 1)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("name", "n_parameters"), [("resnet50", 23_514_179), ("mobilenetv2", 2_227_715)])
def test_peers_of_transformers(few_cells, load_benchmark, name, n_parameters):
    images, target, _ = few_cells.load("opd")
    images = np.repeat(images[:24, ..., None], 3, axis=-1)
    peer = load_benchmark("peers").PEERS[name](augment=None, batch_size=16, random_state=0)
    peer.max_epochs = 1
    probabilities = peer.fit(images[:16], target[:16], images[16:], target[16:]).predict_proba(images)
    assert probabilities.shape == (24, 3)
    assert probabilities.dtype == np.float32
    assert peer.n_parameters_ == n_parameters
    assert peer.n_iter_ == 1


def test_harness(few_cells, load_benchmark, tmp_path, capsys, monkeypatch):
    """Measure, take up again, make the tables."""
    accuracy = load_benchmark("accuracy")
    models = {"tiles": accuracy.ours(max_epochs=2), "hog_svc": accuracy.PEERS["hog_svc"]}
    path, document = tmp_path / "accuracy.json", tmp_path / "README.md"
    assert accuracy.measure_all(path, models, ["event"], 2, 1)
    results = accuracy.recorded(path)
    assert set(results) == {f"event/{model}/seed{i}" for model in models for i in (0, 1)}
    run = results["event/tiles/seed1"]
    assert run["k"] / 32**2 == run["share"]
    assert run["epochs"] == 2
    assert (run["n_train"], run["n_test"]) == (48, 12 + 20)
    assert run["machine"]["threads"] == 1
    assert run["macro_recall"] == pytest.approx(run["balanced_accuracy"])
    assert capsys.readouterr().out.count("accuracy") == 4
    assert accuracy.measure_all(path, models, ["event"], 2, 1)
    assert capsys.readouterr().out == ""

    marks = [
        f"<!-- {name}: {end} -->" for name in ("accuracy", "differences", "k") for end in ("begin", "end")
    ]
    document.write_text("\n".join(marks))
    accuracy.write_tables(path, document)
    text = document.read_text()
    assert len(re.findall(r"^\| `(tiles|hog_svc)` \| 2 \| [\d.]+ ± [\d.]+ \|", text, re.M)) == 2
    assert re.search(r"^\| event \| `tiles` \| `hog_svc` \| 2 \| [+-][\d.]+ \[", text, re.M)
    assert " without " not in text
    assert re.search(r"^\| event \| 2 \| [\d.]+ ± [\d.]+ \| [\d.]+-[\d.]+ \| \d \|", text, re.M)
    monkeypatch.setattr(accuracy, "ASTRAY", {("event", "hog_svc"): ("seed1", "seed7")})
    monkeypatch.setattr(accuracy, "PEERS", {"hog_svc": None})
    hours = [{**run, "fit_seconds": 3600.0} for run in accuracy.recorded(path).values()]
    path.write_text(json.dumps({f"{run['model']}/{run['split']}": run for run in hours}))
    accuracy.write_tables(path, document)
    text = document.read_text()
    assert re.search(r"`hog_svc` without seed1 \| 1 \| [+-][\d.]+ \| one run", text)
    assert "The peers' fits took 2.0 h in all." in text


def test_run_of_ours_is_scored_at_other_k(few_cells, load_benchmark):
    accuracy, fits = load_benchmark("accuracy"), []

    def make(**recipe):
        fits.append(accuracy.ours(max_epochs=2, k_init=0.3)(**recipe))
        return fits[0]

    run = accuracy.run_one("event", "seed1", "tiles", make)
    images, target, splits = few_cells.load("event")
    rows = splits[1][2]
    [clf] = fits
    assert clf.predict_k is None
    for name, k in {"half_k": clf.k_ // 2, "twice_k": 2 * clf.k_, "all": 1.0, "share_0.04": 0.04}.items():
        expected = clf.set_params(predict_k=k).score(images[rows], target[rows])
        assert run[f"accuracy_{name}"] == pytest.approx(expected)
    assert run["accuracy"] == clf.set_params(predict_k=None).score(images[rows], target[rows])


@pytest.mark.parametrize(
    ("bounds", "expected"), [({}, False), ({"k_min": 1.0}, True), ({"k_init": 1, "k_max": 17}, True)]
)
def test_a_bound_is_told(few_cells, load_benchmark, bounds, expected):
    images, target, _ = few_cells.load("event")
    accuracy = load_benchmark("accuracy")
    clf = accuracy.ours(max_epochs=1, **bounds)(augment=None, batch_size=32, random_state=0)
    assert accuracy.describe(clf.fit(images[:40], target[:40]))["at_bound"] == expected


def test_twin_is_trained_by_our_recipe(few_cells, load_benchmark):
    peers = load_benchmark("peers")
    images, target, _ = few_cells.load("event")
    twin = peers.PEERS["twin"](augment="dihedral", batch_size=32, random_state=0)
    twin.recipe["max_epochs"] = 3
    probabilities = twin.fit(images[:40], target[:40], images[40:], target[40:]).predict_proba(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    ours = SparseAttnClassifier(max_epochs=3, random_state=0).fit(images[:40], target[:40])
    assert twin.n_iter_ == ours.n_iter_ == 3
    network = twin.trainer_.module_.network
    assert network.background == pytest.approx(float(ours.network_.coarse.background))
    [group], steps = twin.trainer_.optimizer_.param_groups, 3 * 2
    assert group["max_lr"] == ours.lr
    assert group["weight_decay"] == pytest.approx(3 / (ours.lr * steps))
    # Statistics are those of the training rows at the weights as they are.
    rows = peers.labelled(images[:40], target[:40], twin.scale_).read(np.arange(40))[0]
    with torch.no_grad():
        first = network.features[0](rows - network.background)
    np.testing.assert_allclose(network.features[1].running_mean, first.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "millions"), [("twin_small", 2.5), ("twin", 5.7), ("twin_large", 9.6)])
def test_multiply_adds_of_the_twins(load_benchmark, name, millions):
    network = load_benchmark("peers").TWINS[name]((135, 135, 1), 3).eval()
    found = load_benchmark("efficiency").cost(network, (1, 135, 135))
    assert found["multiply_adds"] / 1e6 == pytest.approx(millions, abs=0.05)


def test_k_by_data_set(load_benchmark):
    accuracy = load_benchmark("accuracy")
    assert accuracy.k_table({}, "tiles") == "Not measured yet."

    def run(split, share, value, at_bound):
        others = {f"accuracy_{name}": value - 0.01 * i for i, name in enumerate(("all", "twice_k", "half_k"))}
        about = {"data": "event", "model": "tiles", "split": split, "at_bound": at_bound}
        return {**about, "share": share, "accuracy": value, **others}

    results = {"a": run("seed0", 0.1, 0.9, False), "b": run("seed1", 0.3, 0.8, True)}
    assert (
        "| event | 2 | 20.0 ± 14.1 | 10.0-30.0 | 1 | +0.00 [+0.00, +0.00] | -1.00 [-1.00, -1.00] "
        "| -2.00 [-2.00, -2.00] |"
    ) in accuracy.k_table(results, "tiles")


@pytest.mark.parametrize(("few", "times"), [(40, 1), (500, 8)])
def test_cnns_see_few_rows_more_often(few_cells, load_benchmark, monkeypatch, few, times):
    accuracy = load_benchmark("accuracy")
    monkeypatch.setattr(accuracy, "FEW", few)  # of 60 cells 43 are for fitting

    def rows_for_fitting(base):
        seen = []

        class Counts(base):
            n_iter_ = n_parameters_ = 1

            def __init__(self, **recipe):
                pass

            def fit(self, X, y, X_val, y_val):
                seen.extend(np.unique(X, axis=0, return_counts=True)[1])

            def predict_proba(self, X):
                return np.full((len(X), 2), 0.5)

        accuracy.run_one("event", "seed0", "counts", Counts)
        return seen

    assert rows_for_fitting(accuracy.Cnn) == [times] * 43
    assert rows_for_fitting(object) == [1] * 43


def test_a_run_that_fails_does_not_stop_the_others(few_cells, load_benchmark, tmp_path, capsys):
    accuracy = load_benchmark("accuracy")
    models = {"broken": accuracy.ours(max_epochs=-1), "hog_svc": accuracy.PEERS["hog_svc"]}
    assert not accuracy.measure_all(tmp_path / "results.json", models, ["event"], 1, 1)
    assert set(accuracy.recorded(tmp_path / "results.json")) == {"event/hog_svc/seed0"}
    assert "event/broken/seed0 failed" in capsys.readouterr().out


def test_difference_says_what_is_noise(load_benchmark):
    difference = load_benchmark("accuracy").difference
    runs = {f"seed{i}": {"accuracy": 0.9 + 0.01 * i} for i in range(3)}
    near = {f"seed{i}": {"accuracy": 0.9 + 0.01 * (2 - i)} for i in range(3)}
    far = {f"seed{i}": {"accuracy": 0.5 + 0.011 * i} for i in range(3)}
    assert difference(runs, near, "accuracy")[1] == "inside the noise"
    assert difference(runs, far, "accuracy")[1] == "better"
    assert difference(far, runs, "accuracy")[1] == "worse"
    assert difference(runs, {"seed0": far["seed0"]}, "accuracy") == ("+40.00", "one run")


# ---- ablation ----


@pytest.fixture
def changed_network(load_benchmark):
    """A network of 30 tiles of 4x4 pixels that chooses some of them, changed as a variant of ablation.py."""

    def change(name, n=6):
        ablation = load_benchmark("ablation")
        network = SparseAttnNet(2, 3, 16 * n).eval()
        network.reset_parameters(torch.Generator().manual_seed(0))
        optimizer = SimpleNamespace(param_groups=[{"params": []}])
        shares = {"a": {"data": "event", "model": "tiles", "split": "seed0", "share": 0.2}}
        variant = ablation.variants_for("event", [name], shares)[name]
        estimator = variant(augment=None, batch_size=32, random_state=0)
        for callback in estimator.callbacks:
            if isinstance(callback, ablation.Change):
                callback.on_train_begin(SimpleNamespace(module_=network, optimizer_=optimizer))
        return network, optimizer.param_groups[0]["params"]

    return change


IMAGES = torch.rand(3, 2, 24, 20, generator=torch.Generator().manual_seed(1))


def test_nothing_withheld_is_the_network_itself(load_benchmark):
    ablation = load_benchmark("ablation")
    network = SparseAttnNet(2, 3, 96).eval()
    expected = network(IMAGES)
    ablation.become(ablation.Withheld, network)
    for found, part in zip(network(IMAGES), expected, strict=True):
        assert torch.equal(found, part)


@pytest.mark.parametrize(
    ("name", "zero"),
    [("coarse_only", slice(0, 64)), ("no_token_maximum", slice(32, 64)), ("no_z_coarse", slice(64, None))],
)
def test_withheld_features_are_zero_and_teach_nothing(changed_network, name, zero):
    network, _ = changed_network(name)
    features = network(IMAGES).features
    withheld = torch.zeros(features.shape[1], dtype=torch.bool)
    withheld[zero] = True
    assert not features[:, withheld].any()
    assert features[:, ~withheld].any(0).float().mean() > 0.5
    network(IMAGES).features.sum().backward()
    if name == "coarse_only":
        assert network.tokens.first.weight.grad is None


def test_random_tiles_are_others_each_time_and_follow_k(changed_network):
    network, _ = changed_network("random_tiles")
    first, second = network(IMAGES).tiles, network(IMAGES).tiles
    assert first.shape == (3, 6)
    assert not torch.equal(first, second)
    assert all(len(set(row)) == 6 and max(row) < 30 for row in first.tolist())
    copied = copy.deepcopy(network)
    copied.k.fill_(160)
    assert copied(IMAGES).tiles.shape == (3, 10)
    assert network(IMAGES).tiles.shape == (3, 6)


def test_random_tiles_are_as_many_as_the_default_ended_with(load_benchmark, capsys):
    ablation = load_benchmark("ablation")
    recipe = {"augment": None, "batch_size": 32, "random_state": 0}
    shares = {
        str(i): {"data": data, "model": model, "split": f"seed{i}", "share": share}
        for i, (data, model, share) in enumerate(
            [("event", "tiles", 0.1), ("event", "tiles", 0.3), ("jurkat", "tiles", 1), ("event", "twin", 1)]
        )
    }
    clf = ablation.variants_for("event", ["random_tiles"], shares)["random_tiles"](**recipe)
    assert clf.k_init == pytest.approx(0.2)
    images = np.random.default_rng(0).random((20, 16, 16))
    clf.set_params(max_epochs=3).fit(images, np.arange(20) % 2)
    assert float(clf.network_.k) == pytest.approx(0.2 * 16**2)
    assert ablation.variants_for("opd", ["random_tiles"], shares) == {}
    assert "opd/random_tiles left out" in capsys.readouterr().out


def test_without_a_ramp_a_gate_is_the_attention_alone(changed_network):
    network, _ = changed_network("no_ramp")
    scores = network.coarse.look(IMAGES).scores.flatten(1)
    tiles = network(IMAGES).tiles
    assert (network.openness(scores, tiles) == 1).all()
    assert (SparseAttnNet.openness(network, scores, tiles) < 1).any()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_layers_that_come_in_are_trained(changed_network, load_benchmark, n):
    if f"layers={n}" not in load_benchmark("ablation").VARIANTS:
        n = 2
    network, trained = changed_network(f"layers={n}")
    assert len(network.tokens.layers) == n
    assert {id(weight) for weight in network.tokens.parameters()} == {id(weight) for weight in trained}
    assert network(IMAGES).logits.shape == (3, 3)


def test_k_that_is_not_drawn(load_benchmark):
    """Every batch is trained with the k of its epoch, which moves all the same."""
    ablation, seen = load_benchmark("ablation"), []

    class Watch(Callback):
        def on_batch_begin(self, net, training=False, **kwargs):
            seen.append(float(net.module_.k))

    images = np.random.default_rng(0).random((60, 16, 16))
    params = {**ablation.VARIANTS["k_not_drawn"], "batch_size": 10, "max_epochs": 4, "random_state": 0}
    params["callbacks"] = [*params["callbacks"], Watch()]
    clf = SparseAttnClassifier(**params).fit(images, np.arange(60) % 2)
    np.testing.assert_allclose(np.reshape(seen, (4, 6)), np.tile(clf.history_["k"], (6, 1)).T)
    assert len(set(seen)) > 1


def test_all_variants_can_be_made(load_benchmark):
    ablation = load_benchmark("ablation")
    shares = {"a": {"data": "event", "model": "tiles", "split": "seed0", "share": 0.2}}
    factories = ablation.variants_for("event", list(ablation.VARIANTS), shares)
    assert list(factories) == list(ablation.VARIANTS)
    for make in factories.values():
        make(augment="dihedral", batch_size=32, random_state=0)._check_params()


def test_ablation_table_holds_variants_against_the_default(load_benchmark):
    ablation = load_benchmark("ablation")

    def run(model, split, accuracy):
        rest = {"balanced_accuracy": accuracy, "ece": 0.01, "share": 0.08}
        rest["machine"] = {"processor": "a processor", "torch": "2.13"}
        return {"data": "event", "model": model, "split": split, "accuracy": accuracy, **rest}

    default = {split: run("tiles", split, value) for split, value in (("seed0", 0.9), ("seed1", 0.92))}
    results = {split: run("coarse_only", split, value) for split, value in (("seed0", 0.8), ("seed1", 0.82))}
    text = ablation.tables(results, default)
    assert "| `default` | 2 | 91.0 ± 1.4 |" in text
    assert "| `coarse_only` | 2 | 81.0 ± 1.4 |" in text
    assert "-10.00 [-10.00, -10.00] | worse" in text
    assert ablation.tables({}, default) == "Not measured yet."


def test_table_of_the_starts_of_k(load_benchmark):
    dynamic_k = load_benchmark("dynamic_k")

    def run(model, split, share, accuracy):
        return {"data": "opd", "model": model, "split": split, "share": share, "accuracy": accuracy}

    default = {"a": run("tiles", "seed0", 0.2, 0.9), "b": run("tiles", "seed1", 0.3, 0.9)}
    results = {
        "c": run("worth, from 5%", "seed0", 0.1, 0.89),
        "d": run("worth, from 5%", "seed1", 0.3, 0.89),
        "e": run("worth, from 5%", "seed2", 0.3, 0.1),  # the other start has no such split
    }
    assert (
        "| opd | worth | 2 | 25.0 ± 7.1 | 20.0 ± 14.1 | 1.50 (at most 2.00) | 90.0 ± 0.0 | 89.0 ± 0.0 "
        "| +1.00 [+1.00, +1.00] |"
    ) in dynamic_k.table(results, default)
    assert dynamic_k.table({}, {}) == "Not measured yet."


# ---- fields ----


def test_chance_of_a_hit(load_benchmark):
    fields = load_benchmark("fields")
    assert fields.hit_by_chance(1, 10, 3) == pytest.approx(0.3)
    assert fields.hit_by_chance(2, 4, 2) == pytest.approx(5 / 6)
    np.testing.assert_allclose(fields.hit_by_chance(np.array([0, 9]), 10, 2), [0, 1], atol=1e-12)


def test_tiles_of_a_mask(load_benchmark):
    mask = np.zeros((1, 5, 9), dtype=bool)
    mask[0, 4, 8] = mask[0, 0, 3] = True
    found = load_benchmark("fields").share_of_tiles(mask, 4)
    assert found.tolist() == [[[True, False, False], [False, False, True]]]


def test_where_it_looks(load_benchmark):
    """Of three fields the first is hit with half of the deciding cell, the second missed; one has none."""
    fields = load_benchmark("fields")
    masks, chosen = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), bool)
    masks[:, 0, 0] = 1
    masks[0, 3:5, :4] = masks[1, :2, :2] = 2
    chosen[0, :4, :4] = chosen[1, 4:, 4:] = chosen[2, :4, :4] = True
    found = SimpleNamespace(chosen=chosen, tiles=np.zeros((3, 1), int))
    clf = SimpleNamespace(attention_maps=lambda images: found, network_=SimpleNamespace(tile=4))
    looks = fields.looks(clf, SimpleNamespace(images=masks, masks=masks))
    assert looks == pytest.approx(
        {"attended": 0.25, "deciding_inside": 0.25, "deciding_hit": 0.5, "hit_by_chance": (0.5 + 0.25) / 2}
    )


def test_fields_harness(load_benchmark, tmp_path, monkeypatch, capsys):
    """Fits, costs and the table, each small."""
    fields = load_benchmark("fields")
    monkeypatch.setattr(fields, "N_TRAIN", 24)
    monkeypatch.setattr(fields, "N_TEST", 12)
    document = tmp_path / "README.md"
    document.write_text("<!-- fields: begin -->\n<!-- fields: end -->\n")
    monkeypatch.setattr(fields, "README", document)
    monkeypatch.setattr(fields, "RESULTS", tmp_path / "fields.json")
    accuracy, peers = (load_benchmark(name) for name in ("accuracy", "peers"))

    def twin(**recipe):
        return peers.Twin(peers.TWINS["twin"], max_epochs=1, **recipe)

    monkeypatch.setattr(fields, "MODELS", {"tiles": accuracy.ours(max_epochs=1), "twin": twin})
    assert fields.main(["--tables"]) == 0
    assert "Not measured yet." in document.read_text()
    assert fields.main(["--sizes", "128", "--seeds", "1", "--jobs", "1"]) == 0
    run = fields.recorded(fields.RESULTS)["128/tiles/seed0"]
    assert 0 < run["attended"] < 1
    assert 0 <= run["deciding_inside"] <= run["deciding_hit"] <= 1
    assert 0 < run["hit_by_chance"] <= 1
    capsys.readouterr()
    assert fields.main(["--sizes", "128", "--seeds", "1", "--jobs", "1"]) == 0
    assert capsys.readouterr().out == ""  # what is there is not measured again
    fields.measure_time(fields.RESULTS, [128, 256], rounds=2, seconds=0.01, n_images=8)
    assert "256 left out" in capsys.readouterr().out
    timed = fields.recorded(fields.RESULTS)["time/128"]
    assert timed["twin"]["multiply_adds"] > timed["tiles"]["multiply_adds"] / 3 > 0
    assert {"tiles", "twin/openvino", "twin/onnxruntime"} == set(timed["rates"])
    assert fields.main(["--tables"]) == 0
    assert re.search(r"^\| 128 \| 1 \| .* M = [\d.]+ \| .* × \|$", document.read_text(), re.M)


# ---- robustness ----


@pytest.fixture(params=["uint8", "int8"])
def poor_rows(request):
    """Two training classes of 50 and 25 rows, and as many for the test: photographs or event frames."""
    rng = np.random.default_rng(0)
    bounds, shape = ((0, 256), (75, 6, 5, 3)) if request.param == "uint8" else ((-8, 12), (75, 6, 5))
    X_train, X_test = rng.integers(*bounds, (2, *shape), dtype=request.param)
    return X_train, np.repeat([3, 5], [50, 25]), X_test, np.repeat([5, 3], [50, 25])


def apply(robustness, name, rows, **options):
    """A condition's rows, after a look that it has kept its hands off what it was given."""
    before = [array.copy() for array in rows]
    changed = robustness.CONDITIONS[name](*rows, np.random.default_rng(1), **options)
    for old, now, new in zip(before, rows, changed, strict=True):
        np.testing.assert_array_equal(now, old)
        assert new.dtype == old.dtype
        assert new.shape[1:] == old.shape[1:]
    assert len(changed[0]) == len(changed[1])
    at_test = name in robustness.AT_TEST
    for i in (0, 1) if at_test else (2, 3):
        np.testing.assert_array_equal(changed[i], rows[i])
    return changed


def test_ten_a_class(load_benchmark, poor_rows):
    robustness = load_benchmark("robustness")
    X, y, _, _ = apply(robustness, "ten_a_class", poor_rows)
    assert np.bincount(y)[[3, 5]].tolist() == [10, 10]
    for image, label in zip(X, y, strict=True):
        assert poor_rows[1][(poor_rows[0] == image).all(axis=tuple(range(1, X.ndim)))] == [label]
    few = poor_rows[0][43:], poor_rows[1][43:], *poor_rows[2:]
    assert np.bincount(apply(robustness, "ten_a_class", few)[1])[[3, 5]].tolist() == [7, 10]


def test_wrong_labels_are_a_tenth_and_never_the_same(load_benchmark, poor_rows):
    robustness = load_benchmark("robustness")
    X, y, _, _ = apply(robustness, "label_noise_10%", poor_rows)
    np.testing.assert_array_equal(X, poor_rows[0])
    assert (y != poor_rows[1]).sum() == 8
    assert set(y) == {3, 5}
    many = np.zeros((3000, 1, 1)), np.repeat([0, 1, 2], 1000), *poor_rows[2:]
    y = apply(robustness, "label_noise_10%", many)[1]
    moves = (y - many[1])[y != many[1]] % 3
    assert len(moves) == 300
    assert np.bincount(moves)[1:].min() > 100  # each other class


def test_constant_images(load_benchmark, poor_rows):
    X, y, _, _ = apply(load_benchmark("robustness"), "constant_images_5%", poor_rows)
    np.testing.assert_array_equal(y, poor_rows[1])
    replaced = [image for image, old in zip(X, poor_rows[0], strict=True) if (image != old).any()]
    assert all(image.min() == image.max() for image in replaced)
    bounds = [0, 255] if X.dtype == np.uint8 else [-8, 11]
    assert sorted(int(image.max()) for image in replaced) == [bounds[0]] * 2 + [bounds[1]] * 2


def test_light_is_rounded_and_clipped(load_benchmark, poor_rows):
    robustness = load_benchmark("robustness")
    X = poor_rows[2].astype(float)
    brighter, darker = (apply(robustness, name, poor_rows)[2] for name in ("brighter", "darker"))
    np.testing.assert_array_equal(brighter, np.minimum(np.rint(X * 1.2), np.iinfo(brighter.dtype).max))
    np.testing.assert_array_equal(darker, np.rint(X * 0.8))
    assert robustness.as_dtype(np.array([0.25]), np.float32) == np.float32(0.25)


def test_noise_has_two_per_cent(load_benchmark, poor_rows):
    robustness = load_benchmark("robustness")
    middle = np.full((50, 20, 20), 2, poor_rows[2].dtype)
    black, white = robustness.value_range(poor_rows[0])
    noisy = apply(robustness, "noise", (poor_rows[0], poor_rows[1], middle + middle * 30, np.zeros(50, int)))[
        2
    ]
    expected = np.hypot(0.02 * (white - black), 12**-0.5)  # rounding adds its own
    assert noisy.std() == pytest.approx(expected, rel=0.15)


def test_light_that_changes_in_the_fit(load_benchmark):
    robustness = load_benchmark("robustness")
    images = np.random.default_rng(0).random((200, 1, 4, 4), dtype=np.float32) + 1
    lit = robustness.with_changing_light(lambda images, rng: images, images, np.random.default_rng(1))
    factors = lit / images
    assert lit.dtype == np.float32
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :, :1, :1], lit.shape), rtol=1e-6)
    assert 0.7 <= factors.min() < 0.72
    assert 1.28 < factors.max() <= 1.3
    turned = robustness.with_changing_light("dihedral", images, np.random.default_rng(1), factors=(1, 1))
    np.testing.assert_array_equal(np.sort(turned.reshape(200, -1)), np.sort(images.reshape(200, -1)))
    assert (turned != images).any()


def test_stain_shift(load_benchmark):
    robustness = load_benchmark("robustness")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images[0, 0, :3] = [[0, 0, 0], [255, 255, 255], [0, 255, 0]]
    rows = images, np.arange(4), images, np.arange(4)
    same = apply(robustness, "stain_shift", rows, factors=(1.0, 1.0))[2]
    assert np.abs(same.astype(int) - images).max() <= 2
    shifted = apply(robustness, "stain_shift", rows)[2]
    assert (np.abs(shifted.astype(int) - images).mean(axis=(1, 2, 3)) > 2).all()
    # More of all three stains is darker by the law of Beer and Lambert, and white has none.
    twice = robustness.restain(images[0], 2.0)
    np.testing.assert_allclose(twice, images[0].astype(float) ** 2 / 255, atol=1)


def test_robustness_harness(few_cells, load_benchmark, tmp_path, capsys):
    """One fit for all test conditions, taken up where it was stopped; the tables."""
    robustness = load_benchmark("robustness")
    make, path = robustness.ours(max_epochs=1), tmp_path / "robustness.json"
    assert robustness.measure_all(path, ["event", "brightfield"], 1, 1, make)
    results = robustness.recorded(path)
    conditions = set(robustness.CONDITIONS)
    assert set(results) == {
        *(f"brightfield/{name}/seed0" for name in conditions),
        *(f"event/{name}/seed0" for name in conditions - {"stain_shift"}),
    }
    for same in (["as_it_is", *robustness.AT_TEST], robustness.IN_CHANGING_LIGHT):
        assert len({results[f"brightfield/{name}/seed0"]["fit_seconds"] for name in same}) == 1
    run = results["brightfield/ten_a_class/seed0"]
    assert run["n_train"] == 10 + 8 + 10 + 10 + 6
    assert run["epochs"] == 1
    assert run["finite_loss"]
    assert 0 < run["least_share"] <= run["share"] <= run["greatest_share"] <= 1
    assert 0 <= run["rarest_recall"] <= 1
    assert "rarest_recall" not in results["event/as_it_is/seed0"]  # both classes have as many
    assert all(run["warnings"] == [] for run in results.values())

    text = robustness.tables(results)
    assert re.search(r"^\| `darker` \| 1 \|.* \| [+-][\d.]+ \| one run \|$", text, re.M)
    assert text.count("Training losses: all finite. Warnings: none.") == 2

    capsys.readouterr()
    left = {key: run for key, run in results.items() if key != "event/darker/seed0"}
    path.write_text(json.dumps(left))
    assert robustness.measure_all(path, ["event"], 1, 1, make)
    assert re.findall(r"^event\S+", capsys.readouterr().out, re.M) == ["event/darker/seed0"]
    found, before = (r["event/darker/seed0"]["accuracy"] for r in (robustness.recorded(path), results))
    assert found == before


def test_warnings_are_recorded(load_benchmark):
    robustness = load_benchmark("robustness")

    def warn():
        for text in ("twice", "twice", "once"):
            warnings.warn(text, UserWarning, stacklevel=2)
        return 7

    assert robustness.caught(warn) == (7, ["UserWarning: twice", "UserWarning: once"])
    run = {"condition": "noise", "split": "seed0", "finite_loss": False, "warnings": ["UserWarning: a\nb"]}
    assert robustness.remarks([run, run | {"split": "seed1"}]) == [
        "Training loss not finite: noise/seed0, noise/seed1. Warnings:",
        "",
        "- 2 × `noise`: UserWarning: a b",
        "",
    ]
