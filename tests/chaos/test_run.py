"""The program leaves no server behind, and no scenario out, however it ends."""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.chaos import run as module
from tests.chaos.client import Outcome
from tests.chaos.run import Scale, Scenario, run
from tests.chaos.site import Site
from tests.server_process import ServerProcess


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[ServerProcess]:
    """The servers that were seen to in the end."""
    servers: list[ServerProcess] = []

    async def undisturbed(*_: Any) -> dict[int, tuple[str, ...]]:
        return {}

    def end(server: ServerProcess) -> None:
        servers.append(server)

    monkeypatch.setattr(module, "undisturbed", undisturbed)
    monkeypatch.setattr(ServerProcess, "end", end)
    return servers


async def wait_for_ever(_: Site) -> Sequence[Outcome]:
    await asyncio.Event().wait()
    return []


def test_sigterm_ends_all_servers(ended: list[ServerProcess], tmp_path: Path) -> None:
    async def be_terminated(site: Site) -> Sequence[Outcome]:
        async with asyncio.TaskGroup() as group:  # as clients are, so that it comes while others work
            group.create_task(wait_for_ever(site))
            os.kill(os.getpid(), signal.SIGTERM)
        return []

    async def main() -> None:
        tormenting = [
            Scenario("waits", wait_for_ever, 1),
            Scenario("waits, too", wait_for_ever, 1),
            Scenario("is terminated", be_terminated, 1),
        ]
        await run(tormenting, tmp_path, {}, Scale(60, 1, 1), Console(quiet=True))

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert len(ended) == 3


@pytest.mark.anyio
async def test_what_is_not_done_in_time_is_a_miss(ended: list[ServerProcess], tmp_path: Path) -> None:
    (row,) = await run(
        [Scenario("waits", wait_for_ever, 1)], tmp_path, {}, Scale(0.05, 1, 1), Console(quiet=True)
    )
    assert (row.is_clean, row.miss) == (False, "not done in time")
    assert len(ended) == 1
