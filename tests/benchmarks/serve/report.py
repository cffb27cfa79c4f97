"""Figures of the servers to a table, to results.json and to their part of RESULTS.md."""

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from app.settings import engine_environment
from tests.benchmarks.report import PAGE, keep
from tests.benchmarks.serve.measurements import Loaded
from tests.benchmarks.serve.plots import plot_closed, plot_open
from tests.benchmarks.serve.results import DEADLINE_SECONDS, Results, verdicts

BEGIN, END = "<!-- serve: begin -->", "<!-- serve: end -->"
_SETUP = (
    "The peer is FastAPI with diffusers' pipelines behind one lock (threads of torch: {threads}), ours has "
    "CASCADE_DEVICES={devices}; each was the faster choice in a trial beforehand. Our engines allocate with "
    "{allocator}, the peer with glibc, as they come. Both get the same requests. "
    "Closed loops and the load of five times too much are measured from their eleventh second on. What the "
    "server adds to a lone picture is the time of a request, by a plain client that does not decode the "
    "answer's base64, less that of the same call of the library and the same PNG encoder in a process "
    "that is started as our engines are, round by round: median and quartiles."
)


def show(console: Console, results: Results) -> None:
    """Both tables."""
    table = Table(*_HEADINGS, title="Servers under load")
    for one in results.loads:
        table.add_row(*_cells(one))
    console.print(table)
    promises = Table("promised", "measured", "", title="Promises")
    for verdict in verdicts(results):
        promises.add_row(
            verdict.promise, verdict.measured, "kept" if verdict.is_kept else "[red]missed[/red]"
        )
    console.print(promises)


def write(results: Results) -> None:
    """Keep the figures, draw the plots and renew the section of RESULTS.md between its marks."""
    figures = {"lone": asdict(results.lone), "neighbours": asdict(results.neighbours)}
    keep("serve", {**figures, "loads": [_figures(one) for one in results.loads]})
    plot_closed(results)
    plot_open(results)
    text = PAGE.read_text()
    if BEGIN not in text:
        text += f"\n## Serving many callers\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{_section(results)}{END}{rest.split(END)[1]}")


_HEADINGS = (
    "server", "load", "images/s", "p50, s", "p95, s", "p99, s",
    f"goodput in {DEADLINE_SECONDS:g} s", "refused", "failed", "rows/tick C, B",
)  # fmt: skip


def _cells(one: Loaded) -> list[str]:
    load = one.load
    ticks = f"{one.ticks.mean_rows('prior'):.1f}, {one.ticks.mean_rows('decoder'):.1f}" if one.ticks else ""
    return [
        one.server,
        "closed" if one.offered is None else f"{one.offered:.1f} images/s",
        f"{load.images_per_second:.2f}",
        *(_seconds(load.percentile(q)) for q in (0.5, 0.95, 0.99)),
        f"{load.goodput(DEADLINE_SECONDS):.2f}",
        str(len(load.refusals)),
        str(load.num_failed),
        ticks,
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if math.isfinite(seconds) else "none"


def _figures(one: Loaded) -> dict[str, Any]:
    names = ("images_per_second", "p50", "p95", "p99", "goodput")
    load = one.load
    values = [
        load.images_per_second,
        *(load.percentile(q) for q in (0.5, 0.95, 0.99)),
        load.goodput(DEADLINE_SECONDS),
    ]
    measured = {
        name: value if math.isfinite(value) else None for name, value in zip(names, values, strict=True)
    }
    ticks = asdict(one.ticks) if one.ticks else None
    return {
        "server": one.server, "offered": one.offered, "seconds": load.seconds, **measured,
        "refused": len(load.refusals), "failed": load.num_failed, "ticks": ticks,
    }  # fmt: skip


def _section(results: Results) -> str:
    lines = ["", "| promised | measured | |", "|---|---|---|"]
    lines += [
        f"| {verdict.promise} | {verdict.measured} | {'kept' if verdict.is_kept else '**missed**'} |"
        for verdict in verdicts(results)
    ]
    lines += ["", f"| {' | '.join(_HEADINGS)} |", "|---" * len(_HEADINGS) + "|"]
    lines += [f"| {' | '.join(_cells(one))} |" for one in results.loads]
    lines += [
        "",
        _SETUP.format(
            threads=results.choices.peer_threads or "all",
            devices=results.choices.devices,
            allocator="tcmalloc" if "tcmalloc" in engine_environment().get("LD_PRELOAD", "") else "glibc",
        ),
        "",
        "![throughput](plots/serve-closed.png)",
        "",
        "![open loops](plots/serve-open.png)",
        "",
    ]
    return "\n".join(lines)
