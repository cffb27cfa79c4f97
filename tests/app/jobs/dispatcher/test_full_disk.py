"""A disk that is full for a while: nothing that was accepted is lost, and nobody waits for it in vain."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from app.errors import StorageFull
from app.jobs import disk_space, results
from app.jobs.job import JobStatus
from app.jobs.keys import Idempotency
from app.jobs.store import JobStore
from app.storage.writing import Space
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import Server, eventually, job, until

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_long_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(disk_space, "PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(results, "LONGEST_PAUSE", 0.01)


class Disk:
    """Takes nothing while it is full."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.is_full = True
        self.num_refused = 0

    def pictures(self, server: Server) -> None:
        """Is that of the pictures."""
        save = server.images.save

        def limited(content: bytes, name: str) -> None:
            self._take()
            save(content, name)

        self._patch.setattr(server.images, "save", limited)

    def rows(self, store: JobStore, *names: str) -> None:
        """Is that of the database, for methods of these names."""
        for name in names:
            self._patch.setattr(store, name, self._limited(getattr(store, name)))

    def _limited(self, write: Callable[..., Any]) -> Callable[..., Any]:
        async def limited(*arguments: Any, **details: Any) -> Any:
            self._take()
            return await write(*arguments, **details)

        return limited

    def _take(self) -> None:
        if self.is_full:
            self.num_refused += 1
            raise StorageFull("no room")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_a_picture_waits_for_room_but_nobody_for_the_picture(serve: Serve, disk: Disk) -> None:
    server = await serve()
    disk.pictures(server)
    accepted = await server.submit(5, 6)
    runs = await server.runs(2)
    server.engine.finish(*runs)
    with pytest.raises(StorageFull, match=accepted.id) as told:
        await server.ended(accepted)
    assert 1 <= int(told.value.headers["Retry-After"]) <= 59
    assert "x-should-retry" not in told.value.headers
    now = await server.store.get(accepted.id, None)
    assert now is not None
    assert (now.status, now.images) == (JobStatus.RUNNING, ())
    assert not server.dispatcher.has_room
    assert server.sample("cascade_out_of_room") == 1
    with pytest.raises(StorageFull, match="no room to keep another job"):
        await server.submit(7)
    with pytest.raises(StorageFull):
        await server.dispatcher.require_room("")
    assert server.sample("cascade_jobs_refused_total", code="insufficient_storage") == 2
    disk.is_full = False
    await until(lambda: server.dispatcher.has_room)
    done = await server.ended(accepted)
    assert (done.status, [image.seed for image in done.images]) == (JobStatus.SUCCEEDED, [5, 6])
    assert sorted(path.name for path in server.files.iterdir()) == sorted(image.name for image in done.images)
    assert len(server.engine.runs) == 2
    assert server.sample("cascade_out_of_room") == 0
    again = await server.submit(7)
    server.engine.finish((await server.runs(3))[2])
    assert (await server.ended(again)).status == JobStatus.SUCCEEDED
    log = server.log.getvalue()
    assert (log.count("there is no room left"), log.count("there is room again")) == (1, 1)
    assert '"reason": "no room"' in log
    assert "Traceback" not in log


async def test_who_was_sent_away_has_the_job_done_and_comes_back_with_the_key(
    serve: Serve, disk: Disk
) -> None:
    server = await serve()
    disk.pictures(server)
    key = Idempotency("key", "fingerprint")
    first = (await server.dispatcher.submit(job(5), key)).job
    server.engine.finish(*await server.runs(1))
    with pytest.raises(StorageFull), server.dispatcher.waiting(first):
        await server.ended(first)
    again = await server.dispatcher.submit(job(5), key)
    assert (again.is_replay, again.job.id, again.job.status) == (True, first.id, JobStatus.RUNNING)
    with pytest.raises(StorageFull, match="another job"):
        await server.dispatcher.submit(job(6), Idempotency("other key", "fingerprint"))
    disk.is_full = False
    await until(lambda: server.dispatcher.has_room)
    assert (await server.ended(first)).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("name", ["save_image", "save_latents"])
async def test_a_database_without_room_is_the_same(
    serve: Serve, store: JobStore, disk: Disk, name: str
) -> None:
    server = await serve()
    disk.rows(store, name)
    accepted = await server.submit(5)
    [run] = await server.runs(1)
    server.engine.end_prior(run)
    server.engine.finish(run)
    with pytest.raises(StorageFull, match=accepted.id):
        await server.ended(accepted)
    assert not server.dispatcher.has_room
    disk.is_full = False
    await until(lambda: server.dispatcher.has_room)
    assert (await server.ended(accepted)).status == JobStatus.SUCCEEDED


