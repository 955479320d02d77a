"""The measures of benchmarks/explanation.py, on maps and models whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import PixelScale


@pytest.fixture
def attributions(load_benchmark):
    return load_benchmark("attributions")


@pytest.fixture(scope="module")
def fitted():
    """A small estimator and cells of its kind."""
    cells = make_cells(60, n_classes=3, image_size=32, random_state=0)
    clf = SparseAttnClassifier(max_epochs=2, random_state=0).fit(cells.images, cells.target)
    return clf, cells.images[:4]


def test_mass_within(attributions):
    maps = np.zeros((3, 4, 4))
    maps[0, :2], maps[1, 0, 0], maps[1, 3, 3], maps[1, 1, 1] = 1, 3, 1, -5
    masks = np.zeros((3, 4, 4), dtype=bool)
    masks[:, 0] = True
    # Half; three quarters, as what is negative does not count; an empty map is even, so the area.
    np.testing.assert_allclose(attributions.mass_within(maps, masks), [0.5, 0.75, 0.25])


def test_pointing_game(attributions):
    maps = np.zeros((2, 3, 5))
    maps[0, 1, 3], maps[1, 2, 4] = 1, 1
    masks = np.zeros((2, 3, 5), dtype=bool)
    masks[:, 1, 3] = True
    np.testing.assert_array_equal(attributions.pointing_game(maps, masks), [True, False])


def test_frame(attributions):
    frame = attributions.frame_of((40, 60))
    assert frame.sum() == 40 * 60 - 36 * 56
    assert frame[[0, 1, -1, -2]].all()
    assert frame[:, [0, 1, -1, -2]].all()
    assert not frame[2:-2, 2:-2].any()


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 9, 9, 3)])
def test_background_is_what_lies_along_the_sides(attributions, shape):
    images = np.full(shape, 40, dtype=np.uint8)
    images[1] = 90
    images[:, 1:-1, 1:-1] = 200
    images[:, 0, :3] = 255  # something reaches the side
    blank = attributions.background(images)
    assert blank.dtype == np.uint8
    assert blank.shape == (2, 1, 1, 3 if len(shape) == 4 else 1)
    np.testing.assert_array_equal(blank[:, 0, 0, 0], [40, 90])


def test_ranking(attributions):
    maps = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    ties = np.array([[[0.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_array_equal(attributions.ranking(maps, ties)[0], [3, 0, 2, 1])


def test_ranking_in_squares(attributions):
    maps = np.zeros((1, 5, 4))
    maps[0, 0, 3], maps[0, 4, 0], maps[0, 3, 1] = 3, 2, 0.5
    order = attributions.ranking(maps, np.zeros_like(maps), 2)[0]
    assert sorted(order) == list(range(20))
    # The square of 3, then that of 2, which the lower side cuts to one row, then that of 0.5.
    assert set(order[:4]) == {2, 3, 6, 7}
    assert set(order[4:6]) == {16, 17}
    assert set(order[6:10]) == {8, 9, 12, 13}


def share_of_lit(weights):
    """A model whose probability of class 1 is the weighted share of white pixels."""

    def predict_proba(images):
        lit = (images.reshape(len(images), -1) * weights.ravel()).sum(axis=1) / weights.sum()
        return np.stack([1 - lit, lit], axis=1)

    return predict_proba


def test_curves_of_a_model_that_is_known(attributions):
    rng = np.random.default_rng(0)
    weights = np.zeros((10, 10))
    weights[2:7, 3:8] = 1  # 25 of 100 pixels decide, all alike
    images = np.ones((2, 10, 10))
    images[:, [0, -1]] = images[:, :, [0, -1]] = 0  # so that the background is black
    shares = np.linspace(0, 1, 101)
    ties = rng.random((2, 10, 10))

    def areas(maps):
        orders = attributions.ranking(maps, ties)
        found = [
            attributions.curves(share_of_lit(weights), images, [1, 1], orders, insert=insert, shares=shares)
            for insert in (False, True)
        ]
        return [attributions.area(curve, shares) for curve in found]

    right = np.broadcast_to(weights, images.shape)
    deletion, insertion = areas(right)
    # From 1 to 0 over the first quarter, and the other way round.
    np.testing.assert_allclose(deletion, 0.125)
    np.testing.assert_allclose(insertion, 0.875)
    deletion, insertion = areas(-right)
    np.testing.assert_allclose(deletion, 0.875)
    np.testing.assert_allclose(insertion, 0.125)
    deletion, insertion = areas(ties)
    np.testing.assert_allclose([deletion, insertion], 0.5, atol=0.15)


def test_curves_begin_and_end_at_the_image_and_the_background(attributions):
    images = np.zeros((1, 6, 6, 3), dtype=np.uint8)
    images[:, 2:4, 2:4] = 255
    seen = []

    def predict_proba(stack):
        seen.append(stack)
        return np.ones((len(stack), 1))

    order = attributions.ranking(np.ones((1, 6, 6)), np.ones((1, 6, 6)))
    for insert in (False, True):
        attributions.curves(predict_proba, images, [0], order, insert=insert)
    removed, revealed = seen
    assert removed.dtype == revealed.dtype == np.uint8
    np.testing.assert_array_equal(removed[0], images[0])
    np.testing.assert_array_equal(revealed[-1], images[0])
    assert not removed[-1].any()
    assert not revealed[0].any()


def test_grad_cam_by_hand(attributions):
    """Two maps, one of them pooled with a positive and one with a negative weight."""
    layer = nn.Conv2d(1, 2, 1, bias=False)
    head = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        head.weight[:] = torch.tensor([[0.0, 0.0], [2.0, -0.5]])
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    image = torch.tensor([[1.0, -1.0], [4.0, 0.0]]).view(1, 1, 2, 2)
    # The weight of a map is the mean over its 4 cells of the gradient, w / 4.
    expected = np.maximum((2.0 * 1.0 - 0.5 * 3.0) / 4 * image[:, 0].numpy(), 0)
    found = attributions.grad_cam(network, layer, image, torch.tensor([1]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_integrated_gradients_by_hand(attributions):
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    image, blank = torch.rand(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 2, 1, 1)
    found = attributions.integrated_gradients(network, image, torch.tensor([1]), blank)
    expected = (image * network[1].weight[1].view(1, 2, 2, 2)).abs().sum(1)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)


@pytest.fixture
def in_parts(attributions, fitted):
    """The network in float64, one image gone through it, and the label to explain."""
    clf, images = fitted
    network = attributions.OursLogits(clf.network_).double().network
    inputs = attributions.scaled(PixelScale(clf.data_range_), images[:1]).double()
    return network, attributions.take_apart(network, inputs), torch.tensor([1]), network(inputs).logits


def test_parts_make_the_answer(attributions, in_parts):
    network, parts, _, logits = in_parts
    of_tokens = attributions.pooled(network, parts.tokens)
    torch.testing.assert_close(attributions.answer(network, of_tokens, parts.z_coarse), logits)


def test_dropping_all_tokens_but_the_first_to_go(attributions, in_parts):
    network, parts, label, logits = in_parts
    probability = logits.softmax(1)[0, 1].item()
    maps = (
        parts.scores.numpy().repeat(network.tile, 1).repeat(network.tile, 2)[:, :30, :31]
    )  # cut at two sides
    none, half = (attributions.without_tokens(network, parts, maps, label, share) for share in (0.0, 0.5))
    np.testing.assert_allclose(none, probability, rtol=1e-9)
    values = attributions.sum_by_tile(maps, network.tile)[0, parts.tiles[0]]
    kept = parts.tokens[:, np.argsort(-values)[round(0.5 * len(values)) :].copy()]
    z_fine = network.fine_norm(network.fine(network.tokens.out(kept))[0])
    of_tokens = torch.cat([z_fine, kept.amax(1)], dim=1)
    expected = attributions.answer(network, of_tokens, parts.z_coarse).softmax(1)[0, 1].item()
    np.testing.assert_allclose(half, expected, rtol=1e-9)


def test_sums_by_tile(attributions):
    maps = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    found = attributions.sum_by_tile(maps, 2)
    assert found.shape == (2, 6)
    assert found[0].tolist() == [0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9, 10 + 11, 12 + 13, 14]


def test_paths(attributions, fitted):
    """A network that does not read one half of the features answers the same without it."""
    clf, images = fitted
    network = attributions.OursLogits(clf.network_).network
    with torch.no_grad():
        network.fusion.first[0].weight[:, : 2 * network.fine.value.out_features] = 0
    inputs = attributions.scaled(PixelScale(clf.data_range_), images)
    parts = attributions.take_apart(network, inputs)
    predicted = network(inputs).logits.argmax(1).numpy()
    assert attributions.paths(network, parts, predicted)["without_tokens"] == 1


def test_maps_of_ours(attributions, fitted):
    clf, images = fitted
    labels = clf.predict_proba(images).argmax(axis=1)
    maps = attributions.maps_of_ours(clf, images, labels) | attributions.controls(
        images, np.random.default_rng(0)
    )
    assert {one.shape for one in maps.values()} == {images.shape}
    assert all(np.isfinite(one).all() for one in maps.values())
    np.testing.assert_array_equal(maps["chosen pixels"].sum(axis=(1, 2)), clf.k_)
    assert not maps["fine attention"][maps["chosen pixels"] == 0].any()
    np.testing.assert_array_equal(maps["brightness"], images)


def test_evidence_is_what_the_estimator_gives_and_that_of_the_tokens_is_its_part(attributions, fitted):
    clf, images = fitted
    labels = np.array([2, 0, 1, 2])
    maps = attributions.maps_of_ours(clf, images, labels)
    np.testing.assert_array_equal(maps["evidence"], clf.evidence_maps(images, clf.classes_[labels]))
    np.testing.assert_array_equal(maps["evidence, absolute"], np.abs(maps["evidence"]))
    np.testing.assert_array_equal(maps["occlusion"], clf.occlusion_maps(images, clf.classes_[labels]))
    of_tokens = maps["evidence of the tokens"]
    assert not of_tokens[maps["chosen pixels"] == 0].any()
    # What remains is of the cells: linear from one to the next.
    rest = maps["evidence"] - of_tokens
    within = np.arange(1, 31) % clf.network_.coarse.steps[-1] != 0
    for bends in (np.diff(rest, 2, axis=1)[:, within], np.diff(rest, 2, axis=2)[:, :, within]):
        assert np.abs(bends).max() < 1e-4 * np.abs(rest).max()
    assert np.abs(np.diff(of_tokens, 2, axis=1)[:, within]).max() > 1e-2 * np.abs(of_tokens).max()
    quick = attributions.maps_of_ours(clf, images, labels, quick=True)
    np.testing.assert_array_equal(quick["evidence"], maps["evidence"])
    assert "occlusion" not in quick


def test_images_with_the_answer_of_an_empty_slide_are_told(load_benchmark):
    """A model of brightness: the first image is as its background, the other two are brighter or darker."""
    explanation = load_benchmark("explanation")
    images = np.full((3, 8, 8), 100, dtype=np.uint8)
    images[1:, 2:6, 2:6] = np.array([250, 3])[:, None, None]

    def predict_proba(rows):
        is_class = np.stack(
            [rows.mean((1, 2)) < 99, rows.mean((1, 2)) == 100, rows.mean((1, 2)) > 101], axis=1
        )
        return is_class.astype(float)

    labels = predict_proba(images).argmax(axis=1)
    assert labels.tolist() == [1, 2, 0]
    assert explanation.are_not_blank(predict_proba, images, labels).tolist() == [False, True, True]
    maps, masks = np.random.default_rng(0).random((3, 8, 8)), np.full((3, 8, 8), 255)
    found = explanation.measure(
        predict_proba, images, labels, maps, maps, masks, np.array([False, True, True])
    )
    alone = [
        explanation.measure(
            predict_proba, images[[i]], labels[[i]], maps[[i]], maps[[i]], masks[[i]], np.ones(1, bool)
        )
        for i in (1, 2)
    ]
    assert found["deletion"] == pytest.approx(np.mean([one["deletion"] for one in alone]))
    none = explanation.measure(predict_proba, images, labels, maps, maps, masks, np.zeros(3, bool))
    assert none["insertion"] == 0


def test_run_and_table(load_benchmark, monkeypatch, tmp_path, fitted):
    """One run from end to end, and the table made of it."""
    explanation = load_benchmark("explanation")
    cells = make_cells(3, image_size=32, return_masks=True, random_state=1)
    monkeypatch.setattr(explanation, "fitted", lambda *job: fitted[0])
    monkeypatch.setattr(explanation, "tested", lambda *job: (cells.images, cells.target, cells.masks))
    document = tmp_path / "README.md"
    document.write_text("<!-- explanation: begin -->\n<!-- explanation: end -->\n")
    monkeypatch.setattr(explanation, "README", document)
    monkeypatch.setattr(explanation, "RESULTS", tmp_path / "explanation.json")
    monkeypatch.setattr(explanation, "JOBS", [("opd", "shuffled", "split"), ("opd", "untrained0", "split")])
    assert explanation.main(["--images", "2"]) == 0
    results = explanation.recorded(tmp_path / "explanation.json")
    run = results["opd/shuffled/split"]
    assert run["n"] == 2
    assert 0 <= run["n_not_blank"] <= 2
    assert run["area"]["cell"] == pytest.approx((cells.masks[:2] > 0).mean())
    for one in run["maps"].values():
        assert set(one) == set(explanation.COLUMNS)
        assert all(0 <= value <= 1 for value in one.values())
    text = document.read_text()
    assert text.count("| fine attention |") == 2
    # What is there already is not measured again.
    monkeypatch.setattr(explanation, "run", None)
    assert explanation.main([]) == 0
