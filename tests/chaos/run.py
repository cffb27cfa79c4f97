"""`make chaos`: kills a server in every way and holds its clients' pictures against an undisturbed run.

Prints a table and leaves with 1 on any miss. `QUICK=1` does each thing a few times, within three minutes.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import Audit, References
from tests.chaos.client import Client, Gone, Outcome, Refused, Way
from tests.chaos.crowd import NUM_CLIENTS
from tests.chaos.drain import drain
from tests.chaos.faults import (
    ENGINE_PASSAGES,
    FEW_ENGINE_PASSAGES,
    FEW_SERVER_PASSAGES,
    SERVER_PASSAGES,
    at_points,
    engine_points,
    server_points,
)
from tests.chaos.leaks import leak
from tests.chaos.neighbours import kill_one, kill_one_apart, roll
from tests.chaos.orders import NUM_ORDERS, NUM_QUICK_ORDERS, all_orders
from tests.chaos.scenarios import hang, kill_engine, kill_server, lose_bucket, poison, same_key
from tests.chaos.site import Missed, Site
from tests.server_process import ServerFailed

NUM_LANES = 3  # servers that are tormented at the same time: two keep a core busy each, one waits
WIDTH = 200  # of a table in a file

Torment = Callable[[Site], Awaitable[Sequence[Outcome]]]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done in how much time."""

    seconds: float  # for everything
    num_orders: int
    num_clients: int


FULL = Scale(3 * 3600.0, NUM_ORDERS, NUM_CLIENTS)
QUICK = Scale(170.0, NUM_QUICK_ORDERS, NUM_CLIENTS // 2)


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
        Scenario("one poisonous job among 50", poison(50), 1),
        Scenario("50 clients with one key, kill -9", same_key, 10),
        Scenario("SIGTERM under load", drain, 10),
        Scenario("SIGTERM of two servers by turns", roll, 20),
        Scenario("kill -9 of one of two servers", kill_one, 20),
        Scenario("kill -9 of one of two servers on a bucket", kill_one_apart, 20),
        Scenario("kill -9 of the bucket", lose_bucket, 20),
        Scenario("thousands of small jobs and refusals", leak, 50),
        *(Scenario(f"kill at {point}", at_points([point], SERVER_PASSAGES), 20) for point in server_points()),
        *(Scenario(f"kill at {point}", at_points([point], ENGINE_PASSAGES), 20) for point in engine_points()),
    ]


def quick_scenarios() -> list[Scenario]:
    """Each of them a few times."""
    return [
        Scenario("SIGSTOP of the engine", hang, 1),
        *(
            Scenario(f"kill at points of the server, {half + 1}/2", at_points(points, FEW_SERVER_PASSAGES), 1)
            for half, points in enumerate((server_points()[::2], server_points()[1::2]))
        ),
        Scenario("kill -9 of the engine", kill_engine, 2),
        Scenario("kill -9 of the server", kill_server, 2),
        Scenario("kill at each point of an engine", at_points(engine_points(), FEW_ENGINE_PASSAGES), 1),
        Scenario("kill -9 of one of two engines", kill_engine, 1, {"devices": "cpu,cpu"}),
        Scenario("one poisonous job among 12", poison(12), 1),
        Scenario("50 clients with one key, kill -9", same_key, 1),
        Scenario("SIGTERM under load", drain, 1),
    ]


def main() -> None:
    """Run everything, print the table, and say by the exit status whether it held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("QUICK")))
    parser.add_argument("--only", help="scenarios whose name contains this")
    parser.add_argument("--rounds", type=int, help="of each scenario, instead of what is promised")
    parser.add_argument("--strict", action="store_true", help="one row per network call, as CASCADE_STRICT")
    arguments = parser.parse_args()
    scenarios = quick_scenarios() if arguments.quick else full_scenarios()
    scenarios = [
        replace(one, rounds=arguments.rounds or one.rounds)
        for one in scenarios
        if (arguments.only or "") in one.name
    ]
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    folder = Path(mkdtemp(prefix="chaos-"))
    scale = QUICK if arguments.quick else FULL
    try:
        rows = asyncio.run(run(scenarios, folder, {"strict": arguments.strict}, scale, console))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
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
    scenarios: Sequence[Scenario], folder: Path, settings: dict[str, Any], scale: Scale, console: Console
) -> list[Row]:
    """All scenarios in turn, in lanes; what is not done in time is a miss. SIGTERM cancels them."""
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    end = time.monotonic() + scale.seconds
    try:
        async with asyncio.timeout(scale.seconds):
            references = await undisturbed(folder, settings, scale.num_orders)
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
                scale.num_clients,
            )
            row = await _endure(scenario, site, end)
            verdict = "held" if row.is_clean else "MISSED"
            reason = f": {row.miss}" if row.miss else ""
            console.print(f"{verdict}: {scenario.name} ({row.seconds:.0f} s){reason}", markup=False)
            rows.append(row)

    await asyncio.gather(*(lane() for _ in range(NUM_LANES)))
    return sorted(rows, key=lambda row: scenarios.index(row.scenario))


async def undisturbed(folder: Path, settings: dict[str, Any], num_orders: int) -> References:
    """The pictures of the first orders, from a server that nobody kills, one after the other."""
    site = Site("undisturbed", folder / "undisturbed", {}, 0, settings)
    client = Client(site.server.url)
    try:
        await site.start()
        references = {}
        for order in all_orders()[:num_orders]:
            outcome = await client.make(order, f"reference-{order.number}", Way.WAIT, 60)
            if outcome.status != "succeeded":
                raise Missed(f"an undisturbed server: {outcome.status} {outcome.remark}")
            references[order.number] = outcome.digests
        return references
    finally:
        await client.close()
        site.end()


async def _endure(scenario: Scenario, site: Site, end: float) -> Row:
    start = time.monotonic()
    miss, found = None, None
    try:
        async with asyncio.timeout(end - start):
            found = await site.judge(await scenario.torment(site))
    except TimeoutError:
        miss = "not done in time"
    except (Missed, ServerFailed, Gone, Refused) as error:
        miss = str(error)
    finally:
        site.end()
    notes = ", ".join(
        f"{what} {min(figures):.1f}..{max(figures):.1f} {unit}"
        for (what, unit), figures in site.notes.items()
    )
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