@pytest.mark.usefixtures("claims_come_later")
async def test_a_job_that_cannot_be_begun_waits_too(serve: Serve, store: JobStore, disk: Disk) -> None:
    server = await serve()
    await server.at_rest()
    disk.rows(store, "claim")
    accepted = await server.submit(5)
    with pytest.raises(StorageFull, match=accepted.id):
        await server.ended(accepted)
    assert "a chore failed" not in server.log.getvalue()


async def test_a_database_that_refused_a_job_is_asked_again(
    serve: Serve, store: JobStore, disk: Disk
) -> None:
    disk.rows(store, "submit", "try_to_submit")
    server = await serve()
    with pytest.raises(StorageFull):
        await server.submit(5)
    assert not server.dispatcher.has_room
    await until(lambda: disk.num_refused > 3)
    assert not server.dispatcher.has_room
    disk.is_full = False
    await until(lambda: server.dispatcher.has_room)
    await server.submit(5)


async def test_streams_go_on_for_those_who_follow_and_end_for_those_who_wait(
    serve: Serve, disk: Disk
) -> None:
    server = await serve()
    disk.pictures(server)
    accepted = await server.submit(5)
    following = asyncio.create_task(server.read(accepted))
    server.engine.finish(*await server.runs(1))
    impatient = server.dispatcher.follow(accepted.id, is_patient=False)
    with pytest.raises(StorageFull, match=accepted.id):
        await asyncio.wait_for(anext(news async for news in impatient if news.kind == "final"), 10)
    assert not following.done()
    disk.is_full = False
    assert [kind for kind, _ in await following][-1] == "final"


async def test_a_job_that_waits_for_room_can_be_canceled(serve: Serve, disk: Disk) -> None:
    server = await serve()
    disk.pictures(server)
    accepted = await server.submit(5)
    server.engine.finish(*await server.runs(1))
    await until(lambda: disk.num_refused)
    await server.dispatcher.cancel(accepted.id)
    assert (await server.ended(accepted)).status == JobStatus.CANCELED
    await until(lambda: server.dispatcher.has_room)
    assert list(server.files.iterdir()) == []


async def test_a_server_that_stops_leaves_what_waits_for_room_to_the_next(
    serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.fleet.LEAVE_SECONDS", 0.1)
    first = await serve()
    disk.pictures(first)
    accepted = await first.submit(5)
    first.engine.finish(*await first.runs(1))
    await until(lambda: disk.num_refused)
    await first.stop()
    second = await serve()
    second.engine.finish(*await second.runs(1))
    done = await second.ended(accepted)
    assert (done.status, done.crashes) == (JobStatus.SUCCEEDED, 0)


async def test_many_pictures_that_wait_hold_up_the_engine_and_none_is_lost(serve: Serve, disk: Disk) -> None:
    server = await serve()
    disk.pictures(server)
    seeds = range(results.MAX_PIXELS_WAITING + 4)
    jobs = [await server.submit(seed) for seed in seeds]
    server.engine.finish(*await server.runs(len(jobs)))
    await until(server.dispatcher._fleet.results._pixels.locked)
    await until(lambda: not server.dispatcher.has_room)
    disk.is_full = False
    await until(lambda: server.dispatcher.has_room)
    assert {(await server.ended(accepted)).status for accepted in jobs} == {JobStatus.SUCCEEDED}
    assert len(server.engines[0]) == 1


async def test_new_jobs_are_refused_while_those_in_work_still_find_room(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    accepted = await server.submit(5)
    monkeypatch.setattr(
        disk_space, "space_of", lambda _: Space(free=disk_space.RESERVE_BYTES - 1, total=2**40)
    )
    await until(lambda: not server.dispatcher.has_room)
    with pytest.raises(StorageFull):
        await server.submit(6)
    waiting = asyncio.create_task(server.ended(accepted))
    await asyncio.sleep(0.03)
    assert not waiting.done()
    server.engine.finish(*await server.runs(1))
    assert (await waiting).status == JobStatus.SUCCEEDED


async def test_a_disk_that_others_cannot_write_to_is_seen_by_those_who_wait(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve(is_sole=False)
    accepted = await server.submit(5)
    monkeypatch.setattr(disk_space, "space_of", lambda _: Space(free=0, total=2**40))
    with pytest.raises(StorageFull, match=accepted.id):
        await server.ended(accepted)


async def test_a_job_that_nobody_wants_goes_on_when_that_cannot_be_written(
    serve: Serve, store: JobStore, disk: Disk
) -> None:
    server = await serve()
    accepted = await server.submit(5)
    disk.rows(store, "request_cancel")
    with server.dispatcher.waiting(accepted):
        pass
    await until(lambda: disk.num_refused)
    server.engine.finish(*await server.runs(1))

    async def has_ended() -> bool:
        now = await store.get(accepted.id, None)
        return now is not None and now.status == JobStatus.SUCCEEDED

    await eventually(has_ended)
    assert "nobody wants" in server.log.getvalue()
