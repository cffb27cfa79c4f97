"""Webhooks from the request to the receiver: what is accepted, who is told what, and with which secret."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from standardwebhooks.webhooks import Webhook as Signature

from app.errors import GenerationFailed
from tests.app.api.sse import Watcher, told
from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner, closed, until
from tests.receiver import Call, Receiver

pytestmark = pytest.mark.anyio

IMAGES, JOBS, SECRET = "/api/v1/images", "/api/v1/jobs", "/api/v1/webhooks/signing-secret"


@pytest.fixture(autouse=True)
def quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.webhooks.ROUND_SECONDS", 0.01)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    async with serve(outbound_allow="127.0.0.1") as client:
        yield client


async def accepted(client: httpx2.AsyncClient, webhook: object, **members: Any) -> dict[str, Any]:
    answer = await client.post(IMAGES, json={"prompt": "x", "webhook": webhook, **members})
    assert answer.status_code == 202, answer.text
    assert answer.headers["preference-applied"] == "respond-async"
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == job["urls"]["self"]
    return job


async def calls(receiver: Receiver, number: int) -> list[Call]:
    async with asyncio.timeout(10):
        return await receiver.got(number)


async def test_the_end_of_a_job_is_told_with_its_pictures(
    client: httpx2.AsyncClient, receiver: Receiver
) -> None:
    job = await accepted(client, {"url": f"{receiver.url}/hook"}, seed=7, metadata={"order": "A-99"})
    [call] = await calls(receiver, 1)
    secret = (await client.get(SECRET)).json()["key"]
    message = Signature(secret).verify(call.body, call.headers)
    assert (call.path, call.headers["content-type"]) == ("/hook", "application/json")
    assert message["type"] == "image.job.succeeded"
    assert message["timestamp"] == message["data"]["completed_at"]
    now = (await client.get(job["urls"]["self"])).json()
    for one in (message["data"], now):
        one.pop("urls")
        [image] = one["images"]
        url = image.pop("url")
        assert url.startswith("http://server/files/")
        assert (await client.get(url)).status_code == 200
    assert message["data"] == now
    assert (now["metadata"], now["request"]["seed"]) == ({"order": "A-99"}, 7)


async def test_start_and_end_if_both_are_asked_for(client: httpx2.AsyncClient, receiver: Receiver) -> None:
    events = ["image.job.started", "image.job.succeeded"]
    await accepted(client, {"url": receiver.url, "events": events})
    messages = [call.message for call in await calls(receiver, 2)]
    assert sorted(message["type"] for message in messages) == events
    [started] = [message for message in messages if message["type"] == "image.job.started"]
    assert started["data"]["status"] == "running"
    assert started["timestamp"] == started["data"]["started_at"]
    assert (started["data"]["completed_at"], started["data"]["images"]) == (None, [])
    assert (started["data"]["progress"]["stage"], started["data"]["progress"]["fraction"]) == ("prior", 0)
    assert len({call.headers["webhook-id"] for call in receiver.calls}) == 2


async def test_other_ends(client: httpx2.AsyncClient, receiver: Receiver, runner: FakeRunner) -> None:
    runner.broken["broken"] = GenerationFailed("the latents are not finite")
    await accepted(client, receiver.url, prompt="broken")
    [failed] = await calls(receiver, 1)
    assert failed.message["type"] == "image.job.failed"
    assert failed.message["data"]["error"]["code"] == "generation_failed"
    with closed(runner.gate):
        job = await accepted(client, receiver.url)
        expiring = await accepted(client, receiver.url, deadline_seconds=1)
        await client.post(job["urls"]["cancel"])
        await calls(receiver, 2)
        canceled = receiver.calls[1].message
        assert (canceled["type"], canceled["data"]["id"]) == ("image.job.canceled", job["id"])
        await calls(receiver, 3)
        expired = receiver.calls[2].message
    assert (expired["type"], expired["data"]["id"]) == ("image.job.failed", expiring["id"])
    assert expired["data"]["status"] == "expired"


async def test_what_is_not_asked_for_is_not_told(
    client: httpx2.AsyncClient, receiver: Receiver, runner: FakeRunner
) -> None:
    with closed(runner.gate):
        job = await accepted(client, {"url": receiver.url, "events": ["image.job.succeeded"]})
        await client.post(job["urls"]["cancel"])
    await accepted(client, receiver.url)
    [call] = await calls(receiver, 1)
    assert call.message["type"] == "image.job.succeeded"


async def test_as_a_form(client: httpx2.AsyncClient, receiver: Receiver) -> None:
    for webhook in (json.dumps({"url": f"{receiver.url}/1"}), f"{receiver.url}/2"):
        fields = {"prompt": (None, "x"), "webhook": (None, webhook)}
        assert (await client.post(IMAGES, files=fields)).status_code == 202
    assert {call.path for call in await calls(receiver, 2)} == {"/1", "/2"}


async def test_a_stream_tells_the_webhook_too_and_its_work_goes_on(
    client: httpx2.AsyncClient, receiver: Receiver
) -> None:
    answer = await client.post(
        IMAGES, json={"prompt": "x", "webhook": receiver.url}, headers={"accept": "text/event-stream"}
    )
    assert answer.status_code == 200
    assert told(answer.text)[-1].event == "job.succeeded"
    await calls(receiver, 1)


async def test_who_leaves_a_stream_leaves_the_work_to_the_webhook(
    client: httpx2.AsyncClient, receiver: Receiver, runner: FakeRunner
) -> None:
    watcher = Watcher(client)
    with closed(runner.gate):
        body = {"prompt": "x", "webhook": receiver.url}
        headers = {"accept": "text/event-stream"}
        async with watcher.watching("POST", IMAGES, body, headers):
            await watcher.until("job.progress")
    [call] = await calls(receiver, 1)
    assert call.message["type"] == "image.job.succeeded"


async def test_who_waits_a_while_gets_the_job(client: httpx2.AsyncClient, receiver: Receiver) -> None:
    body = {"prompt": "x", "webhook": receiver.url}
    answer = await client.post(IMAGES, json=body, headers={"prefer": "wait=10", "accept": "image/png"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    await calls(receiver, 1)


async def test_a_repetition_is_one_job_and_one_call(
    client: httpx2.AsyncClient, receiver: Receiver, runner: FakeRunner
) -> None:
    headers = {"idempotency-key": "k"}
    body = {"prompt": "x", "webhook": receiver.url}
    first, second = [await client.post(IMAGES, json=body, headers=headers) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    other = await client.post(IMAGES, json={**body, "webhook": receiver.url + "/x"}, headers=headers)
    assert other.status_code == 422
    await accepted(client, receiver.url)
    assert len({call.message["data"]["id"] for call in await calls(receiver, 2)}) == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2/",
        "http://2130706434/",
        "http://0x7f.2/",
        "http://[::1]/",
        "http://[::ffff:7f00:2]/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1",
    ],
)
async def test_addresses_that_are_not_public_are_refused(client: httpx2.AsyncClient, url: str) -> None:
    answer = await client.post(IMAGES, json={"prompt": "x", "webhook": {"url": url}})
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["pointer"] == "/webhook/url"
    assert "webhook.url must lead to a public address" in answer.json()["detail"]


async def test_other_contracts_have_none(client: httpx2.AsyncClient) -> None:
    members = {"prompt": "x", "webhook": {"url": "https://example.org"}}
    answer = await client.post("/v1/images/generations", json=members)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "webhook is a member of POST /api/v1/images only"
    absent = await client.post("/v1/images/generations", json={"prompt": "x", "webhook": None})
    assert absent.status_code == 200


async def test_every_key_has_a_secret_of_its_own_that_stays(serve: Serve, receiver: Receiver) -> None:
    keys = {"api_keys": "ann=one,bob=two", "outbound_allow": "127.0.0.1"}
    seen = []
    for _ in range(2):  # as after a restart
        async with serve(**keys) as client:
            assert (await client.get(SECRET)).status_code == 401
            seen.append(
                [
                    (await client.get(SECRET, headers={"x-api-key": key})).json()["key"]
                    for key in ("one", "two")
                ]
            )
            body = {"prompt": "x", "webhook": receiver.url}
            await client.post(IMAGES, json=body, headers={"x-api-key": "two"})
            await calls(receiver, len(seen))
    assert seen[0] == seen[1]
    ann, bob = seen[0]
    assert ann != bob
    for call in receiver.calls:
        Signature(bob).verify(call.body, call.headers)


async def test_a_receiver_that_is_down_is_told_when_it_is_back(
    client: httpx2.AsyncClient, receiver: Receiver
) -> None:
    receiver.reply = lambda call: b"HTTP/1.1 503 x\r\ncontent-length: 0\r\n\r\n"
    await accepted(client, receiver.url)
    await calls(receiver, 1)
    receiver.reply = lambda call: b"HTTP/1.1 200 x\r\ncontent-length: 0\r\n\r\n"
    first, second = await calls(receiver, 2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    metrics = (await client.get("/metrics")).text
    await until(lambda: 'cascade_webhook_attempts_total{outcome="failed"} 1.0' in metrics)


async def test_what_was_not_told_is_told_after_a_restart(serve: Serve, receiver: Receiver) -> None:
    receiver.reply = lambda call: b"HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n"
    async with serve(outbound_allow="127.0.0.1") as client:
        await accepted(client, receiver.url)
        await calls(receiver, 1)
    receiver.reply = lambda call: b"HTTP/1.1 200 x\r\ncontent-length: 0\r\n\r\n"
    async with serve(outbound_allow="127.0.0.1"):
        first, second = await calls(receiver, 2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert second.message["data"]["images"][0]["url"].startswith("http://server/files/")
