"""Finished pictures in a folder: written atomically, under random names, with a limited lifetime.

Half of a name is random, the other half is the start of the content's SHA-256, so that a file that was
damaged on disk is detected before a byte of it is served.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from app.errors import DamagedFile, NotFound
from app.storage.writing import UNFINISHED, write_whole

EXTENSIONS = ("png", "jpeg", "webp")
NAME = re.compile(rf"[0-9a-f]{{32}}\.(?:{'|'.join(EXTENSIONS)})")
_MARK_DIGITS = 16


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Size and digest of a stored picture; its content is read separately, in parts."""

    size_bytes: int
    sha256: str


def new_name(content: bytes, extension: str) -> str:
    """Return a name for a picture, 32 hexadecimal digits and `extension`, that nobody can guess."""
    return f"{secrets.token_hex(8)}{hashlib.sha256(content).hexdigest()[:_MARK_DIGITS]}.{extension}"


class ImageStore:
    """A folder of pictures. Its methods use the disk: call them outside the event loop."""

    def __init__(self, folder: Path, ttl_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._ttl_seconds = ttl_seconds
        self._clock = clock

    def save(self, content: bytes, name: str) -> None:
        """Keep `content` under a name that `new_name` made for it. Raises StorageFull."""
        unfinished = self._folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        now = self._clock()
        write_whole(self._folder / name, content, unfinished=unfinished, what="the picture", now=now)

    def examine(self, name: str) -> StoredImage:
        """Return the size and digest of the picture of that name.

        Raises NotFound for a name that was not saved, DamagedFile if the content has changed.
        """
        with self._open(name) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = file.seek(0, os.SEEK_END)
        _require_digest(name, found)
        return StoredImage(size_bytes, found)

    def read(self, name: str) -> bytes:
        """Return the content of the picture of that name. Raises what `examine` does."""
        with self._open(name) as file:
            content = file.read()
        _require_digest(name, hashlib.sha256(content).hexdigest())
        return content

    def read_part(self, name: str, start: int, num_bytes: int) -> bytes:
        """Return part of an examined picture. It is opened only for this: a slow client holds no descriptor.

        Raises NotFound when it was removed meanwhile, DamagedFile when it is shorter.
        """
        with self._open(name) as file:
            file.seek(start)
            part = file.read(num_bytes)
        if len(part) < num_bytes:
            raise DamagedFile(f"the picture {name} is damaged: it ends before byte {start + num_bytes}")
        return part

    def remove(self, names: Iterable[str]) -> int:
        """Remove pictures; return how many existed."""
        removed = 0
        for name in names:
            path = self._folder / name
            if NAME.fullmatch(name) and path.exists():
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def sweep(self) -> int:
        """Remove expired pictures, and what a crash left unfinished; return how many."""
        removed = 0
        oldest = self._clock() - self._ttl_seconds
        with os.scandir(self._folder) as entries:
            for entry in entries:
                is_ours = NAME.fullmatch(entry.name) or entry.name.endswith(UNFINISHED)
                if is_ours and entry.stat(follow_symlinks=False).st_mtime < oldest:
                    Path(entry.path).unlink(missing_ok=True)
                    removed += 1
        return removed

    def _open(self, name: str) -> BufferedIOBase:
        if not NAME.fullmatch(name):
            raise NotFound("there is no such file")
        try:
            return self._find(name)
        except FileNotFoundError:
            raise NotFound("there is no such file; it may have been removed after its time") from None

    def _find(self, name: str) -> BufferedIOBase:
        return (self._folder / name).open("rb")


def _require_digest(name: str, found: str) -> None:
    expected = name[_MARK_DIGITS:][:_MARK_DIGITS]
    if not found.startswith(expected):
        raise DamagedFile(f"the picture {name} is damaged: its sha256 should begin {expected}, not {found}")
