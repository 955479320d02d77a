"""write_report without a browser: its numbers, its pictures, and that names stay text."""

import base64
import hashlib
import io
import json
import os
import re
import sys
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from PIL import Image
from scipy import sparse
from scipy.stats import binomtest
from sklearn import metrics
from sklearn.exceptions import NotFittedError

from sklearn_sparseattn import SparseAttnClassifier, write_report
from sklearn_sparseattn.report import charts, pictures, scores

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)> '{{ 7 * 7 }}",
    "</script><!-- \u2028 & ${1} \\",
]
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """What of a page a test asks for: tags, scripts, and the text of elements by tag."""

    def __init__(self, file):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open = [], [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append([tag, dict(attrs), ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            depth = len(self.open)
            self.texts[-1][2] += text if self.texts[-1][0] == self.open[depth - 1] else ""

    def text(self, tag, **attributes):
        found = [t for name, attrs, t in self.texts if name == tag and attributes.items() <= attrs.items()]
        return [text.strip() for text in found]

    @property
    def data(self):
        [text] = self.text("script", type="application/json")
        return json.loads(text)

    @property
    def layers(self):
        """Texts of the pictures, by layer."""
        sources = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        return {"image": [source.partition(",")[2] for source in sources], **self.data["layers"]}


def make_images(shape=(12, 14), n=36, n_classes=3):
    rng = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    images = rng.integers(0, 120, size=(n, *shape)).astype(np.uint8)
    images[:, 4:8, 4:8] = (60 * y + 70).reshape(-1, *[1] * len(shape))
    return images, y


def fit(X, y, **params):
    return SparseAttnClassifier(**{"max_epochs": 1, "random_state": 0} | params).fit(X, y)


@pytest.fixture(scope="module")
def fitted():
    X, y = make_images()
    return fit(X, y, k_init=30, k_min=20), X, y


def report(clf, X, y, folder, **options):
    write_report(clf, X, y, folder / "report.html", **options)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return Page(folder / "report.html")


def decoded(text):
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture.convert("RGBA")).astype(int)


# ---- numbers ----


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(hits_n):
    hits, n = hits_n
    score = scores.wilson(hits, n)
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(score, [hits / n, expected.low, expected.high], atol=1e-12)
    assert 0 <= score.low <= score.value <= score.high <= 1


def test_class_scores_are_scikit_learns_and_a_class_that_never_occurs_has_none():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, size=(2, 200))
    counts = scores.confusion(true, predicted, 5)
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(true, predicted, labels=range(5)))
    *by_class, absent = scores.class_scores(counts)
    expected = metrics.precision_recall_fscore_support(true, predicted)
    for i, kind in enumerate(("precision", "recall", "f1")):
        np.testing.assert_allclose([getattr(one, kind).value for one in by_class], expected[i])
    assert [one.n_true for one in by_class] == expected[3].tolist()
    assert np.isnan([*absent.recall, *absent.precision, *absent.f1]).all()


@pytest.mark.parametrize("n", [60, 600])
def test_the_interval_of_f1_holds_the_true_one(n):
    """In 95 % of drawn test sets, up to what 500 draws tell and the interval's own approximation."""
    rng = np.random.default_rng(0)
    shares = np.array([[0.30, 0.05], [0.15, 0.50]])
    true_f1 = 2 * 0.30 / (0.35 + 0.45)
    drawn = rng.multinomial(n, shares.ravel(), size=500).reshape(-1, 2, 2)
    intervals = [scores.class_scores(counts)[0].f1 for counts in drawn]
    inside = np.mean([one.low <= true_f1 <= one.high for one in intervals])
    assert 0.92 <= inside <= 0.98


def test_calibration_counts_every_cell_once_and_sees_a_model_that_is_too_sure():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.4, 1, size=20_000)
    for exponent, gap in [(1, 0.0), (2, np.mean(confidence - confidence**2))]:
        right = rng.random(len(confidence)) < confidence**exponent
        bins = scores.calibration(confidence, right)
        assert sum(one.n for one in bins) == len(confidence)
        assert np.all(np.diff([one.confidence for one in bins]) > 0)
        assert sum(one.right.value * one.n for one in bins) == pytest.approx(right.sum())
        assert scores.calibration_error(bins) == pytest.approx(gap, abs=0.02)
    assert scores.calibration(np.ones(3), np.ones(3, dtype=bool))[0].n == 3


