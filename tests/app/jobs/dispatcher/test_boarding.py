"""What was claimed as it was accepted boards later: no caller waits for it, whatever delays it."""

import asyncio
import threading
from typing import Any

import pytest

from app.engine.protocol import Expect, Run
from app.jobs import maintenance
from app.jobs.job import Job, JobStatus
from app.jobs.keys import Idempotency
from app.jobs.store import JobStore, Submitted
from app.schemas import GenerationRequest, PictureRef
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import Server, job, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_rounds")]

AT_ONCE = 2.0  # seconds; generous, as other processes may have the machine


async def finish_all(server: Server, *jobs: Job) -> list[Run]:
    """Have all that is wanted made, and look that it was."""
    runs = await server.runs(len(jobs))
    server.engine.finish(*runs)
    assert {(await server.ended(job)).status for job in jobs} == {JobStatus.SUCCEEDED}
    return runs


async def test_nobody_waits_for_the_pictures_of_others_to_be_read(serve: Serve) -> None:
    server = await serve()
    await server.at_rest()
    name = server.inputs.save(b"a picture")
    free = threading.Event()
    busy = [server.encoders.submit(free.wait) for _ in range(2)]
    request = GenerationRequest(
        prompt="x", width=64, height=64, seeds=(1,), image=PictureRef(sha256=name, width=1, height=1)
    )
    try:
        async with asyncio.timeout(AT_ONCE):
            pictured = (await server.dispatcher.submit(job(request=request, tenant="ann"))).job
            others = [await server.submit(seed, tenant=f"tenant {seed}") for seed in (2, 3)]
    finally:
        free.set()
    assert all(each.result() for each in busy)
    runs = await finish_all(server, pictured, *others)
    assert [run.inputs for run in runs if run.job == pictured.id] == [{name: b"a picture"}]
    expected = [message.request for message in server.engine.sent if isinstance(message, Expect)]
    assert not any(name.encode() in request for request in expected)


async def test_nobody_waits_for_what_a_crash_left_of_others_to_be_read(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    begun = (await store.submit(job(1, tenant="ann"), max_queue=9)).job
    await store.claim("another", limit=1, lease_seconds=30)
    await store.release("another")

    load_latents, is_away = store.load_latents, True

    async def losing(job_id: str) -> dict[int, bytes]:
        if is_away:
            raise OSError("connection refused")
        return await load_latents(job_id)

    monkeypatch.setattr(store, "load_latents", losing)
    async with asyncio.timeout(AT_ONCE):
        with server.dispatcher.waiting(begun):
            others = [await server.submit(2, tenant="bob")]
        await asyncio.sleep(0.01)  # the one whose turn was first is given up, and cannot end yet
        others.append(await server.submit(3, tenant="cid"))
    is_away = False
    await until(lambda: server.engine.canceled == [begun.id])
    assert (await server.ended(begun)).status == JobStatus.CANCELED
    runs = await server.runs(3)
    server.engine.finish(*runs)
    assert {(await server.ended(job)).status for job in others} == {JobStatus.SUCCEEDED}


async def test_who_is_sent_away_leaves_no_half_accepted_job_to_join(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    submit, committing, go_on = store.submit, asyncio.Event(), asyncio.Event()

    async def slow_submit(*args: Any, **options: Any) -> Submitted:
        committing.set()
        await go_on.wait()
        return await submit(*args, **options)

    monkeypatch.setattr(store, "submit", slow_submit)
    key = Idempotency("key", "print")
    first = job(1)
    submitting = asyncio.create_task(server.dispatcher.submit(first, key))
    await committing.wait()
    submitting.cancel()
    await asyncio.wait([submitting])
    assert server.dispatcher._canceling.locked(), "what goes on is not guarded any more"
    go_on.set()
    again = await server.dispatcher.submit(job(1), key)
    assert (again.job.id, again.is_replay) == (first.id, True)
    await until(lambda: not server.dispatcher._canceling.locked())
    await finish_all(server, first)


async def test_a_job_that_cannot_board_goes_back(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()

    async def broken(_: Job) -> dict[str, bytes]:
        raise ValueError("a mistake")

    fleet = server.dispatcher._fleet
    with monkeypatch.context() as patch:
        patch.setattr(fleet.results, "read_inputs", broken)
        accepted = await server.submit(1)
        await until(lambda: not fleet._boarding.locked())
    assert "could not board" in server.log.getvalue()
    server.dispatcher._wake_to_claim()
    await finish_all(server, accepted)


@pytest.mark.usefixtures("claims_come_later")
async def test_a_job_that_cannot_board_is_tried_once_a_round(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 0.2)
    server = await serve()
    await server.at_rest()
    tried_at: list[float] = []

    async def broken(_: Job) -> dict[str, bytes]:
        tried_at.append(asyncio.get_running_loop().time())
        raise ValueError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(server.dispatcher._fleet.results, "read_inputs", broken)
        accepted = await server.submit(1)
        await until(lambda: len(tried_at) == 4)
    assert tried_at[-1] - tried_at[0] > 0.3
    await finish_all(server, accepted)


@pytest.mark.parametrize("is_committed", [False, True])
async def test_a_failed_claim_takes_no_room_from_a_busy_engine(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch, is_committed: bool
) -> None:
    server = await serve()
    await server.at_rest()
    first = await server.submit(1)
    submit, second = store.submit, job(2)

    async def failing(*args: Any, **options: Any) -> Submitted:
        if is_committed:
            await submit(*args, **options)
        raise TimeoutError("no connection is free")

    with monkeypatch.context() as patch:
        patch.setattr(store, "submit", failing)
        with pytest.raises(TimeoutError):
            await server.dispatcher.submit(second)
    server.dispatcher._wake_all()  # as when a picture is done: nothing new is known of the queue
    await until(lambda: server.dispatcher._fleet.slots[0].room)
    await server.at_rest()
    jobs = [first, *([second] if is_committed else []), await server.submit(3)]
    held = await store.get(first.id, None)
    assert held is not None
    assert (held.status, held.fence) == (JobStatus.RUNNING, 1)
    await finish_all(server, *jobs)
