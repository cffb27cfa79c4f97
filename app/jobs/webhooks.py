"""Webhooks: a receiver is told what became of a job, at least once (https://www.standardwebhooks.com).

The database says what is still to be told, so neither a crash of ours nor hours without the receiver lose
anything. A slow or dead receiver occupies only a few of our attempts, and a tenant with many such receivers
at most half of them all, so that they delay nobody else.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol

from standardwebhooks.webhooks import Webhook as Signature

from app.jobs.faults import NO_FAULTS, Faults
from app.jobs.job import Webhook
from app.jobs.outbox import Busy, Delivery
from app.jobs.store import JobStore
from app.logs import Logger
from app.metrics import Metrics, WebhookOutcome
from app.outbound import Unreachable

ROUND_SECONDS = 0.5
ATTEMPT_SECONDS = 15.0  # in which a receiver must have answered
HOLD_SECONDS = ATTEMPT_SECONDS + 5  # an attempt without an outcome for so long died with its server
PAUSES = (1.0, 5.0, 30.0, 300.0, 1800.0, 7200.0)  # seconds after each attempt, before jitter
JITTER = 0.2
MAX_AT_ONCE = 64  # attempts
MAX_OF_ONE_TENANT = 32
MAX_AT_ONE_RECEIVER = 8  # of one tenant
LEAVE_SECONDS = 1.0  # for the attempts under way, when the server ends
GONE = 410  # status of a receiver that wants no more
AGENT = "stable-cascade-server"

Body = Callable[[Delivery, Webhook], Awaitable[bytes]]
Secret = Callable[[str], str]  # from the name of a tenant to its secret


class Post(Protocol):
    """A function that sends a POST request."""

    async def __call__(self, url: str, headers: Mapping[str, str], body: bytes, *, seconds: float) -> int:
        """Send a body and return the status of the answer. Raises Unreachable."""


class WebhookSender:
    """Calls webhooks when a delivery is due. For one event loop."""

    def __init__(
        self,
        store: JobStore,
        *,
        body: Body,
        secret: Secret,
        post: Post,
        metrics: Metrics,
        logger: Logger,
        clock: Callable[[], float],
        faults: Faults = NO_FAULTS,
    ) -> None:
        self._store = store
        self._body = body
        self._secret = secret
        self._post = post
        self._metrics = metrics
        self._logger = logger
        self._clock = clock
        self._faults = faults
        # Attempts under way, each with its tenant and receiver.
        self._attempts: dict[asyncio.Task[None], tuple[str, str]] = {}
        self._is_away = False  # the database

    async def run(self) -> None:
        """Deliver until canceled; attempts under way then have a short time to end."""
        try:
            while True:
                try:
                    await self._begin_due()
                    self._is_away = False
                except Exception as error:
                    if not self._is_away:
                        self._logger.warning("webhooks wait for the database", reason=str(error))
                    self._is_away = True
                await asyncio.sleep(ROUND_SECONDS)
        finally:
            if attempts := set(self._attempts):
                _, late = await asyncio.wait(attempts, timeout=LEAVE_SECONDS)
                for attempt in late:
                    attempt.cancel()
                await asyncio.gather(*late, return_exceptions=True)

    async def _begin_due(self) -> None:
        """Begin the attempts that are due, as many as there is room for."""
        while await self._store.has_due_deliveries():
            room = min(MAX_AT_ONCE - len(self._attempts), MAX_AT_ONE_RECEIVER)
            if room == 0:
                return
            begun = await self._store.claim_deliveries(
                limit=room, hold_seconds=HOLD_SECONDS, without=self._busy
            )
            if not begun:
                return
            for delivery in begun:
                assert delivery.job.webhook is not None
                attempt = asyncio.create_task(self._deliver(delivery, delivery.job.webhook))
                self._attempts[attempt] = (delivery.job.tenant, delivery.job.webhook.receiver)
                attempt.add_done_callback(self._end)

    @property
    def _busy(self) -> Busy:
        """The tenants and receivers that have as many attempts under way as they may."""
        at_receivers = Counter(self._attempts.values())
        of_tenants = Counter(tenant for tenant, _ in self._attempts.values())
        return Busy(
            tenants=[tenant for tenant, number in of_tenants.items() if number >= MAX_OF_ONE_TENANT],
            receivers=[pair for pair, number in at_receivers.items() if number >= MAX_AT_ONE_RECEIVER],
        )

    def _end(self, attempt: "asyncio.Task[None]") -> None:
        del self._attempts[attempt]
        if not attempt.cancelled() and (error := attempt.exception()) is not None:
            self._logger.error("an attempt to call a webhook is made again", exc_info=error)

    async def _deliver(self, delivery: Delivery, webhook: Webhook) -> None:
        """Make an attempt, and record its outcome."""
        self._faults.hit("before_delivery")
        try:
            status, answer = await self._call(delivery, webhook)
        except asyncio.CancelledError:  # the server ends; the next one need not wait
            await self._store.settle_delivery(delivery, again_after=0.0)
            raise
        self._faults.hit("after_delivery")
        outcome, pause = _outcome(status, delivery.attempt)
        self._metrics.webhooks.labels(outcome).inc()
        log = self._logger.info if outcome == "delivered" else self._logger.warning
        log(
            "webhook called",
            job=delivery.job.id,
            webhook=delivery.id,
            receiver=webhook.receiver,
            attempt=delivery.attempt,
            outcome=outcome,
            answer=answer,
            again_in_seconds=None if pause is None else round(pause, 1),
        )
        await self._store.settle_delivery(delivery, again_after=pause)

    async def _call(self, delivery: Delivery, webhook: Webhook) -> tuple[int, str]:
        """Return the status of the receiver's answer, 0 if there is none, and a text for the log."""
        try:
            body = await self._body(delivery, webhook)
            headers = self._headers(delivery, body)
            status = await self._post(webhook.url, headers, body, seconds=ATTEMPT_SECONDS)
        except Unreachable as error:
            return 0, str(error)
        except Exception as error:  # a bug of ours, which counts as a failed attempt, too
            self._logger.error("a webhook could not be called", job=delivery.job.id, exc_info=error)
            return 0, type(error).__name__
        return status, f"status {status}"

    def _headers(self, delivery: Delivery, body: bytes) -> dict[str, str]:
        now = datetime.fromtimestamp(int(self._clock()), UTC)
        signature = Signature(self._secret(delivery.job.tenant))
        return {
            "content-type": "application/json",
            "user-agent": AGENT,
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signature.sign(delivery.id, now, body.decode()),
        }


def _outcome(status: int, attempt: int) -> tuple[WebhookOutcome, float | None]:
    """Return the outcome of an attempt, and the seconds until the next one, None if there is none."""
    if 200 <= status < 300:
        return "delivered", None
    if status == GONE:
        return "gone", None
    pause = pause_after(attempt)
    return ("given_up", None) if pause is None else ("failed", pause)


def pause_after(attempt: int) -> float | None:
    """Return the seconds until the next attempt, with jitter; None after the last."""
    if attempt > len(PAUSES):
        return None
    return PAUSES[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # nothing secret
