"""Submitting, finding, listing, canceling and deleting jobs, on both databases."""

import asyncio
import base64
from dataclasses import replace
from typing import Any

import pytest

from app.errors import Conflict, InvalidRequest, KeyReused, QueueFull
from app.jobs.claims import Claim
from app.jobs.job import Failure, Job, JobStatus, Timings
from app.jobs.keys import Idempotency
from app.jobs.queue import FULL_SECONDS, FullQueue, QueueCounts
from app.jobs.store import JobStore
from tests.app.jobs.stores import (
    LEASE_SECONDS,
    MANY,
    Clock,
    add,
    add_running,
    claim,
    new_image,
    new_job,
    stored,
)

pytestmark = pytest.mark.anyio
KEY = Idempotency("key", "fingerprint")


async def test_a_job_comes_back_as_it_was(store: JobStore, clock: Clock) -> None:
    job = new_job(
        num_images=2,
        priority=-3,
        deadline_at=clock.now + 0.125,
        on_disconnect="finish",
        metadata={"order": "A-99\n\0"},
        cost_seconds=1.5,
    )
    assert (await store.submit(job, max_queue=1)).job == job
    assert await store.get(job.id, "ann") == job
    assert await store.get(job.id, None) == job


async def test_an_ended_job_comes_back_with_all_that_became_of_it(store: JobStore, clock: Clock) -> None:
    running = await add_running(store, num_images=2)
    image = new_image(1)
    assert await store.save_image(running, image)
    failure = Failure(507, "insufficient_storage", "no room")
    failed = replace(running, images=(image,)).failed(failure, clock.now + 5)
    timed = replace(failed, timings=Timings(0.5, 1.0, 2.0, 0.25))
    assert await store.move(running, timed)
    assert await stored(store, running) == timed


async def test_a_job_is_there_for_its_tenant_alone(store: JobStore) -> None:
    job = new_job("ann")
    await add(store, job)
    assert await store.get(job.id, "bob") is None
    assert await store.request_cancel(job.id, "bob") is None
    assert await store.delete(job.id, "bob") is None
    assert await store.list("bob", limit=10) == ([], None)
    assert (await stored(store, job)).status == JobStatus.QUEUED


async def test_other_ids_find_nothing(store: JobStore) -> None:
    for job_id in ("", "job_1", "\0", "job_\n", "żółw", "\udcff", "'; DROP TABLE jobs; --", "x" * 10_000):
        assert await store.get(job_id, "ann") is None
        assert await store.delete(job_id, None) is None


async def test_the_bound_of_the_queue_is_exact(store: JobStore) -> None:
    for _ in range(3):
        await store.submit(new_job(), max_queue=3)
    with pytest.raises(QueueFull) as full:
        await store.submit(new_job(), max_queue=3)
    assert full.value.num_queued == 3
    await claim(store)
    await store.submit(new_job(), max_queue=3)


async def refused(store: JobStore, max_queue: int) -> None:
    with pytest.raises(QueueFull) as full:
        await store.submit(new_job(), max_queue=max_queue)
    assert full.value.num_queued == max_queue


