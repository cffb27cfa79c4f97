"""Pictures in a bucket of S3, or of a program with its protocol, for servers that share no folder.

A server's own folder then holds copies of what it kept or read lately. What is written to a bucket is there
for every server from then on, whole or not at all.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Self

from app.errors import SettingsError, StorageAway, StorageFull
from app.storage.images import NAME, ImageStore
from app.storage.inputs import InputStore

if TYPE_CHECKING:
    from obstore.store import S3Store

COPY_SECONDS = 3600.0  # that a server keeps its copy of a result
HOUR = 3600

# How long a bucket that hangs may hold up whoever calls it, and the end of a server.
_CONNECT, _REQUEST, _RETRY = (timedelta(seconds=seconds) for seconds in (3, 10, 10))
_RETRIES = 2
_PROBE = "probe"
_PICTURES, _INPUTS = "pictures", "inputs"
_INPUT = re.compile(rf"{_INPUTS}/(?P<name>[0-9a-f]{{64}})/(?P<hour>[0-9]+)")
_AWAY = "the store of pictures does not answer; try again later"


class Bucket:
    """A bucket, or what is below a prefix of one. Its methods use the network and raise StorageAway."""

    def __init__(self, store: "S3Store") -> None:
        self._store = store

    @classmethod
    def open(cls, url: str) -> Self:
        """Open `s3://BUCKET/PREFIX`. Credentials, region and endpoint are those of the `AWS_*` variables.

        Raises SettingsError if it cannot be written to, or the library is not installed.
        """
        try:
            from obstore.store import S3Store
        except ImportError as error:
            raise SettingsError(
                f"CASCADE_BUCKET_URL needs the extra: pip install 'stable-cascade-server[s3]' ({error})"
            ) from None
        name, _, prefix = url.removeprefix("s3://").partition("/")
        bucket = cls(
            S3Store(
                name,
                prefix=prefix or None,
                client_options={
                    "connect_timeout": _CONNECT,
                    "timeout": _REQUEST,
                    "allow_http": True,  # for an endpoint of the operator's; AWS's own is https://
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY},
            )
        )
        try:
            bucket.write(_PROBE, b"A server has started.")
            bucket.remove([_PROBE])
        except StorageAway as error:
            raise SettingsError(f"CASCADE_BUCKET_URL: {url} cannot be used: {error.reason}") from error
        return bucket

    def write(self, key: str, content: bytes) -> None:
        """Write an object, over the one that was there."""
        import obstore

        with _answering():
            obstore.put(self._store, key, content, use_multipart=False)

    def read(self, key: str) -> bytes | None:
        """Return an object; None if there is none."""
        import obstore

        with _answering():
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects, which need not be there."""
        import obstore

        if keys := list(keys):
            with _answering():
                obstore.delete(self._store, keys)

    def find(self, folder: str) -> Iterator[tuple[str, float]]:
        """Yield the keys of all objects below `folder`, and when they were written, in Unix seconds."""
        import obstore

        with _answering():
            for batch in obstore.list(self._store, folder):
                yield from ((found["path"], found["last_modified"].timestamp()) for found in batch)


