"""`make bench-serve`: our server against a plain FastAPI and diffusers server, same weights, one run.

Each server is started anew for each measurement and has the machine for itself; the rounds alternate.
`QUICK=1` measures briefly and writes nothing. Settings of our server may follow, as `devices=cpu,cpu`.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.benchmarks.serve.contestants import OURS, PEER, Contestants
from tests.benchmarks.serve.measurements import (
    Advance,
    Extent,
    Loaded,
    closed,
    lone_picture,
    opened,
    overloaded,
    tuned,
)
from tests.benchmarks.serve.neighbours import neighbours
from tests.benchmarks.serve.report import show, write
from tests.benchmarks.serve.results import Choices, Results
from tests.server_process import leave_when_terminated

WIDTH = 180  # of a table in a file


def main() -> None:
    """Measure everything, show it, and keep it unless the run was a quick one."""
    leave_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("QUICK")))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of our server")
    arguments = parser.parse_args()
    extent = Extent.of(arguments.quick)
    settings = dict(pair.split("=", 1) for pair in arguments.settings)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        TemporaryDirectory(prefix="bench-serve-") as folder,
        Progress(*columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("servers", total=extent.num_measurements)
        contestants = Contestants(Path(folder), arguments.model, settings).prepared()
        results = asyncio.run(measure(contestants, extent, lambda: bar.advance(task)))
    show(console, results)
    if not arguments.quick:
        write(results)


async def measure(contestants: Contestants, extent: Extent, advance: Advance) -> Results:
    """All measurements, one after the other."""
    contestants = await tuned(contestants, extent)
    lone = await lone_picture(contestants, extent.lone_rounds)
    advance()
    loads: list[Loaded] = []
    for round_number in range(extent.closed_rounds):
        order = (OURS, PEER) if round_number % 2 == 0 else (PEER, OURS)
        for server in order:
            loads.append(await closed(contestants, server, extent, seed=round_number))
            advance()
    capacities = {
        name: max(one.load.images_per_second for one in loads if one.server == name) for name in (OURS, PEER)
    }
    for share in extent.shares:
        for server in (OURS, PEER):
            loads.append(await opened(contestants, server, extent, share * capacities[PEER]))
            advance()
    overload = await overloaded(contestants, extent, capacities[OURS])
    advance()
    beside = await neighbours(contestants, extent.lone_rounds)
    advance()
    choices = Choices(contestants.peer_threads, contestants.settings["devices"])
    return Results(lone, tuple(loads), overload, beside, choices)


if __name__ == "__main__":
    main()