async def test_many_are_refused_for_one_look_at_a_full_queue(
    store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(store, new_job(), new_job())
    await refused(store, 2)
    looks, write = [], store._database.write

    async def counted(*args: Any, **options: Any) -> Any:
        looks.append(args)
        return await write(*args, **options)

    monkeypatch.setattr(store._database, "write", counted)
    for _ in range(3):
        await refused(store, 2)
    assert not looks
    clock.let_pass(FULL_SECONDS)  # other servers may have claimed one
    await refused(store, 2)
    assert len(looks) == 1
    assert not (await store.submit(new_job(), max_queue=3)).is_replay


@pytest.mark.parametrize("way", ["claimed", "canceled", "expired", "canceled by a move"])
async def test_a_place_in_a_full_queue_is_seen_at_once(store: JobStore, clock: Clock, way: str) -> None:
    job = new_job(deadline_at=clock.now + FULL_SECONDS / 2)
    await add(store, job)
    await refused(store, 1)
    match way:
        case "claimed":
            await claim(store)
        case "canceled":
            await store.request_cancel(job.id, None)
        case "expired":
            clock.let_pass(FULL_SECONDS / 2)
            await store.expire(clock.now)
        case "canceled by a move":
            await store.move(job, job.canceled(clock.now))
    await store.submit(new_job(), max_queue=1)


def test_a_look_at_a_full_queue_that_a_job_left_meanwhile_counts_for_nothing(clock: Clock) -> None:
    known = FullQueue(clock.steady)
    num_left = known.num_left
    known.left()
    known.note(QueueFull(1), 1, num_left)
    known.check(1)
    known.note(QueueFull(1), 1, known.num_left)
    with pytest.raises(QueueFull):
        known.check(1)


async def test_a_full_queue_still_answers_who_repeats_and_takes_whom_an_engine_takes(store: JobStore) -> None:
    first = await store.submit(new_job(), max_queue=1, idempotency=KEY)
    await refused(store, 1)
    assert (await store.submit(new_job(), max_queue=1, idempotency=KEY)).job.id == first.job.id
    wanted = Claim("one", LEASE_SECONDS, without=["ann"])
    assert (await store.submit(new_job("bob"), max_queue=1, claim=wanted)).is_claimed


async def test_without_a_queue_a_job_is_taken_when_there_is_nothing_else(
    store: JobStore, clock: Clock
) -> None:
    await store.submit(new_job(), max_queue=0)
    with pytest.raises(QueueFull):
        await store.submit(new_job(), max_queue=0)
    (running,) = await claim(store)
    with pytest.raises(QueueFull):
        await store.submit(new_job(), max_queue=0)
    await store.move(running, running.canceled(clock.now))
    await store.submit(new_job(), max_queue=0)


async def test_the_bound_holds_for_many_servers_at_once(store: JobStore, database_url: str) -> None:
    other = await JobStore.open(database_url)
    attempts = [server.submit(new_job(), max_queue=5) for server in (store, other) * 8]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    await other.close()
    assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 11
    assert (await store.counts()).queued == 5


async def test_the_same_key_and_request_give_the_same_job(store: JobStore) -> None:
    first = await store.submit(new_job(), max_queue=1, idempotency=KEY)
    again = await store.submit(new_job(), max_queue=1, idempotency=KEY)  # although the queue is full
    assert (first.is_replay, again.is_replay) == (False, True)
    assert again.job == first.job


async def test_the_replay_of_a_finished_job_has_its_pictures(store: JobStore, clock: Clock) -> None:
    await store.submit(new_job(), max_queue=1, idempotency=KEY)
    (running,) = await claim(store)
    done = replace(running, images=(new_image(),)).succeeded(clock.now)
    await store.save_image(running, new_image())
    await store.move(running, done)
    assert (await store.submit(new_job(), max_queue=1, idempotency=KEY)).job == done


async def test_a_key_with_another_request_is_refused(store: JobStore) -> None:
    await store.submit(new_job(), max_queue=MANY, idempotency=KEY)
    with pytest.raises(KeyReused):
        await store.submit(new_job(), max_queue=MANY, idempotency=Idempotency("key", "another"))


async def test_keys_of_tenants_are_apart(store: JobStore) -> None:
    await store.submit(new_job("ann"), max_queue=MANY, idempotency=KEY)
    other = await store.submit(new_job("bob"), max_queue=MANY, idempotency=Idempotency("key", "another"))
    assert not other.is_replay


async def test_a_key_is_free_again_after_a_day(store: JobStore, clock: Clock) -> None:
    await store.submit(new_job(), max_queue=MANY, idempotency=KEY)
    clock.let_pass(KEY.ttl_seconds - 1)
    assert (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).is_replay
    clock.let_pass(1)
    assert not (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).is_replay
    assert (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).is_replay


@pytest.mark.parametrize("status", [JobStatus.CANCELED, JobStatus.EXPIRED, JobStatus.FAILED])
async def test_a_key_is_taken_over_from_a_job_without_pictures(
    store: JobStore, clock: Clock, status: JobStatus
) -> None:
    first = (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).job
    ends = {
        JobStatus.CANCELED: first.canceled(clock.now),
        JobStatus.EXPIRED: first.expired(clock.now),
        JobStatus.FAILED: first.failed(Failure(500, "internal_error", "x"), clock.now),
    }
    await store.move(first, ends[status])
    second = await store.submit(new_job(), max_queue=MANY, idempotency=Idempotency("key", "another"))
    assert not second.is_replay
    third = await store.submit(new_job(), max_queue=MANY, idempotency=Idempotency("key", "another"))
    assert third.job.id == second.job.id


async def test_a_key_is_taken_over_from_a_job_that_is_about_to_be_canceled(store: JobStore) -> None:
    first = (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).job
    await store.claim("one", limit=1, lease_seconds=30)
    assert (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).job.id == first.id
    await store.request_cancel(first.id, None)
    assert not (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).is_replay


async def test_a_key_of_a_deleted_job_is_free(store: JobStore) -> None:
    job = (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).job
    await store.request_cancel(job.id, None)
    assert await store.delete(job.id, None) is not None
    assert not (await store.submit(new_job(), max_queue=MANY, idempotency=KEY)).is_replay


async def test_of_many_submissions_with_one_key_one_counts(
    store: JobStore, clock: Clock, database_url: str
) -> None:
    other = await JobStore.open(database_url, clock=clock.wall)
    attempts = [server.submit(new_job(), max_queue=1, idempotency=KEY) for server in (store, other) * 10]
    submitted = await asyncio.gather(*attempts)
    await other.close()
    assert len({each.job.id for each in submitted}) == 1
    assert sum(not each.is_replay for each in submitted) == 1


async def test_lists_are_newest_first_and_stable_while_jobs_arrive(store: JobStore, clock: Clock) -> None:
    jobs = [new_job(created_at=clock.now + number // 2) for number in range(5)]  # pairs of the same moment
    await add(store, *jobs)
    newest_first = sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=True)
    seen: list[Job] = []
    page, cursor = await store.list("ann", limit=2)
    seen += page
    while cursor is not None:
        await add(store, new_job(created_at=clock.now + 100))
        page, cursor = await store.list("ann", limit=2, cursor=cursor)
        seen += page
    assert seen == newest_first


async def test_a_page_that_is_just_full_is_the_last(store: JobStore) -> None:
    await add(store, new_job(), new_job())
    page, cursor = await store.list("ann", limit=2)
    assert (len(page), cursor) == (2, None)


async def test_lists_can_be_of_one_status(store: JobStore) -> None:
    running = await add_running(store)
    await add(store, new_job())
    assert (await store.list("ann", limit=10, status=JobStatus.RUNNING))[0] == [running]
    assert await store.list("ann", limit=10, status=JobStatus.FAILED) == ([], None)


async def test_a_cursor_survives_the_job_that_it_names(store: JobStore, clock: Clock) -> None:
    old, middle, new = (new_job(created_at=clock.now + number) for number in range(3))
    await add(store, old, middle, new)
    _, cursor = await store.list("ann", limit=2)
    await store.request_cancel(middle.id, None)
    await store.delete(middle.id, None)
    assert await store.list("ann", limit=2, cursor=cursor) == ([old], None)


async def test_other_cursors_are_refused(store: JobStore) -> None:
    decoded = ["null", "[1,2]", '[1,"\\u0000"]', '[NaN,"job"]', '[1e999,"job"]', '["1","job"]', "[1]"]
    encoded = [base64.urlsafe_b64encode(text.encode()).decode() for text in decoded]
    for cursor in ("", "x", "ü", "\0", "=", "a b c d", *encoded):
        with pytest.raises(InvalidRequest) as refused:
            await store.list("ann", limit=2, cursor=cursor)
        assert refused.value.param == "cursor"


async def test_a_queued_job_is_canceled_at_once_and_never_runs(store: JobStore, clock: Clock) -> None:
    job = new_job()
    await add(store, job)
    canceled = await store.request_cancel(job.id, "ann")
    assert canceled == job.canceled(clock.now) == await stored(store, job)
    assert await claim(store) == []


async def test_the_worker_of_a_running_job_is_told(store: JobStore) -> None:
    running = await add_running(store)
    await add_running(store)
    asked = await store.request_cancel(running.id, "ann")
    assert asked == replace(running, cancel_requested=True)
    assert await store.renew("one", 30) == [running.id]


async def test_an_ended_job_stays_as_it_is(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    failed = job.failed(Failure(500, "internal_error", "x"), clock.now)
    await store.move(job, failed)
    assert await store.request_cancel(job.id, "ann") == failed
    assert await stored(store, job) == failed


async def test_only_ended_jobs_are_deleted(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    await store.save_image(job, new_image())
    with pytest.raises(Conflict):
        await store.delete(job.id, "ann")
    await store.move(job, job.canceled(clock.now))
    deleted = await store.delete(job.id, "ann")
    assert deleted is not None
    assert [image.name for image in deleted.images] == [new_image().name]
    assert await store.get(job.id, None) is None


async def test_counts(store: JobStore, clock: Clock) -> None:
    assert await store.counts() == QueueCounts(0, 0, 0.0, None)
    await add_running(store, cost_seconds=100)
    gone = new_job(cost_seconds=10)
    await add(store, gone, new_job(cost_seconds=1.5, created_at=clock.now + 1), new_job(cost_seconds=2))
    await store.request_cancel(gone.id, None)
    assert await store.counts() == QueueCounts(2, 1, 3.5, clock.now)
