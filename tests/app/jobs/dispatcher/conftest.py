"""Servers on databases in memory."""

import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.jobs import maintenance, results
from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS, Faults
from app.jobs.fleet import Fleet
from app.jobs.store import JobStore
from tests.app.jobs.conftest import sqlite_url
from tests.app.jobs.servers import Server
from tests.app.jobs.stores import kept

Serve = Callable[..., Awaitable[Server]]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(results, "FIRST_PAUSE", 0.001)


@pytest.fixture
def claims_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is claimed as it is accepted, as if there were no room in that moment."""
    monkeypatch.setattr(Fleet, "_roomiest_for", lambda *_: None)


@pytest.fixture
def no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is claimed from the queue but at the start and when there is news."""
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 60.0)


@pytest.fixture
def folder(memory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def url(memory: Path) -> str:
    """The database of all tests, empty at the beginning of each that asks for `store`."""
    return sqlite_url(memory)


@pytest.fixture
async def database(url: str, databases: dict[str, Database]) -> Database:
    """One without jobs."""
    return await kept(url, databases)


@pytest.fixture
def store(database: Database) -> JobStore:
    """A store without jobs."""
    return store_of(database)


def store_of(database: Database, faults: Faults = NO_FAULTS) -> JobStore:
    """What another server has of the same database, or one with faults."""
    return JobStore(Database(database._reader, database._writer, faults), time.time, time.monotonic, faults)


@pytest.fixture
async def serve(folder: Path, store: JobStore) -> AsyncIterator[Serve]:
    """`await serve(setting=...)`: a server that is ready, on `store` or on its own."""
    servers: list[Server] = []

    async def serve(**options: Any) -> Server:
        servers.append(Server(folder, options.pop("store", store), **options))
        return await servers[-1].start()

    yield serve
    for server in servers:
        await server.stop()
