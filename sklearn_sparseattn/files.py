"""Files that are there whole or not at all, and what is written into them. Imports no other room."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


def package_version() -> str:
    """Give the version of this package.

    Returns
    -------
    str
        As installed; "unknown" where it was copied, or frozen into a program, without its metadata.
    """
    try:
        return metadata.version("sklearn-sparseattn")
    except metadata.PackageNotFoundError:
        return "unknown"


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """Where a file is to be written: behind links, and not over what is no file.

    Parameters
    ----------
    path : str or path
        As the user says.

    Returns
    -------
    Path
        Of a file, or of nothing yet.

    Raises
    ------
    ValueError
        If a folder or a device is there.
    FileNotFoundError
        If the folder of the file is missing.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"path={str(path)!r} is there and no file: give the path of a file.")
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path={str(path)!r} cannot be written: there is no folder {str(target.parent)!r}."
        )
    return target


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, or leave the one that was there.

    The content goes to a file next to it, ``.NAME.*.part``, which takes the name once it is on the disk.
    A process that is killed leaves that one behind, and the old file as it was. Who may read and write a file
    that was there may do so as before; of a new one the umask decides that.

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
        with open(part, "xb") as file:
            _permit_as_before(path, part)
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


@contextlib.contextmanager
def hold(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep others who `hold` the same file out, in this process or another, until the end of the block.

    They meet at an empty file next to it, ``.NAME.lock``. What keeps them out is the system's lock on that,
    which dies with the process: the empty file that a killed one leaves behind keeps out nobody.

    Parameters
    ----------
    path : str or path
        Of the file, which need not be there.

    Raises
    ------
    BlockingIOError
        If another holds it; the message names the lock.
    OSError
        If there can be no file in this place.

    Notes
    -----
    On Windows and on file systems without locks nobody is kept out. A process forked in the block shares the
    lock, until both have ended or the lock's file is removed.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    handle = _lock(lock)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                lock.unlink()  # first: whoever has it open by now sees that it is gone
            os.close(handle)


def _lock(lock: Path) -> int | None:
    """An open file with a lock on it; None if the system or the file system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), lock.stat()):
                    return handle
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(error.errno, "held by another", lock.as_posix()) from error
        except OSError:
            os.close(handle)
            lock.unlink(missing_ok=True)
            return None
        os.close(handle)  # the one who had it has just removed it


def _permit_as_before(path: Path, part: Path) -> None:
    """Give a file the permissions of the one that it will replace."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode & 0o777
        if mode != part.stat().st_mode & 0o777:  # not every file system can change it
            part.chmod(mode)


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
