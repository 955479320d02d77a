"""TIFF files: the pixels that the tags describe, or a refusal that names the tag."""

import re
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from sklearn_sparseattn.datasets import load_image_folder
from sklearn_sparseattn.datasets.image_files import read_image

N_RANDOM_FILES = 2_000
TAGS = {"photometric": "PhotometricInterpretation (262)", "extra": "ExtraSamples (338)"}
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a)),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: np.rot90(np.fliplr(a), 3),
    8: np.rot90,
}


def picture(shape, dtype, rng):
    if dtype == np.float32:
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def read(file):
    return read_image(file)[0]


def relabel(file, **values):
    """Give tags of a file other values, in place."""
    with tifffile.TiffFile(file, mode="r+") as tiff:
        for name, value in values.items():
            tiff.pages[0].tags[name].overwrite(value)


def write_squeezed(file, array, compression, stored=None):
    """Write (H, W, C) as `stored`, compressed by Pillow as if its bytes were a gray image."""
    height, width, channels = array.shape
    pixels = np.ascontiguousarray(array if stored is None else stored)
    rows = pixels.view(np.uint8).reshape(height, -1)
    info = {277: 1, 317: 1, 339: 1, 278: 5}  # strips of 5 rows
    try:
        Image.fromarray(rows).save(file, compression=compression, tiffinfo=info)
    except OSError:
        pytest.skip(f"this Pillow is built without {compression}")
    relabel(
        file,
        ImageWidth=width,
        BitsPerSample=(array.itemsize * 8,) * channels,
        SamplesPerPixel=channels,
        PhotometricInterpretation=2 if channels == 3 else 1,
        SampleFormat=3 if array.dtype.kind == "f" else 1,
    )


# ---- random files ----


def random_file(rng, file):
    """Write a TIFF of random tags; return its stored samples (H, W, C) and its description."""
    dtype = np.dtype(rng.choice(["uint8", "uint16", "float32"]))
    photometric = str(rng.choice(["minisblack", "miniswhite", "rgb", "palette"]))
    if photometric == "palette" and dtype.kind == "f":
        photometric = "minisblack"
    n_colours = 3 if photometric == "rgb" else 1
    n = 1 if photometric == "palette" else int(rng.integers(n_colours, 6))
    planar = bool(rng.integers(2)) and n > 1
    extra = [str(kind) for kind in rng.choice(["unspecified", "assocalpha", "unassalpha"], n - n_colours)]
    array = picture((*rng.integers(1, 41, 2), n), dtype, rng)
    if extra and rng.integers(2):
        array[..., -1] = 1 if dtype.kind == "f" else np.iinfo(dtype).max
    orientation = int(rng.integers(1, 9))
    options = {
        "byteorder": str(rng.choice(["<", ">"])),
        "bigtiff": bool(rng.integers(2)),
        "compression": rng.choice([None, "zlib", "lzma"]),
        "photometric": photometric,
        "extrasamples": extra,
        "extratags": [(274, "H", 1, orientation, True)],
        "metadata": None,
    }
    if n > 1:
        options["planarconfig"] = "separate" if planar else "contig"
    if options["compression"] and dtype.kind == "u" and rng.integers(2):
        options["predictor"] = 2
    if rng.integers(2):
        options["tile"] = (16, 32)
    else:
        options["rowsperstrip"] = int(rng.integers(1, 42))
    if photometric == "palette":
        options["colormap"] = rng.integers(0, 65536, (3, 2 ** (8 * dtype.itemsize)), dtype=np.uint16)
    stored = np.moveaxis(array, -1, 0) if planar else array if n > 1 else array[..., 0]
    tifffile.imwrite(file, stored, **options)
    return options | {"planar": planar, "orientation": orientation, "n_colours": n_colours}


def expected_of(file, made):
    """What must be read of a random file: an array, or the tag that a refusal must name."""
    stored = tifffile.imread(file)
    channels = np.moveaxis(stored, 0, -1) if made["planar"] else stored
    top = 1 if stored.dtype.kind == "f" else np.iinfo(stored.dtype).max
    extra = made["extrasamples"]
    if made["photometric"] == "palette":
        channels = (made["colormap"] >> 8).astype(np.uint8).T[stored]
    elif made["photometric"] == "miniswhite":
        if extra or stored.dtype.kind == "f":
            return TAGS["photometric"]
        channels = top - stored
    elif len(extra) == 1 and extra != ["unspecified"] and not made["planar"]:
        if extra == ["assocalpha"] and (channels[..., -1] != top).any():
            return TAGS["extra"]
        channels = channels[..., :3] if made["n_colours"] == 3 else channels[..., 0]
    return UPRIGHT[made["orientation"]](channels)


