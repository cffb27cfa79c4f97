"""`make bench`: our library against diffusers on the same weights, noise and steps, and what loading costs.

`QUICK=1` makes few rounds at smaller sizes and writes nothing. `--only` takes some of the parts.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cascade.config import STAGE_A, STAGE_B_700M, STAGE_C_1B
from cascade.networks.stage_a import StageA
from tests.benchmarks.embedded import embedded_comparisons
from tests.benchmarks.loading import loadings
from tests.benchmarks.measure import Advance, Comparison, Spread, compare
from tests.benchmarks.profile import shares
from tests.benchmarks.report import comparison_figures, keep, write_page
from tests.benchmarks.steps import Step, stage_b_step, stage_c_step
from tests.benchmarks.weights import in_diffusers, random_network


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure."""

    rounds: int
    latent_side: int  # of Stages B and A
    model: str

    @classmethod
    def of(cls, is_quick: bool, model: str) -> "Extent":
        return cls(2, 128, model) if is_quick else cls(7, 256, model)


def embedded(extent: Extent, advance: Advance) -> dict[str, Any]:
    """The embedded checkpoint, from prompt to picture."""
    return comparison_figures(embedded_comparisons(extent.model, 2 * extent.rounds, advance))


def stage_c(extent: Extent, advance: Advance) -> dict[str, Any]:
    """One step of a guided picture (two rows) at 1024x1024."""
    step = stage_c_step(STAGE_C_1B, rows=2, side=24)
    return _step_figures("Stage C 1B step, bf16, 2x24x24", step, 0.85, extent, advance)


def stage_b(extent: Extent, advance: Advance) -> dict[str, Any]:
    """One step of a picture without guidance."""
    side = extent.latent_side
    step = stage_b_step(STAGE_B_700M, rows=1, side=side)
    return _step_figures(f"Stage B 700M step, bf16, {side}x{side}", step, 0.8, extent, advance)


def stage_a(extent: Extent, advance: Advance) -> dict[str, Any]:
    """Latents to pixels."""
    side, comparisons = extent.latent_side, []
    # In fp32 the products alone, at the machine's peak, take half of diffusers' time.
    for dtype, target in ((torch.bfloat16, 0.5), (torch.float32, None)):
        network = random_network(StageA, STAGE_A, dtype)
        reference = in_diffusers(network)
        latents = torch.randn(1, STAGE_A.latent_channels, side, side, dtype=dtype)

        @torch.inference_mode()
        def ours(network: StageA = network, latents: torch.Tensor = latents) -> object:
            return network.decode(latents, scale_factor=1)

        @torch.inference_mode()
        def theirs(reference: Any = reference, latents: torch.Tensor = latents) -> object:
            return reference.decode(latents).sample

        name = f"Stage A decode, {str(dtype).removeprefix('torch.')}, {side}x{side}"
        rounds = max(2, extent.rounds // 2)
        comparisons.append(compare(name, ours, theirs, rounds=rounds, target=target, advance=advance))
    return comparison_figures(comparisons)


def loading(extent: Extent, advance: Advance) -> dict[str, Any]:
    """A lite checkpoint from disk."""
    figures = {"loadings": [asdict(one) for one in loadings()]}
    advance()
    return figures


PARTS: dict[str, Callable[[Extent, Advance], dict[str, Any]]] = {
    "embedded": embedded,
    "stage-c": stage_c,
    "stage-b": stage_b,
    "stage-a": stage_a,
    "loading": loading,
}


def main() -> None:
    """Run the parts in turn and keep each as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", default=bool(os.environ.get("QUICK")))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--model", default="tiny", help="checkpoint for the part `embedded`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    extent = Extent.of(arguments.quick, arguments.model)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for part in arguments.only:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(part, total=None)
            figures = PARTS[part](extent, lambda: progress.advance(task))  # noqa: B023
        _show(console, part, figures)
        if not arguments.quick:
            keep(part, figures)
            write_page()


def _step_figures(name: str, step: Step, target: float, extent: Extent, advance: Advance) -> dict[str, Any]:
    assert step.theirs is not None
    comparisons = [
        compare(name, step.ours, step.theirs, rounds=extent.rounds, target=target, advance=advance),
        compare(f"{name}: condition, once per request", step.prepare, None, rounds=2, advance=advance),
    ]
    profiles = {name: {"ours": shares(step.ours), "diffusers": shares(step.theirs)}}
    return {**comparison_figures(comparisons), "profiles": profiles}


def _show(console: Console, part: str, figures: dict[str, Any]) -> None:
    table = Table("work", "ours", "diffusers", "ratio", "promised", title=part)
    for entry in figures.get("comparisons", []):
        comparison = Comparison(**entry)
        ratio = comparison.ratio
        table.add_row(
            comparison.name,
            f"{Spread.of(comparison.ours).median:.3g} s",
            f"{Spread.of(comparison.theirs).median:.3g} s" if comparison.theirs else "",
            f"{ratio.median:.2f} ({ratio.low:.2f}..{ratio.high:.2f})" if ratio else "",
            f"{comparison.target or ''}",
        )
    for one in figures.get("loadings", []):
        peak = f"peak {one['peak_bytes'] / one['weight_bytes']:.2f} x weights"
        table.add_row(one["name"], f"{one['seconds']:.1f} s", "", peak, "")
    console.print(table)


if __name__ == "__main__":
    main()
