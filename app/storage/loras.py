"""Installed LoRAs: files in folders, which may come and go while the server runs."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class InstalledLoRA:
    """A LoRA file, with the name that requests use."""

    name: str
    num_bytes: int
    sha256: str


class InstalledLoRAs:
    """Finds LoRAs in folders. Its methods use the disk: call them outside the event loop."""

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, int, int], str] = {}

    def names(self, folders: Iterable[str]) -> list[str]:
        """Return all names. Of two files of one name the one in the last folder counts, as in the engine."""
        return sorted(_files(folders))

    def all(self, folders: Iterable[str]) -> list[InstalledLoRA]:
        """Return all LoRAs, by name. A file is hashed once, and again when it has changed."""
        found, digests = [], {}
        for name, path in sorted(_files(folders).items()):
            try:
                status = path.stat()
                key = (path, status.st_mtime_ns, status.st_size)
                digest = self._digests.get(key) or _digest(path)
            except OSError:  # just removed, or not readable
                continue
            digests[key] = digest
            found.append(InstalledLoRA(name, status.st_size, digest))
        self._digests = digests
        return found


def _files(folders: Iterable[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder in map(Path, folders):
        if folder.is_dir():
            for path in folder.glob(f"*{SUFFIX}"):
                if path.is_file():
                    files[path.stem] = path
    return files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
