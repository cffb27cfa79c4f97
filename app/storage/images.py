"""Finished pictures in a local folder: written whole or not at all, under random names, for a while.

Half of a name is random, the other half begins the digest of the content, so that a file that was damaged on
the disk is known before a byte of it is served.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.errors import DamagedFile, NotFound
from app.storage.writing import UNFINISHED, write_whole

EXTENSIONS = ("png", "jpeg", "webp")
_NAME = re.compile(rf"[0-9a-f]{{32}}\.(?:{'|'.join(EXTENSIONS)})")
_MARK_DIGITS = 16
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An open picture: who has it can read it to its end, even when it is removed meanwhile."""

    file: BinaryIO
    size_bytes: int
    sha256: str


class ImageStore:
    """A folder of pictures. Its methods use the disk: call them outside the event loop."""

    def __init__(self, folder: Path, ttl_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._ttl_seconds = ttl_seconds
        self._clock = clock

    def save(self, content: bytes, extension: str) -> str:
        """Keep `content` and return its name, 32 hexadecimal digits and `extension`. Raises StorageFull."""
        name = f"{secrets.token_hex(8)}{hashlib.sha256(content).hexdigest()[:_MARK_DIGITS]}.{extension}"
        unfinished = self._folder / f"{name}{UNFINISHED}"
        now = self._clock()
        write_whole(self._folder / name, content, unfinished=unfinished, what="the picture", now=now)
        return name

    def open(self, name: str) -> StoredImage:
        """The picture of that name, hashed.

        Raises NotFound for anything that `save` did not return, DamagedFile for another content.
        """
        if not _NAME.fullmatch(name):
            raise NotFound("there is no such file")
        try:
            file = (self._folder / name).open("rb")
        except FileNotFoundError:
            raise NotFound("there is no such file; it may have been removed after its time") from None
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        found, expected = digest.hexdigest(), name[_MARK_DIGITS:][:_MARK_DIGITS]
        if not found.startswith(expected):
            file.close()
            raise DamagedFile(
                f"the picture {name} is damaged: its sha256 should begin {expected}, not {found}"
            )
        return StoredImage(file, file.tell(), found)

    def read(self, name: str) -> bytes:
        """The content of the picture of that name; raises what `open` does."""
        with self.open(name).file as file:
            file.seek(0)
            return file.read()

    def remove(self, names: Iterable[str]) -> int:
        """Forget pictures; returns how many were there."""
        removed = 0
        for name in names:
            path = self._folder / name
            if _NAME.fullmatch(name) and path.exists():
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def sweep(self) -> int:
        """Remove the pictures whose time is over, and what a crash left unfinished; returns how many."""
        removed = 0
        oldest = self._clock() - self._ttl_seconds
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(UNFINISHED)
                if _NAME.fullmatch(name) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                    Path(entry.path).unlink(missing_ok=True)
                    removed += 1
        return removed
