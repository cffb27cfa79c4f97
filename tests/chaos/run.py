"""`make chaos`: kills a server in every way and holds its clients' pictures against an undisturbed run.

Prints a table and leaves with 1 on any miss. `QUICK=1` does each thing a few times, within three minutes.
"""

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import Audit, References
from tests.chaos.client import Client, Outcome, Way
from tests.chaos.drain import drain
from tests.chaos.faults import at_points, engine_points, server_points
from tests.chaos.orders import all_orders
from tests.chaos.scenarios import hang, kill_engine, kill_server, poison, same_key
from tests.chaos.site import Missed, Site
from tests.server_process import ServerFailed, leave_when_terminated

NUM_LANES = 2  # servers that are tormented at the same time: starting one keeps a core busy
WIDTH = 200  # of a table in a file
QUICK_SECONDS, FULL_SECONDS = 170.0, 3 * 3600.0  # for everything

Torment = Callable[[Site], Awaitable[Sequence[Outcome]]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table."""

    name: str
    torment: Torment
    rounds: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """How a scenario ended."""

    scenario: Scenario
    seconds: float
    kills: int = 0
    audit: Audit | None = None
    notes: str = ""
    miss: str | None = None

    @property
    def is_clean(self) -> bool:
        """Whether everything held."""
        return self.miss is None and self.audit is not None and self.audit.is_clean


def full_scenarios() -> list[Scenario]:
    """What is promised: a hundred kills of each, each fault point twenty times."""
    return [
        Scenario("SIGSTOP of the engine", hang, 5),
        Scenario("kill -9 of the engine", kill_engine, 100),
        Scenario("kill -9 of the server", kill_server, 100),
        Scenario("kill -9 of one of two engines", kill_engine, 20, {"devices": "cpu,cpu"}),
        Scenario("one poisonous job among 50", poison, 1),
        Scenario("50 clients with one key, kill -9", same_key, 10),
        Scenario("SIGTERM under load", drain, 10),
        *(
            Scenario(f"kill at {point}", at_points([point]), 20)
            for point in server_points() + engine_points()
        ),
    ]


def quick_scenarios() -> list[Scenario]:
    """Each of them a few times."""
    return [
        Scenario("SIGSTOP of the engine", hang, 1),
        Scenario("kill at each point of the server", at_points(server_points()), 1),
        Scenario("kill -9 of the engine", kill_engine, 2),
        Scenario("kill -9 of the server", kill_server, 2),
        Scenario("kill at each point of an engine", at_points(engine_points()), 1),
        Scenario("kill -9 of one of two engines", kill_engine, 1, {"devices": "cpu,cpu"}),
        Scenario("one poisonous job among 50", poison, 1),
        Scenario("50 clients with one key, kill -9", same_key, 1),
        Scenario("SIGTERM under load", drain, 1),
    ]


def main() -> None:
    """Run everything, print the table, and say by the exit status whether it held."""
    leave_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("QUICK")))
    parser.add_argument("--only", help="scenarios whose name contains this")
    parser.add_argument("--strict", action="store_true", help="one row per network call, as CASCADE_STRICT")
    arguments = parser.parse_args()
    scenarios = quick_scenarios() if arguments.quick else full_scenarios()
    scenarios = [one for one in scenarios if (arguments.only or "") in one.name]
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    folder = Path(mkdtemp(prefix="chaos-"))
    seconds = QUICK_SECONDS if arguments.quick else FULL_SECONDS
    rows = asyncio.run(run(scenarios, folder, {"strict": arguments.strict}, seconds, console))
    console.print(_table(rows))
    if all(row.is_clean for row in rows):
        shutil.rmtree(folder)
        return
    for row in rows:
        for remark in (row.miss, *(row.audit.remarks if row.audit else ())):
            if remark and not row.is_clean:
                console.print(f"{row.scenario.name}: {remark}", markup=False)
    console.print(f"logs and data are in {folder}")
    sys.exit(1)


async def run(
    scenarios: Sequence[Scenario], folder: Path, settings: dict[str, Any], seconds: float, console: Console
) -> list[Row]:
    """All scenarios in turn, in lanes; what is not done in time is a miss."""
    end = time.monotonic() + seconds
    try:
        async with asyncio.timeout(seconds):
            references = await undisturbed(folder, settings)
    except (TimeoutError, ServerFailed, Missed) as error:
        return [Row(one, 0.0, miss=f"no reference: {error}") for one in scenarios]
    waiting = list(scenarios)
    rows: list[Row] = []

    async def lane() -> None:
        while waiting:
            scenario = waiting.pop(0)
            site = Site(
                scenario.name,
                folder / scenario.name.replace(" ", "-"),
                references,
                scenario.rounds,
                {**settings, **scenario.settings},
            )
            row = await _endure(scenario, site, end)
            console.print(f"{'held' if row.is_clean else 'MISSED'}: {scenario.name} ({row.seconds:.0f} s)")
            rows.append(row)

    await asyncio.gather(*(lane() for _ in range(NUM_LANES)))
    return sorted(rows, key=lambda row: scenarios.index(row.scenario))


async def undisturbed(folder: Path, settings: dict[str, Any]) -> References:
    """The pictures of every order, from a server that nobody kills, one after the other."""
    site = Site("undisturbed", folder / "undisturbed", {}, 0, settings)
    client = Client(site.server.url)
    try:
        await site.start()
        references = {}
        for order in all_orders():
            outcome = await client.make(order, f"reference-{order.number}", Way.WAIT, 60)
            if outcome.status != "succeeded":
                raise Missed(f"an undisturbed server: {outcome.status} {outcome.remark}")
            references[order.number] = outcome.digests
        return references
    finally:
        await client.close()
        site.server.end()


async def _endure(scenario: Scenario, site: Site, end: float) -> Row:
    start = time.monotonic()
    miss, found = None, None
    try:
        async with asyncio.timeout(end - start):
            found = await site.judge(await scenario.torment(site))
    except TimeoutError:
        miss = "not done in time"
    except (Missed, ServerFailed) as error:
        miss = str(error)
    finally:
        site.server.end()
    notes = ", ".join(f"{what} {min(times):.1f}..{max(times):.1f} s" for what, times in site.notes.items())
    return Row(scenario, time.monotonic() - start, site.kills, found, notes, miss)


def _table(rows: Sequence[Row]) -> Table:
    table = Table("scenario", "kills", "requests", "lost", "twice", "stuck", "different", "seconds", "", "")
    for row in rows:
        audit = row.audit
        figures = (
            [audit.num_requests, *map(len, (audit.lost, audit.duplicated, audit.stuck, audit.different))]
            if audit
            else ["", "", "", "", ""]
        )
        verdict = "held" if row.is_clean else "[red]MISSED[/red]"
        table.add_row(
            row.scenario.name, str(row.kills), *map(str, figures), f"{row.seconds:.0f}", row.notes, verdict
        )
    return table


if __name__ == "__main__":
    main()
