"""uvicorn with time limits for slow clients, a limit on connections, and a graceful stop.

uvicorn waits for ever for the head of a request, for the rest of a body that was already answered, and for
clients that do not read an answer; here such connections are closed. It accepts connections until no
descriptor is left; here some are reserved for the work. On a signal it refuses connections at once; here it
goes on answering while running work is finished.
"""

import asyncio
import fcntl
import resource
import socket
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.deps import Services
from app.api.gateway import CROWDED
from app.jobs import webhooks
from app.jobs.fleet import LEAVE_SECONDS
from app.settings import Settings

DEFAULT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 75  # longer than proxies and clients do, or they send while it is being closed
REST_SECONDS = 30.0  # for an unwanted body: most clients read the answer only after sending it all
READING_SECONDS = 30.0  # between checks of how much of an answer was read
READING_RATE = 1024  # bytes a second at least; a slow mobile connection reads eight times as many
HURRIED_SECONDS = 2  # each time limit of a connection beyond the maximum
DESCRIPTORS_SHARE = 0.75  # for connections; the rest is for pictures, uploads, databases and engines
LAST_SECONDS = 0.3  # for requests in flight when the listening sockets were closed
ANSWER_SECONDS = 2  # of the grace period, for answers to callers whose work was abandoned
AFTER_SECONDS = ANSWER_SECONDS + LAST_SECONDS + LEAVE_SECONDS + webhooks.LEAVE_SECONDS  # of grace, in all


class TimeoutProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose request head does not arrive in time.

    The same holds for the rest of a body after its answer. Answers must be read at a minimum rate.
    """

    header_seconds = DEFAULT_SECONDS
    rest_seconds = REST_SECONDS
    reading_seconds = READING_SECONDS
    max_connections = sys.maxsize
    _awaited_seconds: float | None = None
    _closing: asyncio.TimerHandle | None = None
    _owed_bytes = 0
    _judging: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Limit the time for the first request's head, or refuse a connection beyond the maximum."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing is paused as long as anything is left unsent
        num_beyond = len(self.connections) - self.max_connections
        if num_beyond > self.max_connections // 8:
            transport.abort()
        elif num_beyond > 0:
            self.app_state = {**self.app_state, CROWDED: True}
            self.header_seconds = self.rest_seconds = self.timeout_keep_alive = HURRIED_SECONDS
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Handle more of a head or a body."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all time limits."""
        super().connection_lost(exc)
        self._stop_watching()
        self._stop_judging()

    def on_response_complete(self) -> None:
        """Limit the time for the rest of the body."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def pause_writing(self) -> None:
        """Check the reading rate from now on: data is left unsent, even if the connection is closing."""
        super().pause_writing()
        self._judge_later()

    def resume_writing(self) -> None:
        """Stop checking the reading rate: everything is sent."""
        super().resume_writing()
        self._stop_judging()

    def _watch(self) -> None:
        awaited_seconds = None
        if self.conn.their_state is h11.IDLE:
            awaited_seconds = self.header_seconds
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            awaited_seconds = self.rest_seconds
        if awaited_seconds != self._awaited_seconds:
            self._stop_watching()
            self._awaited_seconds = awaited_seconds
            if awaited_seconds is not None:
                self._closing = self.loop.call_later(awaited_seconds, self.transport.close)

    def _stop_watching(self) -> None:
        self._awaited_seconds = None
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _judge_later(self) -> None:
        self._owed_bytes = self._count_owed()
        self._judging = self.loop.call_later(self.reading_seconds, self._judge)

    def _judge(self) -> None:
        """Abort a slow reader. Nothing is written meanwhile, so what is no longer owed has been read."""
        if self._owed_bytes - self._count_owed() >= READING_RATE * self.reading_seconds:
            self._judge_later()
            return
        reset = struct.pack("ii", 1, 0)  # otherwise the kernel would keep its part of the answer
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self.transport.abort()

    def _stop_judging(self) -> None:
        if self._judging is not None:
            self._judging.cancel()
            self._judging = None

    def _count_owed(self) -> int:
        """Return the number of bytes that the peer has not acknowledged.

        Those in the kernel's buffer count: it accepts no more until a good part of them is acknowledged, for
        which a slow peer may need a minute.
        """
        connection = self.transport.get_extra_info("socket")
        [in_kernel] = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
        return self.transport.get_write_buffer_size() + int(in_kernel)


def configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for `app`."""
    return uvicorn.Config(
        app,
        http=protocol(settings.header_timeout, max_connections=_room_for_connections(settings)),
        log_config=None,  # the app logs its own requests, one JSON line each
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the app decides which proxies it trusts
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )


def _room_for_connections(settings: Settings) -> int:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(settings.max_connections, int(descriptors * DESCRIPTORS_SHARE))


def protocol(
    header_seconds: float,
    rest_seconds: float = REST_SECONDS,
    reading_seconds: float = READING_SECONDS,
    max_connections: int = sys.maxsize,
) -> type[TimeoutProtocol]:
    """Return a protocol class with these limits: uvicorn takes a class, not an instance."""
    patience = {
        "header_seconds": header_seconds,
        "rest_seconds": rest_seconds,
        "reading_seconds": reading_seconds,
        "max_connections": max_connections,
    }
    return type("Protocol", (TimeoutProtocol,), patience)


class DrainingServer(uvicorn.Server):
    """A server that on a signal takes no more work, finishes running work within the grace, and stops.

    Meanwhile every request is answered, if only with 503. A second signal ends the grace period.
    """

    def __init__(self, config: uvicorn.Config, grace_seconds: float, on_stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._grace_seconds = max(grace_seconds - AFTER_SECONDS, 0.0)
        self._on_stopping = on_stopping
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the grace on a second signal of any kind; uvicorn itself only knows a second Ctrl-C."""
        if self.should_exit and self._draining is not None:
            self._draining.get_loop().call_soon_threadsafe(self._draining.cancel)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work, then the connections, then the app."""
        self._on_stopping()
        self.server_state.default_headers.append((b"connection", b"close"))  # a later request could be lost
        services: Services = self.config.loaded_app.state.services
        services.uploads.close()
        self._draining = asyncio.create_task(services.dispatcher.drain(self._grace_seconds))
        with suppress(asyncio.CancelledError):
            await self._draining
        services.dispatcher.abandon()
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_SECONDS)
        self.force_exit = False  # otherwise uvicorn would skip the app's shutdown
        await super().shutdown(sockets)
