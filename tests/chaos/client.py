"""A client that never gives up: it repeats with its Idempotency-Key until its job has ended, whatever dies.

It learns of its pictures on an open connection, by asking for the job again and again, by its events, or by a
webhook.
"""

import asyncio
import base64
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import httpx2
from PIL import Image

from tests.chaos.orders import Order
from tests.receiver import Receiver

FINAL = ("succeeded", "failed", "canceled", "expired")
PAUSE_SECONDS = 0.2  # asking more often would only take the processor from those who draw
LONGEST_PAUSE_SECONDS = 1.0  # of a Retry-After: a chaos run has no time for more
READ_SECONDS = 60.0  # without a byte, not even a comment: the connection counts as lost


class Way(StrEnum):
    """How a client learns that its pictures are there."""

    WAIT = "wait"
    POLL = "poll"
    WATCH = "watch"
    HOOK = "hook"  # of clients with a receiver


class Gone(Exception):
    """The server cannot be reached now, or was lost on the way."""


class Refused(Exception):
    """The server has answered no, for now (`pause` seconds) or for good (None)."""

    def __init__(self, status: int, text: str, pause: float | None) -> None:
        super().__init__(f"{status}: {text[:300]}")
        self.status = status
        self.pause = pause


class Event(NamedTuple):
    """One server-sent event."""

    id: str
    name: str
    data: Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    ticket: str
    order: Order
    way: Way
    job: str | None  # its id, once the server has said it
    status: str  # of the job; "unanswered" when the client's time was up
    digests: tuple[str, ...]  # of the decoded pixels
    seconds: float
    remark: str = ""


