"""A file appears whole, and its content and then its name are on the disk before anybody is told."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from app.errors import StorageFull
from app.storage.writing import space_of, write_whole


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, unfinished = tmp_path / "a", tmp_path / "a.partial"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_whole(path, b"content", unfinished=unfinished, what="it", now=1.0)
    assert synced == [(str(unfinished), False), (str(tmp_path), True)]
    assert (path.read_bytes(), unfinished.exists()) == (b"content", False)


def test_without_room_nothing_is_left_and_the_error_says_what_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="no room to keep the cat"):
        write_whole(tmp_path / "a", b"content", unfinished=tmp_path / "a.partial", what="the cat", now=1.0)
    assert list(tmp_path.iterdir()) == []


def fail_on_folders(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_keeps_files_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fail_on_folders(monkeypatch, code)
    write_whole(tmp_path / "a", b"content", unfinished=tmp_path / "a.partial", what="it", now=1.0)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]


@pytest.mark.parametrize(("code", "error"), [(errno.EIO, OSError), (errno.ENOSPC, StorageFull)])
def test_a_file_whose_name_is_not_on_the_disk_is_not_there_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    fail_on_folders(monkeypatch, code)
    with pytest.raises(error):
        write_whole(tmp_path / "a", b"content", unfinished=tmp_path / "a.partial", what="it", now=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_space_of_a_disk_is_told_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, usage = space_of(tmp_path), shutil.disk_usage(tmp_path)
    assert space is not None
    assert space.total == usage.total
    assert abs(space.free - usage.free) < 2**30
    assert space_of(tmp_path / "nowhere") is None
    silent = os.statvfs_result((4096, 4096, *[0] * 8))  # as some network file systems are
    monkeypatch.setattr(os, "statvfs", lambda _: silent)
    assert space_of(tmp_path) is None
