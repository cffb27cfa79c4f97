"""Who gets which job, how long he holds it, and what becomes of it when he does not come back."""

import asyncio
from dataclasses import replace

import pytest

from app.errors import QueueFull
from app.jobs.claims import Claim
from app.jobs.job import MAX_CRASHES, Failure, Job, JobStatus, Progress
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


async def look(store: JobStore, clock: Clock, times: int = 1) -> list[Job]:
    """What worker "two" gets when it looks for work so many times, each a third of a lease later."""
    found = []
    for _ in range(times):
        clock.let_pass(LEASE_SECONDS / 3)
        found += await claim(store, "two", limit=10)
    return found


async def test_a_claimed_job_is_held(store: JobStore, clock: Clock) -> None:
    job = new_job()
    await add(store, job)
    clock.let_pass(3)
    (claimed,) = await claim(store)
    assert claimed == job.claimed("one", clock.now, LEASE_SECONDS) == await stored(store, job)
    assert await claim(store) == await claim(store, "two") == []


async def test_a_job_may_be_claimed_as_it_is_accepted(store: JobStore, clock: Clock) -> None:
    job, wanted = new_job(), Claim("one", LEASE_SECONDS)
    submitted = await store.submit(job, max_queue=1, claim=wanted)
    assert submitted.is_claimed
    assert list(submitted.claimed) == [job.claimed("one", clock.now, LEASE_SECONDS)]
    assert list(submitted.claimed) == [await stored(store, job)]
    assert (await store.counts()).queued == 0


async def test_a_job_that_is_accepted_goes_before_nobody(store: JobStore) -> None:
    early, late = new_job(), new_job()
    await add(store, early)
    submitted = await store.submit(late, max_queue=MANY, claim=Claim("one", LEASE_SECONDS))
    assert [job.id for job in submitted.claimed] == [early.id]
    assert not submitted.is_claimed
    left = await store.submit(new_job("bob"), max_queue=MANY, claim=Claim("one", 1.0, without=["ann", "bob"]))
    assert left.claimed == []
    with pytest.raises(QueueFull):
        await store.submit(new_job(), max_queue=2, claim=Claim("one", 1.0, without=["ann", "bob"]))
    assert (await stored(store, late)).status == JobStatus.QUEUED


async def test_an_overfull_queue_takes_only_what_need_not_wait(store: JobStore) -> None:
    """As a crash overfills it, which puts back what was in work."""
    await add(store, *(new_job() for _ in range(3)))
    claimed = await claim(store, limit=2)
    await store.release("one")
    with pytest.raises(QueueFull):
        await store.submit(new_job("bob"), max_queue=2, claim=Claim("one", LEASE_SECONDS))
    assert (await store.counts()).queued == 3
    assert (await stored(store, claimed[0])).status == JobStatus.QUEUED
    wanted = Claim("one", LEASE_SECONDS, without=["ann"])
    assert (await store.submit(new_job("bob"), max_queue=2, claim=wanted)).is_claimed


async def test_a_full_queue_keeps_out_nobody_whose_job_is_taken_at_once(store: JobStore) -> None:
    await add(store, new_job(), new_job())
    claim = Claim("one", LEASE_SECONDS, without=["ann"])
    assert (await store.submit(new_job("bob"), max_queue=2, claim=claim)).is_claimed
    assert (await store.counts()).queued == 2
    with pytest.raises(QueueFull):
        await store.submit(new_job("bob"), max_queue=2)


async def test_jobs_come_in_the_order_of_arrival_whatever_the_clock_said(
    store: JobStore, clock: Clock
) -> None:
    jobs = [new_job(created_at=clock.now - number) for number in range(3)]
    await add(store, *jobs)
    assert [job.id for job in await claim(store, limit=10)] == [job.id for job in jobs]


async def test_priority_counts_within_a_tenant(store: JobStore) -> None:
    low, high = new_job("ann", priority=-1), new_job("ann", priority=5)
    other = new_job("bob", priority=-10)
    await add(store, low, high, other)
    assert [job.id for job in await claim(store, limit=10)] == [high.id, other.id, low.id]


async def test_tenants_take_turns(store: JobStore) -> None:
    many, few = [new_job("ann") for _ in range(5)], [new_job("bob") for _ in range(2)]
    await add(store, *many, *few)
    order = [job.tenant for job in await claim(store, limit=10)]
    assert order == ["ann", "bob", "ann", "bob", "ann", "ann", "ann"]


async def test_tenants_may_be_left_out(store: JobStore) -> None:
    await add(store, new_job("ann"), new_job("bob"), new_job("cy"))
    claimed = await store.claim("one", limit=10, lease_seconds=LEASE_SECONDS, without=["ann", "cy"])
    assert [job.tenant for job in claimed] == ["bob"]
    assert {job.tenant for job in await claim(store, limit=10)} == {"ann", "cy"}


