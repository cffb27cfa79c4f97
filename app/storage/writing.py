"""Atomic and durable writing of files, and the space on a disk."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import StorageFull

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNFINISHED = ".partial"  # suffix of a file that is being written, or was during a crash

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # from folders, on some mounts of CIFS and FUSE


def write_whole(path: Path, content: bytes, *, unfinished: Path, what: str, now: float) -> None:
    """Write `path`, a new file, by way of `unfinished`, a new file beside it. If it fails, neither is left.

    `now` becomes its modification time, because the system's clock may be set at any time. Raises
    StorageFull, which names `what`.
    """
    with room_for(what):
        opened = unfinished.open("xb")  # what is there already is not ours to remove
        try:
            with opened as file:
                file.write(content)
                file.flush()
                os.utime(file.fileno(), (now, now))
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        try:
            _sync_folder(path.parent)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def keep_name(path: Path, *, what: str) -> None:
    """Sync the folder of a file that another process wrote. Raises StorageFull, which names `what`."""
    with room_for(what):
        _sync_folder(path.parent)


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Turn an OSError for lack of space in the block into a StorageFull that names `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            message = f"there is no room to keep {what}; the operator has to make some"
            raise StorageFull(message) from error
        raise


@dataclass(frozen=True, slots=True)
class Space:
    """Space of a disk, in bytes."""

    free: int
    total: int


def space_of(folder: Path) -> Space | None:
    """Return what this process may still write in `folder`; None if the file system does not tell."""
    try:
        told = os.statvfs(folder)
    except OSError:
        return None
    return Space(told.f_bavail * told.f_frsize, told.f_blocks * told.f_frsize) if told.f_blocks else None


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk, as far as its file system supports that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(opened)
