"""Who submits, waits, watches, cancels and leaves."""

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from app.errors import (
    KeyReused,
    NotFound,
    Overloaded,
)
from app.jobs.events import Queued
from app.jobs.job import JobStatus
from app.jobs.keys import Idempotency
from app.jobs.store import JobStore
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import job, until

pytestmark = pytest.mark.anyio


async def test_a_queued_job_that_is_canceled_never_runs(serve: Serve) -> None:
    server = await serve(max_samples=1)
    first, second = await server.submit(1), await server.submit(2)
    (run,) = await server.runs(1)
    canceled = await server.dispatcher.cancel(second.id)
    assert canceled is not None
    assert canceled.status == JobStatus.CANCELED
    assert (await server.ended(second)).status == JobStatus.CANCELED
    server.engine.finish(run)
    await server.ended(first)
    third = await server.submit(3)
    assert [run.seed for run in await server.runs(2)] == [1, 3]
    server.engine.finish(server.engine.runs[1])
    await server.ended(third)


async def test_a_running_job_that_is_canceled_frees_the_device(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(1, 2)
    [run, _] = await server.runs(2)
    server.engine.step(run, 1, remaining=2.0)
    server.engine.step(run, 3, remaining=1.0)
    flight = server.dispatcher._fleet.flights[0]
    await until(lambda: flight.share_left() < 0.8)  # nobody has asked yet how far it is
    assert (await server.dispatcher.cancel(accepted.id, "somebody else")) is None
    canceled = await server.dispatcher.cancel(accepted.id, "")
    assert canceled is not None
    assert canceled.status == JobStatus.CANCELED
    progress = server.dispatcher.progress(canceled)
    assert (progress.stage, progress.eta_seconds) == ("done", 0.0)
    assert 0.2 < progress.fraction < 0.3, "not as if all were done"
    assert server.engine.canceled == [accepted.id]
    assert server.sample("cascade_jobs_total", outcome="canceled", reason="") == 1
    again = await server.dispatcher.cancel(accepted.id)
    assert again == canceled
    assert server.sample("cascade_jobs_total", outcome="canceled", reason="") == 1


@pytest.mark.usefixtures("claims_come_later")
async def test_canceling_while_the_job_is_being_claimed(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    claim, claimed, go_on = store.claim, asyncio.Event(), asyncio.Event()

    async def slow_claim(*args: Any, **options: Any) -> Any:
        jobs = await claim(*args, **options)
        if jobs:
            claimed.set()
            await go_on.wait()
        return jobs

    monkeypatch.setattr(store, "claim", slow_claim)
    accepted = await server.submit(1)
    await claimed.wait()
    canceling = asyncio.create_task(server.dispatcher.cancel(accepted.id))
    await until(lambda: canceling.done() or server.dispatcher._fleet._boarding._waiters)
    go_on.set()
    canceled = await canceling
    assert canceled is not None
    assert canceled.status == JobStatus.CANCELED


@pytest.mark.usefixtures("no_rounds")
async def test_canceling_while_the_job_is_accepted_and_begun(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    submit, accepted, go_on = store.submit, asyncio.Event(), asyncio.Event()

    async def slow_submit(*args: Any, **options: Any) -> Any:
        submitted = await submit(*args, **options)
        accepted.set()
        await go_on.wait()
        return submitted

    monkeypatch.setattr(store, "submit", slow_submit)
    first = job(1)
    submitting = asyncio.create_task(server.dispatcher.submit(first))
    await accepted.wait()
    canceling = asyncio.create_task(server.dispatcher.cancel(first.id))
    await until(lambda: canceling.done() or server.dispatcher._fleet._boarding._waiters)
    go_on.set()
    canceled = await canceling
    assert canceled is not None
    assert canceled.status == JobStatus.CANCELED
    assert (await submitting).is_claimed
    assert server.engine.canceled == [first.id]


@pytest.mark.usefixtures("no_rounds")
async def test_a_caller_who_is_sent_away_while_its_job_is_begun_leaves_no_stray(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    submit, accepted, go_on = store.submit, asyncio.Event(), asyncio.Event()

    async def slow_submit(*args: Any, **options: Any) -> Any:
        submitted = await submit(*args, **options)
        accepted.set()
        await go_on.wait()
        return submitted

    monkeypatch.setattr(store, "submit", slow_submit)
    first = job(1)
    submitting = asyncio.create_task(server.dispatcher.submit(first))
    await accepted.wait()
    submitting.cancel()
    go_on.set()
    (run,) = await server.runs(1)
    server.engine.finish(run)
    assert (await server.ended(first)).status == JobStatus.SUCCEEDED
    assert not any(slot.may_hold_strays for slot in server.dispatcher._fleet.slots)


async def test_the_last_picture_and_a_cancellation_at_once(serve: Serve) -> None:
    server = await serve()
    for seed in range(10):
        accepted = await server.submit(seed)
        runs = await server.runs(seed + 1)
        server.engine.finish(runs[-1])
        await asyncio.sleep(0.0005 * seed)
        await server.dispatcher.cancel(accepted.id)
        done = await server.ended(accepted)
        assert done.status in (JobStatus.CANCELED, JobStatus.SUCCEEDED)
        assert await server.store.get(accepted.id, None) == done


async def test_when_all_callers_have_left_the_work_is_dropped(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(1)
    await server.runs(1)
    with server.dispatcher.waiting(accepted), server.dispatcher.waiting(accepted):
        pass
    assert (await server.ended(accepted)).status == JobStatus.CANCELED


async def test_one_caller_left_is_enough_to_go_on(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(1)
    (run,) = await server.runs(1)
    with server.dispatcher.waiting(accepted):
        with server.dispatcher.waiting(accepted):
            pass
        server.engine.finish(run)
        assert (await server.ended(accepted)).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("how", ["on_disconnect", "detach"])
async def test_some_jobs_finish_without_callers(serve: Serve, how: str) -> None:
    server = await serve()
    accepted = await server.submit(1, on_disconnect="finish" if how == "on_disconnect" else "cancel")
    (run,) = await server.runs(1)
    with server.dispatcher.waiting(accepted):
        if how == "detach":
            server.dispatcher.detach(accepted.id)
    with server.dispatcher.waiting(accepted):
        pass
    assert len(server.dispatcher._tasks) == 2, "there is more to do than maintenance and to watch the disk"
    server.engine.finish(run)
    assert (await server.ended(accepted)).status == JobStatus.SUCCEEDED


async def test_who_submits_again_keeps_a_job_that_was_about_to_be_dropped(
    serve: Serve, store: JobStore
) -> None:
    server = await serve()
    key = Idempotency("key", "print")
    for seed in range(5):
        key = Idempotency(f"key {seed}", "print")
        first = job(seed)
        submitted = await server.dispatcher.submit(first, key)
        with server.dispatcher.waiting(submitted.job):
            pass
        again = await server.dispatcher.submit(job(seed), key)
        with server.dispatcher.waiting(again.job):
            (run,) = [run for run in await server.runs(seed + 1) if run.job == again.job.id]
            server.engine.finish(run)
            assert (await server.ended(again.job)).status == JobStatus.SUCCEEDED


async def test_who_joins_by_key_keeps_the_job_when_the_first_leaves(serve: Serve) -> None:
    server = await serve()
    key = Idempotency("k", "f")
    first = await server.dispatcher.submit(job(1), key)
    with ExitStack() as joined:
        with server.dispatcher.waiting(first.job):
            again = await server.dispatcher.submit(job(1), key)
            joined.enter_context(server.dispatcher.waiting(again.job))
        server.engine.finish(*await server.runs(1))
        assert (await server.ended(again.job)).status == JobStatus.SUCCEEDED
    assert server.engine.canceled == []


async def test_the_same_key_is_the_same_job(serve: Serve) -> None:
    server = await serve()
    key = Idempotency("key", "print")
    submitted = await asyncio.gather(*(server.dispatcher.submit(job(1), key) for _ in range(20)))
    assert len({one.job.id for one in submitted}) == 1
    assert sum(not one.is_replay for one in submitted) == 1
    with pytest.raises(KeyReused):
        await server.dispatcher.submit(job(2), Idempotency("key", "another"))
    server.engine.finish(*await server.runs(1))
    done = await server.ended(submitted[0].job)
    assert (await server.dispatcher.submit(job(1), key)).job == done


async def test_a_full_queue_refuses_and_says_when_to_come_back(serve: Serve) -> None:
    server = await serve(max_samples=1, max_queue=2)
    await server.submit(0)
    await server.runs(1)
    jobs = [await server.submit(*range(10)) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 jobs") as refusal:
        await server.submit(3)
    assert 1 <= int(refusal.value.headers["Retry-After"]) <= 59
    assert server.sample("cascade_jobs_refused_total", code="overloaded") == 1
    await until(lambda: not server.dispatcher.is_accepting)
    assert server.sample("cascade_queue_jobs") == 2
    assert await server.dispatcher.eta_seconds() > 0
    assert await server.dispatcher.eta_seconds(jobs[1]) > await server.dispatcher.eta_seconds(jobs[0]) > 0
    await server.dispatcher.cancel(jobs[0].id)
    await until(lambda: server.dispatcher.is_accepting)


async def test_a_deadline_ends_a_job_that_is_in_work(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(1, deadline_at=job().created_at + 60)
    await server.runs(1)
    (flight,) = server.dispatcher._fleet.flights
    assert flight.expires_at is not None
    flight.expires_at -= 60
    assert (await server.ended(accepted)).status == JobStatus.EXPIRED
    assert server.engine.canceled == [accepted.id]


async def test_a_deadline_that_is_over_keeps_a_job_from_the_engine(serve: Serve) -> None:
    server = await serve(max_samples=1)
    await server.submit(1)
    await server.runs(1)
    late = await server.submit(2, deadline_at=job().created_at + 0.03)
    assert (await server.ended(late)).status == JobStatus.EXPIRED
    server.engine.finish(server.engine.runs[0])
    next_job = await server.submit(3)
    assert [run.seed for run in await server.runs(2)] == [1, 3]
    server.engine.finish(server.engine.runs[1])
    await server.ended(next_job)


async def test_streams_tell_the_place_in_the_queue(serve: Serve) -> None:
    server = await serve(max_samples=1)
    jobs = [await server.submit(seed) for seed in range(3)]
    await server.runs(1)
    stream = server.dispatcher.follow(jobs[2].id)
    assert (await anext(stream)).news == Queued(1)
    server.engine.finish(server.engine.runs[0])
    assert (await anext(stream)).news == Queued(0)
    for count in (2, 3):
        server.engine.finish((await server.runs(count))[-1])
    assert [event.kind async for event in stream][-1] == "final"


async def test_the_stream_of_an_ended_job_is_its_end(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(1)
    server.engine.finish(*await server.runs(1))
    done = await server.ended(accepted)
    assert await server.read(done) == [("final", done)]
    last_id = (await server.events(done))[0].id
    assert await server.read(done, last_id) == [("final", done)]
    assert [kind for kind, _ in await server.read(done, last_id - 2)] == ["progress", "final"]


async def test_what_does_not_exist(serve: Serve) -> None:
    server = await serve()
    with pytest.raises(NotFound):
        await server.dispatcher.wait("job_none")
    with pytest.raises(NotFound):
        await anext(server.dispatcher.follow("job_none"))
    assert await server.dispatcher.cancel("job_none") is None
