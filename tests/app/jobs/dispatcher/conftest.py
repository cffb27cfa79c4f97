"""Servers on databases in memory."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.jobs import chores, keeping
from app.jobs.fleet import Fleet
from app.jobs.store import JobStore
from tests.app.jobs.servers import Server

Serve = Callable[..., Awaitable[Server]]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(keeping, "FIRST_PAUSE", 0.001)


@pytest.fixture
def claims_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is claimed as it is accepted, as if there were no room in that moment."""
    monkeypatch.setattr(Fleet, "_roomiest_for", lambda *_: None)


@pytest.fixture
def no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is claimed from the queue but at the start and when there is news."""
    monkeypatch.setattr(chores, "ROUND_SECONDS", 60.0)


@pytest.fixture
async def folder(memory: Path) -> AsyncIterator[Path]:
    """With an empty database."""
    empty = memory / "empty.db"
    if not empty.exists():
        await (await JobStore.open(f"sqlite:///{empty}")).close()
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        shutil.copy(empty, f"{folder}/jobs.db")
        yield Path(folder)


@pytest.fixture
def url(folder: Path) -> str:
    return f"sqlite:///{folder}/jobs.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[JobStore]:
    store = await JobStore.open(url)
    yield store
    await store.close()


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
