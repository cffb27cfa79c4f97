"""Seats: a name that outlives its holder, and never two holders of one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.jobs.server_lock import lock_server


def test_whoever_comes_after_has_the_same_name(tmp_path: Path) -> None:
    first = lock_server(tmp_path, is_sole=True)
    first.leave()
    second = lock_server(tmp_path, is_sole=True)
    assert second.name == first.name
    assert len(second.name) == 16
    second.leave()


def test_a_sole_server_refuses_company(tmp_path: Path) -> None:
    lock = lock_server(tmp_path, is_sole=True)
    with pytest.raises(SettingsError, match="another server works in"):
        lock_server(tmp_path, is_sole=True)
    lock.leave()


def test_servers_that_share_a_folder_have_names_of_their_own(tmp_path: Path) -> None:
    locks = [lock_server(tmp_path, is_sole=False) for _ in range(3)]
    assert len({lock.name for lock in locks}) == 3
    locks[1].leave()
    again = lock_server(tmp_path, is_sole=False)
    assert again.name == locks[1].name
    for lock in (locks[0], locks[2], again):
        lock.leave()


@pytest.mark.parametrize("torn", ["", "abc", "0123456789abcde\n"])
def test_a_torn_name_is_replaced(tmp_path: Path, torn: str) -> None:
    (tmp_path / "server-0.lock").write_text(torn)
    lock = lock_server(tmp_path, is_sole=True)
    assert len(lock.name) == 16
    assert (tmp_path / "server-0.lock").read_text() == lock.name
    lock.leave()


def test_a_killed_holder_frees_its_seat_although_its_children_live(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from app.jobs.server_lock import lock_server\n"
        "lock = lock_server(Path(sys.argv[1]), is_sole=True)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(SettingsError):
            lock_server(tmp_path, is_sole=True)
        holder.kill()
        holder.wait()
        try:
            lock_server(tmp_path, is_sole=True).leave()
        finally:
            os.kill(child, signal.SIGKILL)
