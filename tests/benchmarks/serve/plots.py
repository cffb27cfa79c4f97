"""Pictures of the loads, among the other plots."""

from tests.benchmarks.measure import Spread
from tests.benchmarks.report import pyplot, save_plot
from tests.benchmarks.serve.contestants import OURS, PEER
from tests.benchmarks.serve.results import DEADLINE_SECONDS, Results

COLOURS = {OURS: "#3b7dd8", PEER: "#8a8a8a"}


def plot_closed(results: Results) -> None:
    """Throughput of the closed loop, and how its answers were spread."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for place, name in enumerate((OURS, PEER)):
        rounds = [one.load for one in results.closed(name)]
        rates = Spread.of([load.images_per_second for load in rounds])
        error = [[rates.median - rates.low], [rates.high - rates.median]]
        axes[0].bar(place, rates.median, yerr=error, color=COLOURS[name], capsize=3, width=0.6)
        latencies = sorted(seconds for load in rounds for seconds in load.latencies)
        shares = [(index + 1) / len(latencies) for index in range(len(latencies))]
        axes[1].step(latencies, shares, color=COLOURS[name], label=name, where="post")
    axes[0].set_xticks((0, 1), (OURS, PEER))
    axes[0].set_ylabel("images a second, 16 clients")
    axes[1].set_xlabel("seconds to the answer")
    axes[1].set_ylabel("share of answers")
    axes[1].set_xscale("log")
    axes[1].legend(frameon=False)
    save_plot(figure, "serve-closed.png")


def plot_open(results: Results) -> None:
    """Goodput and waiting against the offered rate."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in (OURS, PEER):
        opened = results.opened(name)
        offered = [one.offered for one in opened]
        goodput = [one.load.goodput(DEADLINE_SECONDS) for one in opened]
        axes[0].plot(offered, goodput, marker="o", color=COLOURS[name], label=name)
        for q, line in ((0.5, "-"), (0.95, "--")):
            seconds = [one.load.percentile(q) for one in opened]
            axes[1].plot(
                offered, seconds, line, marker="o", color=COLOURS[name], label=f"{name}, p{100 * q:g}"
            )
    axes[0].set_ylabel(f"images a second within {DEADLINE_SECONDS:g} s")
    axes[1].set_ylabel("seconds to the answer")
    axes[1].set_yscale("log")
    for one in axes:
        one.set_xlabel("images a second offered")
        one.legend(frameon=False)
    save_plot(figure, "serve-open.png")
