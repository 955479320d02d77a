"""`load_image_folder`: a folder of class folders as one array of images with labels.

Files that cannot be used are collected and named together, since one wants to mend them in one go.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from joblib import Parallel, delayed
from PIL import Image
from sklearn.utils import Bunch, check_scalar

from .folder_listing import Listing, list_images
from .image_files import read_image

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_MAX_LISTED = 20
_DEPTHS = {"uint8": "8-bit", "uint16": "16-bit", "float32": "float32"}


def load_image_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    crop: int | tuple[int, int] | Literal["square"] | None = None,
    gray: bool = False,
    n_jobs: int | None = None,
    on_error: Literal["raise", "warn"] = "raise",
) -> Bunch:
    """Load a folder of class folders of images.

    Each folder in `path` is a class, named after the folder; the images in it and in folders
    below it are its samples: PNG, JPEG, TIFF and BMP, whatever the case of the suffix. Links to
    folders are followed. Hidden files and folders, and files with other suffixes, are passed over.

    Images are gray, RGB or, from TIFF files, of any number of channels, and of 8 bits, 16 bits or,
    from TIFF files, floats. Every file is turned upright as its orientation tag says, as image
    viewers do. Palettes are resolved, white is the largest value, and images of 1, 2 and 4 bits
    are spread over 0 to 255. Alpha channels are dropped, except in a TIFF file that stores its
    channels plane by plane. Channels of a TIFF file are those of one page, or pages that OME or
    ImageJ metadata call channels. A TIFF file whose tags ask for what is not supported is unfit,
    and the message names the tag.

    Parameters
    ----------
    path : str or path-like
        The folder.
    image_size : int or (int, int), default=None
        Side, or (H, W), to which images are resized after cropping (bicubic, with antialiasing).
        None leaves them as they are; then all must be of one size.
    crop : int, (int, int) or "square", default=None
        Side, or (h, w), of the part cut from the centre of each image; "square" takes the largest
        centred square. None takes the whole image, which `image_size` may then distort.
    gray : bool, default=False
        Whether to turn colour images into their luminance, 0.299 R + 0.587 G + 0.114 B.
    n_jobs : int, default=None
        Number of threads. None means 1 unless in a :obj:`joblib.parallel_backend` context, -1 all
        processors.
    on_error : {"raise", "warn"}, default="raise"
        What to do about files that are empty, cannot be read, have several pages, are smaller
        than `crop`, or differ from most others in bit depth or in their channels, about class
        folders without an image, and about folders and links that cannot be followed: name them
        all in one error, or leave them out with one warning.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        With the keys

        images : ndarray of shape (n, H, W) or (n, H, W, C), uint8, uint16 or float32
            Gray, RGB or of C channels, with the bit depth of the files. Floats of 16 and 64 bits
            become float32.
        target : ndarray of shape (n,), int64
            Class numbers.
        target_names : ndarray of shape (n_classes,), str
            Names of the class folders, sorted.
        filenames : ndarray of shape (n,), str
            The files, each beginning with `path` as given. Classes and files within a class
            are in the order of their names.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, PermissionError
        If `path` is missing, not a folder or may not be listed.
    TypeError
        If a parameter is of the wrong type.
    ValueError
        If a parameter is out of its range, there is no class folder, the folders in `path` are
        the parts of a data set (train, val, test) with class folders inside, some files are unfit
        and `on_error="raise"`, no image is left, or sizes differ and `image_size` is None.

    Warns
    -----
    UserWarning
        If files or folders are left out, with `on_error="warn"`; and always if there are images
        in formats that are not read, or links to a folder that holds the link.

    See Also
    --------
    make_cells : Generated images instead.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from PIL import Image
    >>> from sklearn_sparseattn.datasets import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, level in [("dark", 30), ("light", 200)]:
    ...         (Path(folder) / name).mkdir()
    ...         image = Image.fromarray(np.full((40, 50), level, dtype=np.uint8))
    ...         image.save(Path(folder) / name / "0.png")
    ...     data = load_image_folder(folder, crop="square", image_size=16)
    >>> data.images.shape, data.images.dtype, data.target
    ((2, 16, 16), dtype('uint8'), array([0, 1]))
    >>> print(*data.target_names)
    dark light
    """
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error must be 'raise' or 'warn', got {on_error!r}.")
    check_scalar(gray, "gray", (bool, np.bool_))
    size = _check_pair(image_size, "image_size", "None")
    window = crop if crop == "square" else _check_pair(crop, "crop", "'square' or None")
    root = Path(path)
    listing = list_images(root)
    for note in listing.notes(root):
        warnings.warn(note, UserWarning, stacklevel=2)
    files = listing.files
    loaded = Parallel(n_jobs=n_jobs, require="sharedmem")(
        delayed(_load)(root / file, window, size, gray) for file in files
    )
    kept = _sift(listing, loaded, on_error, root)
    images = np.empty((len(kept), *loaded[kept[0]].shape), dtype=loaded[kept[0]].dtype)
    for row, index in enumerate(kept):
        images[row], loaded[index] = loaded[index], None  # so that nothing is held twice
    present, target = np.unique(np.array(listing.labels)[kept], return_inverse=True)
    return Bunch(
        images=images,
        target=target.astype(np.int64),
        target_names=np.array(listing.names)[present],
        filenames=np.array([os.path.join(path, files[index]) for index in kept]),
    )


def _check_pair(value: Any, name: str, otherwise: str) -> tuple[int, int] | None:
    """Return (height, width) of a parameter that may be None, an int or a pair."""
    if value is None:
        return None
    pair = (value, value) if isinstance(value, Integral) else value
    try:
        if isinstance(pair, str):
            raise TypeError
        height, width = pair
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be an int, a pair (height, width) or {otherwise}, got {value!r}."
        ) from None
    for side in (height, width):
        check_scalar(side, name, Integral, min_val=1)
    return int(height), int(width)


def _load(
    file: Path,
    window: tuple[int, int] | Literal["square"] | None,
    size: tuple[int, int] | None,
    gray: bool,
) -> np.ndarray | str:
    """Read one image and bring it into form, or say what is wrong with it."""
    try:
        if file.stat().st_size == 0:
            return "empty file"
        image, is_colour = read_image(file)
        image = _crop(image, window)
        if gray and image.ndim == 3:
            image = _to_luminance(image, is_colour)
        if size is not None:
            return _resize(image, size)
        return image if image.base is None else image.copy()  # so that no larger array is kept for it
    # Decoders meet damaged files with errors of many types; the user wants the file's name.
    except Exception as error:
        return str(error).replace(str(file), "file") or type(error).__name__


def _crop(image: np.ndarray, window: tuple[int, int] | Literal["square"] | None) -> np.ndarray:
    """Cut the window from the centre."""
    if window is None:
        return image
    height, width = image.shape[:2]
    rows, cols = (min(height, width),) * 2 if window == "square" else window
    if rows > height or cols > width:
        raise ValueError(f"{height} x {width} pixels, smaller than crop {rows} x {cols}")
    top, left = (height - rows) // 2, (width - cols) // 2
    return image[top : top + rows, left : left + cols]


def _to_luminance(image: np.ndarray, is_colour: bool) -> np.ndarray:
    """Turn RGB into gray, of the same dtype."""
    if not is_colour:
        raise ValueError(f"{image.shape[2]} channels that are not RGB, which gray=True cannot make gray")
    luminance = image @ _LUMINANCE
    return luminance if image.dtype == np.float32 else np.rint(luminance).astype(image.dtype)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize with antialiasing, channel by channel, and keep the dtype."""
    resized = np.empty((*size, *image.shape[2:]), dtype=image.dtype)
    for source, target in zip(_channels(image), _channels(resized), strict=True):
        deep = source.astype(np.float32) if image.dtype == np.uint16 else np.ascontiguousarray(source)
        channel = np.asarray(Image.fromarray(deep).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        target[:] = np.clip(np.rint(channel), 0, 65535) if image.dtype == np.uint16 else channel
    return resized


def _channels(image: np.ndarray) -> np.ndarray:
    """View an image (H, W) or (H, W, C) as (C, H, W)."""
    return np.moveaxis(np.atleast_3d(image), -1, 0)


def _sift(listing: Listing, loaded: list[Any], on_error: str, root: Path) -> list[int]:
    """Return the indices of the images to keep; raise or warn about all that is unfit."""
    files = listing.files
    problems = dict(listing.problems)
    problems |= {f: item for f, item in zip(files, loaded, strict=True) if isinstance(item, str)}
    kept = [i for i, item in enumerate(loaded) if not isinstance(item, str)]
    hints = []

    kept, odd, usual = _split_by_majority(kept, [_kind(loaded[i]) for i in kept])
    problems |= {files[i]: f"{kind}, where most are {usual}" for i, kind in odd.items()}
    depth = usual.split(" ")[0]
    if any({kind, usual} == {f"{depth} gray", f"{depth} RGB"} for kind in odd.values()):
        hints.append("gray=True makes colour images gray.")

    sizes = ["{} x {}".format(*loaded[i].shape[:2]) for i in kept]
    kept, other, usual = _split_by_majority(kept, sizes)
    problems |= {files[i]: f"{size} pixels, where most have {usual}" for i, size in other.items()}
    if other:
        hints.append("image_size brings all to one size; crop cuts out the centre first.")

    if problems and on_error == "raise":
        hints.append("on_error='warn' leaves out what is not of one kind or cannot be read.")
    # A mixture of sizes is a matter of image_size, not of bad files: nothing is left out for it.
    if not kept or other or (problems and on_error == "raise"):
        message = f"{len(problems)} of the files and folders in {str(root)!r} are unfit:"
        raise ValueError("\n".join([message, *_listing(problems), *hints]))
    if problems:
        message = f"Left out {len(problems)} of the files and folders in {str(root)!r}:"
        warnings.warn("\n".join([message, *_listing(problems)]), UserWarning, stacklevel=3)
    return kept


def _kind(image: np.ndarray) -> str:
    """Bit depth and channels of an image, in words."""
    channels = {(): "gray", (3,): "RGB"}.get(image.shape[2:]) or f"of {image.shape[2]} channels"
    return f"{_DEPTHS[image.dtype.name]} {channels}"


def _split_by_majority(indices: list[int], values: list[str]) -> tuple[list[int], dict[int, str], str]:
    """Return indices with the commonest value, the others with theirs, and that value."""
    if not indices:
        return [], {}, ""
    usual = Counter(values).most_common(1)[0][0]
    pairs = list(zip(indices, values, strict=True))
    return [i for i, v in pairs if v == usual], {i: v for i, v in pairs if v != usual}, usual


def _listing(problems: dict[str, str]) -> list[str]:
    """One line a problem, shortened when there are very many."""
    lines = [f"  {name}: {reason}" for name, reason in problems.items()]
    rest = len(lines) - _MAX_LISTED
    return lines if rest <= 0 else [*lines[:_MAX_LISTED], f"  ... and {rest} more"]
