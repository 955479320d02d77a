"""`read_tiff`: the pixels of a TIFF file as its tags describe them, or a refusal that names the tag.

tifffile reads the tags and arranges the pixels. What it cannot decompress without the package
imagecodecs (LZW, JPEG, ZSTD, fax) Pillow's libtiff decompresses, one strip or tile at a time.
"""

from __future__ import annotations

import copy
import math
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from tifffile import TIFF, TiffFile, TiffPage, TiffPageSeries

from .image_files import check_size, without_equal_channels

_BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _PREDICTOR = 258, 259, 262, 274, 284, 317
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _SAMPLES, _OFFSETS, _JPEG_TABLES, _SUBSAMPLING = 338, 339, 277, 273, 347, 530
_FAX_AND_ORDER = (266, 292, 293)  # FillOrder, T4Options, T6Options
_MEANING = (
    *(_BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _PREDICTOR),
    *(_EXTRA_SAMPLES, _SAMPLE_FORMAT, _SAMPLES),
)
_FAX, _JPEG, _BY_PILLOW = (2, 3, 4), 7, (2, 3, 4, 5, 7, 50000)
_WHITE_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 2, 3, 6
_N_COLOURS = {_WHITE_IS_ZERO: 1, 1: 1, _RGB: 3, _PALETTE: 1, _YCBCR: 3}
_ENCODINGS = {(1, bits) for bits in (1, 2, 4, 8, 10, 12, 14, 16)} | {(3, bits) for bits in (16, 32, 64)}
_ASSOCIATED, _ALPHA = 1, (1, 2)


def read_tiff(file: Path) -> tuple[np.ndarray, bool, int]:
    """Read the one image of a TIFF file.

    Parameters
    ----------
    file : Path
        TIFF, BigTIFF, OME-TIFF or ImageJ's TIFF, with one image of one or several channels.

    Returns
    -------
    image : ndarray of shape (H, W) or (H, W, C), uint8, uint16 or float32
        The pixels as stored, not turned. Black is 0, palettes are resolved, and 1, 2 and 4 bits are
        spread over 0 to 255. The alpha channel of pixels stored together is dropped.
    is_colour : bool
        Whether the image is RGB.
    orientation : int
        The orientation tag, 1 where there is none.

    Raises
    ------
    ValueError
        If the file holds several images, is damaged, or has tags whose meaning cannot be kept.
    """
    with TiffFile(file) as tiff:
        series = _only_series(tiff)
        page = series.keyframe
        sizes = dict(zip(series.axes, series.shape, strict=True))
        height, width = sizes.pop("Y"), sizes.pop("X")
        check_size((height, width, *sizes.values()))
        _check_encoding(page)
        _check_pages(series)
        pixels = _decode(series)
        channels = tuple(series.axes.index(axis) for axis in sizes)
        pixels = np.moveaxis(pixels, channels, range(2, 2 + len(channels)))
        image, is_colour = _interpret(pixels, page)
        return image, is_colour, int(page.tags.valueof(_ORIENTATION, default=1))


def _refusal(page: TiffPage, code: int, reason: str) -> ValueError:
    """Return the error about a tag: its name, number and value, and why it is in the way."""
    value = page.tags.valueof(code, default="missing")
    value = getattr(value, "name", value)
    return ValueError(f"TIFF tag {TIFF.TAGS[code]} ({code}) is {value}: {reason}")


def _pages(series: TiffPageSeries) -> list[TiffPage]:
    """Return the pages of an image, each with its own tags.

    tifffile gives frames, which share the tags of the first page. A virtual frame is a plane that
    follows the first page without any tags.
    """
    return [page.aspage() for page in series if page is not None and not getattr(page, "is_virtual", False)]


def _only_series(tiff: TiffFile) -> TiffPageSeries:
    """Return the file's one image, whose axes are Y, X and at most one of channels; else ValueError."""
    found = [series for series in tiff.series if not series.keyframe.is_reduced]  # thumbnails
    levels = [level for series in found for level in series.levels[1:]]
    if len(found) != 1 or not all(level.keyframe.is_reduced for level in levels):
        raise ValueError(
            f"{len(tiff.pages)} pages, of {len(found) + len(levels)} kinds, where one image was expected"
        )
    (series,) = found
    if series.is_multifile or any(page is None for page in series):
        raise ValueError("its OME-XML names planes that are not in this file; save them in one file")
    others = {a: n for a, n in zip(series.axes, series.shape, strict=True) if a not in "YX"}
    if not {"Y", "X"} <= set(series.axes) or len(series.axes) > 3 or not set(others) <= {"C", "S"}:
        n_pages = math.prod(others.values())
        raise ValueError(
            f"{n_pages} pages (axes {series.axes} of {series.shape}), where one image was expected; "
            "if they are channels, save them with that axis named, as in "
            "tifffile.imwrite(file, array, metadata={'axes': 'CYX'})"
        )
    return series


