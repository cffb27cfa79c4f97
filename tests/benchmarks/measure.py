"""Timing two ways of doing the same work, turn by turn, so that a busy machine slows both alike."""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

Work = Callable[[], object]
Advance = Callable[[], object]  # called after every round, for a progress bar
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Seconds of our runs and of the reference's, round by round; the reference may be absent."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    target: float | None = None  # largest ratio that was promised

    @property
    def ratio(self) -> Spread | None:
        """Our time by theirs, each round by itself."""
        if not self.theirs:
            return None
        return Spread.of([mine / other for mine, other in zip(self.ours, self.theirs, strict=True)])


def compare(
    name: str,
    ours: Work,
    theirs: Work | None,
    *,
    rounds: int,
    target: float | None = None,
    advance: Advance = lambda: None,
) -> Comparison:
    """Run both once to warm up, then `rounds` times in turn, swapping who goes first."""
    works = [ours] if theirs is None else [ours, theirs]
    seconds = take_turns(works, rounds=rounds, advance=advance)
    return Comparison(name, seconds[0], seconds[1] if theirs else (), target)


def take_turns(
    works: Sequence[Work], *, rounds: int, advance: Advance = lambda: None
) -> list[tuple[float, ...]]:
    """Seconds of each work in `rounds` rounds, after one to warm up; who goes first changes."""
    seconds: list[list[float]] = [[] for _ in works]
    for round_number in range(-1, rounds):
        order = list(range(len(works)))
        for which in order if round_number % 2 == 0 else reversed(order):
            taken = _time(works[which])
            if round_number >= 0:
                seconds[which].append(taken)
        advance()
    return [tuple(each) for each in seconds]


def _time(work: Work) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait_for_device()
        start = time.perf_counter()
        work()
        _wait_for_device()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def surroundings() -> dict[str, str]:
    """Where and when a figure was measured."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str:
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    amx = " with AMX" if any("amx_bf16" in line for line in lines) else ""
    return (names[0] if names else platform.processor() or platform.machine()) + amx


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--", "cascade") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"
