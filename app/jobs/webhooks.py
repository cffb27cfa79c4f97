"""Webhooks: a receiver is told what became of a job, at least once (https://www.standardwebhooks.com).

The database says what is still to be told, so neither a crash of ours nor hours of theirs lose anything. A
slow or dead receiver has a few of our attempts waiting for it, and a tenant of many such receivers at most
half of them all: nobody else is kept from being told.
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
from app.jobs.store import Busy, Delivery, JobStore
from app.logs import Logger
from app.metrics import Metrics, WebhookOutcome
from app.outbound import Unreachable

ROUND_SECONDS = 0.5
ATTEMPT_SECONDS = 15.0  # in which a receiver must have answered
HOLD_SECONDS = ATTEMPT_SECONDS + 5  # an attempt of which nobody has heard for so long died with its server
PAUSES = (1.0, 5.0, 30.0, 300.0, 1800.0, 7200.0)  # seconds after each attempt, about
JITTER = 0.2
MAX_AT_ONCE = 64  # attempts
MAX_OF_ONE_TENANT = 32
MAX_AT_ONE_RECEIVER = 8  # of a tenant
LEAVE_SECONDS = 1.0  # for the attempts under way, when the server ends
GONE = 410  # says that a receiver wants no more
AGENT = "stable-cascade-server"

Body = Callable[[Delivery, Webhook], Awaitable[bytes]]
Secret = Callable[[str], str]  # of a tenant


class Post(Protocol):
    """A way to call somebody."""

    async def __call__(self, url: str, headers: Mapping[str, str], body: bytes, *, seconds: float) -> int:
        """The status of the answer. Raises Unreachable."""


class Courier:
    """Tells webhooks what is due. For one event loop."""

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
        self._attempts: dict[
            asyncio.Task[None], tuple[str, str]
        ] = {}  # under way: of whom, at which receiver
        self._is_away = False  # the database

    async def run(self) -> None:
        """Tell, until canceled; attempts under way may then come to their end, if that is soon."""
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
        """Begin what is due, as much as there is room for."""
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
        """Those who have as many attempts under way as may be theirs."""
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
        """One attempt, and what follows from it."""
        self._faults.hit("before_delivery")
        try:
            status, answer = await self._call(delivery, webhook)
        except asyncio.CancelledError:  # the server ends; its next life need not wait
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
        """The status of the receiver's answer, 0 when there is none, and what to say of it."""
        try:
            body = await self._body(delivery, webhook)
            headers = self._headers(delivery, body)
            status = await self._post(webhook.url, headers, body, seconds=ATTEMPT_SECONDS)
        except Unreachable as error:
            return 0, str(error)
        except Exception as error:  # a mistake of ours; and none is made for ever
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
    """What an attempt has come to, and seconds until the next one, if there is to be one."""
    if 200 <= status < 300:
        return "delivered", None
    if status == GONE:
        return "gone", None
    pause = pause_after(attempt)
    return ("given_up", None) if pause is None else ("failed", pause)


def pause_after(attempt: int) -> float | None:
    """Seconds until the next attempt, not the same for all who wait; None after the last."""
    if attempt > len(PAUSES):
        return None
    return PAUSES[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # nothing secret
