"""From an accepted job to its pictures, when nothing dies."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image

from app.engine.protocol import (
    Configure,
    Expect,
    Failed,
    Previewed,
    Progressed,
    Run,
    Stepped,
    WantPreviews,
)
from app.errors import Overloaded
from app.jobs import maintenance
from app.jobs.events import News, Preview
from app.jobs.faults import Point
from app.jobs.flights import ALMOST_DONE, LEAST_PLENTY, Slot
from app.jobs.job import Job, JobStatus, Progress
from app.jobs.store import JobStore, Submitted
from app.storage.encoding import AI_MADE
from tests.app.jobs.dispatcher.conftest import Serve
from tests.app.jobs.servers import pixels_of, until

pytestmark = pytest.mark.anyio


async def test_a_job_becomes_pictures(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5, 6)
    assert accepted.cost_seconds > 0
    runs = await server.runs(2)
    assert [(run.index, run.seed, run.latents, run.is_alone) for run in runs] == [
        (0, 5, None, False),
        (1, 6, None, False),
    ]
    server.engine.finish(*reversed(runs))
    done = await server.ended(accepted)
    assert done.status == JobStatus.SUCCEEDED
    assert [(image.index, image.seed, image.prompt_tokens) for image in done.images] == [(0, 5, 3), (1, 6, 3)]
    assert (done.timings.prior, done.timings.decoder) == (2.0, 1.0)
    assert done.timings.encode > 0.5
    assert done.timings.queued == 0.0  # an engine that says it took longer than the job has lived
    for image in done.images:
        content = (server.files / image.name).read_bytes()
        assert len(content) == image.num_bytes
        assert AI_MADE.encode() in content
        assert Image.open(server.files / image.name).getpixel((0, 0)) == (image.seed, 7, 9)
    assert await server.store.get(done.id, None) == done
    assert server.sample("cascade_jobs_total", outcome="succeeded", reason="") == 1
    assert server.sample("cascade_pictures_total") == 2
    assert server.sample("cascade_eta_error_ratio_count") == 1


@pytest.mark.usefixtures("no_rounds")
async def test_an_idle_engine_makes_ready_while_a_job_is_accepted(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    submit, told_before = store.submit, []

    async def watched(*arguments: Any, **details: Any) -> Submitted:
        told_before.append([type(message) for message in server.engine.sent])
        return await submit(*arguments, **details)

    monkeypatch.setattr(store, "submit", watched)
    accepted = await server.submit(5)
    await server.at_rest()
    await server.submit(6)
    await server.runs(2)
    expected, *others = [message for message in server.engine.sent if not isinstance(message, Configure)]
    assert isinstance(expected, Expect)
    assert expected.request == accepted.request.model_dump_json().encode()
    assert all(isinstance(message, Run) for message in others)
    assert told_before[0] == [Configure, Expect]


async def test_its_events_tell_the_story(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5, 6)
    reading = asyncio.create_task(server.read(accepted))
    runs = await server.runs(2)
    server.engine.step(runs[0], 10)
    server.engine.finish(runs[1])
    await until(lambda: server.sample("cascade_pictures_total") == 1)
    server.engine.finish(runs[0])
    events = await reading
    assert [kind for kind, _ in events if kind in ("image", "final")] == ["image", "image", "final"]
    images = [news for kind, news in events if kind == "image"]
    assert events[-1][1] == await server.ended(accepted)
    assert images == list(reversed((await server.ended(accepted)).images))


async def test_a_job_is_begun_when_it_comes_and_not_in_the_next_round(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 1000.0)
    server = await serve()
    for count in (1, 2, 3):
        accepted = await server.submit(count)
        server.engine.finish((await server.runs(count))[-1])
        await server.ended(accepted)


async def test_many_jobs_share_the_engine_and_none_waits_for_another(serve: Serve) -> None:
    server = await serve()
    jobs = [await server.submit(seed) for seed in range(5)]
    runs = await server.runs(5)
    server.engine.finish(runs[3])
    assert (await server.ended(jobs[3])).status == JobStatus.SUCCEEDED
    server.engine.finish(*runs)
    assert {(await server.ended(job)).status for job in jobs} == {JobStatus.SUCCEEDED}


async def test_no_more_pictures_board_than_fit(serve: Serve) -> None:
    server = await serve(max_samples=3)
    jobs = [await server.submit(1, 2), await server.submit(3, 4), await server.submit(5)]
    runs = await server.runs(3)
    server.engine.finish(runs[0])
    runs = await server.runs(4)
    server.engine.finish(runs[1], runs[2])
    runs = await server.runs(5)
    server.engine.finish(*runs)
    assert [len((await server.ended(job)).images) for job in jobs] == [2, 2, 1]


async def test_a_tenant_with_enough_aboard_waits_in_the_queue_and_delays_nobody(serve: Serve) -> None:
    server = await serve(full_rows=40)
    plenty = 20  # pictures of two rows
    jobs = [await server.submit(*range(10 * number, 10 * number + 10), tenant="many") for number in range(3)]
    await server.runs(plenty)
    other = await server.submit(99, tenant="few")
    runs = await server.runs(plenty + 1)
    assert runs[-1].job == other.id
    await until(lambda: server.dispatcher._forecast.counts.queued == 1)
    server.engine.finish(runs[0])
    await server.runs(plenty + 11)
    server.engine.finish(*server.engine.runs[1:])
    assert {(await server.ended(job)).status for job in [*jobs, other]} == {JobStatus.SUCCEEDED}


@pytest.mark.usefixtures("no_rounds")
async def test_a_job_is_begun_by_the_commit_that_accepts_it(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    commits = 0
    hit = store._database._faults.hit

    def counting(point: Point) -> None:
        nonlocal commits
        commits += point == "before_commit"
        hit(point)

    monkeypatch.setattr(store._database, "_faults", SimpleNamespace(hit=counting))
    accepted = await server.submit(5)
    assert [run.job for run in server.engine.runs] == [accepted.id]
    running = await store.get(accepted.id, None)
    assert running is not None
    assert (running.status, running.fence) == (JobStatus.RUNNING, 1)
    assert commits == 1


@pytest.mark.usefixtures("no_rounds")
async def test_a_refusal_leaves_the_engine_to_others(serve: Serve) -> None:
    server = await serve(max_queue=0)
    await server.at_rest()
    accepted = await server.submit(5)
    with pytest.raises(Overloaded):
        await server.submit(6)
    (slot,) = server.dispatcher._fleet.slots
    assert slot.room
    (run,) = await server.runs(1)
    server.engine.finish(run)
    await server.ended(accepted)
    again = await server.submit(7)
    assert (await server.runs(2))[-1].job == again.id


async def test_what_a_tenant_offers_too_much_is_refused_and_not_taken_aboard(serve: Serve) -> None:
    server = await serve(max_queue=3)
    for seed in range(LEAST_PLENTY):
        await server.submit(seed)
        await server.runs(seed + 1)
    for seed in range(3):
        await server.submit(seed)
    for seed in range(5):
        with pytest.raises(Overloaded) as refusal:
            await server.submit(seed)
        assert int(refusal.value.headers["Retry-After"]) >= 1
    await server.runs(LEAST_PLENTY)


async def test_jobs_of_the_sated_are_not_looked_for_again_and_again(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 60.0)
    server = await serve(max_queue=3)
    for seed in range(LEAST_PLENTY):
        await server.submit(seed)
        await server.runs(seed + 1)
    looks, look = [], store.claim

    async def claim(*args: Any, **options: Any) -> Sequence[Job]:
        looks.append(args)
        return await look(*args, **options)

    monkeypatch.setattr(store, "claim", claim)
    for seed in range(2):
        await server.submit(seed)
    await server.at_rest()
    known = len(looks)
    for _ in range(3):
        server.dispatcher._wake_all()
        await server.at_rest()
    assert len(looks) == known
    server.engine.finish(server.engine.runs[0])  # so the tenant is not sated any more
    await server.runs(LEAST_PLENTY + 1)
    await server.at_rest()
    assert known < len(looks) <= known + 2


@pytest.mark.usefixtures("no_rounds")
async def test_a_job_that_comes_while_none_is_found_is_claimed_next(
    serve: Serve, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    await server.at_rest()
    claim, looked, go_on = store.claim, asyncio.Event(), asyncio.Event()

    async def slow_claim(*args: Any, **options: Any) -> Sequence[Job]:
        jobs = await claim(*args, **options)
        looked.set()
        await go_on.wait()
        return jobs

    monkeypatch.setattr(store, "claim", slow_claim)
    server.dispatcher._wake_to_claim()
    await looked.wait()
    await server.submit(1)
    go_on.set()
    await server.runs(1)


async def test_two_devices_that_find_nothing_know_of_each_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 60.0)
    server = await serve(devices=2)
    await until(lambda: all(engine.is_ready for engine in server.dispatcher.engines))
    fleet = server.dispatcher._fleet
    one = fleet.slots[0]
    sated = property(lambda slot: frozenset({"ann"} if slot is one else {"bob"}))
    monkeypatch.setattr(Slot, "sated", sated)
    server.dispatcher._wake_to_claim()
    await until(lambda: not fleet.may_claim)


async def test_who_is_sated_on_one_device_goes_to_the_other(serve: Serve) -> None:
    server = await serve(devices=2)
    await until(lambda: all(engine.is_ready for engine in server.dispatcher.engines))
    for seed in range(2 * LEAST_PLENTY + 3):
        await server.submit(seed)
    for device in range(2):
        await server.runs(LEAST_PLENTY, device)
    server.engines[1][0].finish(*server.engines[1][0].runs[:3])
    await server.runs(LEAST_PLENTY + 3, 1)
    await server.runs(LEAST_PLENTY, 0)


async def test_several_devices_share_the_queue(serve: Serve) -> None:
    server = await serve(devices=2)
    await until(lambda: all(engine.is_ready for engine in server.dispatcher.engines))
    jobs = [await server.submit(seed) for seed in range(6)]
    runs = [await server.runs(3, device) for device in range(2)]
    for device in range(2):
        server.engines[device][0].finish(*runs[device])
    assert {(await server.ended(job)).status for job in jobs} == {JobStatus.SUCCEEDED}


async def test_steps_are_told_to_those_who_watch_and_to_those_who_come_later(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5)
    (run,) = await server.runs(1)
    flight = server.dispatcher._fleet.flight(accepted.id)
    assert flight is not None
    server.engine.step(run, 3)
    await until(lambda: flight.share_left() == 1.0 and flight._steps)
    untold = server.dispatcher.events.progress(accepted)
    assert (untold.stage, untold.step) == ("prior", 0)  # nobody watches: only that it was begun
    steps: list[int] = []

    async def watch() -> None:
        async for event in server.dispatcher.follow(accepted.id):
            steps.extend([event.news.step] if isinstance(event.news, Progress) else [])

    watching = asyncio.create_task(watch())
    await until(lambda: steps == [3])
    server.engine.step(run, 4)
    await until(lambda: steps == [3, 4])
    server.engine.finish(run)
    await watching


async def test_what_is_said_at_once_of_a_jobs_pictures_is_one_event(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()
    accepted = await server.submit(5, 6, 7)
    runs = await server.runs(3)
    events, told = server.dispatcher.events, list[Progress]()
    publish = events.publish

    def note(job_id: str, news: News) -> None:
        told.extend([news] if isinstance(news, Progress) else [])
        publish(job_id, news)

    monkeypatch.setattr(events, "publish", note)
    monkeypatch.setattr(events, "is_watched", lambda job_id: True)
    for left in ((128.0, 128.0, 128.0), (96.0, 64.0, 32.0)):
        steps = (
            Stepped(run.job, run.index, "prior", 5 + run.index, 20, seconds)
            for run, seconds in zip(runs, left, strict=True)
        )
        server.engine.say(Progressed(tuple(steps)))
    await until(lambda: server.dispatcher.progress(accepted).fraction > 0)
    assert {news.fraction for news in told} == {0, ALMOST_DONE / 2}
    assert told[-1].step == 5, "of the one that is the furthest behind"
    server.engine.finish(*runs)
    await server.ended(accepted)


async def test_progress_never_falls(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5, 6)
    runs = await server.runs(2)
    said: list[Progress] = []

    async def said_more() -> Progress:
        await until(lambda: server.dispatcher.progress(accepted) not in said)
        said.append(server.dispatcher.progress(accepted))
        return said[-1]

    assert (await said_more()).fraction == 0
    server.engine.step(runs[0], 1, remaining=9.0)
    server.engine.step(runs[1], 2, remaining=8.0)
    server.engine.step(runs[1], 3, remaining=4.0)
    await until(lambda: server.dispatcher.progress(accepted).fraction > 0.2)
    assert (await said_more()).step == 1
    server.engine.step(runs[0], 7, "decoder", remaining=2.0)
    await until(lambda: server.dispatcher.progress(accepted).step == 3)
    fraction = (await said_more()).fraction
    server.engine.die(1)
    await until(lambda: len(server.engines[0]) == 2)
    runs = await server.runs(2)
    again = server.dispatcher.progress(accepted)
    assert again.fraction == fraction > 0.5
    assert again.eta_seconds is not None
    server.engine.finish(*runs)
    await server.ended(accepted)
    progress = server.dispatcher.progress(await server.ended(accepted))
    assert (progress.fraction, progress.stage) == (1.0, "done")


async def test_previews_are_made_when_somebody_watches(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5)
    (run,) = await server.runs(1)
    server.dispatcher.want_previews(accepted.id, 2)
    server.dispatcher.want_previews(accepted.id, 1)
    assert server.engine.previews_wanted == [WantPreviews(accepted.id, 2)]
    server.engine.say(Previewed(accepted.id, 0, 0, 2, 2, bytes(12)))
    async for event in server.dispatcher.follow(accepted.id):
        if isinstance(event.news, Preview):
            assert event.news.content.startswith(b"RIFF")
            assert AI_MADE.encode() in event.news.content
            break
    server.engine.finish(run)
    await server.ended(accepted)


async def test_previews_may_be_wanted_before_the_job_is_begun(serve: Serve) -> None:
    server = await serve(max_samples=1)
    first, second = await server.submit(1), await server.submit(2)
    (run,) = await server.runs(1)
    server.dispatcher.want_previews(second.id, 3)
    server.engine.finish(run)
    await until(lambda: server.engine.previews_wanted == [WantPreviews(second.id, 3)])
    sent = server.engine.sent
    assert sent.index(server.engine.previews_wanted[0]) > sent.index(server.engine.runs[1])
    server.engine.finish(server.engine.runs[1])
    await server.ended(second)
    assert (await server.ended(first)).status == JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("code", "status"),
    [("out_of_memory", 500), ("invalid_value", 400), ("odd", 500)],
)
async def test_a_picture_that_cannot_be_made_fails_its_job(serve: Serve, code: str, status: int) -> None:
    server = await serve()
    accepted, other = await server.submit(5, 6), await server.submit(7)
    runs = await server.runs(3)
    server.engine.finish(runs[0])
    server.engine.say(Failed(accepted.id, 1, code, "it does not fit"))
    done = await server.ended(accepted)
    assert done.status == JobStatus.FAILED
    assert done.failure is not None
    assert (done.failure.status, done.failure.code, done.failure.message) == (status, code, "it does not fit")
    server.engine.finish(runs[2])
    assert (await server.ended(other)).status == JobStatus.SUCCEEDED


async def test_what_an_engine_says_of_jobs_that_are_gone_is_old(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5)
    (run,) = await server.runs(1)
    await server.dispatcher.cancel(accepted.id)
    server.engine.step(run, 3)
    server.engine.end_prior(run)
    server.engine.finish(run)
    server.engine.say(Failed(run.job, 0, "odd", "late"))
    other = await server.submit(6)
    server.engine.finish((await server.runs(2))[1])
    await server.ended(other)
    assert (await server.ended(accepted)).status == JobStatus.CANCELED
    assert len(list(server.files.iterdir())) == 1


async def test_a_picture_that_comes_twice_is_kept_once(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5, 6)
    runs = await server.runs(2)
    server.engine.finish(runs[0], runs[0], runs[0], runs[1])
    assert [image.index for image in (await server.ended(accepted)).images] == [0, 1]
    assert len(list(server.files.iterdir())) == 2


async def test_pixels_that_are_no_picture_do_not_loop_for_ever(serve: Serve) -> None:
    server = await serve()
    accepted = await server.submit(5)
    for count in (1, 2, 3):
        runs = await server.runs(count)
        server.engine.say(replace(pixels_of(runs[-1]), pixels=b""))
    done = await server.ended(accepted)
    assert done.failure is not None
    assert done.failure.code == "generation_failed"
