"""Files that are there whole or not at all. Imports no other room of the package."""

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, or leave the one that was there.

    The content goes to a file next to it, ``.NAME.*.part``, which takes the name once it is on the disk.
    A process that is killed leaves that one behind, and the old file as it was.

    Parameters
    ----------
    path : str or path
        Of the file.
    content : bytes
        All of it.

    Raises
    ------
    OSError
        If it cannot be written, for a full disk for one; the message names the file.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        # Opened anew, the user's umask decides who may read it.
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise type(error)(
                error.errno, f"{reason}; not written, and what was there is as it was", path.as_posix()
            ) from error
        raise
    _settle(path.parent)


def remove_whole(path: str | os.PathLike[str]) -> None:
    """Remove a file, and what killed processes left of it.

    Parameters
    ----------
    path : str or path
        Of the file, which need not be there.
    """
    path = Path(path)
    for part in path.parent.glob(f".{path.name}.*.part"):
        part.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Let a new name in a folder outlast a power cut, where the system can do that."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