@pytest.mark.parametrize("low", [0.05, 0.15, 0.45, 0.55, 0.65, 0.75, 0.85])
def test_cells_of_two_neighbouring_bins_do_not_make_up_for_each_other(low):
    """Ten sure and all wrong, ten a little surer and all right: one bin for both would see less."""
    confidence, right = np.repeat([low, low + 0.1], 10), np.repeat([False, True], 10)
    bins = scores.calibration(confidence, right)
    assert [one.n for one in bins] == [10, 10]
    np.testing.assert_allclose([one.confidence for one in bins], [low, low + 0.1])
    assert [one.right.value for one in bins] == [0, 1]
    assert scores.calibration_error(bins) == pytest.approx((low + 1 - (low + 0.1)) / 2)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 40))
def test_wrong_ones_are_shown_first_then_the_least_sure(cells, n):
    confidence, right = (np.array(column) for column in zip(*cells, strict=True))
    rows = scores.most_telling(confidence, right, n)
    assert len(rows) == len(set(rows.tolist())) == min(n, len(cells))
    n_wrong = min(n, (~right).sum())
    assert not right[rows[:n_wrong]].any()
    assert right[rows[n_wrong:]].all()
    assert np.all(np.diff(confidence[rows[:n_wrong]]) <= 0)
    left_out = np.setdiff1d(np.flatnonzero(right), rows)
    if len(left_out) and n_wrong < len(rows):
        assert confidence[rows[n_wrong:]].max() <= confidence[left_out].min()


# ---- the page ----


def test_the_page_says_what_the_estimator_says(fitted, tmp_path):
    clf, X, y = fitted
    names = [f"cell {i}.tif" for i in range(len(X))]
    page = report(clf, X, y, tmp_path, names=names, class_names=["one", "two", "three"])
    proba = clf.predict_proba(X)
    predicted = proba.argmax(axis=1)
    cells = page.data["cells"]
    assert sorted(cell["name"] for cell in cells) == sorted(names)
    for cell in cells:
        row = names.index(cell["name"])
        assert (cell["true"], cell["predicted"]) == (y[row], predicted[row])
        np.testing.assert_allclose(cell["proba"], proba[row], atol=1e-4)
    right = [cell["true"] == cell["predicted"] for cell in cells]
    sure = [proba[names.index(cell["name"])].max() for cell in cells]
    assert right == sorted(right)
    for kind in (True, False):
        of_kind = [p for p, is_right in zip(sure, right, strict=True) if is_right is kind]
        assert of_kind == sorted(of_kind, reverse=True)
    counts = metrics.confusion_matrix(y, predicted)
    assert page.data["counts"] == counts.tolist()
    shown = [int(text) for text in page.text("button", **{"aria-pressed": "false"}) if text.isdigit()]
    assert shown == counts.ravel().tolist()
    text = " ".join(part for _, _, part in page.texts)
    for fact in (
        f"{clf.k_} best of {12 * 14} pixels",
        f"{sum(p.numel() for p in clf.network_.parameters()):,} parameters",
        "12 × 14 pixels, 1 channel;",
        "1 epoch in",
        f"{100 * metrics.accuracy_score(y, predicted):.1f} %",
        f"{100 * metrics.f1_score(y, predicted, average='macro'):.1f} %",
    ):
        assert fact in " ".join(text.split()), fact
    changed = {"k_init", "k_min", "max_epochs", "random_state"}
    assert set(page.text("b")) >= changed
    assert not {"lr", "k_max"} & set(page.text("b"))


@pytest.mark.parametrize(
    ("predict_k", "fact"),
    [
        (None, "only the best tiles go on, 240 of 1320 pixels"),
        (0.5, "only the best tiles go on, 720 of 1320 pixels"),  # of half of the 9 × 10 tiles
        (1.0, "only the best tiles go on, 1320 of 1320 pixels"),
    ],
)
def test_the_page_says_how_many_pixels_the_answers_were_found_with(predict_k, fact, tmp_path):
    X, y = make_images(shape=(33, 40), n=12)
    clf = fit(X, y, k_init=240, k_min=240, k_max=240, predict_k=predict_k)
    page = report(clf, X, y, tmp_path)
    text = " ".join(" ".join(part for _, _, part in page.texts).split())
    assert "every tile of 4 × 4 pixels" in text
    assert fact in text.replace("Only", "only")
    k = int(fact.split()[6])
    assert f"the {k} pixels that went on" in page.source
    assert f"<b>{100 * k / 1320:.1f} %</b> of the pixels used" in page.source


def test_scores_count_all_rows_and_the_gallery_some(fitted, tmp_path):
    clf, X, y = fitted
    page = report(clf, X, y, tmp_path, max_images=5)
    assert len(page.data["cells"]) == 5
    assert {len(layer) for layer in page.layers.values()} == {5}
    assert page.layers.keys() == set(pictures.LAYERS)
    assert np.sum(page.data["counts"]) == len(X)
    assert "5 of 36 cells are shown" in page.source