async def test_what_a_tenant_has_running_counts_as_turns(store: JobStore) -> None:
    await add(store, *(new_job("ann") for _ in range(5)))
    await claim(store, limit=3)
    await add(store, *(new_job("bob") for _ in range(4)))
    order = [(await claim(store))[0].tenant for _ in range(5)]
    assert order == ["bob", "bob", "bob", "ann", "bob"]


async def test_the_position_is_the_order_of_claims(store: JobStore) -> None:
    await add(store, *(new_job("ann") for _ in range(3)), new_job("bob"), new_job("ann", priority=1))
    queued = [job for tenant in ("ann", "bob") for job in (await store.list(tenant, limit=10))[0]]
    positions = {job.id: await store.position(job) for job in queued}
    claimed = await claim(store, limit=10)
    assert positions == {job.id: place for place, job in enumerate(claimed)}
    assert await store.position(claimed[0]) is None


async def test_two_servers_never_get_the_same_job(store: JobStore, database_url: str) -> None:
    await add(store, *(new_job() for _ in range(12)))
    other = await JobStore.open(database_url)
    claims = [claim(server, name, 2) for server, name in ((store, "one"), (other, "two")) * 4]
    claimed = [job.id for jobs in await asyncio.gather(*claims) for job in jobs]
    claimed += [job.id for job in await claim(store, limit=12)]
    await other.close()
    assert len(claimed) == len(set(claimed)) == 12


async def test_a_job_that_is_too_late_is_not_begun(store: JobStore, clock: Clock) -> None:
    late, in_time = new_job(deadline_at=clock.now + 5), new_job(deadline_at=clock.now + 6)
    await add(store, late, in_time)
    clock.let_pass(5)
    assert [job.id for job in await claim(store, limit=2)] == [in_time.id]
    assert await store.position(late) is None
    assert await store.expire(clock.now) == [late.expired(clock.now)] == [await stored(store, late)]
    assert await store.expire(clock.now + 100) == []


async def test_a_worker_that_renews_keeps_its_jobs(store: JobStore, clock: Clock) -> None:
    await add_running(store)
    for _ in range(3):
        assert await store.renew("one", LEASE_SECONDS) == []
        assert await look(store, clock, times=3) == []


async def test_a_worker_tells_how_far_its_jobs_are(store: JobStore, clock: Clock) -> None:
    job, foreign = await add_running(store), await add_running(store, worker="two")
    progress = Progress("decoder", 3, 10, 0.8, 1.5)
    await store.renew("one", LEASE_SECONDS, {job.id: progress, foreign.id: progress})
    told = await stored(store, job)
    assert told.progress == progress
    assert (await stored(store, foreign)).progress is None
    await store.renew("one", LEASE_SECONDS)
    await store.move(job, job.released())
    assert (await stored(store, job)).progress == progress, "who goes on with it does not begin at nothing"


