"""The hub of events: order, numbers, what is kept, and for how long."""

import asyncio
from dataclasses import replace

import pytest

from app.jobs.events import KEPT_SECONDS, MAX_ENDED, NUMBERS_PER_CLAIM, Event, EventHub, Preview, Queued
from app.jobs.job import Job, Progress, StoredImage
from app.schemas import GenerationRequest
from tests.app.jobs.stores import new_job
from tests.app.jobs.virtual_time import BACKEND

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return BACKEND


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(clock: Clock) -> EventHub:
    return EventHub(clock)


REQUEST = GenerationRequest(prompt="x", width=64, height=64, seeds=(1,))


def ended(job_id: str = "job") -> Job:
    return Job(id=job_id, tenant="", request=REQUEST, created_at=0.0).canceled(1.0)


def picture(index: int = 0) -> StoredImage:
    return StoredImage(index, 1, "x.png", 64, 64, "image/png", 10, "ab")


def step(step: int) -> Progress:
    return Progress("prior", step, 20, step / 20)


async def read(hub: EventHub, last_id: int = 0) -> list[Event]:
    """All events up to the end."""
    return [event async for event in hub.subscribe("job", last_id)]


async def settle() -> None:
    """Let everybody go as far as they can."""
    await asyncio.sleep(1)


async def test_events_come_in_order_with_rising_numbers_and_end_with_the_job() -> None:
    hub = EventHub()
    reading = asyncio.create_task(read(hub))
    for news in (Queued(2), step(1), picture(), ended()):
        await settle()
        hub.publish("job", news)
    events = await reading
    assert [(event.id, event.kind) for event in events] == [
        (1, "queued"),
        (2, "progress"),
        (3, "image"),
        (4, "final"),
    ]
    assert events[2].news == picture()


async def test_who_comes_late_gets_what_is_kept(hub: EventHub) -> None:
    for news in (Queued(0), step(1), picture(0), step(2), picture(1), ended()):
        hub.publish("job", news)
    assert [event.id for event in await read(hub)] == [1, 3, 4, 5, 6]


async def test_a_slow_reader_sees_the_latest_progress_only(hub: EventHub) -> None:
    stream = hub.subscribe("job")
    hub.publish("job", step(1))
    assert (await anext(stream)).news == step(1)
    for number in range(2, 1000):
        hub.publish("job", step(number))
    hub.publish("job", ended())
    assert [event.news async for event in stream] == [step(999), ended()]
    assert len(hub._logs["job"].events) == 2


async def test_reading_goes_on_after_the_last_number_seen(hub: EventHub) -> None:
    for news in (Queued(0), picture(0), picture(1), ended()):
        hub.publish("job", news)
    assert [event.id for event in await read(hub, last_id=2)] == [3, 4]
    assert [event.id for event in await read(hub, last_id=4)] == []


async def test_a_number_from_elsewhere_gives_everything(hub: EventHub) -> None:
    hub.publish("job", picture())
    hub.publish("job", ended())
    assert [event.id for event in await read(hub, last_id=77)] == [1, 2]


async def test_numbers_of_a_later_claim_are_higher(hub: EventHub) -> None:
    job = Job(id="job", tenant="", request=REQUEST, created_at=0.0).claimed("w", 0.0, 30)
    hub.begin_claim(job)
    hub.publish("job", step(1))
    hub.begin_claim(job)
    hub.publish("job", ended())
    assert [event.id for event in await read(hub)] == [NUMBERS_PER_CLAIM + 1, NUMBERS_PER_CLAIM + 2]


async def test_the_same_said_twice_is_one_event(hub: EventHub) -> None:
    for news in (Queued(3), Queued(3), picture(), picture(), Queued(2), ended()):
        hub.publish("job", news)
    assert [event.kind for event in await read(hub)] == ["image", "queued", "final"]


async def test_every_preview_is_kept_for_those_who_read_slowly(hub: EventHub) -> None:
    previews = [Preview(index, number, b"webp") for index in range(2) for number in range(3)]
    for preview in previews:
        hub.publish("job", preview)
    hub.publish("job", ended())
    assert [event.news for event in await read(hub)] == [*previews, ended()]


async def test_nothing_follows_the_end(hub: EventHub) -> None:
    hub.publish("job", ended())
    hub.publish("job", step(3))
    hub.publish("job", ended())
    assert [event.id for event in await read(hub)] == [1]


async def test_waiting_for_the_end(hub: EventHub) -> None:
    waiting = [asyncio.create_task(hub.final("job")) for _ in range(2)]
    await settle()
    hub.publish("job", step(1))
    await settle()
    assert not waiting[0].done()
    hub.publish("job", ended())
    assert await asyncio.gather(*waiting) == [ended(), ended()]
    assert await hub.final("job") == ended()


async def test_closing_lets_go_of_everybody(hub: EventHub) -> None:
    hub.publish("job", step(1))
    reading, waiting = asyncio.create_task(read(hub)), asyncio.create_task(hub.final("job"))
    await settle()
    hub.close()
    assert [event.news for event in await reading] == [step(1)]
    assert await waiting is None
    assert await hub.final("other") is None


async def test_forgetting_lets_go_of_those_who_wait_for_that_job(hub: EventHub) -> None:
    waiting, other = asyncio.create_task(hub.final("job")), asyncio.create_task(hub.final("other"))
    await settle()
    hub.forget("job")
    assert await waiting is None
    await settle()
    assert not other.done()
    other.cancel()


async def test_ended_jobs_are_forgotten_after_a_while(hub: EventHub, clock: Clock) -> None:
    hub.publish("job", ended())
    clock.now = KEPT_SECONDS
    hub.publish("b", step(1))
    assert "job" in hub._logs
    clock.now = KEPT_SECONDS + 0.1
    hub.publish("b", step(2))
    assert set(hub._logs) == {"b"}


async def test_many_ended_jobs_are_forgotten_at_once(hub: EventHub) -> None:
    for number in range(2 * MAX_ENDED):
        hub.publish(f"job {number}", ended())
    assert len(hub._logs) <= MAX_ENDED + 2


async def test_asking_leaves_nothing_behind(hub: EventHub) -> None:
    reading = asyncio.create_task(read(hub))
    await settle()
    assert list(hub.unended()) == [("job", True, True)]
    reading.cancel()
    await asyncio.wait([reading])
    assert list(hub.unended()) == []


def test_progress_is_the_furthest_that_was_said(hub: EventHub) -> None:
    job = new_job(id="a")
    assert hub.progress(job) == Progress()
    near, far = Progress("prior", 1, 20, 0.1), Progress("decoder", 2, 10, 0.7)
    assert hub.progress(replace(job, progress=near)) == near
    hub.publish("a", far)
    assert hub.progress(replace(job, progress=near)) == far
    assert hub.progress(replace(job, progress=replace(far, fraction=0.8))).fraction == 0.8


async def test_what_may_still_have_news(hub: EventHub) -> None:
    hub.publish("a", step(1))
    hub.publish("b", ended())
    waiting = asyncio.create_task(hub.final("c"))
    await settle()
    assert list(hub.unended()) == [("a", False, False), ("c", True, False)]
    waiting.cancel()
