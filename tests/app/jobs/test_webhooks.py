"""The sender: whom it tells, how often it tries, and whom it keeps waiting."""

import asyncio
import base64
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from standardwebhooks.webhooks import Webhook as Signature
from standardwebhooks.webhooks import WebhookVerificationError

from app.jobs import webhooks
from app.jobs.faults import Faults, InjectedFault
from app.jobs.job import JobStatus, Webhook
from app.jobs.outbox import Delivery
from app.jobs.store import JobStore
from app.jobs.webhooks import (
    HOLD_SECONDS,
    JITTER,
    MAX_AT_ONCE,
    MAX_AT_ONE_RECEIVER,
    MAX_OF_ONE_TENANT,
    PAUSES,
    WebhookSender,
    pause_after,
)
from app.logs import make_logger
from app.metrics import Metrics
from app.outbound import Unreachable
from app.settings import Settings
from tests.app.fakes import until
from tests.app.jobs.stores import Clock, add, new_job

pytestmark = pytest.mark.anyio

Told = tuple[str, dict[str, str], bytes]


def secret(tenant: str) -> str:
    return "whsec_" + base64.b64encode(tenant.encode() * 8).decode()


class Receivers:
    """All there are: they answer as told, or not before they are let go."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.status: Callable[[str], int | Exception] = lambda url: 200
        self.gate = asyncio.Event()
        self.gate.set()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, *, seconds: float) -> int:
        assert 0 < seconds < HOLD_SECONDS, "another attempt would begin before this one has ended"
        self.told.append((url, dict(headers), body))
        await self.gate.wait()
        status = self.status(url)
        if isinstance(status, Exception):
            raise status
        return status


@pytest.fixture
async def receivers() -> Receivers:
    return Receivers()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


async def body(delivery: Delivery, webhook: Webhook) -> bytes:
    return f'{{"id": "{delivery.job.id}", "words": "привет"}}'.encode()


@pytest.fixture
async def sender(store: JobStore, receivers: Receivers, metrics: Metrics, clock: Clock) -> WebhookSender:
    return new_courier(store, receivers, metrics, clock)


def new_courier(
    store: JobStore,
    receivers: Receivers,
    metrics: Metrics,
    clock: Clock,
    faults: Faults | None = None,
    log_level: Any = "error",
) -> WebhookSender:
    return WebhookSender(
        store,
        body=body,
        secret=secret,
        post=receivers.post,
        metrics=metrics,
        logger=make_logger(Settings(log_level=log_level, log_format="json")),
        clock=clock.wall,
        faults=faults or Faults(),
    )


async def end(store: JobStore, clock: Clock, host: str = "one.example", **fields: Any) -> str:
    """A job that has ended, and wants that to be told."""
    job = new_job(webhook=Webhook(f"https://{host}/hook", (JobStatus.CANCELED,), "https://us"), **fields)
    await add(store, job)
    await store.request_cancel(job.id, None)
    return job.id


async def round_of(sender: WebhookSender) -> None:
    """Begin what is due and wait for what comes of it."""
    await sender._begin_due()
    if sender._attempts:
        await asyncio.wait(sender._attempts)


def outcomes(metrics: Metrics) -> dict[str, float]:
    registry: CollectorRegistry = metrics.registry
    return {
        sample.labels["outcome"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "cascade_webhook_attempts_total" and sample.value
    }


async def test_what_is_told_is_signed_as_the_standard_has_it(
    store: JobStore, sender: WebhookSender, receivers: Receivers, clock: Clock
) -> None:
    clock.now = time.time()
    job_id = await end(store, clock, tenant="bob", created_at=clock.now)
    await round_of(sender)
    [(url, headers, told)] = receivers.told
    assert url == "https://one.example/hook"
    assert (headers["content-type"], headers["user-agent"]) == ("application/json", "stable-cascade-server")
    assert headers["webhook-id"] == f"msg_{job_id[4:]}_canceled"
    assert headers["webhook-timestamp"] == str(int(clock.now))
    assert Signature(secret("bob")).verify(told, headers)["id"] == job_id
    with pytest.raises(WebhookVerificationError):
        Signature(secret("ann")).verify(told, headers)
    with pytest.raises(WebhookVerificationError):
        Signature(secret("bob")).verify(told.replace(b"id", b"ID"), headers)


async def test_what_was_taken_is_not_told_again(
    store: JobStore, sender: WebhookSender, receivers: Receivers, metrics: Metrics, clock: Clock
) -> None:
    await end(store, clock)
    for _ in range(3):
        await round_of(sender)
        clock.let_pass(PAUSES[-1] * 2)
    assert len(receivers.told) == 1
    assert outcomes(metrics) == {"delivered": 1}


@pytest.mark.parametrize("status", [199, 302, 400, 404, 500, Unreachable("refused"), KeyError("ours")])
async def test_a_receiver_that_fails_is_told_again_and_again_but_not_for_ever(
    store: JobStore, sender: WebhookSender, receivers: Receivers, metrics: Metrics, clock: Clock, status: Any
) -> None:
    receivers.status = lambda url: status
    await end(store, clock)
    for number, pause in enumerate(PAUSES, start=1):
        await round_of(sender)
        assert len(receivers.told) == number
        clock.let_pass(pause * (1 - JITTER) * 0.99)
        await round_of(sender)
        assert len(receivers.told) == number, "too early"
        clock.let_pass(pause * 2 * JITTER * 1.1)
    for _ in range(3):
        await round_of(sender)
        clock.let_pass(2 * PAUSES[-1])
    assert len(receivers.told) == len(PAUSES) + 1 == 7
    assert outcomes(metrics) == {"failed": 6, "given_up": 1}
    ids = {headers["webhook-id"] for _, headers, _ in receivers.told}
    stamps = {headers["webhook-timestamp"] for _, headers, _ in receivers.told}
    assert (len(ids), len(stamps)) == (1, 7)


async def test_a_receiver_that_wants_no_more_is_left_alone(
    store: JobStore, sender: WebhookSender, receivers: Receivers, metrics: Metrics, clock: Clock
) -> None:
    receivers.status = lambda url: 410
    await end(store, clock)
    await round_of(sender)
    clock.let_pass(2 * PAUSES[-1])
    await round_of(sender)
    assert len(receivers.told) == 1
    assert outcomes(metrics) == {"gone": 1}


@pytest.mark.parametrize(("point", "times"), [("before_delivery", 1), ("after_delivery", 2)])
async def test_whatever_dies_on_the_way_it_is_told(
    store: JobStore,
    receivers: Receivers,
    metrics: Metrics,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    point: str,
    times: int,
) -> None:
    job_id = await end(store, clock)
    dying = new_courier(store, receivers, metrics, clock, Faults([f"{point}:raise@1"]))
    await round_of(dying)
    assert InjectedFault.__name__ in capsys.readouterr().err
    next_life = new_courier(store, receivers, metrics, clock)
    await round_of(next_life)
    assert len(receivers.told) == times - 1
    clock.let_pass(HOLD_SECONDS)
    await round_of(next_life)
    assert [headers["webhook-id"] for _, headers, _ in receivers.told] == [
        f"msg_{job_id[4:]}_canceled"
    ] * times


async def test_a_slow_receiver_keeps_nobody_else_waiting(
    store: JobStore, sender: WebhookSender, receivers: Receivers, clock: Clock
) -> None:
    receivers.gate.clear()
    for _ in range(3 * MAX_AT_ONE_RECEIVER):
        await end(store, clock, "slow.example")
    await sender._begin_due()
    await asyncio.sleep(0)
    most = len(receivers.told)
    assert MAX_AT_ONE_RECEIVER <= most < 2 * MAX_AT_ONE_RECEIVER
    await end(store, clock, "other.example")
    await sender._begin_due()
    await asyncio.sleep(0)
    assert [url for url, _, _ in receivers.told[most:]] == ["https://other.example/hook"]
    receivers.gate.set()
    await asyncio.wait(sender._attempts)
    await round_of(sender)
    await round_of(sender)
    assert len(receivers.told) == 3 * MAX_AT_ONE_RECEIVER + 1


async def test_a_tenant_with_many_slow_receivers_keeps_no_other_waiting(
    store: JobStore, sender: WebhookSender, receivers: Receivers, clock: Clock
) -> None:
    receivers.gate.clear()
    for number in range(MAX_AT_ONCE):
        await end(store, clock, f"{number}.example", tenant="ann")
    await sender._begin_due()
    await asyncio.sleep(0)
    assert MAX_OF_ONE_TENANT <= len(receivers.told) < MAX_OF_ONE_TENANT + MAX_AT_ONE_RECEIVER
    await end(store, clock, "0.example", tenant="bob")
    await sender._begin_due()
    await asyncio.sleep(0)
    assert receivers.told[-1][0] == "https://0.example/hook"
    receivers.gate.set()
    await asyncio.wait(sender._attempts)


async def test_attempts_at_once_are_bounded(
    store: JobStore, sender: WebhookSender, receivers: Receivers, clock: Clock
) -> None:
    receivers.gate.clear()
    for number in range(MAX_AT_ONCE + 5):
        await end(store, clock, f"{number}.example", tenant=f"tenant-{number}")
    await sender._begin_due()
    await asyncio.sleep(0)
    assert len(receivers.told) == MAX_AT_ONCE
    receivers.gate.set()
    await asyncio.wait(sender._attempts)
    await round_of(sender)
    assert len(receivers.told) == MAX_AT_ONCE + 5


async def test_it_lives_on_when_the_database_is_away(
    store: JobStore,
    sender: WebhookSender,
    receivers: Receivers,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "ROUND_SECONDS", 0.001)
    look, looks = store.has_due_deliveries, 0

    async def has_due() -> bool:
        nonlocal looks
        looks += 1
        if looks <= 2:
            raise ConnectionError("away")
        return await look()

    monkeypatch.setattr(store, "has_due_deliveries", has_due)
    await end(store, clock)
    running = asyncio.create_task(sender.run())
    await until(lambda: receivers.told)
    await leave(running)


async def test_who_leaves_lets_an_attempt_come_to_its_end(
    store: JobStore, sender: WebhookSender, receivers: Receivers, metrics: Metrics, clock: Clock
) -> None:
    receivers.gate.clear()
    await end(store, clock)
    running = asyncio.create_task(sender.run())
    await until(lambda: receivers.told)
    running.cancel()
    await asyncio.sleep(0.01)
    receivers.gate.set()
    await left(running)
    assert outcomes(metrics) == {"delivered": 1}
    clock.let_pass(HOLD_SECONDS)
    assert not await store.has_due_deliveries()


async def test_who_leaves_does_not_wait_for_ever(
    store: JobStore,
    sender: WebhookSender,
    receivers: Receivers,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "LEAVE_SECONDS", 0.01)
    receivers.gate.clear()
    await end(store, clock)
    running = asyncio.create_task(sender.run())
    await until(lambda: receivers.told)
    await leave(running)
    assert await store.has_due_deliveries(), "the next life has to wait"


async def test_neither_path_nor_secret_is_logged(
    store: JobStore,
    receivers: Receivers,
    metrics: Metrics,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sender = new_courier(store, receivers, metrics, clock, log_level="debug")
    for status in (200, 500, Unreachable("refused"), KeyError("ours")):
        receivers.status = lambda url, status=status: status  # type: ignore[misc]
        await end(store, clock)
        await round_of(sender)
    log = capsys.readouterr().err
    assert log.count('"webhook called"') == 4
    assert "one.example" in log
    assert ".example/hook" not in log
    assert secret("ann") not in log


def test_those_who_wait_are_not_told_all_at_once() -> None:
    pauses = [pause_after(3) for _ in range(50)]
    assert len(set(pauses)) > 10
    assert all(pause is not None and 0.8 * 30 <= pause <= 1.2 * 30 for pause in pauses)


async def leave(running: "asyncio.Task[None]") -> None:
    running.cancel()
    await left(running)


async def left(running: "asyncio.Task[None]") -> None:
    with pytest.raises(asyncio.CancelledError):
        await running