async def test_the_jobs_of_a_silent_worker_are_taken(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    assert await look(store, clock, times=3) == []  # the first look only begins to watch
    (taken,) = await look(store, clock)
    assert (taken.id, taken.worker, taken.fence, taken.crashes) == (job.id, "two", 2, 1)


async def test_clocks_may_jump_without_a_job_lost_or_taken(store: JobStore, clock: Clock) -> None:
    await add_running(store)
    for jump in (3600.0, -3600.0, 86_400.0, -86_400.0):
        clock.now += jump
        assert await look(store, clock, times=3) == []
        await store.renew("one", LEASE_SECONDS)
    assert await look(store, clock, times=3) == []
    assert len(await look(store, clock)) == 1


async def test_a_database_that_was_away_lets_nobody_seem_dead(store: JobStore, clock: Clock) -> None:
    await add_running(store)
    assert await look(store, clock) == []
    clock.let_pass(100 * LEASE_SECONDS)  # nobody could look, nobody could renew
    assert await look(store, clock, times=2) == []
    await store.renew("one", LEASE_SECONDS)
    assert await look(store, clock, times=3) == []


async def test_a_job_that_loses_its_worker_too_often_fails(store: JobStore, clock: Clock) -> None:
    job = new_job()
    await add(store, job)
    for crashes in range(MAX_CRASHES):
        (held,) = await claim(store, f"worker {crashes}")
        assert held.crashes == crashes
        for _ in range(4):
            clock.let_pass(LEASE_SECONDS)
            await claim(store, "nobody", limit=0)
    failed = await stored(store, job)
    assert (failed.status, failed.crashes) == (JobStatus.FAILED, MAX_CRASHES)
    assert failed.failure is not None
    assert failed.failure.code == "generation_failed"


async def test_a_late_worker_changes_nothing(store: JobStore, clock: Clock) -> None:
    old = await add_running(store)
    await store.release("one")
    (new,) = await claim(store, "one")  # the same name, another hold
    assert not await store.save_latents(old, 0, b"old")
    assert not await store.save_image(old, new_image())
    assert not await store.move(old, old.canceled(clock.now))
    assert await stored(store, new) == new
    assert await store.load_latents(new.id) == {}
    assert await store.save_image(new, new_image())


async def test_an_ended_job_takes_no_pictures(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    await store.move(job, job.canceled(clock.now))
    assert not await store.save_latents(job, 0, b"late")
    assert not await store.save_image(job, new_image())


async def test_a_job_moves_once(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    moves = [job.canceled(clock.now), job.failed(Failure(500, "internal_error", "x"), clock.now)]
    taken = await asyncio.gather(*(store.move(job, after) for after in moves))
    assert sorted(taken) == [False, True]
    assert await stored(store, job) == moves[taken.index(True)]


async def test_a_move_keeps_what_others_wrote(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    await store.request_cancel(job.id, None)
    assert await store.move(job, job.failed(Failure(500, "internal_error", "x"), clock.now))
    assert (await stored(store, job)).cancel_requested


async def test_released_jobs_are_queued_again(store: JobStore) -> None:
    jobs = [await add_running(store) for _ in range(3)]
    kept = await add_running(store, "two")
    released = await store.release("one", crashed_jobs={jobs[1].id})
    assert released == [job.released(crashed=job is jobs[1]) for job in jobs]
    assert [await stored(store, job) for job in jobs] == released
    assert (await stored(store, kept)).status == JobStatus.RUNNING
    assert await store.release("one") == []


async def test_kept_jobs_are_not_released(store: JobStore) -> None:
    kept, stray = [await add_running(store) for _ in range(2)]
    assert await store.release("one", kept_jobs={kept.id}) == [stray.released()]
    assert await stored(store, kept) == kept


async def test_a_job_that_crashes_too_often_fails(store: JobStore) -> None:
    job = new_job()
    await add(store, job)
    for _ in range(MAX_CRASHES - 1):
        await claim(store)
        assert (await store.release("one", crashed_jobs={job.id}))[0].status == JobStatus.QUEUED
    (running,) = await claim(store)
    assert running.is_quarantined
    (failed,) = await store.release("one", crashed_jobs={job.id})
    assert (failed.status, failed.crashes) == (JobStatus.FAILED, MAX_CRASHES)
    assert await claim(store) == []


async def test_moving_back_a_job_that_crashed_too_often_fails_it(store: JobStore) -> None:
    job = new_job()
    await add(store, job)
    for _ in range(MAX_CRASHES):
        (running,) = await claim(store)
        assert await store.move(running, running.released(crashed=True))
    assert (await stored(store, job)).status == JobStatus.FAILED


@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "released"])
async def test_a_job_that_nobody_wants_is_not_queued_again(
    store: JobStore, clock: Clock, is_moved: bool
) -> None:
    job = await add_running(store)
    await store.request_cancel(job.id, None)
    if is_moved:
        assert await store.move(job, job.released())
    else:
        await store.release("one")
    canceled = await stored(store, job)
    assert (canceled.status, canceled.completed_at) == (JobStatus.CANCELED, clock.now)
    assert await claim(store) == []


async def test_latents_are_kept_until_the_picture_is_there(store: JobStore) -> None:
    job = await add_running(store, num_images=2)
    assert await store.save_latents(job, 0, b"zero")
    assert await store.save_latents(job, 1, b"\0one")
    await store.release("one")
    assert await store.load_latents(job.id) == {0: b"zero", 1: b"\0one"}
    (again,) = await claim(store)
    assert await store.save_image(again, new_image(0))
    assert await store.load_latents(job.id) == {1: b"\0one"}


async def test_a_job_ends_with_its_last_picture_or_not_at_all(store: JobStore, clock: Clock) -> None:
    job, image = await add_running(store), new_image()
    ended = replace(job, images=(image,)).succeeded(clock.now)
    assert not await store.save_image(replace(job, fence=job.fence + 1), image, ended)
    assert await stored(store, job) == job
    assert await store.save_image(job, image, ended)
    assert await stored(store, job) == ended
    assert not await store.save_image(job, image, ended)


async def test_ended_jobs_keep_no_latents(store: JobStore, clock: Clock) -> None:
    job = await add_running(store)
    await store.save_latents(job, 0, b"zero")
    await store.move(job, job.canceled(clock.now))
    assert await store.load_latents(job.id) == {}


async def test_pictures_are_in_order_and_there_once(store: JobStore) -> None:
    job = await add_running(store, num_images=3)
    first, last = new_image(0), new_image(2)
    for image in (last, first, last, replace(first, name="1" * 32 + ".png"), first):
        assert await store.save_image(job, image)
    assert (await stored(store, job)).images == (first, last)
    await store.release("one")
    assert (await claim(store))[0].images == (first, last)


async def test_a_picture_that_nobody_asked_for_is_not_taken(store: JobStore) -> None:
    job = await add_running(store)
    assert not await store.save_image(job, new_image(1))
