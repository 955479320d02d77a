"""The displays: what they show for each kind of input, and that they leave matplotlib as it was."""

import functools
import sys
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import sparse

from sklearn_sparseattn import (
    AttentionDisplay,
    DynamicK,
    MeanAttentionDisplay,
    SparseAttnClassifier,
    TrainingDisplay,
)

COLUMNS = ["image", "coarse attention", "chosen pixels", "fine attention"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_images(shape=(12, 14), n=24, dtype=np.uint8, low=0, high=200):
    """Noise with a bright square, or a dark one for the second class."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    images = rng.integers(low, high, size=(n, *shape))
    images[:, 4:8, 4:8] = np.where(y, low, high).reshape(-1, *[1] * len(shape))
    return images.astype(dtype), y


def fit(X, y, **params):
    return SparseAttnClassifier(max_epochs=2, random_state=0, **params).fit(X, y)


@functools.cache
def fitted(**how):
    """Images, fitted once for all tests, which may not write to them."""
    X, y = make_images(**how)
    X.flags.writeable = y.flags.writeable = False
    return fit(X, y), X, y


def shown(axis):
    return axis.images[0].get_array()


def test_columns_show_image_attention_and_chosen_pixels():
    clf, X, y = fitted()
    display = AttentionDisplay.from_estimator(clf, X, y, max_images=3)
    maps = clf.attention_maps(X[:3])
    assert display.axes_.shape == (3, 4)
    assert [axis.get_title() for axis in display.axes_[0]] == COLUMNS
    assert not any(axis.get_title() for axis in display.axes_[1:].flat)
    assert not any(len(axis.get_xticks()) or len(axis.get_yticks()) for axis in display.axes_.flat)
    for i, (image, coarse, chosen, fine) in enumerate(display.axes_):
        np.testing.assert_allclose(shown(image), X[i] / 255)
        np.testing.assert_array_equal(shown(coarse), maps.coarse[i])
        is_chosen = maps.chosen[i]
        assert 0 < is_chosen.sum() < is_chosen.size
        colours = shown(chosen)
        is_gray = (colours == colours[..., :1]).all(axis=-1)
        np.testing.assert_array_equal(is_gray, ~is_chosen)
        np.testing.assert_allclose(colours[~is_chosen, 0], X[i][~is_chosen] / 255)
        np.testing.assert_array_equal(np.ma.getmaskarray(shown(fine)), ~is_chosen)
        np.testing.assert_allclose(shown(fine)[is_chosen], maps.fine[i][is_chosen])


def test_titles_give_prediction_probability_and_truth():
    X, y = make_images()
    labels = np.array(["benign", "malign"])[y]
    clf = fit(X, labels)
    display = AttentionDisplay.from_estimator(clf, X, labels, max_images=2)
    proba = clf.predict_proba(X[:2])
    for i, title in enumerate(display.titles):
        predicted = clf.classes_[proba[i].argmax()]
        assert title == f"{predicted} ({proba[i].max():.0%})\ntrue: {labels[i]}"
        assert display.axes_[i, 0].get_ylabel() == title
    without_truth = AttentionDisplay.from_estimator(clf, X, max_images=2).titles
    assert without_truth == [title.partition("\n")[0] for title in display.titles]


def test_class_names_replace_labels_of_any_kind():
    X, y = make_images()
    clf = fit(X, 10 * y + 5)  # labels 5 and 15, so that a label is no index
    names = ["first", "second"]
    titles = AttentionDisplay.from_estimator(clf, X, 10 * y + 5, class_names=names, max_images=2).titles
    predicted = (clf.predict(X[:2]) - 5) // 10
    for title, guess, true in zip(titles, predicted, y[:2], strict=True):
        assert title.startswith(names[guess])
        assert title.endswith(f"true: {names[true]}")
    with pytest.raises(ValueError, match="class_names has 3 names for 2 classes"):
        AttentionDisplay.from_estimator(clf, X, class_names=["a", "b", "c"])


def test_a_true_label_that_the_fit_did_not_see_is_shown_as_it_is():
    clf, X, _ = fitted()
    titles = AttentionDisplay.from_estimator(clf, X[:2], np.array([7, 0])).titles
    assert titles[0].endswith("true: 7")
    assert titles[1].endswith("true: 0")


@pytest.mark.parametrize(("max_images", "rows"), [(1, 1), (3, 3), (1000, 4)])
def test_max_images(max_images, rows):
    clf, X, y = fitted()
    display = AttentionDisplay.from_estimator(clf, X[:4], y[:4], max_images=max_images)
    assert display.axes_.shape == (rows, 4)
    assert len(display.titles) == rows


def test_rgb_is_shown_in_colour_and_its_chosen_pixels_on_gray():
    clf, X, _ = fitted(shape=(12, 14, 3))
    display = AttentionDisplay.from_estimator(clf, X, max_images=2)
    np.testing.assert_allclose(shown(display.axes_[0, 0]), X[0] / 255)
    unchosen = ~display.chosen[0]
    assert 0 < unchosen.sum() < unchosen.size
    colours = shown(display.axes_[0, 2])[unchosen]
    gray = (X[0] / 255).mean(axis=-1)[unchosen]
    np.testing.assert_allclose(colours, np.repeat(gray[:, None], 3, axis=1))


def test_two_channels_are_shown_as_their_mean():
    clf, X, _ = fitted(shape=(12, 14, 2))
    display = AttentionDisplay.from_estimator(clf, X, max_images=2)
    np.testing.assert_allclose(shown(display.axes_[0, 0]), X[0].mean(axis=-1) / 255)


@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.float64])
def test_signed_images_use_the_whole_gray_scale(dtype):
    clf, X, _ = fitted(dtype=dtype, low=-5, high=9)
    display = AttentionDisplay.from_estimator(clf, X, max_images=2)
    low, high = float(X[:2].min()), float(X[:2].max())
    np.testing.assert_allclose(display.images, (X[:2].astype(float) - low) / (high - low), atol=1e-6)


def test_images_beyond_the_range_of_the_fit_are_clipped():
    clf, X, _ = fitted(dtype=np.float64)
    display = AttentionDisplay.from_estimator(clf, 2 * X, max_images=2)
    assert display.images.max() == 1
    np.testing.assert_allclose(display.images, np.clip(2 * X[:2] / 200, 0, 1))


@pytest.mark.parametrize("container", ["rows", "lists", "csr", "csc", "coo", "frame"])
def test_other_containers_show_the_same_as_an_array(container):
    clf, X, y = fitted(dtype=np.float64, low=-5, high=9)
    rows = X.reshape(len(X), -1)
    if container == "frame":
        import pandas as pd

        frame = pd.DataFrame(rows, columns=[f"p{i}" for i in range(rows.shape[1])])
        clf = fit(frame, y, image_shape=(12, 14))
        other = frame
    elif container == "rows":
        other = rows
    elif container == "lists":
        other = X.tolist()
    else:
        other = getattr(sparse, f"{container}_array")(rows)
    expected_input = other if container == "frame" else X
    expected = clf.attention_maps(expected_input).coarse[:2]
    display = AttentionDisplay.from_estimator(clf, other, y, max_images=2)
    np.testing.assert_allclose(display.coarse, expected, atol=1e-6)
    low, high = X[:2].min(), X[:2].max()
    np.testing.assert_allclose(display.images, (X[:2] - low) / (high - low), atol=1e-6)


def test_axes_of_the_user_are_drawn_on():
    clf, X, y = fitted()
    figure, axes = plt.subplots(3, 4)
    display = AttentionDisplay.from_estimator(clf, X, y, max_images=2, ax=axes[1:])
    assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]
    assert [len(axis.images) for axis in axes.flat] == [0] * 4 + [1] * 8
    with pytest.raises(ValueError, match=r"ax must have the shape \(2, 4\).*got \(3, 4\)"):
        AttentionDisplay.from_estimator(clf, X, y, max_images=2, ax=axes)


def test_one_strong_pixel_does_not_darken_the_others():
    chosen = np.zeros((1, 20, 20), dtype=bool)
    chosen[0, :10] = True
    fine = 0.1 * chosen
    fine[0, 0, 0] = 100.0
    display = AttentionDisplay(
        np.zeros((1, 20, 20)), coarse=np.zeros((1, 20, 20)), chosen=chosen, fine=fine, titles=["one"]
    ).plot()
    low, high = display.axes_[0, 3].images[0].get_clim()
    assert low == 0
    assert high == pytest.approx(0.1)


def test_plot_again_with_other_colours_and_size():
    clf, X, _ = fitted()
    display = AttentionDisplay.from_estimator(clf, X, max_images=2)
    first = display.figure_
    assert display.plot(cmap="magma", panel_size=1.0) is display
    assert display.figure_ is not first
    assert display.axes_[0, 1].images[0].get_cmap().name == "magma"
    assert (display.figure_.get_size_inches() < first.get_size_inches()).all()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    clf, X, _ = fitted()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-sparseattn\[plot\]'"):
        AttentionDisplay.from_estimator(clf, X)


def test_nothing_global_is_touched():
    clf, X, y = fitted()
    before = dict(mpl.rcParams), plt.get_backend(), plt.isinteractive()
    display = AttentionDisplay.from_estimator(clf, X, y)
    assert (dict(mpl.rcParams), plt.get_backend(), plt.isinteractive()) == before
    assert plt.get_fignums() == [display.figure_.number]
    assert display.axes_.shape == (8, 4)  # unless told otherwise
    plt.close(display.figure_)
    assert plt.get_fignums() == []


def test_colour_bars_give_the_values_of_the_maps_and_move_no_axes():
    clf, X, _ = fitted()
    figure, axes = plt.subplots(2, 4, dpi=40)
    before = [axis.get_position().bounds for axis in axes.flat]
    AttentionDisplay.from_estimator(clf, X[:2], ax=axes)
    figure.canvas.draw()
    assert figure.axes == [*axes.flat]
    # An equal aspect may make a panel smaller inside its place, which is the same as without bars.
    assert [axis.get_position(original=True).bounds for axis in axes.flat] == before
    for row in axes:
        assert [len(axis.child_axes) for axis in row] == [0, 1, 0, 1]
        for axis in row[[1, 3]]:
            assert axis.child_axes[0].get_ylim() == axis.images[0].get_clim()


def test_maps_computed_before_give_the_same_picture():
    clf, X, y = fitted()
    one = AttentionDisplay.from_estimator(clf, X[:2], y[:2], class_names=["a", "b"])
    maps, proba = clf.attention_maps(X[:2]), clf.predict_proba(X[:2])
    other = AttentionDisplay.from_maps(
        X[:2] / 255, maps, proba, classes=clf.classes_, y=y[:2], class_names=["a", "b"]
    )
    assert one.titles == other.titles
    for left, right in zip(one.axes_.flat, other.axes_.flat, strict=True):
        np.testing.assert_allclose(shown(left), shown(right))


def test_evidence_is_a_fifth_column_around_zero():
    clf, X, y = fitted()
    display = AttentionDisplay.from_estimator(clf, X, y, max_images=2, evidence=True)
    assert display.axes_.shape == (2, 5)
    assert [axis.get_title() for axis in display.axes_[0]] == [*COLUMNS, "evidence"]
    expected = clf.evidence_maps(X[:2])
    for axis, values in zip(display.axes_[:, 4], expected, strict=True):
        np.testing.assert_array_equal(shown(axis), values)
        low, high = axis.images[0].get_clim()
        assert -low == high == pytest.approx(np.percentile(np.abs(values), 99))
        assert axis.images[0].get_cmap()(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.05)  # nothing is white
        assert len(axis.child_axes) == 1
    maps = {**clf.attention_maps(X[:2]), "evidence": np.zeros_like(expected)}
    nothing = AttentionDisplay.from_maps(X[:2] / 255, maps, clf.predict_proba(X[:2]), classes=clf.classes_)
    assert nothing.axes_[0, 4].images[0].get_clim() == (-1, 1)
    with pytest.raises(ValueError, match=r"ax must have the shape \(2, 5\).*got \(2, 4\)"):
        display.plot(ax=plt.subplots(2, 4)[1])


def test_evidence_by_occlusion():
    clf, X, y = fitted()
    display = AttentionDisplay.from_estimator(clf, X, y, max_images=2, evidence="occlusion")
    for axis, values in zip(display.axes_[:, 4], clf.occlusion_maps(X[:2]), strict=True):
        np.testing.assert_array_equal(shown(axis), values)
    with pytest.raises(ValueError, match="evidence='occlude' must be True, False or 'occlusion'"):
        AttentionDisplay.from_estimator(clf, X, y, evidence="occlude")


def test_what_is_not_shown_is_not_asked_for():
    clf, X, _ = fitted()
    names = ("attention_maps", "predict_proba", "classes_", "image_shape_", "data_range_")
    other = SimpleNamespace(**{name: getattr(clf, name) for name in names})
    assert AttentionDisplay.from_estimator(other, X, max_images=1).axes_.shape == (1, 4)


LONG_NAMES = [
    "monocyte with a vacuolated cytoplasm, activated, first donor",
    "A_VERY_LONG_NAME_IN_CAPITALS_AND_WITHOUT_ANY_BLANK_VERSION_2",
]


def boxes(texts, figure):
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts]


def overlap(box, other):
    return (
        min(box.x1, other.x1) - max(box.x0, other.x0) > 1
        and min(box.y1, other.y1) - max(box.y0, other.y0) > 1
    )


@pytest.mark.parametrize("own_axes", [False, True])
@pytest.mark.parametrize("kind", ["attention", "mean"])
def test_long_names_are_shortened_in_their_middle_and_overlap_nothing(kind, own_axes):
    clf, X, y = fitted()
    shape = (12, 4) if kind == "attention" else (2, 2)
    ax = plt.subplots(*shape, figsize=(1.6 * shape[1], 1.6 * shape[0]))[1] if own_axes else None
    if kind == "attention":
        options = {"class_names": LONG_NAMES, "max_images": 12, "ax": ax}
        display = AttentionDisplay.from_estimator(clf, X, y, **options)
        texts = [axis.yaxis.label for axis in display.axes_[:, 0]]
        for text, title in zip(texts, display.titles, strict=True):
            assert "…" in text.get_text()
            probability = title.partition("\n")[0].rpartition(" ")[2]
            assert probability in text.get_text()
    else:
        display = MeanAttentionDisplay.from_estimator(clf, X, y, class_names=LONG_NAMES, ax=ax)
        texts = [axis.title for axis in display.axes_.flat] + [
            axis.yaxis.label for axis in display.axes_[:, 0]
        ]
        assert display.class_names == LONG_NAMES
        assert texts[-1].get_text().endswith("SION_2")
    display.figure_.canvas.draw()
    panels = [axis.get_window_extent() for axis in display.axes_.flat]
    placed = boxes(texts, display.figure_)
    for i, box in enumerate(placed):
        assert not any(overlap(box, other) for other in [*placed[i + 1 :], *panels])


def test_short_names_are_left_as_they_are():
    clf, X, y = fitted()
    display = MeanAttentionDisplay.from_estimator(clf, X, y, class_names=["lymphocyte", "monocyte"])
    assert display.axes_[0, 0].get_ylabel() == "true lymphocyte"
    assert display.axes_[0, 1].get_title().startswith("predicted monocyte\n")


def test_dollars_backslashes_and_line_breaks_in_names_are_text():
    clf, X, y = fitted()
    names = ["$\\frac{$", "two\nlines $x$"]
    display = AttentionDisplay.from_estimator(clf, X, y, class_names=names, max_images=4)
    assert display.titles[1].endswith("\ntrue: two lines $x$")
    mean = MeanAttentionDisplay.from_estimator(clf, X, y, class_names=names)
    assert mean.axes_[1, 0].get_ylabel() == "true two lines $x$"
    assert mean.axes_[0, 0].get_title().startswith("predicted $\\frac{$\n")
    for one in (display, mean):
        one.figure_.canvas.draw()  # mathematics would be an error


def test_no_tick_of_a_colour_bar_looks_like_a_minus():
    clf, X, y = fitted()
    display = AttentionDisplay.from_estimator(clf, X, max_images=1, evidence=True)
    mean = MeanAttentionDisplay.from_estimator(clf, X, y)
    bars = [bar for axis in [*display.axes_.flat, *mean.axes_.flat] for bar in axis.child_axes]
    assert len(bars) == 4
    assert all(tick.tick2line.get_markersize() == 0 for bar in bars for tick in bar.yaxis.get_major_ticks())
    assert bars[-1].get_ylabel() == "mean attention"


# ---- TrainingDisplay ----

HISTORY = {
    "epoch": np.arange(1, 4),
    "train_loss": np.array([3.0, 2.0, 1.0]),
    "focal_loss": np.array([1.0, 0.8, 0.5]),
    "contrastive_loss": np.zeros(3),
    "distillation_loss": np.array([9.0, 7.0, 8.0]),
    "consistency_loss": np.array([0.3, 0.2, 0.1]),
    "k": np.array([50.0, 40.0, 30.0]),
    "lr": np.array([1e-3, 1e-2, 1e-5]),
}


def curves(axis):
    return {line.get_label(): line.get_ydata() for line in axis.lines}


def test_training_curves_are_the_history():
    display = TrainingDisplay.from_history(HISTORY, n_pixels=200)
    loss, k, lr = display.axes_
    drawn = curves(loss)
    # A term that was not computed is left out.
    assert list(drawn) == ["total", "answer", "distillation", "consistency"]
    np.testing.assert_array_equal(drawn["total"], HISTORY["train_loss"])
    np.testing.assert_array_equal(drawn["distillation"], HISTORY["distillation_loss"])
    np.testing.assert_allclose(k.lines[0].get_ydata(), [25, 20, 15])
    np.testing.assert_array_equal(lr.lines[0].get_ydata(), HISTORY["lr"])
    for axis in display.axes_:
        assert all(list(line.get_xdata()) == [1, 2, 3] for line in axis.lines)
    # Told apart without colours, too.
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 4
    assert loss.get_yscale() == "log"


def titles(display):
    return [axis.get_title() for axis in display.axes_]


@pytest.mark.parametrize("rule", [None, "paper"])
@pytest.mark.parametrize("validates", [True, False])
def test_training_of_an_estimator(rule, validates):
    X, y = make_images()
    callbacks = [DynamicK.paper(k_min=3)] if rule == "paper" else None
    own = {"early_stopping": True, "validation_fraction": 0.25} if validates else {}
    clf = fit(X, y, callbacks=callbacks, **own)
    display = TrainingDisplay.from_estimator(clf)
    assert titles(display) == [
        "loss",
        "chosen pixels, % of the image",
        *([] if rule == "paper" else ["loss with k and with k / 2 pixels"]),
        "learning rate",
        *(["validation accuracy"] if validates else []),
    ]
    np.testing.assert_allclose(display.axes_[1].lines[0].get_ydata(), 100 * clf.history_["k"] / (12 * 14))
    if rule is None:
        known = np.isfinite(clf.history_["loss_at_k"])
        assert known.any()
        drawn = curves(display.axes_[2])
        np.testing.assert_array_equal(drawn["k"], clf.history_["loss_at_k"][known])
        np.testing.assert_array_equal(drawn["k / 2"], clf.history_["loss_at_half_k"][known])
    if validates:
        np.testing.assert_array_equal(display.axes_[-1].lines[0].get_ydata(), clf.history_["valid_score"])
    assert ("answer, validation" in curves(display.axes_[0])) == validates
    n = len(display.axes_)
    with pytest.raises(ValueError, match=rf"ax must have the shape \({n},\); got \(2,\)"):
        display.plot(ax=plt.subplots(1, 2)[1])


def test_epochs_without_a_comparison_leave_no_gap():
    """Of few batches not every epoch has one; of a history joined to another rule's some have none."""
    compared = {"loss_at_k": np.array([0.9, np.nan, 0.5]), "loss_at_half_k": np.array([0.8, np.nan, 0.5])}
    display = TrainingDisplay.from_history(HISTORY | compared, n_pixels=200)
    for line, values in zip(display.axes_[2].lines, ([0.9, 0.5], [0.8, 0.5]), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 3])
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert len({(line.get_color(), line.get_linestyle()) for line in display.axes_[2].lines}) == 2
    never = {name: np.full(3, np.nan) for name in compared}
    assert len(TrainingDisplay.from_history(HISTORY | never, n_pixels=200).axes_) == 3


