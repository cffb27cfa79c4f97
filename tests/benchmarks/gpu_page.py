"""Puts the figures of `make bench-gpu --out FILE` into RESULTS.md, wherever they were measured.

`python -m tests.benchmarks.gpu_page FILE`. The file names the device, the day and the commit.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu import Peaks, Timing
from tests.benchmarks.measure import Spread
from tests.benchmarks.report import PAGE, pyplot, save_plot

BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
COLOURS = {"off": "#9db8d9", "graphs": "#3b7dd8", "full": "#1d4e9e", "diffusers": "#c9a227"}


def main() -> None:
    """Renew the part of RESULTS.md between the marks, and its plot."""
    figures = json.loads(Path(sys.argv[1]).read_text())
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{page(figures)}{END}{rest.split(END)[1]}")
    plot(figures)


def page(figures: Mapping[str, Any]) -> str:
    """The table, with the ratio to diffusers taken round by round."""
    peaks, timings = Peaks(**figures["peaks"]), _timings(figures)
    theirs = {(each.network, each.batch): each.seconds for each in timings if each.mode == "diffusers"}
    lines = [
        "",
        f"{figures['hardware']}, {figures['date']}, commit {figures['commit']}, torch {figures['torch']}.",
        f"Its peaks, in the same run: {peaks.teraflops:.0f} TFLOP/s in bf16, {peaks.terabytes:.2f} TB/s.",
        "",
        "| network | pictures | way | ms | of the roofline | by diffusers' time |",
        "|---|---|---|---|---|---|",
    ]
    for each in timings:
        spread, other = Spread.of(each.seconds), theirs.get((each.network, each.batch))
        ratio = (
            Spread.of([mine / its for mine, its in zip(each.seconds, other, strict=True)]) if other else None
        )
        shown = f"**{ratio.median:.2f}**" if ratio and each.mode != "diffusers" else ""
        lines.append(
            f"| {each.network} | {each.batch} | {each.mode} | {spread.median * 1e3:.1f} "
            f"({spread.low * 1e3:.1f}..{spread.high * 1e3:.1f}) "
            f"| {peaks.roofline(each.network, each.batch) / spread.median:.0%} | {shown} |"
        )
    return "\n".join([*lines, "", "![steps on a GPU](plots/gpu.png)", ""])


def plot(figures: Mapping[str, Any]) -> None:
    """Milliseconds of one picture by batch size, a panel for each network, with the roofline."""
    peaks, timings = Peaks(**figures["peaks"]), _timings(figures)
    networks = list(dict.fromkeys(each.network for each in timings))
    plt = pyplot()
    drawn, panels = plt.subplots(1, len(networks), figsize=(4.2 * len(networks), 3.6), layout="constrained")
    for network, axes in zip(networks, [panels] if len(networks) == 1 else panels, strict=True):
        own = [each for each in timings if each.network == network]
        for mode in dict.fromkeys(each.mode for each in own):
            points = [
                (each.batch, Spread.of(each.seconds).median * 1e3 / each.batch)
                for each in own
                if each.mode == mode
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=mode, color=COLOURS[mode])
        floor = [(each.batch, peaks.roofline(network, each.batch) * 1e3 / each.batch) for each in own]
        axes.plot(*zip(*sorted(set(floor)), strict=True), "k--", linewidth=1, label="roofline")
        axes.set(
            title=network, xlabel="pictures together", ylim=(0, None), xticks=[each[0] for each in floor]
        )
    (panels if len(networks) == 1 else panels[0]).set_ylabel("ms per picture and step")
    (panels if len(networks) == 1 else panels[0]).legend(frameon=False)
    save_plot(drawn, "gpu.png")


def _timings(figures: Mapping[str, Any]) -> list[Timing]:
    return [
        Timing(each["network"], each["batch"], each["mode"], tuple(each["seconds"]))
        for each in figures["timings"]
    ]


if __name__ == "__main__":
    main()
