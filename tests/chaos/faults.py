"""Kills at named points of the code, between any two writes, however short the moment."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from app.jobs.faults import POINTS
from tests.chaos.client import Outcome
from tests.chaos.site import Missed, Site
from tests.server_process import POLL_SECONDS

ENGINE_PREFIX = "engine_"
SERVER_PASSAGES, FEW_SERVER_PASSAGES = (1, 8), (1, 2)  # at one of which a server dies
ENGINE_PASSAGES = (80, 200)  # of an engine: its successors die so, too, and jobs must get on meanwhile
FEW_ENGINE_PASSAGES = (10, 40)  # where only one engine dies
REACHED_SECONDS = 60.0


def server_points() -> list[str]:
    """Points that the server's own process passes."""
    return [point for point in POINTS if not point.startswith(ENGINE_PREFIX)]


def engine_points() -> list[str]:
    """Points that an engine passes."""
    return [point for point in POINTS if point.startswith(ENGINE_PREFIX)]


def at_points(
    points: Sequence[str], passages: tuple[int, int]
) -> Callable[[Site], Awaitable[Sequence[Outcome]]]:
    """A scenario that dies so many rounds at each of `points`, between the first and last of `passages`."""

    async def die(site: Site) -> Sequence[Outcome]:
        await site.start()
        async with site.crowd() as crowd:
            for point in points:
                if point.startswith(ENGINE_PREFIX):
                    await _die_in_engines(site, point, passages)
                else:
                    await _die_in_servers(site, point, passages)
            site.server.kill()
            site.server.start()
            await crowd.finished(1)
        return crowd.outcomes

    return die


async def _die_in_servers(site: Site, point: str, passages: tuple[int, int]) -> None:
    for _ in range(site.rounds):
        if site.server.is_alive:
            site.server.kill()
        site.server.start(CASCADE_FAULTS=f"{point}:kill@{site.chance.randint(*passages)}")
        await _until(lambda: not site.server.is_alive, point)
        site.kills += 1
    site.server.start()


async def _die_in_engines(site: Site, point: str, passages: tuple[int, int]) -> None:
    site.server.kill()
    site.server.start(CASCADE_FAULTS=f"{point}:kill@{site.chance.randint(*passages)}")
    for _ in range(site.rounds):
        engine = await site.engine()
        await _until(lambda engine=engine: not engine.is_running(), point)  # type: ignore[misc]
        site.kills += 1


async def _until(is_dead: Callable[[], bool], point: str) -> None:
    end = asyncio.get_running_loop().time() + REACHED_SECONDS
    while not is_dead():
        if asyncio.get_running_loop().time() > end:
            raise Missed(f"nothing died at {point} in {REACHED_SECONDS:g} s")
        await asyncio.sleep(POLL_SECONDS)