def test_a_table_of_the_history_is_drawn_alike():
    pd = pytest.importorskip("pandas")
    compared = {"loss_at_k": np.array([0.9, 0.7, 0.5]), "loss_at_half_k": np.array([0.8, 0.6, 0.5])}
    display = TrainingDisplay.from_history(pd.DataFrame(HISTORY | compared), n_pixels=200)
    assert len(display.axes_) == 4
    np.testing.assert_array_equal(curves(display.axes_[0])["total"], HISTORY["train_loss"])


def test_lines_are_seen_on_a_dark_ground():
    with plt.style.context("dark_background"):
        display = TrainingDisplay.from_history(HISTORY, n_pixels=200)
    for axis in display.axes_:
        dark = np.array(mpl.colors.to_rgb(axis.get_facecolor()))
        for line in axis.lines:
            assert np.abs(mpl.colors.to_rgb(line.get_color()) - dark).max() > 0.5
    light = TrainingDisplay.from_history(HISTORY, n_pixels=200)
    assert mpl.colors.to_hex(light.axes_[0].lines[0].get_color()) == "#000000"


def test_a_single_epoch_has_a_single_tick():
    one = {name: values[:1] for name, values in HISTORY.items()}
    display = TrainingDisplay.from_history(one, n_pixels=200)
    display.figure_.canvas.draw()
    for axis in display.axes_:
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


