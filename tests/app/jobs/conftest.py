"""Databases for the tests of the store: SQLite in memory, and a PostgreSQL of our own."""

import asyncio
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS
from app.jobs.store import JobStore
from tests.app.jobs.stores import Clock, empty

MEMORY = Path("/dev/shm")  # a commit does not wait for a disk there
NOBODY = "postgres", "nobody"


def find_postgresql() -> Path | None:
    """The folder of PostgreSQL's programs; distributions do not put it on the path."""
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if found := shutil.which("pg_ctl"):
        folders.insert(0, Path(found).resolve().parent)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None, prefix="jobs-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a database that lives as long as the session."""
    programs = find_postgresql()
    if programs is None:
        reason = "PostgreSQL is not installed: apt install postgresql"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
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


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database of either kind, that has tables after the first test."""
    if request.param == "sqlite":
        return f"sqlite:///{request.getfixturevalue('memory')}/jobs.db"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest.fixture(scope="session")
def databases() -> Iterator[dict[str, Database]]:
    """Kept from test to test: most of a short test would be compiling its statements anew."""
    databases: dict[str, Database] = {}
    yield databases
    for database in databases.values():
        asyncio.run(database.close())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(database_url: str, databases: dict[str, Database], clock: Clock) -> AsyncIterator[JobStore]:
    """A store without jobs, on the test's own time."""
    if database_url not in databases:
        databases[database_url] = await Database.open(database_url, NO_FAULTS)
    database = databases[database_url]
    await database.write(empty)
    yield JobStore(database, clock.wall, clock.steady, NO_FAULTS)
    if not database_url.startswith("sqlite"):
        await (
            database.close()
        )  # its connections belong to this test's event loop; the next test opens new ones


async def execute(url: str, *statements: str) -> None:
    """Behind the store's back, each at once."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        for statement in statements:
            await connection.exec_driver_sql(statement)
    await engine.dispose()
