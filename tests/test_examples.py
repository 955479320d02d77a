"""Every script in examples/, run at small size: what it prints and what it leaves behind."""

import importlib.util
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODALITIES = ["opd", "hologram", "event", "brightfield"]


def load_example(name):
    """Import a script by its path, as `python examples/name.py` does."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec.loader.exec_module(module)
    return module


def row_of(text, name):
    """Numbers in the line that begins with `name`."""
    [line] = [line for line in text.splitlines() if line.startswith(name)]
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line.removeprefix(name))]


def picture_size(file):
    """Width and height of a PNG, which must not be of one colour."""
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(file) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    return struct.unpack(">II", header[16:])


@pytest.fixture
def folder_of_cells(tmp_path):
    """Two classes that are easily told apart, of images of unequal sizes, in colour."""
    rng = np.random.default_rng(0)
    for name, level in [("dim", 60), ("lit", 200)]:
        (tmp_path / "cells" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(level, 10, size=(24 + i % 3, 28, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "cells" / name / f"{i}.png")
    return tmp_path / "cells"


def test_every_example_has_a_test():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = set(re.findall(r'load_example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert scripts == tested


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_importing_an_example_does_nothing_and_its_docstring_says_how_to_run_it(file, capsys):
    module = load_example(file.stem)
    assert capsys.readouterr().out == ""
    assert f"python examples/{file.name}" in module.__doc__


def test_demo(tmp_path, capsys):
    output = tmp_path / "demo.png"
    load_example("demo").main(n_samples=45, image_size=24, max_epochs=2, output=output, n_jobs=1)
    text = capsys.readouterr().out
    for modality in MODALITIES:
        images, accuracy, k, share, seconds, rate = row_of(text, modality)
        assert images == 45
        assert 0 <= accuracy <= 1
        assert share == pytest.approx(100 * k / 24**2, abs=0.1)
        assert seconds >= 0  # a small fit rounds to 0.0
        assert rate > 0
    assert str(output) in text
    assert picture_size(output) == (1140, 1152)


def test_the_demo_turns_holograms_so_that_their_fringes_stay():
    keep_fringes = load_example("demo").keep_fringes
    i, j = np.indices((16, 16))
    fringes = np.cos(0.7 * (i + j)) * np.ones((50, 1, 1, 1))
    centred = np.fft.fft2(fringes - fringes.mean())
    turned = keep_fringes(fringes, np.random.default_rng(0))
    # The size of a spectrum tells direction and spacing of fringes, whatever their phase.
    np.testing.assert_allclose(abs(np.fft.fft2(turned - turned.mean())), abs(centred), atol=1e-9)
    images = np.random.default_rng(1).random((50, 2, 16, 16))
    before = images.copy()
    turned = keep_fringes(images, np.random.default_rng(0))
    np.testing.assert_array_equal(images, before)
    assert 0 < np.mean([np.array_equal(a, b) for a, b in zip(turned, images, strict=True)]) < 0.5
    np.testing.assert_array_equal(np.sort(turned.ravel()), np.sort(images.ravel()))


def test_quickstart(capsys):
    load_example("quickstart").main(n_samples=60, max_epochs=2)
    text = capsys.readouterr().out
    images, accuracy = row_of(text, "accuracy on")
    assert images == 15
    assert 0 <= accuracy <= 1
    rows = np.array(re.findall(r"\[+ *([01]\.\d*) +([01]\.\d*) +([01]\.\d*) *\]", text), dtype=float)
    assert rows.shape == (3, 3)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=0.02)
    assert "coarse attention (15, 48, 48) fine attention (15, 48, 48)" in text
    assert 0 <= row_of(text, "accuracy by half of the pixels")[0] <= 1


def test_classify_folder(folder_of_cells, capsys):
    load_example("classify_folder").main([str(folder_of_cells), "--image-size", "16", "--epochs", "8"])
    text = capsys.readouterr().out
    assert "40 images of 16×16×3, 2 classes" in text
    assert row_of(text, "accuracy  ") == [1.0]
    assert row_of(text, "macro F1") == [1.0]
    for name in ("dim", "lit"):
        assert row_of(text, f"{name:>12}".rstrip()) == [1, 1, 1, 4]
    course = text.split("training loss\n")[1].split("\n\n")[0].splitlines()
    epochs, k = np.array([[float(n) for n in line.split()[:2]] for line in course]).T
    np.testing.assert_array_equal(epochs, np.arange(1, 9))
    assert k[0] == round(8000 / 18225 * 256)
    assert ((k >= 1) & (k <= 256)).all()
    losses = np.array([[float(n) for n in line.split()[3:]] for line in course])
    assert losses.shape == (8, 3)
    assert (np.isnan(losses) | (losses >= 0)).all()  # not every epoch has a comparison
    assert (losses[::2] >= 0).all()


def test_classify_folder_gray_and_uncropped(folder_of_cells, capsys):
    arguments = ["--image-size", "16", "--epochs", "1", "--gray", "--crop"]
    for crop in ("none", "20"):
        load_example("classify_folder").main([str(folder_of_cells), *arguments, crop])
        assert "40 images of 16×16, 2 classes" in capsys.readouterr().out


def test_classify_folder_says_what_is_wrong(folder_of_cells, tmp_path, capsys):
    main = load_example("classify_folder").main
    with pytest.raises(SystemExit, match=r"Cannot use this folder: .*nowhere.* does not exist"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"Cannot use this folder: .*no class folder"):
        main([str(folder_of_cells / "dim")])
    with pytest.raises(SystemExit, match=r"Two classes of two images each .* has: cells 40"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit):
        main([str(folder_of_cells), "--crop", "centre"])
    assert "--crop must be 'square', 'none' or a number of pixels, not 'centre'" in capsys.readouterr().err


def test_classify_folder_leaves_out_what_cannot_be_read(folder_of_cells, capsys):
    (folder_of_cells / "dim" / "broken.png").write_bytes(b"not a picture")
    arguments = [str(folder_of_cells), "--image-size", "16", "--epochs", "1"]
    with pytest.raises(SystemExit, match=r"broken\.png"):
        load_example("classify_folder").main(arguments)
    with pytest.warns(UserWarning, match=r"broken\.png"):
        load_example("classify_folder").main([*arguments, "--skip-unreadable"])
    assert "40 images of" in capsys.readouterr().out


def test_grid_search(capsys):
    search = load_example("grid_search").main(n_samples=48, image_size=16, max_epochs=1, n_jobs=1)
    text = capsys.readouterr().out
    table = [line.split() for line in text.splitlines()[1:-1]]
    pairs = {(float(row[1]), float(row[2])) for row in table}
    assert pairs == {(c, d) for c in (0.0, 0.1, 0.3) for d in (0.0, 0.02)}
    accuracies = [float(row[3]) for row in table]
    assert accuracies == sorted(accuracies, reverse=True)
    assert f"accuracy {search.best_score_:.3f}" in text


def test_compare_classifiers(capsys):
    load_example("compare_classifiers").main(n_samples=210, image_size=16, max_epochs=1)
    text = capsys.readouterr().out
    for name in (
        "SparseAttnClassifier ",
        "LogisticRegression",
        "PCA + SVC",
        "RandomForest",
        "PCA + HistGradientBoosting",
    ):
        accuracy, sd, seconds = row_of(text, name)
        assert 0 <= accuracy <= 1
        assert 0 <= sd <= 0.5
        assert seconds >= 0  # a small fit rounds to 0.0


def test_persistence(tmp_path, capsys):
    loaded = load_example("persistence").main(tmp_path, n_samples=30, image_size=16, max_epochs=1)
    text = capsys.readouterr().out
    assert text.count("the same bits") == 2
    assert "100 % of the images the same to 1e-5" in text
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["cells.joblib", "cells.onnx", "cells.safetensors"]
    for file in files:
        assert row_of(text, file.name)[0] == round(file.stat().st_size / 1024)
    assert loaded.predict(np.zeros((2, 16, 16, 3), dtype=np.uint8)).shape == (2,)


def test_pixel_sets(capsys):
    load_example("pixel_sets").main(n_samples=60, image_size=16, max_epochs=1, k=0.1)
    text = capsys.readouterr().out
    for name in ("intensity", "gradient", "coarse attention"):
        n_features, accuracy = row_of(text, name)
        assert n_features == 3 * 26  # x, y and v of a tenth of 256 pixels
        assert 0 <= accuracy <= 1
    [accuracy, k] = row_of(text, "SparseAttnClassifier itself:")
    assert 0 <= accuracy <= 1
    assert 1 <= k <= 256


def test_plot_attention(tmp_path, capsys):
    load_example("plot_attention").main(n_samples=60, image_size=16, max_epochs=1, n_shown=2, folder=tmp_path)
    text = capsys.readouterr().out
    for modality in MODALITIES:
        accuracy, on_cell, cell, in_frame, frame = row_of(text, modality)[:5]
        assert 0 <= accuracy <= 1
        assert 0 <= on_cell <= 100
        assert 10 < cell < 40
        assert 0 <= in_frame <= 100
        assert frame == (31 if modality == "hologram" else 44)  # 24² - 20² of 24², 16² - 12² of 16²
        width, height = picture_size(tmp_path / f"attention_{modality}.png")
        assert width > height > 200
    for name in ("training", "mean_attention"):
        assert min(picture_size(tmp_path / f"{name}.png")) > 100
    assert len(list(tmp_path.iterdir())) == 6


def test_write_report(tmp_path, capsys):
    output = tmp_path / "report.html"
    load_example("write_report").main(n_samples=80, image_size=24, max_epochs=1, output=output)
    page = output.read_text(encoding="utf-8")
    assert f"20 images, {output.stat().st_size / 1e6:.1f} MB: open {output}" in capsys.readouterr().out
    assert page.count('<li class="cell') == 20
    assert len(re.findall(r'title="cell_\d{4}\.tif"', page)) == 20
    assert "neutrophil" in page
