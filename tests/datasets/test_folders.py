"""Folders of images: what is read, what is passed over, and which files an error names."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from sklearn_sparseattn.datasets import folder_listing, load_image_folder


def picture(shape, dtype=np.uint8, seed=0):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype, endpoint=True)


def save(array, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


@pytest.fixture
def gray_folder(tmp_path):
    """Two classes of three gray images, 20 x 30."""
    for label in "ab":
        for i in range(3):
            save(picture((20, 30), seed=i), tmp_path / label / f"{i}.png")
    return tmp_path


def write_deep_png(file, samples):
    """Write 16-bit PNG of any number of channels (H, W, C), which PIL cannot."""
    height, width, channels = samples.shape
    colour_type = {2: 4, 3: 2, 4: 6}[channels]

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    rows[1:] -= rows[:-1].copy()  # filter 2, "up", so that filters are met as well
    filters = np.full((height, 1), 2, dtype=np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = zlib.compress(np.hstack([filters, rows]).tobytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_bunch_and_order(gray_folder):
    data = load_image_folder(gray_folder)
    assert data.images.shape == (6, 20, 30)
    assert data.images.dtype == np.uint8
    assert data.target.dtype == np.int64
    assert data.target.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.target_names.tolist() == ["a", "b"]
    expected = [str(gray_folder / label / f"{i}.png") for label in "ab" for i in range(3)]
    assert data.filenames.tolist() == expected
    for image, file in zip(data.images, data.filenames, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(file)))


def test_path_may_be_a_string_and_relative(gray_folder, monkeypatch):
    monkeypatch.chdir(gray_folder.parent)
    data = load_image_folder(gray_folder.name)
    assert data.filenames[0] == str(Path(gray_folder.name) / "a" / "0.png")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".TIFF", ".Tif"])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3)])
def test_lossless_formats_come_back_exactly(tmp_path, suffix, shape):
    array = picture(shape)
    save(array, tmp_path / "a" / f"0{suffix}")
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], array)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
@pytest.mark.parametrize("shape", [(40, 32), (40, 32, 3)])
def test_jpeg(tmp_path, suffix, shape):
    save(np.full(shape, 90, dtype=np.uint8), tmp_path / "a" / f"0{suffix}")
    images = load_image_folder(tmp_path).images
    assert images.shape == (1, *shape)
    np.testing.assert_allclose(images, 90, atol=2)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_gray_of_16_bits_stays_so(tmp_path, suffix):
    array = picture((9, 7), np.uint16)
    save(array, tmp_path / "a" / f"0{suffix}")
    images = load_image_folder(tmp_path).images
    assert images.dtype == np.uint16
    np.testing.assert_array_equal(images[0], array)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colour_of_16_bits_stays_so(tmp_path, suffix, channels):
    array = picture((9, 7, channels), np.uint16)
    file = tmp_path / "a" / f"0{suffix}"
    if suffix == ".png":
        write_deep_png(file, array)
    else:
        file.parent.mkdir()
        tifffile.imwrite(file, array, photometric="rgb")
    images = load_image_folder(tmp_path).images
    assert images.dtype == np.uint16
    np.testing.assert_array_equal(images[0], array[..., :3])


def test_gray_with_alpha_of_16_bits(tmp_path):
    array = picture((9, 7, 2), np.uint16)
    write_deep_png(tmp_path / "a" / "0.png", array)
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], array[..., 0])


def test_alpha_is_dropped(tmp_path):
    colour = picture((9, 7, 4))
    save(colour, tmp_path / "a" / "0.png")
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], colour[..., :3])
    gray = picture((9, 7, 2))
    save(gray, tmp_path / "a" / "0.png")
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], gray[..., 0])


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80\xff"])
def test_palette_is_resolved(tmp_path, transparency):
    palette = np.array([[250, 10, 20], [0, 200, 30], [5, 5, 5]], dtype=np.uint8)
    index = np.random.default_rng(0).integers(0, 3, (9, 7)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    (tmp_path / "a").mkdir()
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a" / "0.png", **options)
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], palette[index])


def test_palette_of_grays_is_gray(tmp_path):
    index = np.random.default_rng(0).integers(0, 3, (9, 7)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette([9, 9, 9, 80, 80, 80, 200, 200, 200])
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png")
    expected = np.array([9, 80, 200])[index]
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], expected)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_becomes_black_and_white(tmp_path, suffix):
    bits = picture((9, 7)) > 127
    save(bits, tmp_path / "a" / f"0{suffix}")
    np.testing.assert_array_equal(load_image_folder(tmp_path).images[0], 255 * bits)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_is_luminance_and_mends_mixtures(tmp_path, dtype):
    colour = picture((9, 7, 3), dtype)
    if dtype is np.uint8:
        save(colour, tmp_path / "a" / "0.png")
    else:
        write_deep_png(tmp_path / "a" / "0.png", colour)
    plain = picture((9, 7), dtype)
    save(plain, tmp_path / "b" / "0.png")
    images = load_image_folder(tmp_path, gray=True).images
    assert images.dtype == dtype
    np.testing.assert_allclose(images[0], colour @ [0.299, 0.587, 0.114], atol=0.51)
    np.testing.assert_array_equal(images[1], plain)


@pytest.mark.parametrize("image_size", [8, (8, 12)])
@pytest.mark.parametrize("shape", [(31, 45), (31, 45, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resizing_keeps_dtype_and_smooths(tmp_path, image_size, shape, dtype):
    array = picture(shape, dtype)
    if dtype is np.uint16 and len(shape) == 3:
        write_deep_png(tmp_path / "a" / "0.png", array)
    else:
        save(array, tmp_path / "a" / "0.png")
    images = load_image_folder(tmp_path, image_size=image_size).images
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert images.shape == (1, *size, *shape[2:])
    assert images.dtype == dtype
    assert abs(images.mean() / array.mean() - 1) < 0.05
    assert images.std() < 0.6 * array.std()  # every pixel of the noise has had its share


@pytest.mark.parametrize(
    ("crop", "rows", "cols"),
    [
        (10, slice(5, 15), slice(10, 20)),
        ((4, 30), slice(8, 12), slice(0, 30)),
        ("square", slice(0, 20), slice(5, 25)),
    ],
)
def test_crop_is_from_the_centre(gray_folder, crop, rows, cols):
    whole, part = load_image_folder(gray_folder), load_image_folder(gray_folder, crop=crop)
    np.testing.assert_array_equal(part.images, whole.images[:, rows, cols])


def test_crop_comes_before_resizing(tmp_path):
    array = np.zeros((40, 40), dtype=np.uint8)
    array[10:30, 10:30] = 200
    save(array, tmp_path / "a" / "0.png")
    images = load_image_folder(tmp_path, crop=20, image_size=5).images
    assert (images == 200).all()


def test_threads_change_nothing(gray_folder):
    one, two = (load_image_folder(gray_folder, image_size=9, n_jobs=n) for n in (None, 2))
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.filenames, two.filenames)


def test_other_and_hidden_files_are_passed_over(gray_folder):
    for name in ("a/Thumbs.db", "a/.DS_Store", "a/notes.txt", "a/._0.png", "readme.md", "x.png"):
        (gray_folder / name).write_bytes(b"no image")
    (gray_folder / ".git").mkdir()
    (gray_folder / "a" / ".cache").mkdir()
    (gray_folder / "a" / ".cache" / "0.png").write_bytes(b"no image")
    data = load_image_folder(gray_folder)
    assert len(data.images) == 6
    assert data.target_names.tolist() == ["a", "b"]


def test_folders_below_a_class_belong_to_it(gray_folder):
    save(picture((20, 30)), gray_folder / "a" / "more" / "9.png")
    assert load_image_folder(gray_folder).target.tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.fixture
def broken_folder(gray_folder):
    """`gray_folder` with one file of each kind of damage."""
    bad = gray_folder / "a"
    (bad / "empty.png").touch()
    (bad / "text.jpg").write_text("not an image")
    whole = (bad / "0.png").read_bytes()
    (bad / "cut.png").write_bytes(whole[: len(whole) // 2])
    pages = np.zeros((2, 20, 30), dtype=np.uint8)
    tifffile.imwrite(bad / "pages.tif", pages, photometric="minisblack")
    tifffile.imwrite(bad / "signed.tif", np.zeros((20, 30), dtype=np.int16))
    tifffile.imwrite(bad / "float.tif", np.zeros((20, 30), dtype=np.float32))
    save(picture((20, 30), np.uint16), bad / "deep.png")
    save(picture((20, 30, 3)), bad / "colour.png")
    (gray_folder / "hollow").mkdir()
    return gray_folder


BROKEN = {
    "hollow/": "class folder without an image",
    "a/empty.png": "empty file",
    "a/text.jpg": "cannot identify image file",
    "a/cut.png": "truncated",
    "a/pages.tif": "2 pages",
    "a/signed.tif": "TIFF tag SampleFormat (339) is INT: samples of 16 bits in SampleFormat 2 are not read",
    "a/float.tif": "float32 gray, where most are 8-bit gray",
    "a/deep.png": "16-bit gray, where most are 8-bit gray",
    "a/colour.png": "8-bit RGB, where most are 8-bit gray",
}


def assert_all_named(message):
    for name, reason in BROKEN.items():
        (line,) = [line for line in message.splitlines() if line.strip().startswith(f"{name}:")]
        assert reason in line
    assert len([line for line in message.splitlines() if line.startswith("  ")]) == len(BROKEN)


def test_one_error_names_all_unfit_files(broken_folder):
    with pytest.raises(ValueError, match="9 of the files") as caught:
        load_image_folder(broken_folder)
    assert_all_named(str(caught.value))
    assert "gray=True" in str(caught.value)
    assert "on_error='warn'" in str(caught.value)


def test_one_warning_names_all_unfit_files(broken_folder):
    with pytest.warns(UserWarning, match="Left out 9") as caught:
        data = load_image_folder(broken_folder, on_error="warn")
    assert len(caught) == 1
    assert_all_named(str(caught[0].message))
    assert data.target.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.target_names.tolist() == ["a", "b"]
    assert caught[0].filename == __file__


def test_long_listings_are_shortened(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(50):
        (tmp_path / "a" / f"{i:02}.png").touch()
    with pytest.raises(ValueError, match="50 of the files") as caught:
        load_image_folder(tmp_path)
    assert "... and 30 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 25


def test_nothing_left_is_an_error_even_when_warnings_are_asked_for(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").touch()
    with pytest.raises(ValueError, match=r"a/0\.png: empty file"):
        load_image_folder(tmp_path, on_error="warn")


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_mixed_sizes_need_image_size(gray_folder, on_error):
    save(picture((25, 30)), gray_folder / "b" / "tall.png")
    with pytest.raises(ValueError, match=r"b/tall\.png: 25 x 30 pixels, .* 20 x 30") as caught:
        load_image_folder(gray_folder, on_error=on_error)
    assert "image_size" in str(caught.value)
    assert "crop" in str(caught.value)
    assert load_image_folder(gray_folder, image_size=16).images.shape == (7, 16, 16)
    assert load_image_folder(gray_folder, crop=16).images.shape == (7, 16, 16)


def test_too_small_for_the_crop(gray_folder):
    with pytest.raises(ValueError, match=r"a/0\.png: 20 x 30 pixels, smaller than crop 24 x 24"):
        load_image_folder(gray_folder, crop=24)


def test_huge_images_are_refused_before_decoding(gray_folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"30 x 20 pixels, more than PIL\.Image\.MAX"):
            load_image_folder(gray_folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match="decompression bomb"):
        load_image_folder(gray_folder)


def test_structure_of_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing' does not exist"):
        load_image_folder(tmp_path / "missing")
    file = tmp_path / "0.png"
    save(picture((9, 7)), file)
    with pytest.raises(NotADirectoryError, match=r"0.png' is not a folder"):
        load_image_folder(file)
    with pytest.raises(ValueError, match="holds no class folder"):
        load_image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a/: class folder without an image"):
        load_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"image_size": 0}, ValueError, "image_size == 0, must be >= 1"),
        ({"image_size": "64"}, TypeError, "image_size must be an int, a pair .* got '64'"),
        ({"image_size": (3, 4, 5)}, TypeError, "image_size must be an int, a pair"),
        ({"image_size": (3.0, 4)}, TypeError, "image_size must be an instance of"),
        ({"crop": -1}, ValueError, "crop == -1, must be >= 1"),
        ({"crop": "round"}, TypeError, "crop must be .* 'square' or None, got 'round'"),
        ({"gray": "yes"}, TypeError, "gray must be an instance of"),
        ({"on_error": "skip"}, ValueError, "on_error must be 'raise' or 'warn', got 'skip'"),
    ],
)
def test_errors_name_parameter_and_value(gray_folder, kwargs, error, message):
    with pytest.raises(error, match=message):
        load_image_folder(gray_folder, **kwargs)


def test_suffixes_are_what_the_documentation_says():
    expected = {".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
    assert set(folder_listing.SUFFIXES) == expected
