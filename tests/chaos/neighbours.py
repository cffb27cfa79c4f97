"""Two servers on one PostgreSQL, of which one leaves or dies while the other goes on."""

import itertools
import time
from collections.abc import Sequence

import httpx2

from tests.chaos.client import Outcome
from tests.chaos.site import GRACE_SECONDS, Missed, Site


class Balancer(httpx2.AsyncBaseTransport):
    """Leads each request to the next server, and to the other one where nobody listens."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.lost: list[str] = []  # requests that somebody took and nobody answered
        self._urls = itertools.cycle([httpx2.URL(url) for url in urls])
        self._num_urls = len(urls)
        self._inner = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises ConnectError when nobody listens at all."""
        for remaining in reversed(range(self._num_urls)):
            url = next(self._urls)
            request.url = request.url.copy_with(host=url.host, port=url.port)
            try:
                return await self._inner.handle_async_request(request)
            except httpx2.ConnectError:
                if not remaining:
                    raise
            except httpx2.TransportError as error:
                self.lost.append(f"{request.method} {request.url.path}: {error!r}")
                raise
        raise AssertionError("there is no server")

    async def aclose(self) -> None:
        """Leave."""
        await self._inner.aclose()


async def roll(site: Site) -> Sequence[Outcome]:
    """SIGTERM of one server after the other: whoever comes back when it is told notices nothing."""
    balancer = await _start(site)
    servers = itertools.cycle((site.server, *site.others))
    async with site.crowd(transport=balancer) as crowd:
        for _ in range(site.rounds):
            server = next(servers)
            await crowd.finished(2)
            await site.pause(1)
            start = time.monotonic()
            server.terminate()
            site.kills += 1
            if (status := await server.until_left(GRACE_SECONDS + 5)) != 0:
                raise Missed(f"a server left with {status} after SIGTERM")
            site.note("drained", time.monotonic() - start)
            server.start()
            site.note("start", await server.until_ready())
    if balancer.lost:
        raise Missed(f"{len(balancer.lost)} requests were not answered, as {balancer.lost[0]}")
    return crowd.outcomes


async def kill_one(site: Site) -> Sequence[Outcome]:
    """`kill -9` of one server after the other, each with a random pause before it comes back."""
    balancer = await _start(site)
    servers = itertools.cycle((site.server, *site.others))
    async with site.crowd(transport=balancer) as crowd:
        for _ in range(site.rounds):
            server = next(servers)
            await crowd.finished(2)
            await site.pause(1)
            await site.kill_server(server)
            start = time.monotonic()
            await crowd.finished(2)
            first = crowd.first_finished_after(start)
            site.note("served on", (first or time.monotonic()) - start)
            await site.pause(3)
            server.start()
            site.note("start", await server.until_ready())
    return crowd.outcomes


async def kill_one_apart(site: Site) -> Sequence[Outcome]:
    """The same with servers that have no folder in common, but a bucket."""
    site.use_bucket()
    return await kill_one(site)


async def _start(site: Site) -> Balancer:
    await site.be_two()
    servers = (site.server, *site.others)
    for server in servers:
        server.start()
    for server in servers:
        site.note("start", await server.until_ready())
    return Balancer([server.url for server in servers])
