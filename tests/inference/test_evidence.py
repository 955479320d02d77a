"""What each pixel added to the log-odds: against slopes measured on the literal equations, in float64."""

import copy

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.nn import functional as F

from sklearn_sparseattn import SparseAttnClassifier
from sklearn_sparseattn.datasets import make_cells
from sklearn_sparseattn.images import ImageRows, PixelScale
from sklearn_sparseattn.inference import evidence_maps
from sklearn_sparseattn.inference.evidence import _of_cells, _over_tiles, _share_of_maximum, evidence
from sklearn_sparseattn.network import SparseAttnNet, pixel_tokens, strides_for

BYTES = PixelScale((0.0, 255.0))
N_CLASSES = 4
VARIANTS = ("tiles", "paper")
IMAGE_SHAPES = [(33, 18, 1), (20, 13, 1), (9, 12, 3), (1, 30, 1), (1, 1, 2)]  # tiles of 4, 2, 1, 2, 1 pixels


def make_network(image_shape, variant="tiles", n_classes=N_CLASSES, **form):
    """As a fit leaves it, its statistics moved by data."""
    height, width, channels = image_shape
    generator = torch.Generator().manual_seed(0)
    form |= {"strides": strides_for(height, width), "variant": variant}
    network = SparseAttnNet(channels, n_classes, max(1, 0.2 * height * width), **form)
    network.reset_parameters(generator)
    network.coarse.background.fill_(0.37)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return network.eval()


def random_images(image_shape, n=3, dtype=float):
    return (255 * np.random.default_rng(0).random((n, *image_shape))).astype(dtype)


def maps_of(network, images, classes, k=None):
    rows = ImageRows(images, images.shape[1:])
    return evidence_maps(network, rows, BYTES, np.asarray(classes), k)


