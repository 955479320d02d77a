"""AttentionDisplay: what it shows for each kind of input, and that it leaves matplotlib as it was."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy import sparse

from sklearn_sparseattn import AttentionDisplay, SparseAttnClassifier

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


def shown(axis):
    return axis.images[0].get_array()


def test_columns_show_image_attention_and_chosen_pixels():
    X, y = make_images()
    clf = fit(X, y)
    display = AttentionDisplay.from_estimator(clf, X, y, max_images=3)
    maps = clf.attention_maps(X[:3])
    assert display.axes_.shape == (3, 4)
    assert [axis.get_title() for axis in display.axes_[0]] == COLUMNS
    assert not any(axis.get_title() for axis in display.axes_[1:].flat)
    assert not any(len(axis.get_xticks()) or len(axis.get_yticks()) for axis in display.axes_.flat)
    for i, (image, coarse, chosen, fine) in enumerate(display.axes_):
        np.testing.assert_allclose(shown(image), X[i] / 255)
        np.testing.assert_array_equal(shown(coarse), maps.coarse[i])
        is_chosen = np.zeros(X[i].shape, dtype=bool)
        is_chosen.flat[maps.pixels[i]] = True
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
    display = AttentionDisplay.from_estimator(clf, X, labels, max_images=4)
    proba = clf.predict_proba(X[:4])
    for i, title in enumerate(display.titles):
        predicted = clf.classes_[proba[i].argmax()]
        assert title == f"{predicted} ({proba[i].max():.0%})\ntrue: {labels[i]}"
        assert display.axes_[i, 0].get_ylabel() == title
    without_truth = AttentionDisplay.from_estimator(clf, X, max_images=4).titles
    assert without_truth == [title.partition("\n")[0] for title in display.titles]


def test_class_names_replace_labels_of_any_kind():
    X, y = make_images()
    clf = fit(X, 10 * y + 5)  # labels 5 and 15, so that a label is no index
    names = ["first", "second"]
    titles = AttentionDisplay.from_estimator(clf, X, 10 * y + 5, class_names=names, max_images=4).titles
    predicted = (clf.predict(X[:4]) - 5) // 10
    for title, guess, true in zip(titles, predicted, y[:4], strict=True):
        assert title.startswith(names[guess])
        assert title.endswith(f"true: {names[true]}")
    with pytest.raises(ValueError, match="class_names has 3 names for 2 classes"):
        AttentionDisplay.from_estimator(clf, X, class_names=["a", "b", "c"])


def test_a_true_label_that_the_fit_did_not_see_is_shown_as_it_is():
    X, y = make_images()
    titles = AttentionDisplay.from_estimator(fit(X, y), X[:2], np.array([7, 0])).titles
    assert titles[0].endswith("true: 7")
    assert titles[1].endswith("true: 0")


@pytest.mark.parametrize(("max_images", "rows"), [(1, 1), (5, 5), (8, 8), (1000, 24)])
def test_max_images(max_images, rows):
    X, y = make_images()
    display = AttentionDisplay.from_estimator(fit(X, y), X, y, max_images=max_images)
    assert display.axes_.shape == (rows, 4)
    assert len(display.titles) == rows


def test_rgb_is_shown_in_colour_and_its_chosen_pixels_on_gray():
    X, y = make_images(shape=(12, 14, 3))
    clf = fit(X, y)
    display = AttentionDisplay.from_estimator(clf, X, max_images=2)
    np.testing.assert_allclose(shown(display.axes_[0, 0]), X[0] / 255)
    unchosen = np.setdiff1d(np.arange(12 * 14), display.pixels[0])
    colours = shown(display.axes_[0, 2]).reshape(-1, 3)[unchosen]
    gray = (X[0] / 255).mean(axis=-1).ravel()[unchosen]
    np.testing.assert_allclose(colours, np.repeat(gray[:, None], 3, axis=1))


def test_two_channels_are_shown_as_their_mean():
    X, y = make_images(shape=(12, 14, 2))
    display = AttentionDisplay.from_estimator(fit(X, y), X, max_images=2)
    np.testing.assert_allclose(shown(display.axes_[0, 0]), X[0].mean(axis=-1) / 255)


@pytest.mark.parametrize("dtype", [np.int8, np.float32, np.float64])
def test_signed_images_use_the_whole_gray_scale(dtype):
    X, y = make_images(dtype=dtype, low=-5, high=9)
    display = AttentionDisplay.from_estimator(fit(X, y), X, max_images=4)
    low, high = float(X[:4].min()), float(X[:4].max())
    np.testing.assert_allclose(display.images, (X[:4].astype(float) - low) / (high - low), atol=1e-6)


def test_images_beyond_the_range_of_the_fit_are_clipped():
    X, y = make_images(dtype=np.float64)
    display = AttentionDisplay.from_estimator(fit(X, y), 2 * X, max_images=2)
    assert display.images.max() == 1
    np.testing.assert_allclose(display.images, np.clip(2 * X[:2] / 200, 0, 1))


@pytest.mark.parametrize("container", ["rows", "lists", "csr", "csc", "coo", "frame"])
def test_other_containers_show_the_same_as_an_array(container):
    X, y = make_images(dtype=np.float64, low=-5, high=9)
    clf = fit(X, y)
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
    expected = clf.attention_maps(expected_input).coarse[:3]
    display = AttentionDisplay.from_estimator(clf, other, y, max_images=3)
    np.testing.assert_allclose(display.coarse, expected, atol=1e-6)
    low, high = X[:3].min(), X[:3].max()
    np.testing.assert_allclose(display.images, (X[:3] - low) / (high - low), atol=1e-6)


def test_axes_of_the_user_are_drawn_on():
    X, y = make_images()
    clf = fit(X, y)
    figure, axes = plt.subplots(3, 4)
    display = AttentionDisplay.from_estimator(clf, X, y, max_images=2, ax=axes[1:])
    assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]
    assert [len(axis.images) for axis in axes.flat] == [0] * 4 + [1] * 8
    with pytest.raises(ValueError, match=r"ax must have the shape \(2, 4\).*got \(3, 4\)"):
        AttentionDisplay.from_estimator(clf, X, y, max_images=2, ax=axes)


def test_one_strong_pixel_does_not_darken_the_others():
    fine = np.zeros((1, 20, 20))
    pixels = np.arange(200)[None]
    fine.reshape(1, -1)[0, :200] = 0.1
    fine[0, 0, 0] = 100.0
    display = AttentionDisplay(
        np.zeros((1, 20, 20)), coarse=np.zeros((1, 20, 20)), pixels=pixels, fine=fine, titles=["one"]
    ).plot()
    low, high = display.axes_[0, 3].images[0].get_clim()
    assert low == 0
    assert high == pytest.approx(0.1)


def test_plot_again_with_other_colours_and_size():
    X, y = make_images()
    display = AttentionDisplay.from_estimator(fit(X, y), X, max_images=2)
    first = display.figure_
    assert display.plot(cmap="magma", panel_size=1.0) is display
    assert display.figure_ is not first
    assert display.axes_[0, 1].images[0].get_cmap().name == "magma"
    assert (display.figure_.get_size_inches() < first.get_size_inches()).all()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    X, y = make_images()
    clf = fit(X, y)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-sparseattn\[plot\]'"):
        AttentionDisplay.from_estimator(clf, X)


def test_nothing_global_is_touched():
    X, y = make_images()
    clf = fit(X, y)
    before = dict(mpl.rcParams), plt.get_backend(), plt.isinteractive()
    display = AttentionDisplay.from_estimator(clf, X, y)
    assert (dict(mpl.rcParams), plt.get_backend(), plt.isinteractive()) == before
    assert plt.get_fignums() == [display.figure_.number]
    plt.close(display.figure_)
    assert plt.get_fignums() == []
