"""Reads server-sent events as clients do, from a whole text or while they come."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx2


class Told(NamedTuple):
    """One event."""

    event: str
    data: Any
    id: int | None


def told(text: str) -> list[Told]:
    """All events of a stream; comments and the reconnection time are no events."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            number = int(fields["id"]) if "id" in fields else None
            events.append(Told(fields["event"], json.loads(fields["data"]), number))
    return events


class Watcher:
    """A caller of the app itself who reads an answer while it comes, and may leave."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._app = client.app  # type: ignore[attr-defined]
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._text = ""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_over = False

    @property
    def events(self) -> list[Told]:
        """What came until now."""
        return told(self._text)

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()

    async def until(self, event: str) -> Told:
        """Wait for an event of that name."""
        async with asyncio.timeout(10):
            while True:
                for found in self.events:
                    if found.event == event:
                        return found
                assert not self.is_over, self._text
                self._changed.clear()
                await self._changed.wait()

    @asynccontextmanager
    async def watching(
        self, method: str, url: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> AsyncIterator["Watcher"]:
        """Ask, and read in the background until the block is left."""
        path, _, query = url.partition("?")
        given = {"host": "server", "content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("server", 80),
            "http_version": "1.1",
        }
        unread = [json.dumps(body).encode() if body is not None else b""]

        async def receive() -> dict[str, object]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        visit = asyncio.ensure_future(self._app(scope, receive, self._send))
        try:
            yield self
        finally:
            self.leave()
            async with asyncio.timeout(10):
                await visit

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self._text += message.get("body", b"").decode()
            self.is_over = not message.get("more_body", False)
        self._changed.set()