def test_labels_and_names_stay_text(tmp_path):
    X, y = make_images()
    clf = fit(X, np.array(HOSTILE)[y])
    names = [f"{HOSTILE[i % 3]} {i}" for i in range(len(X))]
    names[0] = os.fsdecode(b"no UTF-8 \xe9.tif")
    page = report(clf, X, np.array(HOSTILE)[y], tmp_path, names=names)
    assert page.data["classes"] == clf.classes_.tolist()
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {attrs["src"][:22] for tag, attrs in page.tags if tag == "img"} == {"data:image/webp;base64"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert sorted(cell["name"] for cell in page.data["cells"]) == sorted(names)
    for name in HOSTILE:
        assert name in page.text("span", **{"class": "name"})
        assert name in "".join(page.text("th", scope="row"))
    assert "<script>alert" not in page.source
    assert "7 * 7" in page.source
    assert "\u2028" not in page.source.split('id="data"')[1]


def test_names_that_would_not_be_seen_stand_in_quotes(fitted, tmp_path):
    clf, X, y = fitted
    page = report(clf, X, y, tmp_path, class_names=["", " ", "c"], names=["\t", *map(str, range(1, 36))])
    assert page.data["classes"] == ['""', '" "', "c"]
    assert '"\t"' in [cell["name"] for cell in page.data["cells"]]


def test_the_page_asks_for_nothing_and_runs_its_own_script_only(fitted, tmp_path):
    page = report(*fitted, tmp_path)
    [policy] = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    script = re.search(r"<script>(.*?)</script>", page.source, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    for _, attrs in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attrs.get(key) or "#").startswith(("data:", "#"))
    assert not re.findall(r"url\((?!#)", page.source)
    assert "@import" not in page.source


def test_ids_are_unique_and_charts_take_their_colours_from_the_page(tmp_path):
    X, y = make_images()
    page = report(fit(X, y, early_stopping=True), X, y, tmp_path)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page.source))
    assert references
    assert references <= set(ids)
    charts = re.findall(r"<svg.*?</svg>", page.source, re.S)
    assert len(charts) == 4  # calibration, loss, k, validation score
    for chart in charts:
        assert "var(--ink)" in chart
        assert not re.findall(r"(?:stroke|fill): #", chart)


# ---- pictures ----


def test_pictures_are_the_images_and_their_maps(fitted, tmp_path):
    clf, X, y = fitted
    page = report(clf, X, y, tmp_path)
    maps = clf.attention_maps(X)
    layers = page.layers
    for i, cell in enumerate(page.data["cells"]):
        row = int(cell["name"].removeprefix("row "))
        shown = {name: decoded(layers[name][i]) for name in pictures.LAYERS}
        assert {picture.shape for picture in shown.values()} == {(12, 14, 4)}
        assert abs(shown["image"][..., 0] - X[row].astype(int)).mean() < 12  # noise, compressed
        chosen = maps.chosen[row].ravel()
        assert 0 < chosen.sum() < chosen.size
        for name in ("chosen", "fine"):
            np.testing.assert_array_equal(shown[name][..., 3].ravel() > 0, chosen)
        # Viridis rises in brightness with the attention.
        light = shown["fine"][..., :3].sum(axis=-1).ravel()[chosen]
        assert (
            np.corrcoef(light.argsort().argsort(), maps.fine[row].ravel()[chosen].argsort().argsort())[0, 1]
            > 0.9
        )
        light = shown["coarse"][..., :3].sum(axis=-1)
        assert np.corrcoef(light.ravel(), maps.coarse[row].ravel())[0, 1] > 0.7
        weight, colour = maps.contribution[row], shown["contribution"]
        seen = colour[..., 3] > 0
        assert seen.any()
        np.testing.assert_array_equal(colour[seen][:, 0] > colour[seen][:, 2], weight[seen] > 0)
        assert not seen.ravel()[~chosen].any()


def test_a_picture_stands_in_the_page_once(fitted, tmp_path):
    """Their size is measured against the greatest of the page."""
    page = report(*fitted, tmp_path)
    assert len(page.layers["image"]) == 36
    for layer in ("image", "coarse"):
        assert all(page.source.count(text) == 1 for text in page.layers[layer])


