"""Every way to the schema ends at the tables that the code knows."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from app.errors import SettingsError
from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS
from app.jobs.store import JobStore
from app.jobs.tables import metadata
from tests.app.jobs.conftest import execute
from tests.app.jobs.stores import add, new_job, stored

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bare_url(database_url: str, tmp_path: Path) -> str:
    """A database without even a table."""
    if database_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/new/folder/jobs.db"
    await execute(database_url, "DROP DATABASE IF EXISTS bare", "CREATE DATABASE bare")
    return database_url.replace("/postgres?", "/bare?")


@pytest.fixture
async def database(bare_url: str) -> AsyncIterator[Database]:
    database = await Database.open(bare_url, NO_FAULTS)
    yield database
    await database.close()


async def test_the_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    def differences(connection: Connection) -> list[Any]:
        return compare_metadata(MigrationContext.configure(connection), metadata)

    assert await database.write(differences) == []


async def test_cascades_and_the_order_of_arrival_are_those_of_the_tables(database: Database) -> None:
    """What Alembic does not compare."""

    def facts(connection: Connection) -> tuple[Any, Any]:
        found = inspect(connection)
        keys = [key for table in metadata.tables for key in found.get_foreign_keys(table)]
        rules = {(key["name"], key["options"].get("ondelete")) for key in keys}
        insert = text(
            "INSERT INTO jobs (id, tenant, status, priority, created_at, cost_seconds, on_disconnect, fence,"
            " crashes, cancel_requested, request, metadata, timings)"
            " VALUES (:id, '', 'queued', 0, 0, 0, '', 0, 0, false, '', '', '')"
        )
        connection.execute(insert, {"id": "first"})
        connection.execute(text("DELETE FROM jobs"))
        connection.execute(insert, {"id": "second"})
        return rules, connection.scalar(text("SELECT number FROM jobs"))

    rules, number = await database.write(facts)
    assert rules == {
        (f"fk_{table}_job_id", "CASCADE") for table in ("pictures", "inputs", "idempotency", "deliveries")
    }
    assert number == 2


async def test_servers_that_start_together_migrate_once(bare_url: str) -> None:
    stores = await asyncio.gather(*(JobStore.open(bare_url) for _ in range(4)))
    job = new_job()
    await add(stores[0], job)
    assert [await stored(store, job) for store in stores] == [job] * 4
    for store in stores:
        await store.close()


@pytest.mark.parametrize("lasts", [0.02, None])
async def test_a_new_file_that_somebody_locks_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasts: float | None
) -> None:
    """SQLite does not wait itself: who is about to write could want what we have."""
    path = tmp_path / "jobs.db"
    locking = sqlite3.connect(path, isolation_level=None)
    locking.execute("CREATE TABLE things (name)")
    locking.execute("BEGIN IMMEDIATE")
    if lasts is None:
        monkeypatch.setattr("app.jobs.database.BUSY_SECONDS", 0.02)
        with pytest.raises(SettingsError, match="locked"):
            await JobStore.open(f"sqlite:///{path}")
    else:
        loop = asyncio.get_running_loop()
        free_at = loop.time() + lasts
        loop.call_at(free_at, locking.close)
        await (await JobStore.open(f"sqlite:///{path}")).close()
        assert loop.time() >= free_at
    locking.close()


async def test_opening_again_keeps_the_jobs(bare_url: str) -> None:
    job = new_job()
    for _ in range(2):
        store = await JobStore.open(bare_url)
        if await store.get(job.id, None) is None:
            await add(store, job)
        await store.close()
    store = await JobStore.open(bare_url)
    assert await stored(store, job) == job
    await store.close()


async def test_the_database_of_a_newer_version_is_refused(bare_url: str, database: Database) -> None:
    def age(connection: Connection) -> None:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    await database.write(age)
    with pytest.raises(SettingsError, match="9999"):
        await JobStore.open(bare_url)
