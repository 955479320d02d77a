"""BMP, JPEG and PNG: orientation by one rule, multi-picture JPEGs, and the content before the suffix."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from sklearn_sparseattn.datasets import load_image_folder
from sklearn_sparseattn.datasets.image_files import read_image, turned

# Where a 2 x 3 image of the letters a to f belongs, by the table of the TIFF and Exif standards.
UPRIGHT = {
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["da", "eb", "fc"],
    7: ["fc", "eb", "da"],
    8: ["cf", "be", "ad"],
}


def blocks(letters):
    """Image of 16 x 16 blocks, a letter each, which JPEG keeps nearly exactly."""
    levels = np.array([[30 * (ord(letter) - ord("a")) + 40 for letter in row] for row in letters])
    return np.kron(levels, np.ones((16, 16))).astype(np.uint8)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("colour", [False, True])
def test_every_kind_of_file_is_turned_by_its_orientation_tag(tmp_path, orientation, suffix, colour):
    stored, expected = blocks(UPRIGHT[1]), blocks(UPRIGHT[orientation])
    if colour:
        stored, expected = (np.stack([a, a // 2, 255 - a], axis=-1) for a in (stored, expected))
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "a").mkdir()
    Image.fromarray(stored).save(tmp_path / "a" / f"0{suffix}", exif=exif, quality=100, subsampling=0)
    (image,) = load_image_folder(tmp_path).images
    assert image.shape == expected.shape
    np.testing.assert_allclose(image.astype(int), expected, atol=4 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535, -1])
def test_an_orientation_without_meaning_turns_nothing(orientation):
    image = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(turned(image, orientation), image)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's, which a user may see
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_damaged_exif_block_turns_nothing(tmp_path, exif, suffix):
    stored = blocks(UPRIGHT[1])
    Image.fromarray(stored).save(tmp_path / f"0{suffix}", exif=exif, quality=100)
    image, _ = read_image(tmp_path / f"0{suffix}")
    np.testing.assert_allclose(image.astype(int), stored, atol=4)


def test_the_first_picture_of_a_multi_picture_jpeg_is_read_and_turned(tmp_path):
    first, second = blocks(UPRIGHT[1]), np.zeros((8, 8), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    pictures = [Image.fromarray(second)]
    Image.fromarray(first).save(
        tmp_path / "0.jpg", format="MPO", save_all=True, append_images=pictures, exif=exif, quality=100
    )
    with Image.open(tmp_path / "0.jpg") as image:
        assert image.format == "MPO"
        assert image.n_frames == 2
    found, is_colour = read_image(tmp_path / "0.jpg")
    assert not is_colour
    expected = blocks(UPRIGHT[6])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected, atol=4)


def test_a_moving_png_is_refused(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (0, 90)]
    frames[0].save(tmp_path / "0.png", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="2 pages, where one image was expected"):
        read_image(tmp_path / "0.png")


@pytest.mark.parametrize("written", ["PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".jpg"])
def test_the_content_decides_not_the_suffix(tmp_path, written, suffix):
    array = blocks(UPRIGHT[1])
    Image.fromarray(array).save(tmp_path / f"0{suffix}", format=written)
    np.testing.assert_array_equal(read_image(tmp_path / f"0{suffix}")[0], array)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_a_huge_tiff_is_refused_before_decoding(tmp_path, monkeypatch, options):
    tags = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "0.tif", np.zeros((40, 40, 8), np.uint8), **tags, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 * 2)
    assert read_image(tmp_path / "0.tif")[0].shape == (40, 40, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 * 2 - 1)
    with pytest.raises(ValueError, match=r"40 x 40 pixels of 8 samples, more than PIL\.Image\.MAX"):
        read_image(tmp_path / "0.tif")


def test_a_crop_does_not_keep_the_whole_image(tmp_path):
    """Peak memory is that of the crops, not of the files."""
    import tracemalloc

    (tmp_path / "a").mkdir()
    for i in range(20):
        tifffile.imwrite(tmp_path / "a" / f"{i}.tif", np.zeros((512, 512), np.uint8))
    load_image_folder(tmp_path, crop=8)
    tracemalloc.start()
    load_image_folder(tmp_path, crop=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 512 * 512
