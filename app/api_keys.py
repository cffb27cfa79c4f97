"""API keys: of the settings, and of a file that can be changed while the server runs.

The file is a JSON list of `{"name", "sha256", "expires", "rate_limit"}`, the last two optional. Only digests
are kept anywhere; a key itself is shown once, by `cascade keys add`.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from app.errors import SettingsError

KEY_PREFIX = "sc_"  # so that scanners for leaked secrets can tell what they found
_KEY_BYTES = 32
_DIGEST = re.compile("[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that may call the server."""

    name: str  # of the tenant; two keys of one name share jobs, which is how a key is replaced
    sha256: bytes
    expires_at: float | None = None  # seconds since 1970
    rate_limit: int | None = None  # requests for pictures in a minute, in place of the server's limit


def check_name(name: str) -> str:
    """Return the name of a key. Raises ValueError, which says what names are allowed."""
    if not re.fullmatch(r"[\w.@-]{1,100}", name):
        raise ValueError("must be 1 to 100 letters, digits or any of _ . @ -")
    return name


def _check_digest(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError("must be 64 hexadecimal digits")
    return digest


class KeyEntry(BaseModel):
    """A key in a file."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, AfterValidator(check_name)]
    sha256: Annotated[str, AfterValidator(_check_digest)]
    expires: AwareDatetime | None = None
    rate_limit: Annotated[int, Field(ge=1)] | None = None

    def key(self) -> ApiKey:
        """Return what the server needs of it."""
        expires_at = None if self.expires is None else self.expires.timestamp()
        return ApiKey(self.name, bytes.fromhex(self.sha256), expires_at, self.rate_limit)


_ENTRIES = TypeAdapter(list[KeyEntry])
_NO_MEMBER = f"is no member of a key, which has {', '.join(KeyEntry.model_fields)}"


def read_entries(path: Path) -> list[KeyEntry]:
    """Read a file of keys. Raises SettingsError, which names the file, the entry and what is wrong."""
    try:
        return _ENTRIES.validate_json(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        lines = [_line(path, problem["loc"], problem["msg"]) for problem in error.errors(include_input=False)]
        raise SettingsError("\n".join(lines)) from None


@contextmanager
def changing(path: Path) -> Iterator[Path]:
    """Let nobody else change a file of keys in the block; gives the file that `path`, if a link, leads to."""
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(folder)


def write_entries(path: Path, entries: Sequence[KeyEntry]) -> None:
    """Replace a whole file of keys; its owner and mode stay. A new one is readable by its owner alone."""
    content = json.dumps([entry.model_dump(mode="json", exclude_none=True) for entry in entries], indent=2)
    before = path.stat() if path.exists() else None
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
            if before is not None:
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(f"{content}\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def new_key() -> str:
    """Return a key that nobody can guess."""
    return f"{KEY_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}"


def parse_key(entry: str, number: int) -> ApiKey:
    """Parse `KEY`, `NAME=KEY` or `NAME=sha256:HEX`. Equals signs that only pad a key are part of it."""
    name, separator, key = entry.partition("=")
    if not separator or not key.strip("="):
        name, key = f"key-{number}", entry
    if not key.startswith("sha256:"):
        return ApiKey(name, hashlib.sha256(key.encode()).digest())
    digest = key.removeprefix("sha256:")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"entry {number}: sha256: must be followed by 64 hexadecimal digits")
    return ApiKey(name, bytes.fromhex(digest))


def _line(path: Path, location: tuple[int | str, ...], message: str) -> str:
    """Return the message for a mistake in a file."""
    message = message.removeprefix("Value error, ").replace("Extra inputs are not permitted", _NO_MEMBER)
    message = f"{message[:1].lower()}{message[1:]}"
    if not location:
        return f"{path}: must be a JSON list of keys: {message}"
    number, *member = location
    assert isinstance(number, int)
    return f"{path}: {' '.join(['entry', str(number + 1), *map(str, member)])}: {message}"