def test_training_and_validation_are_compared_by_the_same_loss():
    ones = np.ones(3)
    history = {"epoch": np.arange(3), "focal_loss": ones, "valid_loss": ones, "k": 9 * ones}
    drawn = charts.training_charts(history, 100)
    assert [one.title for one in drawn] == ["Classification loss", "Chosen pixels, % of the image"]
    alone = charts.training_charts({**history, "train_loss": 1e6 * ones}, 100)[0]
    assert re.findall(r'd="M [^"]*"', alone.svg) == re.findall(r'd="M [^"]*"', drawn[0].svg)
    assert drawn[0].head == ["epoch", "training", "validation"]
    assert alone.rows == drawn[0].rows


def test_every_chart_has_a_sentence_and_its_numbers_beside_it(tmp_path):
    X, y = make_images()
    clf = fit(X, y, early_stopping=True, max_epochs=2)
    page = report(clf, X, y, tmp_path)
    found = {}
    for figure in re.findall(r"<figure>.*?</figure>", page.source, re.S):
        title = re.search(r"<figcaption>(.*?)</figcaption>", figure)[1]
        [said] = re.findall(r'<svg role="img" aria-label="([^"]+)"', figure)
        table = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", figure)[1:]]
        assert all(text in said for row in (table[0], table[-1]) for text in row[1:2])
        assert f'aria-label="{title}"><table>' in figure
        found[title] = table
    confidence = clf.predict_proba(X).max(axis=1)
    bins = scores.calibration(confidence, clf.predict(X) == y)
    rows = [[f"{100 * one.confidence:.1f}", f"{100 * one.right.value:.1f}", str(one.n)] for one in bins]
    assert [[*row[:2], row[3]] for row in found.pop("Is it as sure as it is right?")] == rows
    history = clf.history_
    drawn = {
        "Classification loss": [history["focal_loss"], history["valid_loss"]],
        "Chosen pixels, % of the image": [100 * history["k"] / (12 * 14)],
        "Accuracy on validation images, %": [100 * history["valid_score"]],
    }
    assert found.keys() == drawn.keys()
    for title, values in drawn.items():
        np.testing.assert_allclose(np.array(found[title], float).T, [[1, 2], *values], rtol=6e-3, atol=0.05)


@pytest.mark.parametrize("losses", [[0.0], [0.0, 0.0], [3.0, np.inf, 2.0]])
def test_charts_of_short_flat_and_endless_histories(losses):
    n = len(losses)
    history = {"epoch": np.arange(1, n + 1), "focal_loss": np.array(losses), "k": np.full(n, 9)}
    for chart in charts.training_charts({**history, "valid_score": np.zeros(n)}, 100):
        assert len(chart.rows) == n
        assert chart.rows[0][0] == "1"
        # matplotlib writes each text as a comment, too: first the ticks of the epochs, which are whole.
        texts = re.findall(r"<!-- (.*?) -->", chart.svg)
        assert texts[: texts.index("epoch")] == [str(epoch) for epoch in range(1, n + 1)]