class Client:
    """One HTTP client, for many requests at a time."""

    def __init__(
        self,
        url: str,
        transport: httpx2.AsyncBaseTransport | None = None,
        receiver: Receiver | None = None,
    ) -> None:
        self._receiver = receiver
        limits = httpx2.Limits(max_connections=None)
        timeout = httpx2.Timeout(READ_SECONDS, pool=None)
        self._http = httpx2.AsyncClient(base_url=url, timeout=timeout, limits=limits, transport=transport)

    async def close(self) -> None:
        """Leave."""
        await self._http.aclose()

    async def make(self, order: Order, ticket: str, way: Way, patience: float) -> Outcome:
        """Have the pictures of `order` made, within `patience` seconds."""
        start = time.monotonic()
        known: list[str] = []  # the job's id, as soon as it was seen
        try:
            async with asyncio.timeout(patience):
                job = await self._insist(order, ticket, way, known)
                digests = await self._digests(job) if job["status"] == "succeeded" else ()
        except (TimeoutError, Refused) as error:
            seconds = time.monotonic() - start
            status = "unanswered" if isinstance(error, TimeoutError) else "refused"
            return Outcome(ticket, order, way, known[0] if known else None, status, (), seconds, str(error))
        remark = json.dumps(job["error"]) if job["error"] else ""
        seconds = time.monotonic() - start
        return Outcome(ticket, order, way, job["id"], job["status"], digests, seconds, remark)

    async def submit(
        self, order: Order, ticket: str, webhook: str | None = None, **headers: str
    ) -> dict[str, Any]:
        """Post once. Raises Gone or Refused."""
        body = order.body(ticket) | ({"webhook": webhook} if webhook else {})
        response = await self._send(
            "POST", "/api/v1/images", json=body, headers={"Idempotency-Key": ticket, **headers}
        )
        job: dict[str, Any] = response.json()
        return job

    async def job(self, job: str) -> dict[str, Any]:
        """How a job stands. Raises Gone or Refused."""
        answer: dict[str, Any] = (await self._send("GET", f"/api/v1/jobs/{job}")).json()
        return answer

    async def until(self, job: str, statuses: Collection[str]) -> dict[str, Any]:
        """Ask for a job until it has one of `statuses`. Raises Gone or Refused."""
        while True:
            found = await self.job(job)
            if found["status"] in statuses:
                return found
            await asyncio.sleep(PAUSE_SECONDS)

    async def all_jobs(self) -> list[dict[str, Any]]:
        """Every job that the server knows, page by page."""
        jobs: list[dict[str, Any]] = []
        parameters: dict[str, Any] = {"limit": 100}
        while True:
            page = (await self._send("GET", "/api/v1/jobs", params=parameters)).json()
            jobs += page["data"]
            if not page["has_more"]:
                return jobs
            parameters["cursor"] = page["next_cursor"]

    async def events(self, job: dict[str, Any], last: str | None = None) -> AsyncIterator[Event]:
        """The events of a job after the one with the id `last`. Raises Gone or Refused."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        try:
            async with self._http.stream("GET", job["urls"]["events"], headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response)
                fields: dict[str, str] = {}
                async for line in response.aiter_lines():
                    if line:
                        name, _, value = line.partition(":")
                        fields[name] = value.removeprefix(" ")
                        continue
                    if "data" in fields:
                        yield Event(fields["id"], fields["event"], json.loads(fields["data"]))
                    fields = {}
        except httpx2.TransportError as error:
            raise Gone(str(error)) from None

    async def _insist(self, order: Order, ticket: str, way: Way, known: list[str]) -> dict[str, Any]:
        """The ended job. Losing the server, or being sent away for a while, is no reason to stop."""
        while True:
            try:
                return await self._once(order, ticket, way, known)
            except Gone:
                await asyncio.sleep(PAUSE_SECONDS)
            except Refused as refusal:
                if refusal.pause is None:
                    raise
                await asyncio.sleep(min(refusal.pause, LONGEST_PAUSE_SECONDS))

    async def _once(self, order: Order, ticket: str, way: Way, known: list[str]) -> dict[str, Any]:
        if way is Way.WAIT:
            return await self.submit(order, ticket)
        webhook = self._receiver.url if self._receiver and way is Way.HOOK else None
        job = await self.submit(order, ticket, webhook, Prefer="respond-async")
        known[:] = [job["id"]]
        if way is Way.WATCH:
            await self._watch(job)
        if way is Way.HOOK:
            await self._be_told(job)
        return await self.until(job["id"], FINAL)

    async def _watch(self, job: dict[str, Any]) -> None:
        """Read events until the last one, over as many connections as it takes."""
        last: str | None = None
        while True:
            try:
                async for event in self.events(job, last):
                    last = event.id
                    if event.name.removeprefix("job.") in FINAL:
                        return
            except Gone:
                pass
            await asyncio.sleep(PAUSE_SECONDS)

    async def _be_told(self, job: dict[str, Any]) -> None:
        """Do nothing until the server calls."""
        receiver = self._receiver
        assert receiver is not None
        await receiver.until(lambda: any(call.message["data"]["id"] == job["id"] for call in receiver.calls))

    async def _digests(self, job: dict[str, Any]) -> tuple[str, ...]:
        """Of each picture's pixels: two files of the same pixels need not be the same."""
        return tuple([await self._digest(image) for image in job["images"]])

    async def _digest(self, image: dict[str, Any]) -> str:
        content = (
            base64.b64decode(image["b64_json"]) if "b64_json" in image else await self._file(image["url"])
        )
        if hashlib.sha256(content).hexdigest() != image["sha256"]:
            return "a torn file"
        with Image.open(io.BytesIO(content)) as picture:
            pixels = picture.convert("RGB").tobytes()
        return hashlib.sha256(pixels).hexdigest()

    async def _file(self, url: str) -> bytes:
        while True:
            try:
                return (await self._send("GET", url)).content
            except Gone:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _send(self, method: str, url: str, **options: Any) -> httpx2.Response:
        try:
            response = await self._http.request(method, url, **options)
        except httpx2.TransportError as error:
            raise Gone(str(error)) from None
        if response.status_code >= 400:
            raise _refusal(response)
        return response


def _refusal(response: httpx2.Response) -> Refused:
    may_repeat = response.status_code in (409, 429, 503) and "retry-after" in response.headers
    pause = float(response.headers["retry-after"]) if may_repeat else None
    return Refused(response.status_code, response.text, pause)