class BucketImages(ImageStore):
    """Finished pictures in a bucket."""

    def __init__(self, bucket: Bucket, folder: Path, ttl_seconds: float, clock: Callable[[], float]) -> None:
        super().__init__(folder, min(ttl_seconds, COPY_SECONDS), clock)
        self._bucket = bucket
        self._kept_seconds = ttl_seconds
        self._swept_hour = 0
        self._uncopied = ("", b"")  # the last picture that found no room for a copy

    def save(self, content: bytes, name: str) -> None:
        """Keep `content` under a name that `new_name` made for it. Raises StorageAway."""
        self._bucket.write(_picture(name), content)
        self._copy(content, name)

    def remove(self, names: Iterable[str]) -> int:
        """Remove pictures, and return how many copies existed. Raises StorageAway."""
        names = [name for name in names if NAME.fullmatch(name)]
        self._bucket.remove(_picture(name) for name in names)
        return super().remove(names)

    def sweep(self) -> int:
        """Remove expired copies and, once an hour, expired pictures; return how many. Raises StorageAway."""
        removed = super().sweep()
        hour = _hour(self._clock)
        if hour != self._swept_hour:
            self._swept_hour = hour
            oldest = self._clock() - self._kept_seconds
            found = self._bucket.find(_PICTURES)
            expired = [key for key, written in found if written < oldest and _is_picture(key)]
            self._bucket.remove(expired)
            removed += len(expired)
        return removed

    def _find(self, name: str) -> BufferedIOBase:
        try:
            return super()._find(name)
        except FileNotFoundError:
            uncopied, content = self._uncopied
            if uncopied != name:
                content = self._read(name)
        return BytesIO(content)

    def _read(self, name: str) -> bytes:
        content = self._bucket.read(_picture(name))
        if content is None:
            raise FileNotFoundError(name)
        self._copy(content, name)
        return content

    def _copy(self, content: bytes, name: str) -> None:
        try:
            super().save(content, name)
        except (StorageFull, OSError):
            self._uncopied = name, content


class BucketInputs(InputStore):
    """Input pictures in a bucket.

    A bucket has no lock, by which InputStore keeps a picture that is just wanted again from being removed. So
    its key here has the hour: a request writes that of the present hour, and only those of long ago are
    removed. Servers' clocks may differ by as much.
    """

    def __init__(self, bucket: Bucket, folder: Path, max_pixels: int, clock: Callable[[], float]) -> None:
        super().__init__(folder, max_pixels, clock)
        self._bucket = bucket
        self._seen_hour = 0

    def save(self, content: bytes) -> str:
        """Store a file and return its name. Raises StorageAway and StorageFull."""
        name = super().save(content)
        self._bucket.write(f"{_input(name)}/{_hour(self._clock)}", content)
        return name

    def old(self) -> list[str]:
        """Return names as InputStore does and, once an hour, of what is old in the bucket."""
        names = set(super().old())
        hour = _hour(self._clock)
        if hour != self._seen_hour:
            self._seen_hour = hour
            newest: dict[str, int] = {}
            for _, name, written in self._written(_INPUTS):
                newest[name] = max(written, newest.get(name, 0))
            names.update(name for name, written in newest.items() if self._is_past(written))
        return list(names)

    def remove(self, names: Collection[str]) -> int:
        """Remove files that are still old; return how many. Raises StorageAway."""
        written = [entry for name in names for entry in self._written(_input(name))]
        self._bucket.remove(key for key, _, hour in written if self._is_past(hour))
        return super().remove(names)

    def _find(self, name: str) -> bytes:
        try:
            return super()._find(name)
        except FileNotFoundError:
            keys = [key for key, _, _ in self._written(_input(name))]
            content = self._bucket.read(max(keys)) if keys else None
            if content is None:
                raise
            return content

    def _written(self, folder: str) -> Iterator[tuple[str, str, int]]:
        """Yield key, name and hour of what is ours in a folder of the bucket."""
        for key, _ in self._bucket.find(folder):
            if match := _INPUT.fullmatch(key):
                yield key, match["name"], int(match["hour"])

    def _is_past(self, hour: int) -> bool:
        """Whether no request that is just being accepted can have written in that hour."""
        return hour < _hour(self._clock) - 1


def _picture(name: str) -> str:
    return f"{_PICTURES}/{name}"


def _is_picture(key: str) -> bool:
    return NAME.fullmatch(key.removeprefix(f"{_PICTURES}/")) is not None


def _input(name: str) -> str:
    return f"{_INPUTS}/{name}"


def _hour(clock: Callable[[], float]) -> int:
    """Return the number of hours since 1970; it has six digits until 2084."""
    return int(clock() // HOUR)


@contextmanager
def _answering() -> Iterator[None]:
    """Turn the library's errors into StorageAway, with what they say before they go into details."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        told = str(error).partition("Debug source:")[0]
        raise StorageAway(_AWAY, reason=" ".join(told.split())) from error