# ---- MeanAttentionDisplay ----


def test_mean_attention_by_true_and_predicted_class():
    maps = np.random.default_rng(0).random((6, 5, 7))
    y, predicted = np.array(list("aabbca")), np.array(list("abbbac"))
    display = MeanAttentionDisplay.from_maps(maps, y, predicted, classes=["a", "b", "c"], class_names="ABC")
    np.testing.assert_array_equal(display.counts, [[1, 1, 1], [0, 2, 0], [1, 0, 0]])
    np.testing.assert_allclose(display.attention[1, 1], maps[[2, 3]].mean(axis=0))
    np.testing.assert_allclose(display.attention[2, 0], maps[4])
    assert np.isnan(display.attention[display.counts == 0]).all()
    for (i, j), axis in np.ndenumerate(display.axes_):
        head = f"predicted {'ABC'[j]}\n" if i == 0 else ""
        assert axis.get_title() == f"{head}{display.counts[i, j]}"
        assert axis.get_ylabel() == (f"true {'ABC'[i]}" if j == 0 else "")
        assert np.ma.getmaskarray(shown(axis)).all() == (display.counts[i, j] == 0)
    assert len({axis.images[0].get_clim() for axis in display.axes_.flat}) == 1


@pytest.mark.parametrize("attention", ["fine", "coarse"])
def test_mean_attention_of_an_estimator_is_that_of_its_maps_in_pieces(attention, monkeypatch):
    clf, X, y = fitted(dtype=np.float64)
    monkeypatch.setattr("sklearn_sparseattn.display.mean_attention._ROWS", 7)
    display = MeanAttentionDisplay.from_estimator(
        clf, sparse.coo_array(X.reshape(len(X), -1)), y, attention=attention
    )
    expected = MeanAttentionDisplay.from_maps(
        clf.attention_maps(X)[attention], y, clf.predict(X), classes=clf.classes_
    )
    np.testing.assert_array_equal(display.counts, expected.counts)
    np.testing.assert_allclose(display.attention, expected.attention, atol=1e-6)


