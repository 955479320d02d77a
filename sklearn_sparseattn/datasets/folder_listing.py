"""Which files of a folder of class folders are images, and what stands in the way of listing them.

Nothing is opened here, and nothing is passed over silently: what cannot be listed is a problem that
names the folder, and files or links that are left out on purpose are counted in a note.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
# Images that the loader does not read. A user who has them expects them to be loaded.
_OTHER_IMAGES = (
    *(".avif", ".bif", ".btf", ".cif", ".czi", ".dcm", ".dicom", ".dng", ".exr", ".fits", ".flex", ".gif"),
    *(".heic", ".heif", ".ims", ".j2k", ".jp2", ".jxl", ".jxr", ".lif", ".lsm", ".mrc", ".mrxs", ".nd2"),
    *(".ndpi", ".nii", ".npy", ".npz", ".nrrd", ".oib", ".oif", ".pbm", ".pgm", ".pnm", ".ppm", ".psd"),
    *(".qptiff", ".rif", ".scn", ".stk", ".svs", ".tf8", ".tga", ".vsi", ".webp"),
)
_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "test", "testing")


@dataclass
class Listing:
    """What a folder of class folders holds; all names are relative to it.

    Attributes
    ----------
    files : list of str
        Image files, class by class, sorted within a class.
    labels : list of int
        For each file, the index of its class in `names`.
    names : list of str
        Class folders, sorted.
    problems : dict of str to str
        Files, links and folders that cannot be listed, and why.
    loops : list of str
        Links to a folder that holds them. They are not followed.
    ignored : dict of str to str
        Images in formats that are not read, and their suffixes.
    """

    files: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    loops: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    def notes(self, root: Path) -> list[str]:
        """Return sentences about what was left out on purpose, to be warned about."""
        notes = []
        if self.ignored:
            counts = Counter(self.ignored.values())
            kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items()))
            notes.append(
                f"Passed over {len(self.ignored)} image files in {str(root)!r} whose formats are not read "
                f"({kinds}), such as {min(self.ignored)}. Convert them to one of {', '.join(SUFFIXES)}."
            )
        if self.loops:
            notes.append(
                f"Did not follow {len(self.loops)} links in {str(root)!r} to a folder that holds the link: "
                f"{', '.join(sorted(self.loops)[:5])}. Remove them."
            )
        return notes


def list_images(root: Path) -> Listing:
    """List the images in the class folders of `root` and in all folders below, links followed.

    Parameters
    ----------
    root : Path
        The folder of class folders. Hidden files and folders in it are passed over.

    Returns
    -------
    listing : Listing
        The images, and what cannot be listed.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, PermissionError
        If `root` is missing, not a folder or may not be listed.
    ValueError
        If there is no class folder, or if `root` holds folders for training and validation or
        testing, with class folders inside.
    """
    if not root.exists():
        raise FileNotFoundError(f"path {str(root)!r} does not exist.")
    if not root.is_dir():
        raise NotADirectoryError(
            f"path {str(root)!r} is not a folder; it must be one that holds a folder per class."
        )
    listing = Listing()
    names, _ = _entries(root, "", listing)
    _refuse_split(root, names)
    identities = frozenset(_identity(folder) for folder in (root, *root.resolve().parents))
    for name in names:
        found: list[str] = []
        looped = len(listing.loops)
        _walk(root, name, identities, listing, found)
        if len(listing.loops) > looped and listing.loops[looped] == _folder(name):
            continue  # the class folder itself is a link to `root` or above
        listing.files += sorted(found)
        listing.labels += [len(listing.names)] * len(found)
        listing.names.append(name)
        known = (*listing.problems, *listing.ignored)
        if not found and not any(entry.startswith(_folder(name)) for entry in known):
            listing.problems[_folder(name)] = "class folder without an image"
        elif not found and _folder(name) not in listing.problems:
            listing.problems[_folder(name)] = "class folder without an image that can be read"
    if not listing.names and not listing.problems:
        raise ValueError(
            f"path {str(root)!r} holds no class folder; it must hold one folder per class, "
            "with the images of the class inside."
        )
    return listing


def _folder(name: str) -> str:
    """Name of a folder as messages have it."""
    return name + os.sep


def _identity(folder: str | Path) -> tuple[int, int]:
    """Device and inode: the same for a folder and for every link to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _entries(root: Path, name: str, listing: Listing) -> tuple[list[str], list[str]]:
    """Return folders and files in the folder `name`, relative to `root`, hidden ones left out."""
    folders, files = [], []
    with os.scandir(root / name) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            relative = os.path.join(name, entry.name)
            try:
                if entry.is_dir():
                    folders.append(relative)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    listing.problems[relative] = "link to a file or folder that does not exist"
                else:
                    files.append(relative)
            except OSError as error:  # of a link that may not be followed, or to itself
                listing.problems[relative] = f"link that cannot be followed: {error.strerror}"
    return folders, files


def _walk(
    root: Path, name: str, above: frozenset[tuple[int, int]], listing: Listing, found: list[str]
) -> None:
    """Add to `found` the images in the folder `name` and below; `above` are the folders that hold it."""
    try:
        identity = _identity(root / name)
        if identity in above:
            listing.loops.append(_folder(name))
            return
        folders, files = _entries(root, name, listing)
    except OSError as error:
        listing.problems[_folder(name)] = f"folder that cannot be listed: {error.strerror}"
        return
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if suffix in SUFFIXES:
            found.append(file)
        elif suffix in _OTHER_IMAGES:
            listing.ignored[file] = suffix
    for folder in folders:
        _walk(root, folder, above | {identity}, listing, found)


def _refuse_split(root: Path, names: list[str]) -> None:
    """Raise ValueError if `root` holds folders for training and for testing, not for classes."""
    train = [name for name in names if name.lower() in _TRAIN]
    held_out = [name for name in names if name.lower() in _HELD_OUT]
    parts = [name for name in (*train, *held_out) if _holds_folders(root / name)]
    if set(parts) & set(train) and set(parts) & set(held_out):
        listed = ", ".join(_folder(name) for name in parts)
        raise ValueError(
            f"path {str(root)!r} holds {listed} with folders inside: these are parts of a data set, "
            f"not classes. Load each part by itself, as in load_image_folder({str(root / parts[0])!r})."
        )


def _holds_folders(folder: Path) -> bool:
    """Whether a folder holds folders that are not hidden; False if it may not be listed."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False  # the walk names it
