"""Pictures that came with requests: kept by content, there after a crash, gone when nobody needs them."""

import hashlib
import os
from pathlib import Path

import pytest

from app.errors import DamagedFile, NotFound, StorageFull
from app.storage.inputs import GRACE_SECONDS, InputStore


@pytest.fixture
def now() -> list[float]:
    return [1_000_000.0]


@pytest.fixture
def store(tmp_path: Path, now: list[float]) -> InputStore:
    return InputStore(tmp_path, 10_000, clock=lambda: now[0])


def test_the_name_is_the_digest_and_one_content_is_one_file(store: InputStore, tmp_path: Path) -> None:
    name = store.save(b"a picture")
    assert name == hashlib.sha256(b"a picture").hexdigest() == store.save(b"a picture")
    assert store.read(name) == b"a picture"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [name]


@pytest.mark.parametrize("name", ["", "..", "../secret", "0" * 63, "0" * 64 + "/", "G" * 64, "0" * 64])
def test_nothing_else_can_be_read(store: InputStore, name: str) -> None:
    with pytest.raises(NotFound):
        store.read(name)


def test_damage_is_seen(store: InputStore, tmp_path: Path) -> None:
    name = store.save(b"a picture")
    (tmp_path / name).write_bytes(b"another one")
    with pytest.raises(DamagedFile):
        store.read(name)


def test_what_is_old_can_be_removed_and_what_is_wanted_again_is_new(
    store: InputStore, tmp_path: Path, now: list[float]
) -> None:
    names = [store.save(content) for content in (b"one", b"two")]
    unfinished = tmp_path / "ab.partial"
    unfinished.write_bytes(b"")
    for path in (unfinished, *(tmp_path / name for name in names)):
        os.utime(path, (now[0], now[0]))
    assert store.old() == []
    assert store.remove(names) == 0
    now[0] += GRACE_SECONDS + 1
    assert sorted(store.old()) == sorted(names)
    store.save(b"two")  # between the look and the removal
    assert store.remove([*names, "../secret"]) == 2
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [names[1]]


def test_a_full_disk_leaves_nothing_half(
    store: InputStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        store.save(b"a picture")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_a_folder_without_room_for_its_lock_is_full(
    store: InputStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageFull, match="the picture that came"):
        store.save(b"a picture")


def test_a_picture_that_is_there_already_has_its_name_on_the_disk(
    store: InputStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(b"a picture")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda opened: synced.append(Path(f"/proc/self/fd/{opened}").readlink()))
    store.save(b"a picture")
    assert synced == [tmp_path]