def _check_encoding(page: TiffPage) -> None:
    """Raise ValueError if the tags ask for samples or a compression that cannot be decoded faithfully."""
    for code in (_BITS, _SAMPLE_FORMAT):
        values = page.tags.valueof(code, default=1)
        if isinstance(values, tuple) and len(set(values)) > 1:
            raise _refusal(page, code, "all samples must have the same")
    sample_format, bits = int(page.sampleformat), page.bitspersample
    if (sample_format, bits) not in _ENCODINGS:
        code = _BITS if sample_format in (1, 3) else _SAMPLE_FORMAT
        reason = f"samples of {bits} bits in SampleFormat {sample_format} are not read"
        raise _refusal(page, code, f"{reason}; save as uint8, uint16 or float32")
    if page.compression not in _BY_PILLOW and page.compression not in TIFF.DECOMPRESSORS:
        reason = "install imagecodecs to read it, or save without compression or with deflate"
        raise _refusal(page, _COMPRESSION, reason)
    if page.predictor != 1 and page.predictor not in TIFF.UNPREDICTORS:
        raise _refusal(page, _PREDICTOR, "install imagecodecs to read it, or save without a predictor")
    if page.photometric not in _N_COLOURS:
        raise _refusal(page, _PHOTOMETRIC, "save as gray, RGB or palette colours")
    if page.photometric == _YCBCR and page.compression != _JPEG:
        raise _refusal(page, _PHOTOMETRIC, "it is read with JPEG compression only; save as RGB")


def _check_pages(series: TiffPageSeries) -> None:
    """Raise ValueError if the pages differ in their tags or if strips or tiles are missing."""
    first = series.keyframe
    for page in _pages(series):
        for code in _MEANING:
            if page.tags.valueof(code) != first.tags.valueof(code):
                raise _refusal(page, code, f"in another page it is {first.tags.valueof(code)}")
        expected = 1 if page.is_contiguous else math.prod(page.chunked)
        offsets, counts = page.dataoffsets[:expected], page.databytecounts[:expected]
        if min(len(offsets), len(counts)) < expected or 0 in offsets or 0 in counts:
            code = _OFFSETS if _OFFSETS in page.tags else 324
            raise ValueError(
                f"TIFF tag {TIFF.TAGS[code]} ({code}) lacks strips or tiles; the file is damaged"
            )


def _decode(series: TiffPageSeries) -> np.ndarray:
    """Return the stored samples, with the axes of `series`."""
    page = series.keyframe
    if page.compression not in _BY_PILLOW and page.bitspersample in (1, 8, 16, 32, 64):
        return series.asarray(maxworkers=1)
    return np.stack([_decode_page(page) for page in _pages(series)]).reshape(series.shape)


def _decode_page(page: TiffPage) -> np.ndarray:
    """Decode what tifffile cannot: its strips or tiles are decompressed and unpacked before it."""
    plain = copy.copy(page)  # as the page would be if it were stored without compression
    plain.compression, plain.subsampling, plain.fillorder = 1, (1, 1), 1
    packed = page.bitspersample not in (1, 8, 16, 32, 64)
    if packed:
        if page.predictor != 1:
            raise _refusal(page, _PREDICTOR, f"it is not read with {page.bitspersample} bits a sample")
        plain.bitspersample = 8 if page.bitspersample < 8 else 16
    image = np.empty(plain.shaped, plain.dtype)
    n = math.prod(page.chunked)
    for data, index in page.parent.filehandle.read_segments(page.dataoffsets[:n], page.databytecounts[:n]):
        _, (plane, _, top, left, _), shape = plain.decode(None, index)
        assert isinstance(data, bytes)  # `_check_pages` has seen to it
        _, rows, columns, samples = shape
        data = _decompress(page, data, rows, columns, samples)
        if packed:
            data = _unpack(data, page.bitspersample, columns * samples, page.parent.byteorder)
        segment = np.asarray(plain.decode(data, index)[0])
        part = image[plane, 0, top : top + rows, left : left + columns]
        part[:] = segment[0, : part.shape[0], : part.shape[1]]
    return image.reshape(page.shape)