def test_random_tags_give_the_right_pixels_or_a_refusal_that_names_the_tag(tmp_path):
    """Against tifffile's own reading, the meaning of the samples, and one rule of orientation."""
    rng = np.random.default_rng(0)
    file = tmp_path / "0.tif"
    n_read = 0
    for i in range(N_RANDOM_FILES):
        made = random_file(rng, file)
        expected = expected_of(file, made)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=re.escape(f"TIFF tag {expected} is")):
                read(file)
            continue
        found = read(file)
        n_read += 1
        assert found.dtype == expected.dtype.newbyteorder("="), (i, made)
        np.testing.assert_array_equal(found, expected, err_msg=f"file {i}: {made}")
    assert N_RANDOM_FILES // 2 < n_read < N_RANDOM_FILES


# ---- compression ----


@pytest.mark.parametrize("compression", ["tiff_lzw", "zstd", "packbits", "tiff_adobe_deflate", "lzma"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [3, 5])
def test_compression_without_imagecodecs(tmp_path, compression, dtype, channels):
    array = picture((23, 31, channels), dtype, np.random.default_rng(0))
    write_squeezed(tmp_path / "0.tif", array, compression)
    np.testing.assert_array_equal(read(tmp_path / "0.tif"), array)


@pytest.mark.parametrize("compression", ["tiff_lzw", "zstd", "tiff_adobe_deflate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_predictor_is_undone(tmp_path, compression, dtype):
    array = picture((23, 31, 3), dtype, np.random.default_rng(0))
    differences = array.copy()
    differences[:, 1:] -= array[:, :-1]
    write_squeezed(tmp_path / "0.tif", array, compression, stored=differences)
    relabel(tmp_path / "0.tif", Predictor=2)
    np.testing.assert_array_equal(read(tmp_path / "0.tif"), array)


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4", "tiff_lzw", "packbits", None])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_one_bit(tmp_path, compression, white_is_zero):
    bits = np.random.default_rng(0).random((23, 31)) < 0.5
    options = {} if compression is None else {"compression": compression}
    Image.fromarray(bits).save(tmp_path / "0.tif", **options)
    with tifffile.TiffFile(tmp_path / "0.tif") as tiff:
        stored_white_is_zero = tiff.pages[0].photometric == 0
    relabel(tmp_path / "0.tif", PhotometricInterpretation=int(not white_is_zero))
    expected = bits if stored_white_is_zero == white_is_zero else ~bits
    np.testing.assert_array_equal(read(tmp_path / "0.tif"), 255 * expected)


@pytest.mark.parametrize(
    ("shape", "mode", "photometric"), [((40, 48), "L", 1), ((40, 48, 3), "RGB", 2), ((40, 48, 3), "YCbCr", 6)]
)
def test_jpeg_compression(tmp_path, shape, mode, photometric):
    array = np.full(shape, 60, dtype=np.uint8)
    array[:16] = [200, 40, 90] if len(shape) == 3 else 180
    Image.fromarray(array).convert(mode).save(tmp_path / "0.tif", compression="jpeg", quality=95)
    with tifffile.TiffFile(tmp_path / "0.tif") as tiff:
        assert (tiff.pages[0].compression, tiff.pages[0].photometric) == (7, photometric)
    found = read(tmp_path / "0.tif")
    assert found.shape == shape
    np.testing.assert_allclose(found.astype(int), array, atol=6)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (34712, r"Compression \(259\) is .*: install imagecodecs"),
        (50001, r"Compression \(259\) is WEBP: install imagecodecs"),
        (6, r"Compression \(259\) is OJPEG: install imagecodecs"),
    ],
)
def test_unknown_compression_is_named(tmp_path, code, message):
    if code in tifffile.TIFF.DECOMPRESSORS:
        pytest.skip("imagecodecs is here")
    tifffile.imwrite(tmp_path / "0.tif", np.zeros((9, 7), np.uint8))
    relabel(tmp_path / "0.tif", Compression=code)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "0.tif")


# ---- samples ----


