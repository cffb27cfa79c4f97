"""Pictures in a bucket of S3, or of a program with its protocol, for servers that share no folder.

A server's own folder then holds copies of what it kept or read lately. What is written to a bucket is there
for every server from then on, whole or not at all.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
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

_CONNECT, _REQUEST, _RETRY = (timedelta(seconds=seconds) for seconds in (5, 30, 20))
_RETRIES = 2
_PROBE = "probe"
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
            oldest = self._clock() - self._kept_seconds
            expired = [key for key, written in self._bucket.find(_picture("")) if written < oldest]
            self._bucket.remove(expired)
            removed += len(expired)
            self._swept_hour = hour
        return removed

    def _write(self, name: str, content: bytes) -> None:
        self._bucket.write(_picture(name), content)
        self._copy(name, content)

    def _find(self, name: str) -> BufferedIOBase:
        try:
            return super()._find(name)
        except FileNotFoundError:
            content = self._bucket.read(_picture(name))
            if content is None:
                raise
        self._copy(name, content)
        return BytesIO(content)

    def _copy(self, name: str, content: bytes) -> None:
        with suppress(StorageFull, OSError):  # no room, or another thread does the same
            super()._write(name, content)


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
        self._bucket.write(f"{_input(name)}{_hour(self._clock)}", content)
        return name

    def old(self) -> list[str]:
        """Return names as InputStore does and, once an hour, of what is old in the bucket."""
        names = set(super().old())
        hour = _hour(self._clock)
        if hour != self._seen_hour:
            newest: dict[str, int] = {}
            for key, _ in self._bucket.find(_input("")):
                name, written = _parse(key)
                newest[name] = max(written, newest.get(name, 0))
            names.update(name for name, written in newest.items() if self._is_past(written))
            self._seen_hour = hour
        return list(names)

    def remove(self, names: Collection[str]) -> int:
        """Remove files that are still old; return how many. Raises StorageAway."""
        keys = [key for name in names for key, _ in self._bucket.find(_input(name))]
        self._bucket.remove(key for key in keys if self._is_past(_parse(key)[1]))
        return super().remove(names)

    def _find(self, name: str) -> bytes:
        try:
            return super()._find(name)
        except FileNotFoundError:
            keys = [key for key, _ in self._bucket.find(_input(name))]
            content = self._bucket.read(max(keys)) if keys else None
            if content is None:
                raise
            return content

    def _is_past(self, hour: int) -> bool:
        """Whether no request that is just being accepted can have written in that hour."""
        return hour < _hour(self._clock) - 1


def _picture(name: str) -> str:
    return f"pictures/{name}"


def _input(name: str) -> str:
    return f"inputs/{name}/" if name else "inputs/"


def _parse(key: str) -> tuple[str, int]:
    """Return name and hour of an input picture."""
    _, name, hour = key.split("/")
    return name, int(hour)


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
