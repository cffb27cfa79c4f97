"""Who may call: the keys of the settings, and those of a file that may change while the server runs."""

import asyncio
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from app.api_keys import ApiKey, read_entries
from app.errors import SettingsError
from app.logs import Logger

LOOK_SECONDS = 2.0


class KeyRing:
    """All keys that may call. Changes of the file count within seconds, if it is right."""

    def __init__(self, fixed: Sequence[ApiKey], file: Path | None, logger: Logger) -> None:
        """Raises SettingsError if the file cannot be used."""
        self._fixed = tuple(fixed)
        self._file = file
        self._logger = logger
        self._seen = _version(file)
        self._keys = (*self._fixed, *self._read())
        self._mistake = ""  # why the file could not be read last

    def find(self, offered: Iterable[bytes]) -> ApiKey | None:
        """Return the key that one of the texts is; None if none is."""
        found = None
        for text in offered:
            digest = hashlib.sha256(text).digest()
            for key in self._keys:  # always all of them, so that timing does not tell which one matched
                if hmac.compare_digest(key.sha256, digest):
                    found = key
        return found

    async def watch(self) -> None:
        """Read the file whenever it has changed, until canceled. Of a wrong one nothing counts."""
        while self._file is not None:
            await asyncio.sleep(LOOK_SECONDS)
            version = await asyncio.to_thread(_version, self._file)
            if version == self._seen:
                continue
            try:
                self._keys = (*self._fixed, *await asyncio.to_thread(self._read))
            except SettingsError as error:
                if str(error) != self._mistake:
                    self._mistake = str(error)
                    self._logger.error("the keys stay as they were: their file is wrong", reason=str(error))
            else:
                self._seen, self._mistake = version, ""
                self._logger.info("keys read again", keys=len(self._keys))

    def _read(self) -> list[ApiKey]:
        return [] if self._file is None else [entry.key() for entry in read_entries(self._file)]


def _version(file: Path | None) -> tuple[int, ...] | None:
    """Return what changes whenever a file does; None without a file."""
    try:
        status = None if file is None else file.stat()
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