@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
def test_odd_numbers_of_bits(tmp_path, bits):
    """Rows are padded to whole bytes; few bits are spread over 8, more than 8 stay as they are."""
    values = np.random.default_rng(0).integers(0, 2**bits, (23, 31)).astype(np.uint16)
    digits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(23, 31, 2), axis=2)[..., 16 - bits :]
    packed = np.packbits(digits.reshape(23, -1), axis=1)
    tifffile.imwrite(tmp_path / "0.tif", packed, photometric="minisblack", metadata=None)
    relabel(tmp_path / "0.tif", ImageWidth=31, BitsPerSample=bits)
    expected = values * {2: 85, 4: 17}.get(bits, 1)
    found = read(tmp_path / "0.tif")
    assert found.dtype == (np.uint8 if bits < 8 else np.uint16)
    np.testing.assert_array_equal(found, expected)
    relabel(tmp_path / "0.tif", PhotometricInterpretation=0)
    np.testing.assert_array_equal(read(tmp_path / "0.tif"), max(255, 2**bits - 1) - expected)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_floats_become_float32(tmp_path, dtype):
    array = np.random.default_rng(0).normal(size=(9, 7)).astype(dtype)
    tifffile.imwrite(tmp_path / "0.tif", array)
    found = read(tmp_path / "0.tif")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "uint64", "complex64"])
def test_other_samples_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "0.tif", np.ones((9, 7), dtype))
    tag = "BitsPerSample (258)" if dtype.startswith("uint") else "SampleFormat (339)"
    with pytest.raises(ValueError, match=rf"{re.escape(tag)}.*; save as uint8, uint16 or float32"):
        read(tmp_path / "0.tif")


def test_samples_that_differ_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "0.tif", np.zeros((9, 7, 3), np.uint8), photometric="rgb")
    relabel(tmp_path / "0.tif", BitsPerSample=(8, 8, 16))
    with pytest.raises(ValueError, match=r"BitsPerSample \(258\)"):
        read(tmp_path / "0.tif")


@pytest.mark.parametrize("photometric", ["cfa", "cielab", "separated", "ycbcr"])
def test_other_colours_are_refused(tmp_path, photometric):
    channels = {"cfa": 1, "cielab": 3, "separated": 4, "ycbcr": 3}[photometric]
    array = np.zeros((10, 8, channels), np.uint8)[..., 0 if channels == 1 else slice(None)]
    options = {"subsampling": (1, 1)} if photometric == "ycbcr" else {}
    tifffile.imwrite(tmp_path / "0.tif", array, photometric=photometric, **options)
    with pytest.raises(ValueError, match=r"PhotometricInterpretation \(262\)"):
        read(tmp_path / "0.tif")


def test_palette_of_8_bit_values_and_of_grays(tmp_path):
    index = np.random.default_rng(0).integers(0, 256, (9, 7)).astype(np.uint8)
    for factor in (1, 257):  # what some programs write, and what the standard says
        ramp = np.tile(np.arange(255, -1, -1, dtype=np.uint16) * np.uint16(factor), (3, 1))
        tifffile.imwrite(tmp_path / "0.tif", index, photometric="palette", colormap=ramp)
        np.testing.assert_array_equal(read(tmp_path / "0.tif"), 255 - index)


# ---- channels and pages ----

CHANNELS = np.random.default_rng(0).normal(size=(5, 12, 10)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"ome": True, "metadata": {"axes": "CYX"}},
        {"ome": True, "metadata": {"axes": "CYX"}, "compression": "zlib"},
        {"imagej": True, "metadata": {"axes": "CYX"}},
        {"metadata": {"axes": "CYX"}},
        {"photometric": "minisblack", "planarconfig": "separate"},
        {"photometric": "minisblack", "planarconfig": "contig"},
    ],
)
def test_stacks_of_channels_are_loaded_channels_last(tmp_path, options):
    (tmp_path / "a").mkdir()
    contiguous = options.get("planarconfig") == "contig"
    last = np.moveaxis(CHANNELS, 0, -1)
    tifffile.imwrite(tmp_path / "a" / "0.tif", last if contiguous else CHANNELS, **options)
    images = load_image_folder(tmp_path).images
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[0], last)


def test_float_maps_are_loaded_cropped_and_resized(tmp_path):
    (tmp_path / "a").mkdir()
    tifffile.imwrite(tmp_path / "a" / "0.tif", np.full((12, 10), -2.5, np.float32))
    images = load_image_folder(tmp_path, crop="square", image_size=4).images
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, np.full((1, 4, 4), -2.5), rtol=1e-6)