@pytest.mark.parametrize("form", ["coo", "csc", "dok"])
def test_mean_attention_converts_sparse_images_once(form, monkeypatch):
    clf, X, y = fitted(dtype=np.float64)
    rows = sparse.csr_array(X.reshape(len(X), -1)).asformat(form)
    kind, calls = type(rows), []
    tocsr = kind.tocsr
    monkeypatch.setattr(kind, "tocsr", lambda self, copy=False: calls.append(self.shape) or tocsr(self, copy))
    monkeypatch.setattr("sklearn_sparseattn.display.mean_attention._ROWS", 7)
    MeanAttentionDisplay.from_estimator(clf, rows, y)
    assert calls == [rows.shape]


def test_mean_attention_says_what_is_wrong():
    maps, y = np.ones((2, 3, 3)), np.array([0, 1])
    with pytest.raises(ValueError, match=r"y has labels \[1\] which are not among the classes \[0, 2\]"):
        MeanAttentionDisplay.from_maps(maps, y, y, classes=[0, 2])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        MeanAttentionDisplay.from_maps(maps, y[:1], y, classes=[0, 1])
    with pytest.raises(ValueError, match="attention='both' must be"):
        MeanAttentionDisplay.from_estimator(None, maps, y, attention="both")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainingDisplay.from_history(HISTORY, n_pixels=200),
        lambda: MeanAttentionDisplay.from_maps(np.ones((1, 3, 3)), [0], [0], classes=[0]),
    ],
)
def test_the_other_displays_too_name_the_extra_they_need(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(
        ImportError, match=r"Display needs matplotlib: pip install 'sklearn-sparseattn\[plot\]'"
    ):
        make()


# ---- notebooks ----


@pytest.mark.parametrize("is_fitted", [False, True])
def test_html_of_an_estimator_names_it_its_parameters_and_its_state(is_fitted):
    clf = SparseAttnClassifier(k_init=0.37)
    if is_fitted:
        clf = fit(*make_images(), k_init=0.37)
    html = clf._repr_html_()
    assert "SparseAttnClassifier" in html
    assert "0.37" in html
    assert ("<span>Fitted</span>" in html, "<span>Not fitted</span>" in html) == (is_fitted, not is_fitted)
    assert 'href="http' not in html  # this estimator has no page on scikit-learn.org


def test_the_progress_bar_does_without_ipywidgets(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # which in a notebook would warn
    fit(*make_images(), verbose=1)
    assert "2/2" in capsys.readouterr().err
