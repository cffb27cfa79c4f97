"""Pictures in a bucket: every server reads what any has kept, whole, and each removes what nobody needs."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.errors import DamagedFile, NotFound, SettingsError, StorageAway
from app.storage import bucket as bucket_module
from app.storage.bucket import COPY_SECONDS, HOUR, Bucket, BucketImages, BucketInputs
from app.storage.images import StoredImage
from app.storage.inputs import GRACE_SECONDS
from app.storage.writing import UNFINISHED
from tests.app.pictures import kept
from tests.s3 import S3, TestBucket

CONTENT = os.urandom(300_000)


class Servers:
    """Two servers on one bucket, with a clock that the test sets."""

    def __init__(self, tmp_path: Path, bucket: TestBucket) -> None:
        self.now = time.time()
        self.folders = [tmp_path / "one", tmp_path / "two"]
        opened = [Bucket.open(bucket.url) for _ in self.folders]
        for folder in self.folders:
            (folder / "files").mkdir(parents=True)
            (folder / "inputs").mkdir()
        self.images = [
            BucketImages(bucket, folder / "files", 10 * HOUR, lambda: self.now)
            for bucket, folder in zip(opened, self.folders, strict=True)
        ]
        self.inputs = [
            BucketInputs(bucket, folder / "inputs", 10_000, lambda: self.now)
            for bucket, folder in zip(opened, self.folders, strict=True)
        ]

    def copies(self, number: int, kind: str) -> list[str]:
        return [path.name for path in (self.folders[number] / kind).iterdir() if path.name != ".lock"]


@pytest.fixture
def servers(tmp_path: Path, bucket: TestBucket) -> Servers:
    return Servers(tmp_path, bucket)


def test_opening_leaves_nothing(servers: Servers, bucket: TestBucket) -> None:
    assert bucket.keys() == []


def test_a_picture_is_the_same_on_every_server(servers: Servers, bucket: TestBucket) -> None:
    name = kept(servers.images[0], CONTENT, "webp")
    assert bucket.keys() == [f"pictures/{name}"]
    assert (bucket.folder / "pictures" / name).read_bytes() == CONTENT
    for images in servers.images:
        assert images.examine(name) == StoredImage(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        assert images.read(name) == CONTENT
        assert images.read_part(name, 100_000, 50_000) == CONTENT[100_000:150_000]


def test_a_copy_spares_the_bucket_and_is_not_needed(servers: Servers, bucket: TestBucket) -> None:
    one, two = servers.images
    name = kept(one, CONTENT, "png")
    two.examine(name)
    assert servers.copies(0, "files") == servers.copies(1, "files") == [name]
    bucket.s3.stop()
    assert one.read(name) == two.read(name) == CONTENT
    bucket.s3.start()
    (servers.folders[0] / "files" / name).unlink()
    assert one.read_part(name, 0, 100) == CONTENT[:100]


def test_without_room_for_a_copy_the_picture_is_kept_and_served(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for images in servers.images:
        name = kept(images, CONTENT, "png")
        assert images.read(name) == CONTENT
        assert images.read_part(name, 10, 10) == CONTENT[10:20]
    assert servers.copies(0, "files") == []


def test_without_room_for_a_copy_the_parts_of_a_picture_are_one_read(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    name = kept(servers.images[0], CONTENT, "png")
    monkeypatch.setattr(os, "fsync", full)
    reads = []
    read = Bucket.read

    def counted(bucket: Bucket, key: str) -> bytes | None:
        reads.append(key)
        return read(bucket, key)

    monkeypatch.setattr(Bucket, "read", counted)
    servers.images[1].examine(name)
    parts = [servers.images[1].read_part(name, start, 50_000) for start in range(0, 300_000, 50_000)]
    assert b"".join(parts) == CONTENT
    assert len(reads) == 1


def test_threads_that_copy_the_same_picture_do_not_disturb_each_other(servers: Servers) -> None:
    with ThreadPoolExecutor(6) as threads:
        for _ in range(20):
            name = kept(servers.images[0], os.urandom(500_000), "png")
            found = list(threads.map(servers.images[1].examine, [name] * 6))
            assert {image.size_bytes for image in found} == {500_000}
            assert servers.copies(1, "files").count(name) == 1
    assert not [copy for copy in servers.copies(1, "files") if copy.endswith(UNFINISHED)]


def test_what_was_damaged_in_the_bucket_is_not_served(servers: Servers, bucket: TestBucket) -> None:
    name = kept(servers.images[0], CONTENT, "png")
    (bucket.folder / "pictures" / name).write_bytes(CONTENT[:-1])
    with pytest.raises(DamagedFile, match=name):
        servers.images[1].examine(name)


@pytest.mark.parametrize("name", ["", "..", "../x.png", "probe", "a" * 32 + ".png", "a" * 32 + ".png/x"])
def test_other_names_open_nothing(servers: Servers, bucket: TestBucket, name: str) -> None:
    (bucket.folder.parent / "x.png").parent.mkdir(parents=True, exist_ok=True)
    (bucket.folder.parent / "x.png").write_bytes(b"not ours")
    with pytest.raises(NotFound):
        servers.images[0].examine(name)
    assert servers.images[0].remove([name]) == 0
    assert (bucket.folder.parent / "x.png").exists()
    with pytest.raises(NotFound):
        servers.inputs[0].read(name)


def test_pictures_are_removed_for_all(servers: Servers, bucket: TestBucket) -> None:
    one, two = servers.images
    stays, gone = (kept(one, content, "png") for content in (b"kept", b"gone"))
    assert two.remove([gone]) == 0  # there was no copy
    assert bucket.keys() == [f"pictures/{stays}"]
    assert one.remove([gone, stays]) == 2
    assert bucket.keys() == []


def test_expired_pictures_are_removed_once_an_hour(servers: Servers, bucket: TestBucket) -> None:
    one, two = servers.images
    old, young = (kept(one, content, "png") for content in (b"old", b"young"))
    written = servers.now
    for name, age in ((old, 10 * HOUR + 1), (young, 9 * HOUR)):
        os.utime(bucket.folder / "pictures" / name, (written - age, written - age))
    assert two.sweep() == 1
    assert bucket.keys() == [f"pictures/{young}"]
    os.utime(bucket.folder / "pictures" / young, (written - 11 * HOUR, written - 11 * HOUR))
    assert two.sweep() == 0
    servers.now += HOUR
    assert two.sweep() == 1
    assert bucket.keys() == []


def test_what_is_not_ours_stays_and_holds_nothing_up(servers: Servers, bucket: TestBucket) -> None:
    strange = [
        "inputs/README.txt",
        "pictures/holiday/IMG_0001.jpg",
        "pictures/logo.png",
        f"inputs/{'0' * 64}/notes.txt",
    ]
    for key in strange:
        path = bucket.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (servers.now - 99 * HOUR, servers.now - 99 * HOUR))
    name = servers.inputs[0].save(CONTENT)
    servers.now += 2 * HOUR
    assert servers.images[0].sweep() == 0
    assert servers.inputs[1].old() == [name]
    servers.inputs[1].remove([name, "0" * 64])
    assert bucket.keys() == sorted(strange)


def test_copies_are_removed_earlier(servers: Servers, bucket: TestBucket) -> None:
    name = kept(servers.images[0], CONTENT, "png")
    servers.now += COPY_SECONDS + 1
    bucket_time = (servers.now, servers.now)
    os.utime(bucket.folder / "pictures" / name, bucket_time)
    assert servers.images[0].sweep() == 1
    assert servers.copies(0, "files") == []
    assert servers.images[0].read(name) == CONTENT


def test_an_input_is_read_by_every_server(servers: Servers, bucket: TestBucket) -> None:
    name = servers.inputs[0].save(CONTENT)
    assert name == hashlib.sha256(CONTENT).hexdigest() == servers.inputs[1].save(CONTENT)
    assert len(bucket.keys()) == 1
    (servers.folders[1] / "inputs" / name).unlink()
    assert [inputs.read(name) for inputs in servers.inputs] == [CONTENT, CONTENT]
    with pytest.raises(NotFound):
        servers.inputs[0].read("0" * 64)


def test_an_old_input_is_removed_everywhere(servers: Servers, bucket: TestBucket) -> None:
    one, two = servers.inputs
    name = one.save(CONTENT)
    assert (one.old(), two.old()) == ([], [])
    servers.now += GRACE_SECONDS + 1
    assert one.old() == [name]
    assert one.remove([name]) == 1  # the copy: in the bucket it may be wanted again
    assert two.read(name) == CONTENT
    servers.now += 2 * HOUR
    assert two.old() == [name]
    two.remove([name])
    assert bucket.keys() == []
    with pytest.raises(NotFound):
        one.read(name)


def test_an_input_that_is_wanted_again_is_not_removed(servers: Servers, bucket: TestBucket) -> None:
    one, two = servers.inputs
    name = one.save(CONTENT)
    servers.now += 2 * HOUR
    assert two.old() == [name]
    one.save(CONTENT)  # between another server's look and its removal
    two.remove([name])
    assert len(bucket.keys()) == 1
    assert two.read(name) == CONTENT


def test_the_bucket_is_looked_through_once_an_hour(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    servers.images[0].sweep()
    servers.inputs[0].old()
    monkeypatch.setattr(Bucket, "find", None)
    assert (servers.images[0].sweep(), servers.inputs[0].old()) == (0, [])
    servers.now += HOUR
    with pytest.raises(TypeError):
        servers.images[0].sweep()


def test_a_bucket_that_is_away_is_temporary(
    servers: Servers, bucket: TestBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = kept(servers.images[0], CONTENT, "png")
    bucket.s3.stop()
    for call in (
        lambda: kept(servers.images[0], CONTENT, "png"),
        lambda: servers.images[1].read(name),
        servers.images[1].sweep,
        lambda: servers.inputs[0].save(CONTENT),
        servers.inputs[0].old,
    ):
        with pytest.raises(StorageAway) as caught:
            call()
        assert caught.value.status == 503
        assert "Retry-After" in caught.value.headers
        assert "127.0.0.1" in caught.value.reason
        assert "127.0.0.1" not in caught.value.message
    bucket.s3.start()
    servers.images[1].sweep()
    assert servers.images[1].read(name) == CONTENT
    assert servers.inputs[0].read(servers.inputs[0].save(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_ACCESS_KEY_ID", "somebody", "403 Forbidden"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1", "127.0.0.1:1"),
        (None, "s3://no-such-bucket", "NoSuchBucket"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_told_at_the_start(
    bucket: TestBucket, monkeypatch: pytest.MonkeyPatch, name: str | None, value: str, told: str
) -> None:
    if name is not None:
        monkeypatch.setenv(name, value)
    url = value if name is None else bucket.url
    with pytest.raises(SettingsError) as caught:
        Bucket.open(url)
    assert f"CASCADE_BUCKET_URL: {url} cannot be used: " in str(caught.value)
    assert told in str(caught.value)
    assert "Debug source" not in str(caught.value)


def test_the_library_is_named_if_it_is_missing(
    bucket: TestBucket, monkeypatch: pytest.MonkeyPatch, s3: S3
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(SettingsError, match=r"stable-cascade-server\[s3\]"):
        bucket_module.Bucket.open(bucket.url)
