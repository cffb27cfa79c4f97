"""What one run measured, and what it says of the promises."""

from dataclasses import dataclass
from statistics import median

from tests.benchmarks.measure import Comparison, Spread
from tests.benchmarks.serve.contestants import OURS, PEER
from tests.benchmarks.serve.load import percentile
from tests.benchmarks.serve.measurements import OVERLOAD, Loaded, Overload
from tests.benchmarks.serve.neighbours import Neighbours

DEADLINE_SECONDS = 5.0  # of the goodput


@dataclass(frozen=True, slots=True)
class Verdict:
    """Something promised, what was measured, and whether it holds."""

    promise: str
    measured: str
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Choices:
    """How each server was faster in a trial beforehand."""

    peer_threads: int | None  # of torch; None: as torch chooses
    devices: str  # CASCADE_DEVICES of ours


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run measured."""

    lone: Comparison
    loads: tuple[Loaded, ...]
    overload: Overload
    neighbours: Neighbours
    choices: Choices

    def closed(self, server: str) -> list[Loaded]:
        """Rounds of the closed loop."""
        return [one for one in self.loads if one.server == server and one.offered is None]

    def opened(self, server: str) -> list[Loaded]:
        """Open loops, the slowest first."""
        found = [one for one in self.loads if one.server == server and one.offered is not None]
        return sorted(found, key=lambda one: one.offered or 0.0)

    @property
    def capacity(self) -> float:
        """Pictures a second of our server in the closed loop."""
        return median(one.load.images_per_second for one in self.closed(OURS))

    @property
    def speedup(self) -> Spread:
        """Our throughput by the peer's, round by round."""
        pairs = zip(self.closed(OURS), self.closed(PEER), strict=True)
        return Spread.of([ours.load.images_per_second / peer.load.images_per_second for ours, peer in pairs])


def verdicts(results: Results) -> list[Verdict]:
    """What was promised against what was measured."""
    added = Spread.of(
        [mine - theirs for mine, theirs in zip(results.lone.ours, results.lone.theirs, strict=True)]
    )
    share = added.median / Spread.of(results.lone.theirs).median
    fills = [one.ticks.mean_fill for one in results.closed(OURS) if one.ticks and one.ticks.mean_fill]
    p95 = {name: median(one.load.percentile(0.95) for one in results.closed(name)) for name in (OURS, PEER)}
    return [
        Verdict(
            "throughput of 16 clients at least 4 x diffusers'",
            f"{results.speedup.median:.2f} x ({results.speedup.low:.2f}..{results.speedup.high:.2f})",
            results.speedup.median >= 4,
        ),
        Verdict(
            "p95 of 16 clients no worse",
            f"{p95[OURS]:.2f} s against {p95[PEER]:.2f} s",
            p95[OURS] <= p95[PEER],
        ),
        Verdict(
            "rows of a tick at least 0.8 x cap while rows wait",
            f"{median(fills):.2f}" if fills else "no tick left rows waiting",
            not fills or median(fills) >= 0.8,
        ),
        Verdict(
            "the server adds at most 5 % or 10 ms to a lone picture",
            f"{1000 * added.median:.1f} ms ({1000 * added.low:.1f}..{1000 * added.high:.1f}), {share:.1%}",
            share <= 0.05 or added.median <= 0.010,
        ),
        Verdict(
            "64 pictures of another tenant delay a picture by at most 2 ticks",
            f"{results.neighbours.ticks:.1f} ticks of {1000 * results.neighbours.tick_seconds:.0f} ms",
            results.neighbours.ticks <= 2,
        ),
        *_overload_verdicts(results.overload, results.capacity),
    ]


def _overload_verdicts(overload: Overload, capacity: float) -> list[Verdict]:
    load, refused = overload.load, overload.load.refusals
    refusal_p99 = percentile([answer.seconds for answer in refused], 0.99)
    silent = sum(not answer.has_retry_after for answer in refused)
    goodput = load.images_per_second / capacity
    health = overload.health.percentile(0.99)
    name = f"at {OVERLOAD:g} x capacity:"
    return [
        Verdict(
            f"{name} the queue's bound is exact",
            f"at most {overload.most_queued} of {overload.capacity} waited, {load.num_failed} failed",
            overload.most_queued <= overload.capacity and not load.num_failed,
        ),
        Verdict(
            f"{name} every refusal has Retry-After",
            f"{len(refused) - silent} of {len(refused)}",
            bool(refused) and not silent,
        ),
        Verdict(f"{name} p99 of refusals under 50 ms", f"{1000 * refusal_p99:.0f} ms", refusal_p99 < 0.050),
        Verdict(f"{name} goodput at least 95 % of capacity", f"{goodput:.0%}", goodput >= 0.95),
        Verdict(
            f"{name} p99 of /healthz under 100 ms, none failed",
            f"{1000 * health:.0f} ms, {overload.health.num_failed} failed",
            health < 0.100 and not overload.health.num_failed,
        ),
    ]