class Literal:
    """One image through a network in float64, where each token and each cell can be scaled."""

    @torch.no_grad()
    def __init__(self, network, image):
        self.network = network.double()
        inputs = torch.from_numpy(BYTES(image[None])).double()
        self.scores, _, maps = network.coarse.look(inputs)
        self.tiles = network.choose(inputs, self.scores)[0]
        if network.embedding is None:
            self.hidden, self.out = (
                network.tile_tokens(self.scores, maps, self.tiles[None])[0],
                network.tokens.out,
            )
        else:
            pixels = pixel_tokens(inputs, self.tiles[None])[0]
            self.hidden, self.out = network.embedding.hidden(pixels), network.embedding.out
        self.cells = maps[-1][0]
        sides = np.ones(self.cells.shape[1:], dtype=bool)
        sides[1:-1, 1:-1] = False
        values = np.sort(self.cells.numpy()[:, sides], axis=1)
        self.floor = torch.from_numpy(values[:, (values.shape[1] - 1) // 2])  # the lower of two middle ones

    @torch.no_grad()
    def log_odds(self, label, by_token=None, by_cell=None):
        """Of the class; `by_token` (n,) scales what the tokens bring, `by_cell` (h, w) the cells' excess."""
        by_token = torch.ones(len(self.hidden)).double() if by_token is None else by_token
        by_cell = torch.ones(self.cells.shape[1:]) if by_cell is None else by_cell
        fine, cells, floor = self.network.fine, self.cells, self.floor[:, None, None]
        rows = torch.cat([self.out(self.hidden), fine.cls_token[0]])
        key = F.relu(fine.key(rows)) + fine.epsilon
        key = key / key.sum(0)
        values = fine.value(rows) * torch.cat([by_token, torch.ones(1)])[:, None]
        query = fine.query(fine.cls_token[0])
        heads = zip(query.chunk(fine.n_heads, 1), key.chunk(fine.n_heads, 1), strict=True)
        z_fine = torch.stack([one @ (part.T @ values) for one, part in heads]).mean(0)
        parts = [self.network.fine_norm(z_fine)]
        if self.network.embedding is None:
            parts.append((by_token[:, None] * self.hidden).amax(0)[None])
        cells = floor + by_cell * (cells - floor)
        parts.append(torch.cat([cells.mean((1, 2)), cells.amax((1, 2))])[None])
        p = torch.softmax(self.network.fusion(torch.cat(parts, dim=1))[0], 0).numpy()
        return np.log(p[label]) - np.log(np.delete(p, label).sum())

    def slopes(self, label, name, shape, step=1e-6):
        """How the log-odds change as each is scaled, by itself."""
        found = np.zeros(shape)
        for place in np.ndindex(*shape):
            change = torch.zeros(shape, dtype=torch.float64)
            change[place] = step
            more, less = (self.log_odds(label, **{name: 1 + sign * change}) for sign in (1, -1))
            found[place] = (more - less) / (2 * step)
        return found

    def expected(self, label, height, width):
        """The map, of slopes: a token's among the pixels of its tile, a cell's among those around it."""
        expected, side = np.zeros((height, width)), self.network.tile
        of_tokens = self.slopes(label, "by_token", (len(self.hidden),))
        for tile, value in zip(self.tiles.tolist(), of_tokens, strict=True):
            i, j = divmod(tile, self.scores.shape[2])
            place = expected[i * side : (i + 1) * side, j * side : (j + 1) * side]  # what there is of it
            place += value / place.size
        of_cells = self.slopes(label, "by_cell", tuple(self.cells.shape[1:]))
        step = self.network.coarse.steps[-1]
        for (i, j), value in np.ndenumerate(of_cells):
            lines = []
            for at, n_cells, n_pixels in zip((i, j), of_cells.shape, (height, width), strict=True):
                places = np.arange(n_cells) * step
                line = np.interp(np.arange(n_pixels), places, np.arange(n_cells) == at)
                lines.append(line / line.sum())
            expected += value * np.outer(*lines)
        return expected


@pytest.mark.parametrize(
    "form",
    [{}, {"size": "large"}, {"n_heads": 1}, {"variant": "paper"}],
    ids=lambda form: str([*form.values()]),
)
@pytest.mark.parametrize("image_shape", IMAGE_SHAPES, ids=str)
def test_it_is_the_slope_of_scaling_tokens_and_cells(image_shape, form):
    network = make_network(image_shape, **form)
    images, classes = random_images(image_shape), [2, 0, 3]
    found = maps_of(network, images, classes)
    assert found.shape == (3, *image_shape[:2])
    for one, image, label in zip(found, images, classes, strict=True):
        expected = Literal(network, image).expected(label, *image_shape[:2])
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-7 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_another_number_of_pixels(variant):
    network = make_network((20, 13, 1), variant)
    images = random_images((20, 13, 1))
    found = maps_of(network, images, [0, 1, 2], k=150)
    other = copy.deepcopy(network)
    other.k.fill_(150)
    np.testing.assert_array_equal(found, maps_of(other, images, [0, 1, 2]))
    assert np.abs(found - maps_of(network, images, [0, 1, 2])).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_sum_is_the_slope_of_scaling_all_at_once(variant):
    network = make_network((20, 13, 1), variant)
    images = random_images((20, 13, 1), 1)
    literal, step = Literal(network, images[0]), 1e-6
    tokens, cells = (torch.ones(n, dtype=torch.float64) for n in (len(literal.hidden), ()))
    more, less = (literal.log_odds(2, scale * tokens, scale * cells) for scale in (1 + step, 1 - step))
    assert maps_of(network, images, [2]).sum() == pytest.approx((more - less) / (2 * step), rel=1e-5)


def test_with_two_classes_what_is_for_one_is_against_the_other():
    network = make_network((20, 13, 1), n_classes=2)
    images = random_images((20, 13, 1))
    found = maps_of(network, images, [0, 1, 0])
    assert np.abs(found).max(axis=(1, 2)).min() > 1e-3
    np.testing.assert_allclose(found, -maps_of(network, images, [1, 0, 1]), rtol=1e-9, atol=1e-12)


def test_with_one_class_there_is_nothing_to_explain():
    network = make_network((20, 13, 1), n_classes=1)
    assert not maps_of(network, random_images((20, 13, 1)), [0, 0, 0]).any()


def full_of_ties(image_shape):
    """Constant images and constant areas, whose cells differ by rounding alone, and one of noise."""
    images = np.zeros((6, *image_shape))
    images[1], images[2, 5:, 4:], images[3, :4], images[4, ::2] = 128, 90, 200, 60
    images[5] = random_images(image_shape, 1)
    return images


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_is_the_same_in_any_company(variant):
    image_shape = (40, 24, 1)
    network = make_network(image_shape, variant)
    images, classes = full_of_ties(image_shape), np.arange(6) % N_CLASSES
    together = maps_of(network, images, classes)
    for rows in ([0], [1], [2], [3], [4], [5], [5, 4, 3, 2, 1, 0], [2, 2, 3], [1] * 9):
        alone = maps_of(network, images[rows], classes[rows])
        np.testing.assert_allclose(alone, together[rows], rtol=0, atol=1e-9)


def test_cells_that_tie_share_the_maximum():
    """Of two alike, neither counts more, though their values differ in the last bits."""
    cells = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    cells[0, 0, 1, 1], cells[0, 0, 3, 3] = 2.0, 2.0 + 4e-16
    found = _of_cells(cells, torch.tensor([[0.0, 3.0]]).double())
    np.testing.assert_allclose(found[0, 1, 1], 3.0)
    np.testing.assert_allclose(found[0, 3, 3], 3.0)
    assert found.count_nonzero() == 2


def test_tokens_that_tie_share_the_maximum():
    tokens = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [2.0 + 4e-16, 0.0]]]).double()
    expected = [[[1 / 2, 1 / 3], [0, 1 / 3], [1 / 2, 1 / 3]]]
    np.testing.assert_allclose(_share_of_maximum(tokens, 1), expected)


