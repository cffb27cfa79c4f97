"""Figures to files: results.json keeps them, RESULTS.md and the plots are drawn from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.loading import LIMIT, Loading
from tests.benchmarks.measure import Comparison, Spread, surroundings
from tests.benchmarks.profile import KINDS

FOLDER = Path(__file__).parent
FIGURES = FOLDER / "results.json"
PAGE = FOLDER / "RESULTS.md"
PLOTS = FOLDER / "plots"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def keep(part: str, figures: Mapping[str, Any]) -> None:
    """Replace the figures of one benchmark, with where they were measured."""
    known = read_figures()
    known[part] = {**surroundings(), **figures}
    FIGURES.write_text(json.dumps(known, indent=1) + "\n")


def read_figures() -> dict[str, Any]:
    """Everything that was measured last."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def comparison_figures(comparisons: list[Comparison]) -> dict[str, Any]:
    """Comparisons, ready for `keep`."""
    return {"comparisons": [asdict(comparison) for comparison in comparisons]}


def write_page() -> None:
    """Draw the plots and renew the generated part of RESULTS.md; what people wrote around it stays."""
    figures = read_figures()
    _plot_ratios(figures)
    _plot_profiles(figures)
    text = PAGE.read_text() if PAGE.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{_generated(figures)}{END}{after}")


def _generated(figures: Mapping[str, Any]) -> str:
    lines = ["", "| work | ours, s | diffusers, s | ours / diffusers | promised |", "|---|---|---|---|---|"]
    lines += [_comparison_row(comparison) for comparison in _comparisons(figures)]
    lines += [
        "",
        "Medians with quartiles; the ratio is taken round by round. Rows without diffusers are ours only.",
    ]
    if loadings := _loadings(figures):
        lines += [
            "",
            "| loading | seconds | weights | peak memory | peak / weights | promised |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_loading_row(loading) for loading in loadings]
    for name, shares in _profiles(figures).items():
        lines += [
            "",
            f"| share of time: {name} | " + " | ".join(shares) + " |",
            "|---" * (len(shares) + 1) + "|",
        ]
        for kind in KINDS:
            lines.append(
                f"| {kind} | " + " | ".join(f"{share[kind]:.0%}" for share in shares.values()) + " |"
            )
    lines += [
        "",
        "| part | date | commit | hardware | threads | torch | load before |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, entry in figures.items():
        words = [str(entry[key]) for key in ("date", "commit", "hardware", "threads", "torch", "load")]
        lines.append(f"| {part} | " + " | ".join(words) + " |")
    lines += ["", "![ratios](plots/ratios.png)", "", "![profiles](plots/profiles.png)", ""]
    return "\n".join(lines)


def _comparison_row(comparison: Comparison) -> str:
    ours = _seconds(Spread.of(comparison.ours))
    theirs = _seconds(Spread.of(comparison.theirs)) if comparison.theirs else ""
    ratio = comparison.ratio
    shown = f"**{ratio.median:.2f}** ({ratio.low:.2f}..{ratio.high:.2f})" if ratio else ""
    promised = f"≤ {comparison.target}" if comparison.target else ""
    return f"| {comparison.name} | {ours} | {theirs} | {shown} | {promised} |"


def _loading_row(loading: Loading) -> str:
    share = loading.peak_bytes / loading.weight_bytes
    sizes = [f"{size / 1e9:.2f} GB" for size in (loading.weight_bytes, loading.peak_bytes)]
    promised = f"≤ {LIMIT}" if loading.name.startswith("ours") else ""
    return (
        f"| {loading.name} | {loading.seconds:.1f} | {sizes[0]} | {sizes[1]} | **{share:.2f}** | {promised} |"
    )


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g}..{spread.high:.3g})"


def _comparisons(figures: Mapping[str, Any]) -> list[Comparison]:
    kept = [entry for part in figures.values() for entry in part.get("comparisons", [])]
    return [
        Comparison(entry["name"], tuple(entry["ours"]), tuple(entry["theirs"]), entry["target"])
        for entry in kept
    ]


def _loadings(figures: Mapping[str, Any]) -> list[Loading]:
    return [Loading(**entry) for part in figures.values() for entry in part.get("loadings", [])]


def _profiles(figures: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return {name: shares for part in figures.values() for name, shares in part.get("profiles", {}).items()}


def _plot_ratios(figures: Mapping[str, Any]) -> None:
    compared = [comparison for comparison in _comparisons(figures) if comparison.ratio][::-1]
    if not compared:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(compared) + 1.2), layout="constrained")
    for place, comparison in enumerate(compared):
        ratio = comparison.ratio
        assert ratio is not None
        spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.barh(place, ratio.median, xerr=spread, color="#3b7dd8", capsize=3, height=0.55)
        if comparison.target:
            axes.plot([comparison.target] * 2, [place - 0.4, place + 0.4], color="#c23b22", linewidth=2)
    axes.set_yticks(range(len(compared)), [comparison.name for comparison in compared])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time by diffusers' time: median and quartiles; red: promised")
    save_plot(figure, "ratios.png")


def _plot_profiles(figures: Mapping[str, Any]) -> None:
    rows = [
        (f"{name}, {who}", share)
        for name, shares in _profiles(figures).items()
        for who, share in shares.items()
    ]
    if not rows:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(rows) + 1.6), layout="constrained")
    for place, (_, share) in enumerate(reversed(rows)):
        left = 0.0
        for index, kind in enumerate(KINDS):
            label = kind if place == 0 else None
            axes.barh(
                place, share[kind], left=left, color=plt.get_cmap("tab10")(index), label=label, height=0.6
            )
            left += share[kind]
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.set_xlabel("share of the step's time")
    figure.legend(ncols=4, loc="outside upper center", frameon=False)
    save_plot(figure, "profiles.png")


def pyplot() -> Any:
    """matplotlib, drawing to files only."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    return plt


def save_plot(figure: Any, name: str) -> None:
    """Write a figure among the plots."""
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / name, dpi=120)
