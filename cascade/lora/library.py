"""The installed LoRAs: files in folders, found by name and read when they are first requested."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from weakref import WeakKeyDictionary

from cascade.errors import InvalidSetting
from cascade.lora.lora import LoRA, combine, read_lora
from cascade.models import Models
from cascade.networks.adapters import Adapter
from cascade.recent import Recent

KEPT_LORAS = 16  # a few megabytes each
KEPT_ADAPTERS = 16

_Stamp = tuple[Path, int, int]  # path, modification time and size of a file


@dataclass(slots=True)
class _Read:
    """The LoRAs and adapters cached for one set of models."""

    loras: Recent[_Stamp, LoRA] = field(default_factory=lambda: Recent(KEPT_LORAS))
    adapters: Recent[tuple[tuple[_Stamp, float], ...], Adapter] = field(
        default_factory=lambda: Recent(KEPT_ADAPTERS)
    )


class LoRALibrary:
    """LoRAs by file name, from several folders; one in a later folder hides one of the same name.

    Files may be added, changed or removed at any time. Threads may share a library.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._lock = Lock()
        self._read: WeakKeyDictionary[Models, _Read] = WeakKeyDictionary()

    def names(self) -> list[str]:
        """Return the names of the installed LoRAs."""
        return sorted(self._files())

    def adapter(self, models: Models, uses: Sequence[tuple[str, float]]) -> Adapter | None:
        """Return the adapter of some LoRAs by name and scale; the same object until their files change.

        Returns None if `uses` is empty.

        Raises:
            InvalidSetting: a LoRA is not installed; names those that are.
            CheckpointError: a file is damaged or does not fit these models.
        """
        if not uses:
            return None
        files = self._files()
        chosen = tuple((_stamp(_found(files, name), name), float(scale)) for name, scale in uses)
        with self._lock:
            read = self._read.setdefault(models, _Read())

            def lora(stamp: _Stamp) -> LoRA:
                return read.loras.get(stamp, lambda _: read_lora(stamp[0], models))

            return read.adapters.get(
                chosen, lambda _: combine(models, [(lora(stamp), scale) for stamp, scale in chosen])
            )

    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for folder in self.folders:
            try:
                found = sorted(folder.iterdir())
            except OSError:  # a missing folder has no LoRAs
                continue
            files |= {path.stem: path for path in found if path.suffix == ".safetensors"}
        return files


def _found(files: dict[str, Path], name: str) -> Path:
    if name not in files:
        known = ", ".join(sorted(files)) or "none"
        raise InvalidSetting("loras", f"{name!r} is not installed; installed are: {known}")
    return files[name]


def _stamp(path: Path, name: str) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidSetting("loras", f"{name!r} cannot be read: {error.strerror}") from error
    return path, status.st_mtime_ns, status.st_size