def _decompress(page: TiffPage, data: bytes, rows: int, columns: int, samples: int) -> bytes:
    """Decompress one strip or tile.

    For Pillow it is made a TIFF file of its own: of JPEG and fax an image of its kind, of the others
    one of gray bytes, whatever they mean.
    """
    if page.compression not in _BY_PILLOW:
        return bytes(TIFF.DECOMPRESSORS[page.compression](data))
    bits: tuple[int, ...] = (8,)
    photometric = 1
    if page.compression in _FAX:
        if (page.bitspersample, samples) != (1, 1):
            raise _refusal(page, _COMPRESSION, "it is read with one bit a pixel only")
        bits = (1,)
    elif page.compression == _JPEG:
        if page.bitspersample != 8 or samples not in (1, 3) or (samples, page.photometric) == (1, _YCBCR):
            raise _refusal(page, _COMPRESSION, "it is read with 8 bits, and gray or interleaved RGB, only")
        if samples == 3:
            bits, photometric = (8, 8, 8), int(page.photometric)
    else:
        columns, samples = -(-columns * samples * page.bitspersample // 8), 1
    tags = ImageFileDirectory_v2(prefix=b"II")
    for code, value in (
        *((256, columns), (257, rows), (_BITS, bits), (_COMPRESSION, int(page.compression))),
        *((_PHOTOMETRIC, photometric), (_OFFSETS, 0), (_SAMPLES, samples), (278, rows), (279, len(data))),
    ):
        tags[code] = value
    for code in (*_FAX_AND_ORDER, _JPEG_TABLES, _SUBSAMPLING):
        if code in page.tags:
            tags[code] = page.tags.valueof(code)
    file = BytesIO()
    tags.save(file)  # header and tags, after which the one strip begins
    file.write(data)
    try:
        with Image.open(file, formats=["TIFF"]) as image:
            return image.tobytes()
    except OSError as error:
        reason = f"the file is damaged, or Pillow is built without this compression ({error})"
        raise _refusal(page, _COMPRESSION, reason) from error


def _unpack(data: bytes, bits: int, per_row: int, byteorder: str) -> bytes:
    """Turn samples of `bits` bits, rows padded to whole bytes, into whole bytes or pairs of bytes."""
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, -(-per_row * bits // 8))
    digits = np.unpackbits(rows, axis=1, count=per_row * bits).reshape(-1, bits)
    values = digits @ (1 << np.arange(bits - 1, -1, -1, dtype=np.uint16))
    return values.astype("u1" if bits < 8 else f"{byteorder}u2").tobytes()


def _interpret(pixels: np.ndarray, page: TiffPage) -> tuple[np.ndarray, bool]:
    """Turn stored samples (H, W) or (H, W, C) into what they mean; return also whether that is RGB."""
    n_colours, n_samples = _N_COLOURS[page.photometric], page.samplesperpixel
    if n_samples < n_colours:
        raise _refusal(page, _SAMPLES, f"PhotometricInterpretation {int(page.photometric)} needs {n_colours}")
    if page.photometric in (_WHITE_IS_ZERO, _PALETTE) and n_samples > 1:
        reason = f"with {n_samples} samples it is not clear what it applies to; save as MINISBLACK or RGB"
        raise _refusal(page, _PHOTOMETRIC, reason)
    if page.photometric == _PALETTE:
        return _colours(pixels, page)
    pixels = _without_alpha(pixels, page, n_colours)
    if pixels.dtype.kind == "f":
        if page.photometric == _WHITE_IS_ZERO:
            raise _refusal(
                page, _PHOTOMETRIC, "floats have no value of white to count from; save as MINISBLACK"
            )
        return pixels.astype(np.float32, copy=False), page.photometric == _RGB and pixels.shape[2] == 3
    bits = page.bitspersample
    if bits < 8:
        pixels = pixels.astype(np.uint8) * np.uint8(255 // (2**bits - 1))
        bits = 8
    if page.photometric == _WHITE_IS_ZERO:
        pixels = pixels.dtype.type(2**bits - 1) - pixels
    is_colour = n_colours == 3 and pixels.shape[2:] == (3,)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False), is_colour


def _without_alpha(pixels: np.ndarray, page: TiffPage, n_colours: int) -> np.ndarray:
    """Drop the channel that the tag says is alpha, if it is the one extra sample of each pixel.

    In separate planes it stays: tifffile calls the fourth plane of any four channels alpha.
    """
    extra = page.extrasamples
    if page.samplesperpixel != n_colours + 1 or len(extra) != 1 or extra[0] not in _ALPHA:
        return pixels
    if page.planarconfig != 1:
        return pixels
    opaque = 1.0 if pixels.dtype.kind == "f" else 2**page.bitspersample - 1
    if extra[0] == _ASSOCIATED and not (pixels[..., -1] == opaque).all():
        reason = "the colours are multiplied by the alpha channel; save without it"
        raise _refusal(page, _EXTRA_SAMPLES, reason)
    return pixels[..., 0] if n_colours == 1 else pixels[..., :n_colours]


def _colours(pixels: np.ndarray, page: TiffPage) -> tuple[np.ndarray, bool]:
    """Look indices (H, W) up in the palette: (H, W, 3), or (H, W) if all its colours are gray."""
    palette = page.colormap
    if palette is None or palette.shape != (3, 2**page.bitspersample) or pixels.ndim != 2:
        raise _refusal(page, 320, "the image needs a palette with a colour for every index")
    # Some programs write 8 bits where the standard has 16.
    palette = (palette if palette.max() < 256 else palette >> 8).astype(np.uint8)
    image = without_equal_channels(palette.T[pixels.astype(np.intp)])
    return image, image.ndim == 3
