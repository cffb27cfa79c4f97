"""Files that appear whole or not at all, and are on the disk when they do."""

import errno
import os
from pathlib import Path

from app.errors import StorageFull

UNFINISHED = ".partial"  # ends the name of a file that is being written, or was when something crashed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, content: bytes, *, unfinished: Path, what: str) -> None:
    """Write `path` by way of `unfinished`, a new file beside it. Raises StorageFull, which names `what`."""
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno in _NO_ROOM:
            message = f"there is no room to keep {what}; the operator has to make some"
            raise StorageFull(message) from error
        raise


def _sync_folder(folder: Path) -> None:
    """The name is on the disk, too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
