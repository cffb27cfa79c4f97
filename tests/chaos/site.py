"""One server with a folder of its own, the clients it has had, and what has to be said of it in the end."""

import asyncio
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import httpx2
import psutil

from tests.chaos.audit import Audit, References, audit
from tests.chaos.client import FINAL, Client, Gone, Outcome
from tests.chaos.crowd import NUM_CLIENTS, Crowd
from tests.chaos.orders import Order, all_orders
from tests.postgresql import NotInstalled, running_postgresql
from tests.s3 import S3
from tests.server_process import POLL_SECONDS, ServerProcess

LEASE_SECONDS = 10
GRACE_SECONDS = 20
STUCK_SECONDS = LEASE_SECONDS + 10.0  # a job that nobody waits for must have ended by then
ORPHAN_SECONDS = 3.0  # that an engine may outlive its server


class Missed(Exception):
    """Something promised did not happen; the message says what."""


@dataclass(slots=True)
class Site:
    """Where a scenario happens."""

    name: str
    folder: Path
    references: References
    rounds: int
    settings: dict[str, Any] = field(default_factory=dict)
    num_clients: int = NUM_CLIENTS
    server: ServerProcess = field(init=False)
    chance: Random = field(init=False)
    others: list[ServerProcess] = field(default_factory=list)  # servers beside the first
    belongings: ExitStack = field(default_factory=ExitStack)  # what ends with the site
    s3: S3 | None = None  # where pictures are if servers have a folder each
    notes: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # of what in which unit
    kills: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.server = self._new_server()
        self.chance = Random(self.name)  # reproducible

    def _new_server(self) -> ServerProcess:
        chosen = {
            "cache_dir": self.folder.parent / "cache",
            "devices": "cpu",
            "lease_seconds": LEASE_SECONDS,
            "grace_seconds": GRACE_SECONDS,
            "log_format": "json",
            "outbound_allow": "127.0.0.1",  # where the clients' webhooks are
            **self.settings,
        }
        log = self.folder / "server.log"
        if self.s3 is None:
            return ServerProcess.ours(self.folder / "data", log, **chosen)
        server = ServerProcess.ours(Path(mkdtemp(prefix="data-", dir=self.folder)), log, **chosen)
        server.tell(self.s3.environment)
        return server

    def use_bucket(self) -> None:
        """Have pictures in a bucket; each server has a folder of its own."""
        self.s3 = S3(self.folder / "s3")
        self.s3.folder.mkdir()
        self.s3.make_bucket("pictures")
        self.s3.start()
        self.belongings.callback(self.s3.stop)
        self.settings |= {
            "bucket_url": "s3://pictures/here",
            "signing_secret": "the same for every server, of course",
        }
        self.server = self._new_server()

    async def be_two(self) -> None:
        """Have two servers, which share a PostgreSQL and pictures. Raises Missed where there is none."""
        try:
            url = await asyncio.to_thread(self.belongings.enter_context, running_postgresql())
        except NotInstalled as error:
            raise Missed(str(error)) from None
        self.settings["database_url"] = url
        self.server, other = self._new_server(), self._new_server()
        self.others.append(other)

    def end(self) -> None:
        """Leave nothing behind."""
        for server in (self.server, *self.others):
            server.end()
        self.belongings.close()

    @property
    def orders(self) -> list[Order]:
        """What may be asked for: all that has a reference."""
        return [order for order in all_orders() if order.number in self.references]

    def crowd(self, *, limit: int | None = None, transport: httpx2.AsyncBaseTransport | None = None) -> Crowd:
        """Clients of this server, or of what `transport` leads to; give what they got to `judge`."""
        return Crowd(
            self.server.url,
            self.orders,
            self.name,
            num_clients=self.num_clients,
            limit=limit,
            transport=transport,
        )

    def note(self, what: str, figure: float, unit: str = "s") -> None:
        """Remember for the table how long something took, or another figure."""
        self.notes.setdefault((what, unit), []).append(figure)

    async def pause(self, seconds: float) -> None:
        """A random part of `seconds`, so that what follows comes at any point of the work."""
        await asyncio.sleep(self.chance.uniform(0, seconds))

    async def engine(self, *, but: Collection[int] = (), seconds: float = 60.0) -> psutil.Process:
        """One of the engine processes whose ids are not in `but`; waits for it."""
        end = time.monotonic() + seconds
        while True:
            if found := [one for one in self.server.engines() if one.pid not in but]:
                return self.chance.choice(found)
            if time.monotonic() > end:
                raise Missed(f"no engine appeared in {seconds:g} s")
            await asyncio.sleep(POLL_SECONDS)

    async def send_engine(self, number: signal.Signals, within: float) -> float:
        """Send a signal to an engine; another process must follow `within` seconds. Returns when it did."""
        known = {one.pid for one in self.server.engines()}
        (await self.engine()).send_signal(number)
        start = time.monotonic()
        self.kills += 1
        await self.engine(but=known, seconds=within)
        now = time.monotonic()
        self.note(f"successor of {number.name}", now - start)
        return now

    async def kill_server(self, server: ServerProcess | None = None) -> None:
        """`kill -9` of a server, the first if there are more; its engines must follow by themselves."""
        server = server or self.server
        engines = server.engines()
        server.kill()
        self.kills += 1
        _, alive = await asyncio.to_thread(psutil.wait_procs, engines, timeout=ORPHAN_SECONDS)
        if alive:
            raise Missed(f"{len(alive)} engines outlived their server by {ORPHAN_SECONDS:g} s")

    async def start(self) -> None:
        """Start the server and wait until it is ready."""
        self.server.start()
        self.note("start", await self.server.until_ready())

    async def judge(self, outcomes: Sequence[Outcome]) -> Audit:
        """What is wrong in the end, after jobs that nobody waits for had their time to end, too."""
        client = Client(self.server.url)
        end = time.monotonic() + STUCK_SECONDS
        try:
            while True:
                try:
                    jobs = await client.all_jobs()
                except Gone as error:
                    raise Missed(f"the server cannot be reached in the end: {error}") from None
                if all(job["status"] in FINAL for job in jobs) or time.monotonic() > end:
                    return audit(outcomes, jobs, self.references)
                await asyncio.sleep(0.2)
        finally:
            await client.close()
