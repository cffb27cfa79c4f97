"""Starting engines, and the line to each: one end of a socket pair, whose other end the engine inherits."""

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
    """An engine that was started, as its supervisor sees it."""

    def send(self, message: ToEngine) -> None:
        """Leave a message to be sent. To a dead engine, it is lost."""

    async def receive(self) -> AnyFromEngine | None:
        """The next message; None when no more will come. Raises ValueError for noise."""

    def kill(self) -> None:
        """End the engine, whatever it does."""

    async def ended(self) -> int:
        """Wait for its end; returns the exit status, negative for a signal."""


Launch = Callable[[], Awaitable[Link]]


class SocketLink:
    """A line over a stream socket."""

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
        """Leave a message to be sent."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def receive(self) -> AnyFromEngine | None:
        """The next message; None when the engine has hung up. Raises ValueError for noise."""
        try:
            head = await self._reader.readexactly(HEAD_BYTES)
            return from_engine(await self._reader.readexactly(frame_length(head)))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def kill(self) -> None:
        """End the engine, and hang up."""
        self._kill()
        self._writer.close()

    async def ended(self) -> int:
        """Wait for the engine's end; returns its exit status."""
        return await self._ended()


class ProcessLauncher:
    """Starts engine processes. They write their logs to our standard error.

    `-P`: whatever lies in the folder where the server was started is no part of it.
    """

    def __init__(self, settings: Settings, *, program: Sequence[str] = ("-P", "-m", ENGINE)) -> None:
        self._interpreter = sys.executable
        self._words = [*program, "--log-level", settings.log_level, "--log-format", settings.log_format]

    async def __call__(self) -> SocketLink:
        """Start one. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(self._interpreter, *self._words, "--socket-fd", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env=engine_environment(),
                    start_new_session=True,  # Ctrl-C is for us, who then drain it
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
        """Start one."""
        ours, theirs = socket.socketpair()
        served = serve_in_thread(theirs, self._runner, logger=self._logger)
        killed = asyncio.Event()

        async def ended() -> int:
            """A thread in a long step cannot be ended, only left alone."""
            thread = asyncio.ensure_future(asyncio.wrap_future(served))
            death = asyncio.ensure_future(killed.wait())
            await asyncio.wait((thread, death), return_when=asyncio.FIRST_COMPLETED)
            death.cancel()
            return int(thread.result()) if thread.done() else -signal.SIGKILL

        return SocketLink(*await _streams(ours), kill=killed.set, ended=ended)


async def _streams(ours: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=ours, limit=BUFFER_BYTES)
