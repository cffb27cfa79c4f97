"""Files that appear whole or not at all, and are on the disk when they do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import StorageFull

UNFINISHED = ".partial"  # ends the name of a file that is being written, or was when something crashed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of folders, on some mounts of CIFS and FUSE


def write_whole(path: Path, content: bytes, *, unfinished: Path, what: str, now: float) -> None:
    """Write `path`, a new file, by way of `unfinished`, a new file beside it. If it fails, neither is left.

    `now` is when it was written: the system's clock may be set at any time. Raises StorageFull, which names
    `what`.
    """
    with _room_for(what):
        try:
            with unfinished.open("xb") as file:
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
    """The name of a file that somebody else wrote is on the disk, too. Raises StorageFull, as above."""
    with _room_for(what):
        _sync_folder(path.parent)


@contextmanager
def _room_for(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            message = f"there is no room to keep {what}; the operator has to make some"
            raise StorageFull(message) from error
        raise


def _sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk, as far as its file system can promise that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(opened)
