"""Other forms of the sparse branch, which the ablation holds against the default, by their definitions."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.network import SparseAttnNet

IMAGES = torch.rand(3, 2, 24, 20, generator=torch.Generator().manual_seed(1)).double()
NAMES = [
    "single_pixel_tokens",
    "coarse_feature_tokens",
    *(f"patch_tokens_{n}x{n}" for n in (3, 5, 7)),
    "context_and_patch_tokens_5x5",
    "image_query",
    "second_layer",
    "cheaper_coarse",
    "cheaper_coarse_and_patches",
    "cheaper_coarse_only",
]


@pytest.fixture
def ablation(load_benchmark):
    return load_benchmark("ablation")


@pytest.fixture
def candidate(ablation):
    """The network of a variant, changed as before its training, and as it was before; float64."""

    def make(name):
        variant = ablation.VARIANTS[name]
        network = SparseAttnNet(2, 3, 20, kernel_size=variant.get("kernel_size", 3)).eval()
        network.reset_parameters(torch.Generator().manual_seed(0))
        network.coarse.background.fill_(0.3)
        optimizer = SimpleNamespace(param_groups=[{"params": list(network.parameters())}])
        plain = copy.deepcopy(network).double()
        for callback in variant["callbacks"]:
            callback.on_train_begin(SimpleNamespace(module_=network, optimizer_=optimizer))
        assert {id(p) for p in optimizer.param_groups[0]["params"]} >= {id(p) for p in network.parameters()}
        return network.double(), plain

    return make


def looked(network):
    scores, _, maps = network.coarse.look(IMAGES)
    pixels = network.choose(IMAGES, scores)
    return pixels, scores, maps


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_trained_whole(ablation, name):
    X = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 2), dtype=np.uint8)
    start, trained = (
        ablation.ours(**ablation.VARIANTS[name] | {"max_epochs": n_epochs})(
            augment=None, batch_size=5, random_state=0
        )
        for n_epochs in (1, 2)
    )
    weights = []
    for model in (start, trained):
        assert isinstance(model, SparseAttnClassifier)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.fit(X, np.arange(20) % 2)
        weights.append(dict(model.network_.named_parameters()))
    assert np.isfinite(trained.predict_proba(X)).all()
    unchanged = {key for key, weight in weights[0].items() if torch.equal(weight, weights[1][key])}
    frozen = {key for key, weight in weights[0].items() if not weight.requires_grad}
    if name == "cheaper_coarse_only":  # nothing comes back from tokens that reach nothing
        frozen = {
            key for key in weights[0] if key.split(".")[0] in ("context", "embedding", "fine", "fine_norm")
        }
    assert unchanged == frozen


def test_single_pixels_have_no_context(candidate):
    network, plain = candidate("single_pixel_tokens")
    pixels, _, maps = looked(network)
    assert plain.context(maps, pixels, 20).any()
    assert not network.context(maps, pixels, 20).any()


def test_coarse_features_are_those_of_the_nearest_cells(candidate):
    network, _ = candidate("coarse_feature_tokens")
    pixels, _, maps = looked(network)
    found = network.context(maps, pixels, 20)
    for image in range(3):
        for at, context in zip(pixels[image].tolist(), found[image], strict=True):
            expected = 0
            for cells, step, convolve in zip(maps, (2, 4), network.context.convolve, strict=True):
                i, j = (
                    min((place + step // 2) // step, n - 1)
                    for place, n in zip(divmod(at, 20), cells.shape[2:], strict=True)
                )
                expected = expected + convolve[1].weight[:, :, 0, 0] @ cells[image, :, i, j]
            torch.testing.assert_close(context, expected)


@pytest.mark.parametrize(
    "name", [*(f"patch_tokens_{n}x{n}" for n in (3, 5, 7)), "context_and_patch_tokens_5x5"]
)
def test_patches_are_what_lies_around_a_pixel(candidate, name):
    network, _ = candidate(name)
    pixels, scores, maps = looked(network)
    found = network.hidden_tokens(IMAGES, pixels, scores, maps)
    side = int(name[-1])
    padded = np.pad(IMAGES.numpy() - np.float32(0.3), ((0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2))
    gates = network.gates(scores, pixels)
    context = network.context(maps, pixels, 20) * name.startswith("context")
    first = network.embedding.first
    for image in range(3):
        for n, at in enumerate(pixels[image].tolist()):
            i, j = divmod(at, 20)
            patch = torch.from_numpy(padded[image, :, i : i + side, j : j + side])
            token = torch.tensor([(2 * j + 1) / 20 - 1, (2 * i + 1) / 24 - 1, *IMAGES[image, :, i, j]])
            inner = first.weight @ token + first.bias + context[image, n]
            inner = inner + (network.patches.weight * patch).sum((1, 2, 3))
            torch.testing.assert_close(found[image, n], inner.clamp(min=0) * gates[image, n])


def test_image_query_is_added_to_that_of_the_cls_token(candidate):
    network, plain = candidate("image_query")
    with_image = network(IMAGES)
    network.image_query.weight.data.zero_()
    for found, expected in zip(network(IMAGES), plain(IMAGES), strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(with_image.logits, network(IMAGES).logits)
    # By hand, for one image: w_j = mean over heads of the sum over columns of q_c A_jc.
    network, _ = candidate("image_query")
    pixels, scores, maps = looked(network)
    z_fine, attention, contribution = network.attend(IMAGES, pixels, scores, maps)
    fine = network.fine
    tokens = network.embedding.out(network.hidden_tokens(IMAGES, pixels, scores, maps))[0]
    joint = torch.cat([tokens, fine.cls_token[0]])
    pooled = torch.cat([maps[1][0].mean((1, 2)), maps[1][0].amax((1, 2))])
    query = fine.query.weight @ fine.cls_token[0, 0] + network.image_query.weight @ pooled
    key = (joint @ fine.key.weight.T).clamp(min=0) + 1e-6
    share = key / key.sum(0)
    weight = share @ query / 2  # 2 heads, side by side
    torch.testing.assert_close(contribution[0], weight[:-1])
    torch.testing.assert_close(attention[0], share[:-1].mean(1))
    torch.testing.assert_close(z_fine[0], fine.value.weight @ (weight @ joint))


def test_second_layer_lets_tokens_ask_before_they_are_pooled(candidate):
    network, plain = candidate("second_layer")
    pixels, scores, maps = looked(network)
    found = network.attend(IMAGES, pixels, scores, maps)
    first = network.first_layer
    tokens = network.embedding.out(network.hidden_tokens(IMAGES, pixels, scores, maps))
    asked = []
    for rows in tokens:
        joint = torch.cat([rows, first.cls_token[0]])
        key = (joint @ first.key.weight.T).clamp(min=0) + 1e-6
        share = key / key.sum(0)
        asked.append((rows @ first.query.weight.T / 2) @ (share.T @ (joint @ first.value.weight.T)))
    expected = plain.fine.attend(tokens + network.first_norm(torch.stack(asked)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_cheaper_coarse_network_has_a_quarter_of_the_cells(candidate):
    network, plain = candidate("cheaper_coarse")
    assert [cells.shape[2:].numel() for cells in looked(network)[2]] == [30, 9]
    assert [cells.shape[2:].numel() for cells in looked(plain)[2]] == [120, 30]
    assert network(IMAGES).scores.shape == (3, 24, 20)
    assert network.context.steps == network.coarse.steps == (4, 8)
    before = network(IMAGES).logits
    network.embedding.first.weight.data.zero_()
    assert not torch.equal(network(IMAGES).logits, before)
    both, _ = candidate("cheaper_coarse_and_patches")
    before = both(IMAGES).logits
    both.patches.weight.data.zero_()
    assert not torch.equal(both(IMAGES).logits, before)
    only, _ = candidate("cheaper_coarse_only")
    before = only(IMAGES).logits
    only.embedding.first.weight.data.zero_()
    assert torch.equal(only(IMAGES).logits, before)


def test_cheaper_coarse_network_is_the_same_compiled_and_in_pytorch(candidate):
    network, _ = candidate("cheaper_coarse")
    network = network.float().train()
    network.coarse.to(memory_format=torch.channels_last)
    found = []
    for compiled in (True, False):
        network.compiled = network.coarse.compiled = compiled
        network.zero_grad()
        output = network(IMAGES.float())
        (output.logits.square().sum() + output.scores.square().mean()).backward()
        gradients = {name: weight.grad for name, weight in network.named_parameters()}
        found.append({"logits": output.logits.detach(), "pixels": output.pixels, **gradients})
    for name, compiled in found[0].items():
        scale = float(found[1][name].abs().amax())  # of float32 sums, through batch norms of 27 cells
        torch.testing.assert_close(compiled, found[1][name], rtol=0, atol=1e-3 * scale + 1e-5, msg=name)


def test_costs_of_candidates_are_those_of_one_image(ablation, tmp_path):
    path = tmp_path / "costs.json"
    ablation.measure_costs(path, size=24, n_images=2, n_rounds=2, seconds=0)
    costs = ablation.recorded(path)
    assert set(costs) == set(ablation.CANDIDATES)
    # All 576 pixels are chosen: a token is made of 9, 25 or 49 numbers to 32.
    more = [costs[f"patch_tokens_{n}x{n}"]["multiply_adds"] for n in (3, 5, 7)]
    assert np.diff(more).tolist() == [576 * 32 * 16, 576 * 32 * 24]
    parameters = [costs[f"patch_tokens_{n}x{n}"]["parameters"] for n in (3, 5, 7)]
    context = 24 * (9 + 32)  # which is not used there
    more = np.subtract(parameters, costs["default"]["parameters"])
    assert more.tolist() == [32 * 9 - context, 32 * 25 - context, 32 * 49 - context]
    # Coarse networks alone, 24×24 of one channel: 144, 36 and 9 cells, or 36 and 9.
    macs = 144 * 9 * 8 + 36 * (72 * 16 + 16)
    assert costs["coarse_only"]["multiply_adds"] == macs
    assert costs["coarse_only_deep"]["multiply_adds"] == macs + 9 * 9 * (16 + 24) * 24
    assert costs["cheaper_coarse_only"]["multiply_adds"] == 36 * 25 * 8 + 9 * (72 * 16 + 16)
    rows = ablation.cost_table(costs).splitlines()
    assert len(rows) == 2 + len(costs) + 2
    assert re.fullmatch(r"\| `default` \| [\d,]+ \| [\d.]+ \| \d+ \| 1\.00 \(1\.00-1\.00\) \|", rows[2])
