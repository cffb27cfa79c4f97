"""A server in a process of its own, that keeps its port over restarts; to be measured or killed."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

ROOT = Path(__file__).parents[1]
ENGINE_MODULE = "app.engine.process"
POLL_SECONDS = 0.02
START_SECONDS = 180.0  # a slow machine reads packages and weights, and profiles the model


class ServerFailed(Exception):
    """The server did not start, or left when it should not have."""


def leave_when_terminated() -> None:
    """Let SIGTERM unwind this program as an error would, so that no server of its outlives it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """Starts, kills and restarts one server. Its output goes to the end of `log`."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._words = [word.replace("{port}", str(self.port)) for word in words]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("CASCADE_")}
        self._environment = {**outside, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def ours(cls, folder: Path, log: Path, **settings: object) -> "ServerProcess":
        """`cascade serve` with its data in `folder` and these settings (max_queue=8: CASCADE_MAX_QUEUE)."""
        environment = {f"CASCADE_{name.upper()}": str(value) for name, value in settings.items()}
        words = ["-m", "app.cli", "serve", "--port", "{port}", "--data-dir", str(folder)]
        return cls(words, log, environment)

    def tell(self, variables: Mapping[str, str]) -> None:
        """Add environment variables for all starts from now on."""
        self._environment.update(variables)

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return self._running.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process exists and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self, **changed: str) -> None:
        """Start the process; `changed` replaces environment variables for this start only."""
        if self.is_alive:
            raise ServerFailed("the server runs already")
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._words],
                cwd=ROOT,
                env={**self._environment, **changed},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the program that measures
            )

    async def until_ready(self, path: str = "/readyz", seconds: float = START_SECONDS) -> float:
        """Wait until `path` answers 200; returns the seconds that it took."""
        start = time.monotonic()
        async with httpx2.AsyncClient(base_url=self.url, timeout=5) as client:
            while True:
                if not self.is_alive:
                    raise ServerFailed(
                        f"the server left with {self._running.returncode}: {self.last_words()}"
                    )
                try:
                    if (await client.get(path)).status_code == 200:
                        return time.monotonic() - start
                except httpx2.TransportError:
                    pass
                if time.monotonic() - start > seconds:
                    raise ServerFailed(f"the server was not ready in {seconds:g} s: {self.last_words()}")
                await asyncio.sleep(POLL_SECONDS)

    def engines(self) -> list[psutil.Process]:
        """The engine processes that this server has now."""
        try:
            children = psutil.Process(self._running.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if _is_engine(child)]

    def kill(self) -> None:
        """`kill -9`, of the server alone; its engines have to see to themselves."""
        self._running.kill()
        self._running.wait()

    def terminate(self) -> None:
        """`SIGTERM`; the server may take its time."""
        self._running.send_signal(signal.SIGTERM)

    async def until_left(self, seconds: float) -> int | None:
        """The exit status, or None if the process lives on after `seconds`."""
        try:
            return await asyncio.to_thread(self._running.wait, seconds)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self, characters: int = 2000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def end(self) -> None:
        """Make sure that nothing is left, whatever happened."""
        if self._process is None:
            return
        left = self.engines()
        if self.is_alive:
            self.kill()
        for engine in left:
            try:
                engine.kill()
            except psutil.NoSuchProcess:
                continue

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerFailed("the server was never started")
        return self._process


@contextmanager
def ending(server: ServerProcess) -> Iterator[ServerProcess]:
    """Whatever happens inside, the processes of `server` are gone at the end."""
    try:
        yield server
    finally:
        server.end()


def _is_engine(process: psutil.Process) -> bool:
    try:
        return ENGINE_MODULE in process.cmdline()
    except psutil.Error:
        return False
