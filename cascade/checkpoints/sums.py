"""Checksums of a checkpoint folder, in sha256sum's format: a flipped bit is noticed before it is drawn.

Loading checks the small files, which make up the whole embedded checkpoint. Files larger than `SMALL_BYTES`
take seconds each: they are checked when they are downloaded, and by `check_sums` without a limit.
"""

import hashlib
import re
from pathlib import Path

from cascade.checkpoints.writing import atomic_file
from cascade.errors import CheckpointError

SUMS_NAME = "SHA256SUMS"
SMALL_BYTES = 64_000_000


def write_sums(folder: Path) -> None:
    """List every file of a checkpoint folder with its sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_NAME)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    with atomic_file(folder / SUMS_NAME) as out:
        out.write("".join(lines).encode())


def check_sums(folder: Path, max_bytes: int | None = SMALL_BYTES) -> None:
    """Compare the files of a folder with its list, if it has one; files over `max_bytes` are skipped.

    Raises `CheckpointError` with the expected and the found checksum.
    """
    listing = folder / SUMS_NAME
    if not listing.is_file():
        return
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match:
            raise CheckpointError(f"{listing}: malformed line {line[:100]!r}")
        path = folder / match[2]
        is_checked = path.is_file() and (max_bytes is None or path.stat().st_size <= max_bytes)
        if is_checked and (found := sha256(path)) != match[1]:
            raise CheckpointError(
                f"{path}: damaged or changed: sha256 should be {match[1]}, is {found}; fetch it again, "
                f"or delete {SUMS_NAME} if the change is meant"
            )


def sha256(path: Path) -> str:
    """Return the checksum of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