def test_of_the_tokens_only_chosen_tiles_have_evidence():
    image_shape = (33, 18, 1)
    network = make_network(image_shape).double()
    images = torch.from_numpy(BYTES(random_images(image_shape))).double()
    of_tokens, _ = evidence(network, images, torch.tensor([2, 0, 3]))
    with torch.no_grad():
        tiles = network(images).tiles
    chosen = torch.zeros(3, 45, dtype=torch.bool).scatter_(1, tiles, True).view(3, 9, 5)
    chosen = chosen.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :33, :18]
    assert not of_tokens[~chosen].any()
    assert of_tokens.count_nonzero() > 0.7 * chosen.sum()


def test_a_tile_lies_evenly_over_the_pixels_that_it_has():
    found = _over_tiles(torch.tensor([[[16.0, 8.0], [12.0, 6.0]]]), 7, 6, side=4)
    expected = np.ones((7, 6))
    np.testing.assert_array_equal(found, expected[None])


def test_chunks_are_bounded_and_change_nothing(monkeypatch):
    image_shape = (64, 64, 3)
    read = []

    class Watched(ImageRows):
        def read(self, rows):
            read.append(rows)
            return super().read(rows)

    network, classes = make_network(image_shape), np.zeros(50, dtype=np.int64)
    images = random_images(image_shape, 50, np.uint8)
    found = evidence_maps(network, Watched(images, image_shape), BYTES, classes)
    assert [i for rows in read for i in range(rows.start, rows.stop)] == list(range(50))
    assert max(rows.stop - rows.start for rows in read) * 64 * 64 * 3 <= 2**19
    for rows in (slice(0, 2), slice(40, 45)):
        alone = maps_of(network, images[rows], classes[rows])
        np.testing.assert_allclose(found[rows], alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(np.uint8, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
)
def test_dtype(dtype, expected):
    network = make_network((20, 13, 1))
    assert maps_of(network, random_images((20, 13, 1), dtype=dtype), [0, 1, 2]).dtype == expected


def test_no_images():
    network = make_network((20, 13, 1))
    assert maps_of(network, np.empty((0, 20, 13, 1)), np.empty(0, dtype=np.int64)).shape == (0, 20, 13)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_outside_stays_and_does_not_matter(mode):
    network = make_network((20, 13, 1))
    images, before = random_images((20, 13, 1)), {n: p.clone() for n, p in network.state_dict().items()}
    expected = maps_of(network, images, [0, 1, 2])
    with mode():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = maps_of(network, images, [0, 1, 2])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state
    np.testing.assert_array_equal(found, expected)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


# ---- the estimator's method ----

CELLS = make_cells(60, n_classes=3, image_size=32, random_state=0)
NAMES = np.array(["healthy", "large", "small"])


@pytest.fixture(scope="module", params=VARIANTS)
def clf(request):
    clf = SparseAttnClassifier(max_epochs=2, variant=request.param, random_state=0)
    return clf.fit(CELLS.images, NAMES[CELLS.target])


def test_it_explains_what_is_predicted(clf):
    found = clf.evidence_maps(CELLS.images[:8])
    assert found.shape == (8, 32, 32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, clf.evidence_maps(CELLS.images[:8], clf.predict(CELLS.images[:8])))
    flat = clf.evidence_maps(CELLS.images[:8].reshape(8, -1).astype(float))
    assert flat.dtype == np.float64
    np.testing.assert_allclose(flat, found, rtol=1e-4, atol=1e-6)


def test_other_classes_have_other_evidence(clf):
    images = CELLS.images[:4]
    maps = np.stack([clf.evidence_maps(images, [name] * 4) for name in NAMES])
    for i in range(3):
        assert np.abs(maps[i] - maps[(i + 1) % 3]).max() > 1e-3
    mixed = clf.evidence_maps(images, NAMES[[2, 0, 1, 2]])
    np.testing.assert_allclose(mixed, maps[[2, 0, 1, 2], np.arange(4)], rtol=0, atol=1e-6)


def test_tokens_that_the_head_does_not_read_say_nothing(clf):
    """Then the map is that of the cells alone, and does not change with the tokens."""
    other = copy.deepcopy(clf)
    with torch.no_grad():
        other.network_.fusion.first[0].weight[:, : -other.network_.coarse.n_features] = 0
    images = CELLS.images[:2].astype(float)
    found = other.evidence_maps(images, NAMES[:2])
    assert np.abs(found).max() > 0
    with torch.no_grad():
        other.network_.fine.cls_token.add_(1)
    np.testing.assert_array_equal(other.evidence_maps(images, NAMES[:2]), found)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["healthy", "ill", "odd", "small"], r"labels \['ill' 'odd'\] which are not among"),
        (["healthy"] * 3, "inconsistent numbers of samples"),
        ([["healthy", "small"]] * 4, "1d array"),
        ([0, 1, 2, 0], "not among the classes"),
    ],
)
def test_labels_are_checked(clf, y, message):
    with pytest.raises(ValueError, match=message):
        clf.evidence_maps(CELLS.images[:4], y)


def test_images_are_checked(clf):
    with pytest.raises(ValueError, match="fitted to"):
        clf.evidence_maps(np.zeros((2, 16, 16)))
    with pytest.warns(UserWarning, match="in the units of the training images"):
        clf.evidence_maps(np.linspace(0, 1e300, 32 * 32).reshape(1, 32, 32))
    with config_context(assume_finite=True), pytest.raises(ValueError, match="X contains NaN"):
        clf.evidence_maps(np.full((1, 32, 32), np.nan))
    with pytest.raises(NotFittedError):
        SparseAttnClassifier().evidence_maps(CELLS.images)
