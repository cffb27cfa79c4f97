"""A PostgreSQL of our own, for tests and for those that kill servers."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NOBODY = "postgres", "nobody"


class NotInstalled(Exception):
    """There is no PostgreSQL on this machine."""


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a database that lives as long as the session."""
    try:
        with running_postgresql() as url:
            yield url
    except NotInstalled as error:
        if "CI" in os.environ:
            pytest.fail(str(error))
        pytest.skip(str(error))


@contextmanager
def running_postgresql() -> Iterator[str]:
    """The URL of a database that is there inside. Raises NotInstalled."""
    programs = find_postgresql()
    if programs is None:
        raise NotInstalled("PostgreSQL is not installed: apt install postgresql")
    with tempfile.TemporaryDirectory(prefix="postgresql-") as name:
        folder, identity = Path(name), give_away(Path(name))

        def run(program: str, *words: str) -> None:
            command = [str(programs / program), "-D", str(folder / "data"), *words]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, **identity
            )
            assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

        run("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "--username=tester")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "start", "--timeout=300", f"--log={folder / 'log'}", f"--options={options}")
        try:
            yield f"postgresql+asyncpg://tester@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "--timeout=300", "--mode=immediate")


def give_away(folder: Path) -> dict[str, Any]:
    """Let somebody else have a folder if we are root, as whom PostgreSQL refuses to run."""
    if os.geteuid() != 0:
        return {}
    names = {user.pw_name for user in pwd.getpwall()}
    user = next(name for name in NOBODY if name in names)
    shutil.chown(folder, user)
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def find_postgresql() -> Path | None:
    """The folder of PostgreSQL's programs; distributions do not put it on the path."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if found := shutil.which("pg_ctl"):
        folders.insert(0, Path(found).resolve().parent)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)
