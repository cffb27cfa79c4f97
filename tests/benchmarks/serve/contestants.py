"""The two servers that are measured, each started anew for every measurement and alone on the machine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import aiohttp

from tests.benchmarks.serve.load import ask
from tests.benchmarks.serve.workload import SIZES, USUAL
from tests.server_process import ServerProcess, ending

OURS, PEER = "ours", "diffusers"


@dataclass(frozen=True, slots=True)
class Contestants:
    """How to start each server; `folder` keeps the converted checkpoint, data and logs."""

    folder: Path
    model: str = "tiny"
    settings: dict[str, Any] = field(default_factory=dict)  # of ours
    peer_threads: int | None = None  # of torch in the peer; as torch chooses when None

    def prepared(self) -> "Contestants":
        """Write the checkpoint as diffusers reads it, in the precision that both servers work in."""
        from cascade.checkpoints.convert import convert

        convert(self.model, self.folder / "checkpoint", layout="diffusers", dtype="float32")
        return self

    def process(self, name: str, **settings: object) -> ServerProcess:
        """The server `name`, not started yet; `settings` are for ours only."""
        log = self.folder / f"{name}.log"
        if name == OURS:
            data = Path(mkdtemp(dir=self.folder))
            profiles = self.folder / "profiles"  # measured once
            chosen = {"model": self.model, "cache_dir": profiles, "log_format": "json"}
            chosen |= {**self.settings, **settings}
            return ServerProcess.ours(data, log, **chosen)
        words = ["-m", "tests.benchmarks.serve.peer", "--port", "{port}"]
        words += ["--checkpoint", str(self.folder / "checkpoint")]
        words += ["--threads", str(self.peer_threads)] if self.peer_threads else []
        return ServerProcess(words, log, {})

    @asynccontextmanager
    async def running(
        self, name: str, *, key: str | None = None, **settings: object
    ) -> AsyncIterator[aiohttp.ClientSession]:
        """A client, with its API key, of a server that is ready and has drawn every size once."""
        async with self.started(name, **settings) as url, _client(url, key) as client:
            for width, height in SIZES:
                await ask(client, replace(USUAL, width=width, height=height), 0, 0)
            yield client

    @asynccontextmanager
    async def started(self, name: str, **settings: object) -> AsyncIterator[str]:
        """The address of a server that is ready."""
        with ending(self.process(name, **settings)) as server:
            server.start()
            await server.until_ready()
            yield server.url


def _client(url: str, key: str | None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
