"""Which server of a data folder this process is. A seat has a name that outlives the process, and one holder.

The kernel frees the lock of a dead holder. So whoever sits down knows that nobody works under its name any
more, and takes back at once what was in work when the last holder was killed.
"""

import fcntl
import os
import secrets
from io import TextIOWrapper
from pathlib import Path

from app.errors import SettingsError

NUM_SEATS = 64  # servers that share a folder


class Seat:
    """The name of a server, ours until we leave or die."""

    def __init__(self, name: str, file: TextIOWrapper, *, is_sole: bool) -> None:
        self.name = name
        self.is_sole = is_sole  # nobody else works on the same jobs
        self._file = file

    def leave(self) -> None:
        """Let another process have it."""
        self._file.close()


def take_seat(folder: Path, *, is_sole: bool) -> Seat:
    """The first free seat of the folder; of a server that must be the only one there is one seat.

    Raises SettingsError when none is free.
    """
    for number in range(1 if is_sole else NUM_SEATS):
        file = (folder / f"server-{number}.lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
        else:
            return Seat(_name(file), file, is_sole=is_sole)
    raise SettingsError(
        f"another server works in {folder}; give this one a folder of its own with --data-dir"
    )


def _name(file: TextIOWrapper) -> str:
    """What the file says, or a new name when it was made just now, or torn."""
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
