"""Databases for the tests of the store: SQLite in memory, and a PostgreSQL of our own."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS
from app.jobs.store import JobStore
from tests.app.jobs.stores import Clock, kept

MEMORY = Path("/dev/shm")  # a commit does not wait for a disk there


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None, prefix="jobs-") as folder:
        yield Path(folder)


def sqlite_url(memory: Path) -> str:
    return f"sqlite:///{memory}/jobs.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A database of either kind, that has tables after the first test."""
    if request.param == "sqlite":
        return sqlite_url(request.getfixturevalue("memory"))
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
    database = await kept(database_url, databases)
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
