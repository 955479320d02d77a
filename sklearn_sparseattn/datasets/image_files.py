"""`read_image`: the pixels of one image file, turned as its orientation tag says.

Pillow reads BMP, JPEG and PNG here; `tiff_files` reads TIFF. The content decides, not the suffix.
"""

from __future__ import annotations

import contextlib
import math
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

_FORMATS = ("BMP", "JPEG", "PNG")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# How Pillow reads PNG of 16 bits and several channels, and how the other bytes are had.
_DEEP_PNG = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}


def read_image(file: Path) -> tuple[np.ndarray, bool]:
    """Read one image.

    Parameters
    ----------
    file : Path
        BMP, JPEG, PNG or TIFF. Of a multi-picture JPEG, the first picture is read.

    Returns
    -------
    image : ndarray of shape (H, W) or (H, W, C), uint8, uint16 or float32
        The pixels, upright as the orientation tag says. Only TIFF gives float32, and C other than 3.
    is_colour : bool
        Whether the image is RGB.

    Raises
    ------
    ValueError
        If the file holds what cannot be read faithfully.
    Exception
        If the file is damaged; the decoders raise errors of many types.
    """
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic in _TIFF_MAGIC:
        from .tiff_files import read_tiff  # here, as it imports tifffile, which takes long to load

        image, is_colour, orientation = read_tiff(file)
    else:
        image, orientation = _read_with_pillow(file)
        is_colour = image.ndim == 3
    return turned(image, orientation), is_colour


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of an image (H, W, ...) turned upright by the value of its orientation tag.

    Values 1 to 8 say where the first stored row and column belong (TIFF 6.0, Exif). Others mean 1.
    """
    if orientation in (5, 6, 7, 8):  # rows are stored as columns
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def check_size(shape: tuple[int, ...]) -> None:
    """Raise ValueError if an image (H, W, ...) is larger than Pillow lets images be.

    Up to four samples a pixel count as one pixel, more count in proportion.
    """
    limit = Image.MAX_IMAGE_PIXELS
    height, width, *channels = shape
    if limit is not None and height * width * max(1, math.prod(channels) / 4) > limit:
        samples = f" of {math.prod(channels)} samples" if channels else ""
        raise ValueError(f"{width} x {height} pixels{samples}, more than PIL.Image.MAX_IMAGE_PIXELS")


def _read_with_pillow(file: Path) -> tuple[np.ndarray, int]:
    """Read an image (H, W) or (H, W, 3), uint8 or uint16, as stored, and its orientation tag."""
    with Image.open(file, formats=_FORMATS) as image:
        n_pages = getattr(image, "n_frames", 1)
        # The further pictures of a camera's JPEG (MPO) are previews and other views of the same scene.
        if n_pages > 1 and image.format != "MPO":
            raise ValueError(f"{n_pages} pages, where one image was expected")
        check_size((image.height, image.width))
        pixels = _pixels(image, file)
        return pixels, _orientation(image)


def _pixels(image: ImageFile.ImageFile, file: Path) -> np.ndarray:
    """Decode to (H, W) or (H, W, 3), uint8 or uint16; alpha is dropped."""
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)
    if image.format == "PNG" and image.tile[0][3] in _DEEP_PNG:
        return _read_deep_png(image, file)
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode == "P":  # by way of RGBA, since Pillow warns about transparent palettes
        return without_equal_channels(np.asarray(image.convert("RGBA"))[..., :3])
    return np.asarray(image.convert("RGB"))


def without_equal_channels(colours: np.ndarray) -> np.ndarray:
    """Return the colours (H, W, 3) of a palette as gray (H, W) if all are gray."""
    return colours[..., 0] if (colours == colours[..., :1]).all() else colours


def _orientation(image: ImageFile.ImageFile) -> int:
    """Orientation of a decoded image; 1 if the tag is missing or its block is damaged."""
    # A damaged Exif block says nothing about orientation, and the pixels beside it are whole.
    with contextlib.suppress(SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _read_deep_png(image: ImageFile.ImageFile, file: Path) -> np.ndarray:
    """Both bytes of a 16-bit PNG with several channels, of which Pillow keeps only the high ones.

    Pillow has no such mode. But told that the samples are little-endian it takes the other byte of
    each, so that two passes over a colour file give both; and told that 16-bit gray with alpha is
    8-bit RGBA, it gives all four bytes at once.
    """
    rawmode = _DEEP_PNG[str(image.tile[0][3])]
    with Image.open(file, formats=_FORMATS) as other:
        other.tile = [(*other.tile[0][:3], rawmode)]  # type: ignore[list-item]
        second = np.asarray(other)
    if rawmode == "RGBA":
        return (second[..., 0].astype(np.uint16) << 8) | second[..., 1]
    return (np.asarray(image)[..., :3].astype(np.uint16) << 8) | second[..., :3]
