"""What is removed when its time is over; what a full disk, or a caller who leaves, does to the store."""

import asyncio
import random
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, func, select, text

from app.errors import SettingsError, StorageFull
from app.jobs import database
from app.jobs import store as store_module
from app.jobs.job import Job, JobStatus
from app.jobs.keys import Idempotency
from app.jobs.store import JobStore
from app.jobs.tables import metadata
from app.storage.writing import Space
from tests.app.jobs.conftest import execute
from tests.app.jobs.stores import MANY, Clock, add, add_running, new_image, new_job, stored

pytestmark = pytest.mark.anyio

FULL_DISK = """
CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER full_disk BEFORE INSERT ON pictures EXECUTE FUNCTION full_disk()
"""


async def end(store: JobStore, clock: Clock, *, with_image: str | None = None) -> Job:
    job = await add_running(store)
    if with_image is not None:
        await store.save_image(job, new_image(name=with_image))
    ended = job.canceled(clock.now)
    await store.move(job, ended)
    return ended


async def test_old_jobs_are_forgotten_and_their_files_named(
    store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PRUNED_AT_ONCE", 2)
    old = [await end(store, clock, with_image=f"{number}.png") for number in range(5)]
    clock.let_pass(10)
    young, running = await end(store, clock, with_image="young.png"), await add_running(store)
    assert sorted(await store.prune(clock.now)) == [f"{number}.png" for number in range(5)]
    assert [await store.get(job.id, None) for job in old] == [None] * 5
    assert (await stored(store, young)).images[0].name == "young.png"
    assert (await stored(store, running)).status == JobStatus.RUNNING
    assert await store.prune(clock.now) == []


@pytest.mark.parametrize("is_pruned", [True, False], ids=["pruned", "deleted"])
async def test_nothing_of_a_forgotten_job_stays(store: JobStore, clock: Clock, is_pruned: bool) -> None:
    def count(connection: Connection) -> int:
        sizes = [select(func.count()).select_from(table) for table in metadata.tables.values()]
        return sum(connection.execute(size).scalar_one() for size in sizes)

    key = Idempotency("key", "fingerprint")
    job = (await store.submit(new_job(num_images=2), max_queue=MANY, idempotency=key)).job
    assert await store._database.read(count) == 4
    await store.request_cancel(job.id, None)
    await (store.prune(clock.now + 1) if is_pruned else store.delete(job.id, None))
    assert await store._database.read(count) == 0


async def test_old_keys_are_forgotten(store: JobStore, clock: Clock) -> None:
    def count(connection: Connection) -> int:
        return connection.execute(text("SELECT count(*) FROM idempotency")).scalar_one()

    await store.submit(new_job(), max_queue=MANY, idempotency=Idempotency("old", "x", ttl_seconds=10))
    await store.submit(new_job(), max_queue=MANY, idempotency=Idempotency("young", "x", ttl_seconds=11))
    clock.let_pass(10)
    await store.prune(0)
    assert await store._database.read(count) == 1


@pytest.fixture
async def full_store(store: JobStore) -> AsyncIterator[JobStore]:
    """A store whose disk has no room left, until the test is over."""

    def fill(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            for statement in FULL_DISK.split(";\n"):
                connection.exec_driver_sql(statement)
        else:
            connection.exec_driver_sql(
                "PRAGMA max_page_count = 1"
            )  # it is as large as it is, and may not grow

    await store._database.write(fill)
    yield store
    await store._database.write(make_room)


def make_room(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("DROP FUNCTION IF EXISTS full_disk CASCADE")
    else:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")


async def test_a_full_disk_is_told_and_heals(full_store: JobStore) -> None:
    large = new_job(metadata={"m": "x" * 100_000})
    with pytest.raises(StorageFull):
        await full_store.submit(large, max_queue=MANY)
    assert await full_store.get(large.id, None) is None
    await full_store._database.write(make_room)
    await add(full_store, large)


async def test_whether_there_is_room_again_is_tried_without_a_trace(
    full_store: JobStore,
) -> None:
    with pytest.raises(StorageFull):
        await add(full_store, *(new_job() for _ in range(1000)))  # some find room in the pages that there are
    before = await full_store.counts()
    with pytest.raises(StorageFull):
        await full_store.try_to_submit()
    await full_store._database.write(make_room)
    await full_store.try_to_submit()
    assert await full_store.counts() == before
    assert await full_store.claim("one", limit=1, lease_seconds=1, without=["ann"]) == []


async def test_without_room_a_key_still_finds_its_job(store: JobStore) -> None:
    key, job = Idempotency("key", "fingerprint"), new_job()
    with pytest.raises(StorageFull, match="no room to keep another job"):
        await store.submit(job, max_queue=MANY, idempotency=key, has_room=False)
    await store.submit(job, max_queue=MANY, idempotency=key)
    again = await store.submit(new_job(), max_queue=MANY, idempotency=key, has_room=False)
    assert (again.is_replay, again.job.id) == (True, job.id)


async def test_a_database_that_cannot_be_opened_for_want_of_space_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs.db").mkdir()
    url = f"sqlite:///{tmp_path}/jobs.db"
    with pytest.raises(SettingsError, match=r"^(?!.*no space left)"):
        await JobStore.open(url)
    monkeypatch.setattr(database, "space_of", lambda _: Space(free=1000, total=2**30))
    with pytest.raises(SettingsError, match=f"there is no space left in {tmp_path} "):
        await JobStore.open(url)


async def test_a_caller_who_leaves_leaves_nothing_half_done(store: JobStore) -> None:
    chance = random.Random(7)
    accepted: list[Job] = []

    async def submit() -> None:
        accepted.append((await store.submit(new_job(num_images=2), max_queue=MANY)).job)

    for _ in range(20):
        calls = [asyncio.create_task(call) for call in (submit(), store.counts(), store.list("ann", limit=1))]
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    await store.submit(new_job(), max_queue=MANY)
    for job in accepted:
        assert await stored(store, job) == job


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "must be like"),
        ("mysql://root:secret@localhost/jobs", "PostgreSQL or in a file of SQLite"),
        ("sqlite://", "PostgreSQL or in a file of SQLite"),
        ("sqlite:////dev/null/jobs.db", "cannot be used"),
        ("postgresql://ann:secret@/jobs?host=/nowhere", "cannot be used"),
    ],
)
async def test_a_database_that_cannot_be_used_is_named_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as refused:
        await JobStore.open(url)
    assert "secret" not in str(refused.value)


async def test_the_store_outlives_a_restart_of_postgresql(postgresql: str) -> None:
    store = await JobStore.open(postgresql)
    await store.counts()
    await execute(
        postgresql, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
    )
    await store.counts()
    await store.close()


async def test_prompts_are_for_the_server_alone(tmp_path: Path) -> None:
    store = await JobStore.open(f"sqlite:///{tmp_path}/new/jobs.db")
    await add(store, new_job())
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    await store.close()
    assert {"jobs.db", "jobs.db-wal"} <= modes.keys()
    assert set(modes.values()) == {"-rw-------"}
