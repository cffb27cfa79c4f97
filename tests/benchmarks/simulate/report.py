"""Findings to tables, plots and a page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from tests.benchmarks.report import BEGIN, END, FOLDER, pyplot, save_plot
from tests.benchmarks.simulate.scenarios import Company, Decision, Figures, Shares

PAGE = FOLDER / "simulation.md"
PLOT = "simulation.png"


class Table(NamedTuple):
    """Text in rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was found: of pairs, ours comes first."""

    clients: list[tuple[Figures, Figures]]
    loads: list[tuple[Figures, Figures]]
    fleets: list[tuple[Figures, Figures]]
    company: list[Company]
    shares: list[Shares]
    decisions: list[Decision]

    @property
    def tables(self) -> list[Table]:
        """For people."""
        return [
            _pairs("One device, closed loop", "clients", self.clients),
            _pairs("One device, open loop", "load", self.loads),
            _pairs("Fleets at nine tenths of our capacity", "devices", self.fleets),
            Table(
                "Five tenants who want a picture now and then, beside one who wants a thousand at once",
                ["", "their p95 without it, s", "their p50, s", "their p95, s", "it gets, pictures/s"],
                [
                    [row.name, *map(_short, (row.alone, row.p50, row.p95, row.bulk_rate))]
                    for row in self.company
                ],
            ),
            Table(
                "Ten tenants who all want more than their share",
                ["", "Jain's index", "farthest from its share"],
                [[row.name, f"{row.jain:.3f}", f"{row.worst:.0%}"] for row in self.shares],
            ),
            Table(
                "A decision among ten thousand pictures",
                ["tenants", "shapes", "p50, ms", "p99, ms"],
                [
                    [f"{row.tenants:,}", f"{row.shapes:,}", f"{row.p50:.3f}", f"{row.p99:.3f}"]
                    for row in self.decisions
                ],
            ),
        ]


def show(findings: Findings) -> None:
    """Print the tables."""
    console = Console(width=160)
    for title, head, rows in findings.tables:
        table = RichTable(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_page(findings: Findings, origin: str) -> None:
    """The same as a page, with its plot; what people wrote around it stays."""
    _plot(findings)
    lines = [f"Step times: {origin}.", ""]
    for title, head, rows in findings.tables:
        lines += [f"**{title}**", "", _row(head), "|---" * len(head) + "|", *map(_row, rows), ""]
    text = PAGE.read_text() if PAGE.exists() else f"# Simulation\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    figures = "\n".join([*lines, f"![simulation](plots/{PLOT})"])
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures}\n\n{END}{rest.split(END)[1]}")


def _row(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def _pairs(title: str, name: str, pairs: Sequence[tuple[Figures, Figures]]) -> Table:
    columns = ("pictures/s", "p50, s", "p95, s", "utilisation")
    head = [name, *(word for column in columns for word in (column, "one by one")), "rows of C, B"]
    return Table(title, head, [_pair(*pair) for pair in pairs])


def _pair(ours: Figures, theirs: Figures) -> list[str]:
    figures = [(ours.rate, theirs.rate), (ours.p50, theirs.p50), (ours.p95, theirs.p95)]
    shown = [_short(value) for pair in figures for value in pair]
    busy = [f"{ours.utilisation:.0%}", f"{theirs.utilisation:.0%}"]
    return [ours.name, *shown, *busy, f"{ours.rows['prior']:.1f}, {ours.rows['decoder']:.1f}"]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plot(findings: Findings) -> None:
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    _curves(axes[0], findings.clients, "clients of one device", lambda figures: figures.rate)
    axes[0].set(ylabel="pictures/s", ylim=(0, None))
    _curves(axes[1], findings.loads, "load of one device, of one by one", lambda figures: figures.p95)
    axes[1].set(yscale="log", ylabel="seconds to a picture, p95")
    _curves(axes[2], findings.fleets, "devices, at 0.9 of our capacity", lambda figures: figures.p95)
    axes[2].set(yscale="log", ylabel="seconds to a picture, p95")
    save_plot(figure, PLOT)


def _curves(
    axes: Any, pairs: Sequence[tuple[Figures, Figures]], label: str, value: Callable[[Figures], float]
) -> None:
    names = [ours.name for ours, _ in pairs]
    axes.plot(names, [value(ours) for ours, _ in pairs], "o-", color="#3b7dd8", label="ours")
    axes.plot(names, [value(theirs) for _, theirs in pairs], "s--", color="#c23b22", label="one by one")
    axes.set_xlabel(label)
    axes.legend(frameon=False)
