"""The folder of pictures: whole files or none, random names, nothing outside, nothing for ever."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from app.errors import DamagedFile, NotFound, StorageFull
from app.storage.images import ImageStore
from tests.app.pictures import kept


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path, ttl_seconds=100)


def test_what_was_saved_is_read_back(store: ImageStore) -> None:
    content = os.urandom(200_000)
    name = kept(store, content, "webp")
    assert store.read(name) == content
    stored = store.examine(name)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    assert stored.size_bytes == len(content)
    assert store.read_part(name, 150_000, 50_000) == content[150_000:]


def test_a_damaged_picture_is_named_and_never_served(store: ImageStore, tmp_path: Path) -> None:
    content = os.urandom(1000)
    name = kept(store, content, "png")
    assert store.read(name) == content
    for damaged in (content[:-1], content[:500] + b"x" + content[501:], b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DamagedFile) as caught:
            store.examine(name)
        with pytest.raises(DamagedFile):
            store.read(name)
        found = hashlib.sha256(damaged).hexdigest()
        assert name in caught.value.message
        assert found in caught.value.message
        assert hashlib.sha256(content).hexdigest()[:16] in caught.value.message


def test_pictures_are_removed_by_name_and_nothing_else(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    stays, gone = kept(store, b"kept", "png"), kept(store, b"gone", "png")
    assert store.remove([gone, gone, "secret", "../secret", "a" * 32 + ".png"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([stays, "secret"])


def test_names_are_random(store: ImageStore) -> None:
    names = {kept(store, b"same", "png") for _ in range(50)}
    assert len(names) == 50
    assert all(len(name) == 36 for name in names)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x.png", "/etc/passwd", "secret", "a" * 32, "a" * 32 + ".png\n", "a" * 32 + ".png/x"],
)
def test_other_names_open_nothing(store: ImageStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(NotFound):
        store.examine(name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_an_error_and_leaves_nothing(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageFull):
            kept(store, b"x" * 1000, "png")
    assert list(tmp_path.iterdir()) == []
    kept(store, b"x", "png")


def test_other_errors_of_the_disk_are_not_hidden(store: ImageStore, tmp_path: Path) -> None:
    tmp_path.rmdir()
    with pytest.raises(FileNotFoundError):
        kept(store, b"x", "png")
    tmp_path.mkdir()


def test_old_pictures_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    now = 1_000_000.0
    store = ImageStore(tmp_path, ttl_seconds=100, clock=lambda: now)
    old, young = kept(store, b"old", "png"), kept(store, b"young", "png")
    (tmp_path / f"{old}.partial").write_bytes(b"ol")
    (tmp_path / "not-ours.png").write_bytes(b"x")
    os.utime(tmp_path / old, (now - 101, now - 101))
    os.utime(tmp_path / f"{old}.partial", (now - 101, now - 101))
    os.utime(tmp_path / "not-ours.png", (now - 101, now - 101))
    os.utime(tmp_path / young, (now - 99, now - 99))
    assert store.sweep() == 2
    assert {path.name for path in tmp_path.iterdir()} == {young, "not-ours.png"}


@pytest.mark.parametrize("now", [1_000_000.0, 4_000_000_000.0])
def test_the_age_of_a_picture_is_told_by_one_clock(tmp_path: Path, now: float) -> None:
    """Whatever the system's clock says when the file is written."""
    clock = iter([now, now + 99, now + 101])
    store = ImageStore(tmp_path, ttl_seconds=100, clock=lambda: next(clock))
    kept(store, b"x", "png")
    assert [store.sweep(), store.sweep()] == [0, 1]


def test_a_picture_that_was_removed_or_cut_while_it_is_read_ends_there(
    store: ImageStore, tmp_path: Path
) -> None:
    name = kept(store, b"content", "png")
    (tmp_path / name).write_bytes(b"cont")
    with pytest.raises(DamagedFile, match="ends before byte 7"):
        store.read_part(name, 0, 7)
    (tmp_path / name).unlink()
    with pytest.raises(NotFound):
        store.read_part(name, 0, 4)
