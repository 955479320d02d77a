"""`load_image_folder`: a folder of class folders as one array of images with labels.

Files that cannot be used are collected and named together, since one wants to mend them in one go.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from joblib import Parallel, delayed
from PIL import Image, ImageFile
from sklearn.utils import Bunch, check_scalar

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
_FORMATS = ("BMP", "JPEG", "PNG", "TIFF")
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_MAX_LISTED = 20
_BITS_PER_SAMPLE = 258  # the TIFF tag
# How PIL reads PNG of 16 bits and several channels, and how the other bytes are had.
_DEEP_PNG = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}


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
    below it are its samples: PNG, JPEG, TIFF and BMP, of 8 or 16 bits, whatever the case of the
    suffix. Hidden files and folders, and files with other suffixes, are passed over. Alpha channels
    are dropped, palettes resolved, and 1-bit images become 0 and 255.

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
        than `crop`, or differ from most others in bit depth or in being coloured, and about class
        folders without an image: name them all in one error, or leave them out with one warning.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        With the keys

        images : ndarray of shape (n, H, W) or (n, H, W, 3), uint8 or uint16
            Gray or RGB, with the bit depth of the files.
        target : ndarray of shape (n,), int64
            Class numbers.
        target_names : ndarray of shape (n_classes,), str
            Names of the class folders, sorted.
        filenames : ndarray of shape (n,), str
            The files, each beginning with `path` as given. Classes and files within a class
            are in the order of their names.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If `path` is missing or not a folder.
    TypeError
        If a parameter is of the wrong type.
    ValueError
        If a parameter is out of its range, there is no class folder, some files are unfit
        and `on_error="raise"`, no image is left, or sizes differ and `image_size` is None.

    Warns
    -----
    UserWarning
        If files or class folders are left out, with `on_error="warn"`.

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
    files, labels, names, empty = _list_files(root)
    loaded = Parallel(n_jobs=n_jobs, require="sharedmem")(
        delayed(_load)(root / file, window, size, gray) for file in files
    )
    kept = _sift(files, loaded, empty, on_error, root)
    images = np.empty((len(kept), *loaded[kept[0]].shape), dtype=loaded[kept[0]].dtype)
    for row, index in enumerate(kept):
        images[row], loaded[index] = loaded[index], None  # so that nothing is held twice
    present, target = np.unique(labels[kept], return_inverse=True)
    return Bunch(
        images=images,
        target=target.astype(np.int64),
        target_names=np.array(names)[present],
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


def _list_files(root: Path) -> tuple[list[str], np.ndarray, list[str], list[str]]:
    """List the image files relative to `root`, their labels, the classes, and the empty ones."""
    if not root.exists():
        raise FileNotFoundError(f"path {str(root)!r} does not exist.")
    if not root.is_dir():
        raise NotADirectoryError(
            f"path {str(root)!r} is not a folder; it must be one that holds a folder per class."
        )
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(
            f"path {str(root)!r} holds no class folder; it must hold one folder per class, "
            "with the images of the class inside."
        )
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(names):
        found = sorted(_walk(root, name))
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(name)
    return files, np.array(labels, dtype=np.int64), names, empty


def _walk(root: Path, name: str) -> Iterator[str]:
    """Yield the image files below one class folder, relative to `root`, hidden ones left out."""
    for folder, below, files in os.walk(root / name):
        below[:] = [b for b in below if not b.startswith(".")]
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.path.relpath(os.path.join(folder, file), root)


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
        image = _read(file)
        if gray and image.ndim == 3:
            image = np.rint(image @ _LUMINANCE).astype(image.dtype)
        image = _crop(image, window)
        return image if size is None else _resize(image, size)
    # Decoders meet damaged files with errors of many types; the user wants the file's name.
    except Exception as error:
        return str(error).replace(str(file), "file") or type(error).__name__


def _read(file: Path) -> np.ndarray:
    """Decode a file to (H, W) or (H, W, 3), uint8 or uint16; ValueError if it is neither."""
    with Image.open(file, formats=_FORMATS) as image:
        n_pages = getattr(image, "n_frames", 1)
        if n_pages > 1:
            raise ValueError(f"{n_pages} pages, where one image was expected")
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS")
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError("more than 16 bits or signed, where 8 or 16 bits were expected")
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.uint16)
        if image.format == "PNG" and image.tile[0][3] in _DEEP_PNG:
            return _read_deep_png(image, file)
        tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
        if max(tags.get(_BITS_PER_SAMPLE, (8,))) > 8:
            return _read_deep_tiff(file)
        if image.mode in ("1", "L", "LA", "La"):
            return np.asarray(image.convert("L"))
        if image.mode == "P":  # by way of RGBA, since PIL warns about transparent palettes
            array = np.asarray(image.convert("RGBA"))[..., :3]
            return array[..., 0] if (array == array[..., :1]).all() else array
        return np.asarray(image.convert("RGB"))


def _read_deep_png(image: ImageFile.ImageFile, file: Path) -> np.ndarray:
    """Both bytes of a 16-bit PNG with several channels, of which PIL keeps only the high ones.

    PIL has no such mode. But told that the samples are little-endian it takes the other byte of
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


def _read_deep_tiff(file: Path) -> np.ndarray:
    """Read a colour TIFF of 16 bits, which PIL cuts down to 8."""
    import tifffile  # here, as few need it and it takes long to load

    array = tifffile.imread(file)
    if array.dtype != np.uint16 or array.ndim != 3 or array.shape[2] not in (3, 4):
        raise ValueError(f"TIFF of shape {array.shape}, {array.dtype}, where RGB was expected")
    return array[..., :3]


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


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize with antialiasing and keep the dtype."""
    target = (size[1], size[0])
    bicubic = Image.Resampling.BICUBIC
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(target, bicubic))
    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize(target, bicubic))
        for channel in np.atleast_3d(image).transpose(2, 0, 1)
    ]
    resized = np.clip(np.rint(np.stack(channels, axis=-1)), 0, 65535).astype(np.uint16)
    return resized if image.ndim == 3 else resized[..., 0]


def _sift(files: list[str], loaded: list[Any], empty: list[str], on_error: str, root: Path) -> list[int]:
    """Return the indices of the images to keep; raise or warn about all that is unfit."""
    problems = {f"{name}{os.sep}": "class folder without an image" for name in empty}
    problems |= {f: item for f, item in zip(files, loaded, strict=True) if isinstance(item, str)}
    kept = [i for i, item in enumerate(loaded) if not isinstance(item, str)]
    hints = []

    kept, odd, usual = _split_by_majority(kept, [_kind(loaded[i]) for i in kept])
    problems |= {files[i]: f"{kind}, where most are {usual}" for i, kind in odd.items()}
    if any(kind[:2] == usual[:2] for kind in odd.values()):
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
    """Bit depth and colour of an image, in words."""
    depth = "8-bit" if image.dtype == np.uint8 else "16-bit"
    return f"{depth} {'RGB' if image.ndim == 3 else 'gray'}"


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