FORMS = {
    "rows": lambda X: X.reshape(len(X), -1),
    "channel": lambda X: X[..., None],
    "sparse": lambda X: sparse.csr_array(X.reshape(len(X), -1)),
    "coo": lambda X: sparse.coo_array(X.reshape(len(X), -1)),
    "DataFrame": lambda X: pd.DataFrame(X.reshape(len(X), -1)),
    "list": lambda X: X.reshape(len(X), -1).tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_the_images_gives_the_same_cells(fitted, form):
    clf, X, y = fitted
    # A list holds Python's integers, not bytes: shown by their percentiles.
    X = X.astype(np.int64) if form == "list" else X
    rows = np.array([7, 3, 20])
    if form in ("rows", "DataFrame"):
        clf = fit(FORMS[form](X), y, image_shape=(12, 14))
    expected = pictures.draw_cells(clf, X, rows) if form not in ("rows", "DataFrame") else None
    found = pictures.draw_cells(clf, FORMS[form](X), rows)
    expected = expected or pictures.draw_cells(clf, X.reshape(len(X), -1), rows)
    assert found == expected


def test_sparse_images_are_converted_once(fitted, monkeypatch):
    clf, X, _ = fitted
    calls, tocsr = [], sparse.coo_array.tocsr
    monkeypatch.setattr(
        sparse.coo_array, "tocsr", lambda self, copy=False: calls.append(1) or tocsr(self, copy)
    )
    pictures.draw_cells(clf, sparse.coo_array(X.reshape(len(X), -1)), np.arange(20))
    assert calls == [1]


def test_chunks_are_small_and_change_nothing(fitted, monkeypatch):
    clf, X, _ = fitted
    rows = np.arange(20)[::-1]
    expected = pictures.draw_cells(clf, X, rows)
    sizes = []
    attention_maps = SparseAttnClassifier.attention_maps

    def counted(self, X):
        sizes.append(len(X))
        return attention_maps(self, X)

    monkeypatch.setattr(pictures, "_CHUNK_PIXELS", 3 * 12 * 14)
    monkeypatch.setattr(SparseAttnClassifier, "attention_maps", counted)
    assert pictures.draw_cells(clf, X, rows) == expected
    assert max(sizes) == 3


def test_pictures_shrink_until_they_fit(monkeypatch):
    X, y = make_images(shape=(80, 110), n=12)
    clf = fit(X, y)
    large = pictures.draw_cells(clf, X, np.arange(12))
    assert (large.factor, large.height, large.width) == (1, 80, 110)
    size = sum(len(text) for layer in large.layers.values() for text in layer)
    monkeypatch.setattr(pictures, "_MAX_BYTES", size // 3)
    small = pictures.draw_cells(clf, X, np.arange(12))
    assert sum(len(text) for layer in small.layers.values() for text in layer) <= size // 3
    height, width = -(-80 // small.factor), -(-110 // small.factor)
    assert small.factor > 1
    assert (small.height, small.width) == (height, width)
    maps = clf.attention_maps(X)
    for i in range(12):
        row, column = np.nonzero(maps.chosen[i])
        blocks = np.zeros((height, width), dtype=bool)
        blocks[row // small.factor, column // small.factor] = True
        np.testing.assert_array_equal(decoded(small.layers["chosen"][i])[..., 3] > 0, blocks)
        assert decoded(small.layers["image"][i]).shape == (height, width, 4)


@pytest.mark.parametrize("kind", ["float", "signed", "colour", "constant", "two channels"])
def test_images_of_other_kinds_use_the_whole_range(kind):
    X, y = make_images(shape=(12, 14, {"colour": 3, "two channels": 2}.get(kind, 1)))
    X = X.astype(np.float64) / 50 + 3 if kind in ("float", "two channels") else X
    X = X.astype(np.int16) - 100 if kind == "signed" else X
    X = np.full_like(X, 9) if kind == "constant" else X
    clf = fit(X, y)
    shown = [decoded(text) for text in pictures.draw_cells(clf, X, np.arange(9)).layers["image"]]
    if kind == "constant":
        assert all(np.ptp(picture[..., :3]) == 0 for picture in shown)
    else:
        assert min(picture[..., :3].min() for picture in shown) < 30
        assert max(picture[..., :3].max() for picture in shown) > (100 if kind == "colour" else 225)
    # Rounding aside: WebP keeps brightness and colour, not red, green and blue.
    is_gray = [abs(picture[..., 0] - picture[..., 1]).max() <= 4 for picture in shown]
    assert all(is_gray) == (kind != "colour")


# ---- around it ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [5] * 36}, "not fitted with: 5"),
        ({"y": [0] * 35}, "inconsistent numbers of samples"),
        ({"class_names": ["one"]}, "class_names has 1 names for 3 classes"),
        ({"names": ["one"]}, "names has 1 names for 36 images"),
        ({"max_images": 0}, "max_images == 0"),
        ({"X": np.zeros((36, 9, 9))}, "image"),
    ],
)
def test_errors_name_what_is_wrong_and_leave_the_old_file(fitted, tmp_path, change, message):
    clf, X, y = fitted
    file = tmp_path / "report.html"
    file.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_report(clf, **{"X": X, "y": y, "path": file} | change)
    assert file.read_text() == "old"
    write_report(clf, X, y, str(file), max_images=1)
    assert len(Page(file).data["cells"]) == 1


def test_the_file_behind_a_link_is_replaced_and_a_missing_folder_is_named_at_once(
    fitted, tmp_path, monkeypatch
):
    clf, X, y = fitted
    file, link = tmp_path / "report.html", tmp_path / "link.html"
    link.symlink_to(file)
    write_report(clf, X, y, link, max_images=1)
    assert link.is_symlink()
    assert len(Page(file).data["cells"]) == 1
    monkeypatch.setattr(SparseAttnClassifier, "predict_proba", None)  # no work before it
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        write_report(clf, X, y, tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match="is there and no file"):
        write_report(clf, X, y, tmp_path)


def test_an_estimator_that_is_not_fitted_is_refused(tmp_path):
    with pytest.raises(NotFittedError):
        write_report(SparseAttnClassifier(), *make_images(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_extra(fitted, tmp_path, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"sklearn-sparseattn\[report\]"):
        write_report(*fitted, tmp_path / "report.html")


def test_matplotlib_is_left_as_it_was(fitted, tmp_path):
    before = dict(mpl.rcParams)
    report(*fitted, tmp_path)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
