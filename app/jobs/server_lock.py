"""The lock of a server on its data folder. A lock has one holder, and a name that outlives the holder.

The kernel frees the lock of a dead holder. So a new holder knows that nobody works under the name of the lock
any more, and takes back at once what was in work when the last holder was killed.
"""

import fcntl
import os
import secrets
from io import TextIOWrapper
from pathlib import Path

from app.errors import SettingsError

NUM_LOCKS = 64  # servers that share a folder


class ServerLock:
    """The name of a server, which is ours until we leave or die."""

    def __init__(self, name: str, file: TextIOWrapper, *, is_sole: bool) -> None:
        self.name = name
        self.is_sole = is_sole  # no other server works on the same jobs
        self._file = file

    def leave(self) -> None:
        """Free the lock for another process."""
        self._file.close()


def lock_server(folder: Path, *, is_sole: bool) -> ServerLock:
    """Take the first free lock of the folder, which has only one if the server must be the sole one.

    Raises SettingsError when none is free.
    """
    for number in range(1 if is_sole else NUM_LOCKS):
        file = (folder / f"server-{number}.lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
        else:
            return ServerLock(_name(file), file, is_sole=is_sole)
    raise SettingsError(
        f"another server works in {folder}; give this one a folder of its own with --data-dir"
    )


def _name(file: TextIOWrapper) -> str:
    """Return the name in the file; if the file is new or torn, write a new name."""
    file.seek(0)
    name = file.read()
    if len(name) == 16 and name.isalnum():
        return name
    name = secrets.token_hex(8)
    file.truncate(0)
    file.write(name)
    file.flush()
    os.fsync(file.fileno())
    return name
