"""`/api/v1/jobs`: lists, one job, its events, cancelling, forgetting; and that keys see only their own."""

import asyncio
import time
from typing import Any

import httpx2
import pytest

from app.engine.protocol import Previewed
from app.jobs.pictures import encode_preview
from tests.app.api.sse import Watcher, told
from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner, closed, until

pytestmark = pytest.mark.anyio
IMAGES, JOBS = "/api/v1/images", "/api/v1/jobs"


async def submit(client: httpx2.AsyncClient, *, key: str | None = None, **members: Any) -> dict[str, Any]:
    headers = {"prefer": "respond-async"} | ({"x-api-key": key} if key else {})
    answer = await client.post(IMAGES, json={"prompt": "x", **members}, headers=headers)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def ended(client: httpx2.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            now: dict[str, Any] = (await client.get(job["urls"]["self"])).json()
            if now["status"] not in ("queued", "running"):
                return now
            await asyncio.sleep(0.005)


async def test_jobs_are_listed_newest_first_in_pages(client: httpx2.AsyncClient) -> None:
    jobs = [await submit(client) for _ in range(5)]
    first = (await client.get(JOBS, params={"limit": 2})).json()
    assert (first["object"], first["has_more"]) == ("list", True)
    newer = await submit(client)
    second = (await client.get(JOBS, params={"limit": 2, "cursor": first["next_cursor"]})).json()
    third = (await client.get(JOBS, params={"limit": 2, "cursor": second["next_cursor"]})).json()
    seen = [job["id"] for page in (first, second, third) for job in page["data"]]
    assert seen == [job["id"] for job in reversed(jobs)]
    assert (third["has_more"], third["next_cursor"]) == (False, None)
    for job in (*jobs, newer):
        await ended(client, job)
    done = (await client.get(JOBS, params={"status": "succeeded", "limit": 100})).json()
    assert len(done["data"]) == 6
    assert (await client.get(JOBS, params={"status": "failed"})).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("limit=0", "limit must be greater than or equal to 1"),
        ("limit=101", "limit must be less than or equal to 100"),
        ("status=done", "status must be"),
        ("cursor=%00", "cursor"),
    ],
)
async def test_wrong_queries_are_problems(client: httpx2.AsyncClient, query: str, words: str) -> None:
    answer = await client.get(f"{JOBS}?{query}")
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]


