"""How a server ends."""

import asyncio
from contextlib import nullcontext
from typing import Any

import pytest

from app.errors import ShuttingDown
from app.jobs.job import JobStatus
from app.jobs.store import JobStore, Submitted
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import until

pytestmark = pytest.mark.anyio


async def test_draining_finishes_what_is_in_work(serve: Serve) -> None:
    server = await serve(max_samples=1)
    working, queued = await server.submit(1), await server.submit(2)
    (run,) = await server.runs(1)
    waiting = [asyncio.create_task(server.dispatcher.wait(job.id)) for job in (working, queued)]
    await until(lambda: server.num_awaited == 2)
    draining = asyncio.create_task(server.dispatcher.drain(10))
    await until(lambda: not server.dispatcher.is_accepting)
    with pytest.raises(ShuttingDown):
        await server.submit(3)
    with pytest.raises(ShuttingDown):
        _ = server.dispatcher.model
    with pytest.raises(ShuttingDown):
        await waiting[1]
    with pytest.raises(ShuttingDown):
        await server.dispatcher.wait(queued.id)
    assert not draining.done()
    server.engine.finish(run)
    assert (await waiting[0]).status == JobStatus.SUCCEEDED
    await draining
    left = await server.store.get(queued.id, None)
    assert left is not None
    assert (left.status, left.crashes, left.fence) == (JobStatus.QUEUED, 0, 0)


@pytest.mark.parametrize("is_late", [False, True])
async def test_who_comes_as_the_server_closes_has_nothing_claimed(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    server = await serve()
    await server.at_rest()
    claims: list[object] = []
    submit = store.submit

    async def noting(*args: Any, **options: Any) -> Submitted:
        claims.append(options.get("claim"))
        return await submit(*args, **options)

    monkeypatch.setattr(store, "submit", noting)
    async with server.dispatcher._canceling if is_late else nullcontext():
        submitting = asyncio.create_task(server.submit(1))
        await asyncio.sleep(0)  # it waits for its turn, or is about to be written
        server.dispatcher.close()
    if is_late:  # nothing is written yet
        with pytest.raises(ShuttingDown):
            await submitting
        assert claims == []
    else:
        accepted = await submitting
        assert claims == [None]
        left = await store.get(accepted.id, None)
        assert left is not None
        assert left.status == JobStatus.QUEUED


async def test_what_is_not_done_in_time_stays_accepted(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(1)
    await server.runs(1)
    with server.dispatcher.waiting(accepted):
        waiting = asyncio.create_task(server.dispatcher.wait(accepted.id))
        await until(lambda: server.num_awaited)
        reading = asyncio.create_task(server.read(accepted))
        await server.dispatcher.drain(0.01)
        with pytest.raises(ShuttingDown):
            await waiting
    assert not server.dispatcher._tasks, "the job is being canceled"
    assert "final" not in [kind for kind, _ in await reading]
    left = await server.store.get(accepted.id, None)
    assert left is not None
    assert (left.status, left.crashes, left.worker) == (JobStatus.QUEUED, 0, None)
    assert server.engine.canceled == [accepted.id]
    assert server.engine.status.result() == 0


async def test_no_task_is_left(serve: Serve) -> None:
    before = asyncio.all_tasks()
    server = await serve()
    await server.submit(1)
    await server.runs(1)
    await server.dispatcher.stop()
    assert asyncio.all_tasks() - before <= {server.engine.beating}


async def test_it_ends_although_the_database_is_away(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    accepted = await server.submit(1)
    await server.runs(1)

    async def away(*_: object, **__: object) -> None:
        raise OSError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(store, "release", away)
        await server.dispatcher.stop()
    server.leave()
    again = await serve()
    again.engine.finish(*await again.runs(1))
    assert (await again.ended(accepted)).status == JobStatus.SUCCEEDED