def test_resizing_does_not_mix_channels(tmp_path):
    """Pillow takes two or four channels for an alpha channel, and multiplies the others by it."""
    (tmp_path / "a").mkdir()
    array = np.broadcast_to(np.array([200, 0, 50, 0], np.uint8), (12, 10, 4))
    tifffile.imwrite(tmp_path / "a" / "0.tif", array, photometric="minisblack", planarconfig="contig")
    images = load_image_folder(tmp_path, image_size=4).images
    np.testing.assert_array_equal(images[0], array[:4, :4])


def test_gray_refuses_channels_that_are_not_colours(tmp_path):
    (tmp_path / "a").mkdir()
    tifffile.imwrite(
        tmp_path / "a" / "0.tif", CHANNELS[:3], photometric="minisblack", metadata={"axes": "CYX"}
    )
    with pytest.raises(ValueError, match=r"a/0\.tif: 3 channels that are not RGB"):
        load_image_folder(tmp_path, gray=True)
    colours = np.zeros((12, 10, 4), np.uint8)
    tifffile.imwrite(tmp_path / "a" / "0.tif", colours, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(ValueError, match=r"a/0\.tif: 4 channels that are not RGB"):
        load_image_folder(tmp_path, gray=True)


@pytest.mark.parametrize(
    "options", [{"photometric": "minisblack"}, {"metadata": {"axes": "ZYX"}}, {"metadata": None}]
)
def test_pages_that_are_not_said_to_be_channels_are_refused(tmp_path, options):
    tifffile.imwrite(tmp_path / "0.tif", CHANNELS, **options)
    with pytest.raises(ValueError, match=r"5 pages .*'axes': 'CYX'"):
        read(tmp_path / "0.tif")


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(0, 5)])
def test_different_images_in_one_file_are_refused_but_not_a_thumbnail(tmp_path, part):
    image = np.arange(120, dtype=np.uint8).reshape(12, 10)
    for kind in (0, 1):
        with tifffile.TiffWriter(tmp_path / "0.tif") as writer:
            writer.write(image, metadata=None)
            writer.write(image[part, part], metadata=None, subfiletype=kind)
        if kind == 1:
            np.testing.assert_array_equal(read(tmp_path / "0.tif"), image)
        else:
            with pytest.raises(ValueError, match="2 pages, of 2 kinds, where one image"):
                read(tmp_path / "0.tif")


def test_pages_with_other_tags_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "0.tif", CHANNELS.astype(np.uint8), ome=True, metadata={"axes": "CYX"})
    with tifffile.TiffFile(tmp_path / "0.tif", mode="r+") as tiff:
        tiff.pages.useframes = False
        tiff.pages[3].tags["PhotometricInterpretation"].overwrite(0)
    with pytest.raises(ValueError, match=r"PhotometricInterpretation \(262\) is MINISWHITE: in another page"):
        read(tmp_path / "0.tif")


# ---- damage ----

DAMAGE = (ValueError, tifffile.TiffFileError, zlib.error)


@pytest.mark.parametrize("compression", ["tiff_lzw", "zstd", "packbits", "tiff_adobe_deflate"])
def test_cut_files_are_refused(tmp_path, compression):
    array = picture((23, 31, 3), np.uint8, np.random.default_rng(0))
    write_squeezed(tmp_path / "0.tif", array, compression)
    whole = (tmp_path / "0.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "0.tif") as tiff:
        offsets, counts = tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts
    relabel(tmp_path / "0.tif", StripByteCounts=[*counts[:-1], counts[-1] // 2])
    with pytest.raises(DAMAGE):
        read(tmp_path / "0.tif")
    (tmp_path / "0.tif").write_bytes(whole)
    relabel(tmp_path / "0.tif", StripOffsets=[*offsets[:-1], 0])
    with pytest.raises(ValueError, match=r"StripOffsets \(273\) lacks strips"):
        read(tmp_path / "0.tif")


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}, {"rowsperstrip": 4}])
def test_files_that_end_early_are_refused(tmp_path, options):
    array = picture((32, 32), np.uint16, np.random.default_rng(0))
    tifffile.imwrite(tmp_path / "0.tif", array, **options)
    whole = (tmp_path / "0.tif").read_bytes()
    (tmp_path / "0.tif").write_bytes(whole[:-40])
    with pytest.raises(DAMAGE):
        read(tmp_path / "0.tif")
