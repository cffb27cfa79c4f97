"""Starts engines, and the link to each: one end of a socket pair, whose other end the engine inherits."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from app.engine.contract import AnyRunner
from app.engine.process import serve_in_thread
from app.engine.protocol import AnyFromEngine, ToEngine, frame_length, from_engine, pack
from app.logs import Logger
from app.settings import Settings, engine_environment

HEAD_BYTES = 4
BUFFER_BYTES = 1024**2

ENGINE = "app.engine.process"


class Link(Protocol):
    """The connection to an engine that was started, for its supervisor."""

    def send(self, message: ToEngine) -> None:
        """Queue a message to be sent. If the engine is dead, it is lost."""

    async def receive(self) -> AnyFromEngine | None:
        """Return the next message; None when no more will come. Raises ValueError for anything else."""

    def kill(self) -> None:
        """Kill the engine, whatever it does."""

    async def ended(self) -> int:
        """Wait for the engine's end; return the exit status, negative for a signal."""


Launch = Callable[[], Awaitable[Link]]


class SocketLink:
    """A link over a stream socket."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        kill: Callable[[], None],
        ended: Callable[[], Awaitable[int]],
        pid: int = 0,
    ) -> None:
        self.pid = pid
        self._reader = reader
        self._writer = writer
        self._kill = kill
        self._ended = ended

    def send(self, message: ToEngine) -> None:
        """Queue a message to be sent."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def receive(self) -> AnyFromEngine | None:
        """Return the next message; None when the engine has hung up. Raises ValueError for anything else."""
        try:
            head = await self._reader.readexactly(HEAD_BYTES)
            return from_engine(await self._reader.readexactly(frame_length(head)))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def kill(self) -> None:
        """Kill the engine, and hang up."""
        self._kill()
        self._writer.close()

    async def ended(self) -> int:
        """Wait for the engine's end; return its exit status."""
        return await self._ended()


class ProcessLauncher:
    """Starts engine processes. They write their logs to our standard error.

    `-P` keeps them from importing files of the folder where the server was started.
    """

    def __init__(self, settings: Settings, *, program: Sequence[str] = ("-P", "-m", ENGINE)) -> None:
        self._interpreter = sys.executable
        self._words = [*program, "--log-level", settings.log_level, "--log-format", settings.log_format]

    async def __call__(self) -> SocketLink:
        """Start an engine. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(self._interpreter, *self._words, "--socket-fd", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env=engine_environment(),
                    start_new_session=True,  # Ctrl-C then reaches only us, and we drain the engine
                )
            except BaseException:
                ours.close()
                raise

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)  # ends a stopped process, too

        return SocketLink(*await _streams(ours), kill=kill, ended=process.wait, pid=process.pid)


class ThreadLauncher:
    """Starts engines as threads of this process, all with the same runner. For tests."""

    def __init__(self, runner: AnyRunner, logger: Logger) -> None:
        self._runner = runner
        self._logger = logger

    async def __call__(self) -> SocketLink:
        """Start an engine."""
        ours, theirs = socket.socketpair()
        served = serve_in_thread(theirs, self._runner, logger=self._logger)
        killed = asyncio.Event()

        async def ended() -> int:
            """Wait for the thread or `kill`: a thread in a long step cannot be ended, only left alone."""
            thread = asyncio.ensure_future(asyncio.wrap_future(served))
            death = asyncio.ensure_future(killed.wait())
            await asyncio.wait((thread, death), return_when=asyncio.FIRST_COMPLETED)
            death.cancel()
            return int(thread.result()) if thread.done() else -signal.SIGKILL

        return SocketLink(*await _streams(ours), kill=killed.set, ended=ended)


async def _streams(ours: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=ours, limit=BUFFER_BYTES)
