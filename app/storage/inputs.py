"""Input pictures in a folder: decoded, as plain PNG, and named by the digest of the file.

A file is written before the job that names it is committed, so that an accepted job finds it after any crash.
Many jobs may name one file. It is removed when none does and it is old enough: a request that is just being
accepted has no job yet.
"""

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from app.errors import DamagedFile, NotFound
from app.storage.decoding import decode_picture
from app.storage.writing import UNFINISHED, keep_name, room_for, write_whole

GRACE_SECONDS = 600.0  # from writing a file to the commit of its job, at most

_NAME = re.compile(r"[0-9a-f]{64}")
_LOCK = ".lock"
_WHAT = "the picture that came"


class InputStore:
    """A folder of plain PNG files. Its methods use the disk: call them outside the event loop."""

    def __init__(self, folder: Path, max_pixels: int, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._max_pixels = max_pixels
        self._clock = clock

    def decode(self, content: bytes) -> Image.Image:
        """Decode an untrusted file. Raises BrokenPicture."""
        return decode_picture(content, self._max_pixels)

    def name(self, content: bytes) -> str:
        """Return the name of a file."""
        return hashlib.sha256(content).hexdigest()

    def save(self, content: bytes) -> str:
        """Store a file and return its name. Raises StorageFull."""
        name = self.name(content)
        with room_for(_WHAT), self._locked():
            path = self._folder / name
            if path.exists():
                os.utime(path, (self._clock(), self._clock()))  # so that it is not removed as old
                keep_name(path, what=_WHAT)  # its writer may have crashed before that
            else:
                self._write(path, content)
        return name

    def read(self, name: str) -> bytes:
        """Return the file of that name. Raises NotFound, or DamagedFile if its content has changed."""
        if not _NAME.fullmatch(name):
            raise NotFound("there is no such picture")
        try:
            content = self._find(name)
        except FileNotFoundError:
            raise NotFound("there is no such picture") from None
        if self.name(content) != name:
            raise DamagedFile(f"the picture {name} that came with the request is damaged")
        return content

    def old(self) -> list[str]:
        """Return the names of files too old for a request that is just being accepted."""
        return [
            path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name) and self._is_old(path)
        ]

    def remove(self, names: Collection[str]) -> int:
        """Remove files that are still old, and what a crash left unfinished; return how many."""
        removed = 0
        with self._locked():
            unfinished = [path for path in self._folder.iterdir() if path.name.endswith(UNFINISHED)]
            for path in [*unfinished, *(self._folder / name for name in names if _NAME.fullmatch(name))]:
                if self._is_old(path):
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _is_old(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime < self._clock() - GRACE_SECONDS
        except FileNotFoundError:
            return False

    def _find(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def _write(self, path: Path, content: bytes) -> None:
        unfinished = path.with_name(f"{secrets.token_hex(8)}{UNFINISHED}")
        write_whole(path, content, unfinished=unfinished, what=_WHAT, now=self._clock())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude all other threads and servers, so that no file is removed just when it is needed."""
        with (self._folder / _LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
