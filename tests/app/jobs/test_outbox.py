"""What webhooks are to be told: written with what it tells of, and there until it was taken."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from app.jobs.database import Database
from app.jobs.faults import NO_FAULTS
from app.jobs.job import Failure, Job, JobStatus, Timings, Webhook
from app.jobs.outbox import LONGEST_PAUSE, Busy, Delivery
from app.jobs.store import NOBODY, JobStore
from tests.app.jobs.stores import LEASE_SECONDS, Clock, add, add_running, claim, new_image, new_job, stored

pytestmark = pytest.mark.anyio

HOLD_SECONDS = 30.0
ENDS = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED, JobStatus.EXPIRED)


def hook(*statuses: JobStatus, host: str = "one.example") -> Webhook:
    return Webhook(f"https://{host}:444/hook?token=1", statuses or ENDS, "https://server.example")


def hooked(*statuses: JobStatus, host: str = "one.example", **fields: Any) -> Job:
    return new_job(webhook=hook(*statuses, host=host), **fields)


async def due(store: JobStore, limit: int = 100, without: Busy = NOBODY) -> list[Delivery]:
    return list(await store.claim_deliveries(limit=limit, hold_seconds=HOLD_SECONDS, without=without))


async def waits(store: JobStore, clock: Clock) -> list[tuple[str, JobStatus]]:
    """All that is to be told, sooner or later."""
    clock.let_pass(LONGEST_PAUSE)
    return [(delivery.job.id, delivery.status) for delivery in await due(store)]


async def end(store: JobStore, clock: Clock, job_id: str) -> None:
    running = await add_running(store, webhook=hook(), id=job_id)
    await store.move(running, running.canceled(clock.now))


async def test_a_webhook_is_kept_with_its_job(store: JobStore) -> None:
    job = hooked()
    await add(store, job)
    found = await stored(store, job)
    assert found == job
    assert found.webhook == hook()
    assert not await store.has_due_deliveries()


async def test_the_end_of_a_job_is_to_be_told_in_the_moment_it_is_written(
    store: JobStore, clock: Clock
) -> None:
    running = await add_running(store, webhook=hook())
    ended = running.failed(Failure(500, "x", "y"), clock.now)
    assert await store.move(running, ended)
    assert await store.has_due_deliveries()
    [delivery] = await due(store)
    assert (delivery.job, delivery.status, delivery.attempt) == (ended, JobStatus.FAILED, 1)
    assert delivery.id == f"msg_{running.id[4:]}_failed"
    assert not await store.move(running, ended), "a late worker"
    assert await waits(store, clock) == [(running.id, JobStatus.FAILED)]


async def test_every_way_to_an_end_tells_of_it(store: JobStore, clock: Clock) -> None:
    canceled = hooked(id="job_canceled")
    expired = hooked(id="job_expired", deadline_at=clock.now + 5)
    crashed = hooked(id="job_crashed")
    await add(store, canceled)
    await store.request_cancel(canceled.id, None)
    await add(store, expired)
    await store.expire(clock.now + 10)
    await add(store, crashed)
    for _ in range(3):
        await claim(store)
        await store.release("one", crashed_jobs=[crashed.id])
    drawn = await add_running(store, webhook=hook(), id="job_drawn")
    image = new_image()
    whole = Job(**{name: getattr(drawn, name) for name in drawn.__slots__} | {"images": (image,)})
    assert await store.save_image(drawn, image, whole.succeeded(clock.now))
    assert sorted(await waits(store, clock)) == [
        ("job_canceled", JobStatus.CANCELED),
        ("job_crashed", JobStatus.FAILED),
        ("job_drawn", JobStatus.SUCCEEDED),
        ("job_expired", JobStatus.EXPIRED),
    ]


async def test_only_what_is_wanted_is_told(store: JobStore, clock: Clock) -> None:
    for wanted in (None, hook(JobStatus.SUCCEEDED), hook(JobStatus.RUNNING)):
        running = await add_running(store, webhook=wanted)
        await store.move(running, running.canceled(clock.now))
    assert await waits(store, clock) == [(running.id, JobStatus.RUNNING)]


async def test_the_start_is_told_once_though_a_job_begins_again(store: JobStore, clock: Clock) -> None:
    job = hooked(JobStatus.RUNNING)
    await add(store, job)
    await claim(store)
    [delivery] = await due(store)
    assert delivery.job.as_started() == await stored(store, job)
    await store.settle_delivery(delivery, again_after=None)
    await store.release("one", crashed_jobs=[job.id])
    [again] = await claim(store)
    assert again.id == job.id
    assert await waits(store, clock) == []


async def test_how_a_job_was_when_it_started() -> None:
    started = hooked(JobStatus.RUNNING).claimed("one", 1_700_000_001.0, LEASE_SECONDS)
    was = replace(started, worker=None, lease_until=None)
    drawn = replace(started, images=(new_image(),))
    for ended in (
        started.failed(Failure(500, "x", "y"), 1_700_000_002.0),
        started.canceled(1_700_000_002.0),
        drawn.succeeded(1_700_000_002.0, Timings(queued=1.0, prior=2.0, decoder=3.0, encode=4.0)),
    ):
        assert ended.as_started() == was


async def test_an_attempt_is_nobody_elses_for_a_while(store: JobStore, clock: Clock) -> None:
    running = await add_running(store, webhook=hook())
    await store.move(running, running.canceled(clock.now))
    both = await asyncio.gather(due(store), due(store))
    assert sorted(len(found) for found in both) == [0, 1]
    clock.let_pass(HOLD_SECONDS - 1)
    assert not await store.has_due_deliveries()
    clock.let_pass(1)
    [second] = await due(store)
    assert second.attempt == 2


async def test_servers_that_look_at_once_begin_nothing_twice(
    database_url: str, store: JobStore, clock: Clock
) -> None:
    """Each locks what it takes, and takes what nobody has locked."""
    for number in range(40):
        await end(store, clock, f"job_{number}")
    others = [
        JobStore(await Database.open(database_url, NO_FAULTS), clock.wall, clock.steady, NO_FAULTS)
        for _ in range(3)
    ]

    async def take_all(one: JobStore) -> list[str]:
        taken = []
        while found := await due(one, 3):
            taken += [delivery.id for delivery in found]
        return taken

    taken = await asyncio.gather(*(take_all(one) for one in others * 2))
    for other in others:
        await other.close()
    ids = [message for some in taken for message in some]
    assert (len(ids), len(set(ids))) == (40, 40)


async def test_outcomes(store: JobStore, clock: Clock) -> None:
    running = await add_running(store, webhook=hook())
    await store.move(running, running.canceled(clock.now))
    [first] = await due(store)
    await store.settle_delivery(first, again_after=100.0)
    clock.let_pass(99)
    assert await due(store) == []
    clock.let_pass(1)
    [second] = await due(store)
    await store.settle_delivery(first, again_after=None)  # of an attempt that was given up for dead
    clock.let_pass(HOLD_SECONDS)
    [third] = await due(store)
    assert (second.attempt, third.attempt) == (2, 3)
    await store.settle_delivery(third, again_after=None)
    assert await waits(store, clock) == []


async def test_busy_receivers_are_left_alone(store: JobStore, clock: Clock) -> None:
    for host in ("one.example", "two.example", "one.example"):
        running = await add_running(store, webhook=hook(host=host))
        await store.move(running, running.canceled(clock.now))
        clock.let_pass(1)
    busy = Busy(receivers=[("ann", "one.example"), ("bob", "two.example")])
    [other] = await due(store, without=busy)
    assert other.job.webhook is not None
    assert other.job.webhook.receiver == "two.example"
    assert await due(store, without=Busy(tenants=["bob", "ann"])) == []
    assert len(await due(store, without=Busy(tenants=["bob"], receivers=[("bob", "one.example")]))) == 2


async def test_who_has_waited_longest_is_told_first(store: JobStore, clock: Clock) -> None:
    for number in range(3):
        running = await add_running(store, webhook=hook(), id=f"job_{number}")
        await store.move(running, running.canceled(clock.now))
    for delivery, pause in zip(await due(store), (30.0, 10.0, 20.0), strict=True):
        await store.settle_delivery(delivery, again_after=pause)
    clock.let_pass(40)
    told = [(await due(store, 1))[0] for _ in range(3)]
    assert [delivery.job.id for delivery in told] == ["job_1", "job_2", "job_0"]


async def test_two_messages_of_a_job_do_not_meet(store: JobStore, clock: Clock) -> None:
    running = await add_running(store, webhook=hook(JobStatus.RUNNING, JobStatus.CANCELED))
    await store.move(running, running.canceled(clock.now))
    started, ended = sorted(await due(store), key=lambda delivery: delivery.status, reverse=True)
    assert (started.status, ended.status) == (JobStatus.RUNNING, JobStatus.CANCELED)
    await store.settle_delivery(started, again_after=None)
    assert await waits(store, clock) == [(running.id, JobStatus.CANCELED)]


@pytest.mark.parametrize("jump", [-86_400.0, -600.0, 86_400.0])
async def test_no_jump_of_the_clock_makes_a_receiver_wait(store: JobStore, clock: Clock, jump: float) -> None:
    running = await add_running(store, webhook=hook())
    await store.move(running, running.canceled(clock.now))
    clock.now += jump
    assert len(await due(store)) == 1


async def test_jobs_are_kept_until_their_webhooks_know(store: JobStore, clock: Clock) -> None:
    running = await add_running(store, webhook=hook())
    await store.move(running, running.canceled(clock.now))
    clock.let_pass(LONGEST_PAUSE)
    await store.prune(clock.now)
    assert await store.get(running.id, None) is not None
    [delivery] = await due(store)
    await store.settle_delivery(delivery, again_after=None)
    await store.prune(clock.now)
    assert await store.get(running.id, None) is None


async def test_what_is_forgotten_is_not_told(store: JobStore, clock: Clock) -> None:
    running = await add_running(store, webhook=hook())
    await store.move(running, running.canceled(clock.now))
    await store.delete(running.id, None)
    assert await waits(store, clock) == []