async def test_a_job_from_waiting_to_done(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    with closed(runner.gate):
        job = await submit(client, seed=3)
        await until(lambda: runner.started)
        running = (await client.get(job["urls"]["self"])).json()
        assert running["status"] == "running"
        assert running["started_at"]
        assert running["queue_position"] is None
        assert running["progress"]["eta_seconds"] > 0
    done = await ended(client, job)
    assert done["images"][0]["url"].startswith("http://server/files/")
    assert (await client.get(done["images"][0]["url"])).status_code == 200


async def test_the_events_of_a_running_job_and_where_they_go_on(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    with closed(runner.gate):
        job = await submit(client)
        first = Watcher(client)
        async with first.watching("GET", job["urls"]["events"]):
            await first.until("job.progress")
    await ended(client, job)
    seen = first.events[-1].id
    answer = await client.get(job["urls"]["events"], headers={"last-event-id": str(seen)})
    assert answer.status_code == 200
    assert [event.event for event in told(answer.text)][-1] == "job.succeeded"
    assert "\n\nretry: 2000\nevent: job." in answer.text
    last = told(answer.text)[-1].id
    again = await client.get(job["urls"]["events"], headers={"last-event-id": str(last)})
    assert again.status_code == 204
    for odd in ("x", "-1", "9" * 5000):
        assert (await client.get(job["urls"]["events"], headers={"last-event-id": odd})).status_code == 200


@pytest.mark.parametrize("is_late", [False, True])
async def test_who_follows_a_job_sees_the_previews_it_asked_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Never an older one after a newer one, though that may be encoded faster."""

    def encode(made: Previewed, *details: Any) -> bytes:
        time.sleep(0.12 if is_late and made.preview == 0 else 0)
        return encode_preview(made, *details)

    monkeypatch.setattr("app.jobs.results.encode_preview", encode)
    runner = FakeRunner(steps=8)
    runner.on_step = lambda tracks: time.sleep(0.02)  # a picture that is finished before needs no preview
    async with serve(use=runner) as client:
        watcher = Watcher(client)
        with closed(runner.gate):
            job = await submit(client, previews=2)
            watching = watcher.watching("GET", job["urls"]["events"])
            await watching.__aenter__()
            await watcher.until("job.progress")
        await watcher.until("job.succeeded")
        await watching.__aexit__(None, None, None)
    previews = [told.data["preview"] for told in watcher.events if told.event == "job.preview"]
    assert previews == [2] or (previews == [1, 2] and not is_late)


async def test_who_waits_in_the_queue_is_told_the_place(serve: Serve, runner: FakeRunner) -> None:
    runner.max_samples = 1
    async with serve() as client:
        with closed(runner.gate):
            await submit(client)
            await until(lambda: runner.started)
            jobs = [await submit(client) for _ in range(2)]
            assert [job["queue_position"] for job in jobs] == [0, 1]
            assert 0 < jobs[0]["progress"]["eta_seconds"] <= jobs[1]["progress"]["eta_seconds"]
            watcher = Watcher(client)
            async with watcher.watching("GET", jobs[1]["urls"]["events"]):
                assert (await watcher.until("job.queued")).data == {"queue_position": 1}


async def test_an_ended_job_has_one_event(client: httpx2.AsyncClient) -> None:
    job = await ended(client, await submit(client))
    [event] = told((await client.get(f"{JOBS}/{job['id']}/events")).text)
    assert event.event == "job.succeeded"
    assert event.data["images"][0]["sha256"] == job["images"][0]["sha256"]


async def test_watching_does_not_hold_a_job_and_leaving_does_not_end_it(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    with closed(runner.gate):
        job = await submit(client)
        watcher = Watcher(client)
        async with watcher.watching("GET", job["urls"]["events"]):
            await watcher.until("job.progress")
    assert (await ended(client, job))["status"] == "succeeded"


async def test_a_job_that_waits_is_canceled_at_once(serve: Serve, runner: FakeRunner) -> None:
    async with serve() as client:
        with closed(runner.gate):
            running = await submit(client)
            await until(lambda: runner.started)
            answer = await client.post(running["urls"]["cancel"])
            assert answer.status_code == 200
        assert (await ended(client, running))["status"] == "canceled"
        again = await client.post(running["urls"]["cancel"])
        assert (again.status_code, again.json()["status"]) == (200, "canceled")
        done = await ended(client, await submit(client))
        assert (await client.post(done["urls"]["cancel"])).json()["status"] == "succeeded"


async def test_who_waits_for_a_canceled_job_is_told(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    with closed(runner.gate):
        waiting = asyncio.ensure_future(client.post(IMAGES, json={"prompt": "x"}))
        await until(lambda: runner.started)
        [job] = (await client.get(JOBS)).json()["data"]
        await client.post(job["urls"]["cancel"])
    answer = await waiting
    assert (answer.status_code, answer.json()["code"]) == (409, "canceled")
    assert answer.headers["x-should-retry"] == "false"


async def test_an_ended_job_is_forgotten_with_its_files(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    job = await ended(client, await submit(client))
    assert (await client.delete(job["urls"]["self"])).status_code == 204
    assert (await client.get(job["urls"]["self"])).status_code == 404
    assert (await client.delete(job["urls"]["self"])).status_code == 404
    assert (await client.get(job["images"][0]["url"])).status_code == 404
    with closed(runner.gate):
        running = await submit(client)
        answer = await client.delete(running["urls"]["self"])
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


async def test_keys_see_their_own_jobs_only(serve: Serve) -> None:
    async with serve(api_keys="a=one,b=two") as client:
        job = await submit(client, key="one")
        for method, path in [
            ("GET", job["urls"]["self"]),
            ("DELETE", job["urls"]["self"]),
            ("POST", job["urls"]["cancel"]),
            ("GET", f"{job['urls']['self']}/events"),
        ]:
            theirs = await client.request(method, path, headers={"x-api-key": "two"})
            missing = await client.request(
                method, path.replace(job["id"], "job_0"), headers={"x-api-key": "two"}
            )
            assert theirs.status_code == missing.status_code == 404
            assert theirs.json().keys() == missing.json().keys()
            assert theirs.json()["detail"] == missing.json()["detail"]
            assert (await client.request(method, path)).status_code == 401
        assert (await client.get(JOBS, headers={"x-api-key": "two"})).json()["data"] == []
        assert len((await client.get(JOBS, headers={"x-api-key": "one"})).json()["data"]) == 1
        assert (await client.get("/api/v1/queue")).status_code == 401


async def test_signed_events_need_no_key(serve: Serve) -> None:
    async with serve(api_keys="a=one") as client:
        job = await submit(client, key="one")
        assert (await client.get(job["urls"]["events"])).status_code == 200
        other = job["urls"]["events"].replace(job["id"], "job_0")
        assert (await client.get(other)).status_code == 403
        assert (await client.get(f"{job['urls']['self']}/events?exp=9&sig=é")).status_code == 403


async def test_a_deadline_that_passes_in_the_queue_ends_the_job(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    store = inside(client).store
    with closed(runner.gate):
        job = await submit(client, deadline_seconds=60)
        stored = await store.get(job["id"], "")
    assert stored is not None
    assert stored.deadline_at == pytest.approx(stored.created_at + 60)
