"""Pictures with captions: a folder, or tar shards as WebDataset writes them.

Only names, captions and sizes are kept; pictures are read when they are needed. Shards are never unpacked:
their members are found once and then read in place. Nothing outside the given folder is opened.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cascade.errors import InvalidSetting
from cascade.tasks.encoding import flattened

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_CAPTION = 10_000  # characters
MAX_FILE_BYTES = 512_000_000
METADATA = "metadata.jsonl"

_CAPTION_KEYS = ("caption", "text", "prompt")
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, the picture lies on its side
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Source:
    """The location of a picture's or caption's bytes: a file, or a range of a tar file."""

    path: Path
    num_bytes: int
    offset: int = 0

    def read(self) -> bytes:
        """Read the bytes; raise `OSError` if that fails."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.num_bytes)


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with its caption."""

    name: str
    caption: str
    source: Source
    width: int
    height: int

    def open(self) -> Image.Image:
        """Return the upright picture in RGB, transparent parts white. Raises `UnreadablePicture`."""
        try:
            return flattened(Image.open(io.BytesIO(self.source.read())))
        except _UNREADABLE as error:
            raise UnreadablePicture(f"{self.name}: {_reason(error)}") from error


@dataclass(frozen=True, slots=True)
class Dataset:
    """All usable examples in the order of their names, and what was left out: "name: reason"."""

    examples: tuple[Example, ...]
    skipped: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A hash of names, captions and file sizes, by which a resumed run notices other data."""
        text = "\n".join(f"{e.name}\t{e.caption}\t{e.source.num_bytes}" for e in self.examples)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class UnreadablePicture(ValueError):
    """A picture cannot be decoded; the message names it and says why."""


def read_dataset(path: Path) -> Dataset:
    """Find the pictures of a folder (and its sub-folders and .tar shards), or of one .tar file.

    The caption of a picture is, in this order: the entry of a metadata.jsonl beside it (`file_name` and
    `caption` or `text`), the .txt file of the same name, or its file name with spaces for _ and -.

    Raises:
        InvalidSetting: nothing usable is there, or a metadata.jsonl is malformed.
    """
    if not path.exists():
        raise InvalidSetting("data", f"{path}: no such folder or .tar file")
    skipped: list[str] = []
    found = list(_found(path, skipped))
    if not found:
        listed = "".join(f"; {line}" for line in skipped[:3])
        raise InvalidSetting(
            "data",
            f"{path}: holds no picture that can be used ({', '.join(SUFFIXES)} with captions, "
            f"or .tar shards of them); {len(skipped)} were skipped{listed}",
        )
    return Dataset(tuple(sorted(found, key=lambda example: example.name)), tuple(skipped))


def _found(path: Path, skipped: list[str]) -> Iterator[Example]:
    if path.is_file():
        yield from _shard(path, path.name, skipped)
        return
    described: dict[Path, dict[str, str]] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if any(part.startswith(".") for part in relative.parts) or not file.is_file():
            continue
        if file.suffix.lower() == ".tar":
            yield from _shard(file, relative.as_posix(), skipped)
        elif file.suffix.lower() in SUFFIXES:
            source = Source(file, file.stat().st_size)
            captions = described.setdefault(file.parent, _metadata(file.parent / METADATA))
            given = captions.get(file.name, "")
            beside = file.with_suffix(".txt")
            text = Source(beside, beside.stat().st_size) if beside.is_file() else None
            yield from _example(relative.as_posix(), source, given, text, file.stem, skipped)


def _shard(path: Path, title: str, skipped: list[str]) -> Iterator[Example]:
    """Yield the examples of a tar file; members that share a name up to the first dot belong together."""
    pictures: dict[str, tuple[str, Source]] = {}
    captions: dict[str, Source] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.sparse is not None:
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key, source = f"{folder}/{stem}", Source(path, member.size, member.offset_data)
                suffix = f".{suffix.rpartition('.')[2].lower()}"
                if suffix in SUFFIXES:
                    pictures[key] = (stem, source)
                elif suffix in (".txt", ".json", ".caption") and not (suffix == ".json" and key in captions):
                    captions[key] = source
    except (tarfile.TarError, OSError) as error:
        skipped.append(f"{title}: {_reason(error)}")
    for key, (stem, source) in pictures.items():
        name = f"{title}/{key.lstrip('/')}"
        yield from _example(name, source, "", captions.get(key), stem, skipped)


def _example(
    name: str, source: Source, given: str, text: Source | None, stem: str, skipped: list[str]
) -> Iterable[Example]:
    """Return the example, or add the reason to `skipped`: an unreadable header or an overlong caption."""
    try:
        if source.num_bytes > MAX_FILE_BYTES:
            raise ValueError(f"{source.num_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        words = " ".join((given or _written(text) or _words(stem)).split())
        if len(words) > MAX_CAPTION:
            raise ValueError(f"a caption of {len(words):,} characters; at most {MAX_CAPTION:,} are allowed")
        width, height = _size(source)
    except _UNREADABLE as error:
        skipped.append(f"{name}: {_reason(error)}")
        return ()
    return (Example(name, words, source, width, height),)


def _size(source: Source) -> tuple[int, int]:
    """Return width and height of the upright picture, from its header."""
    with Image.open(io.BytesIO(source.read()) if source.offset else source.path) as image:
        width, height = image.size
        # Without EXIF data before the pixels of a PNG, `getexif` would decode them to look behind them.
        is_silent = image.format == "PNG" and "exif" not in image.info
        turned = not is_silent and image.getexif().get(_ORIENTATION, 1) >= 5
        return (height, width) if turned else (width, height)


def _metadata(path: Path) -> dict[str, str]:
    """Return captions by file name from a metadata.jsonl, if there is one."""
    captions: dict[str, str] = {}
    if not path.is_file():
        return captions
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[str(entry["file_name"])] = _caption_of(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidSetting(
                "data", f"{path}, line {number}: must be a JSON object with file_name and caption or text"
            ) from error
    return captions


def _caption_of(entry: dict[str, object]) -> str:
    return next((str(entry[key]) for key in _CAPTION_KEYS if isinstance(entry.get(key), str)), "")


def _written(source: Source | None) -> str:
    if source is None:
        return ""
    text = _decoded(source)
    if not text.lstrip().startswith("{"):
        return text
    try:
        entry = json.loads(text)
    except ValueError:
        return text
    return _caption_of(entry) if isinstance(entry, dict) else text


def _decoded(source: Source) -> str:
    if source.num_bytes > 4 * MAX_CAPTION:
        raise ValueError(f"a caption of {source.num_bytes:,} bytes; at most {4 * MAX_CAPTION:,} are allowed")
    return source.read().decode("utf-8", errors="replace")


def _words(stem: str) -> str:
    return stem.replace("_", " ").replace("-", " ")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that can be read"
    return (str(error).splitlines() or [type(error).__name__])[0]
