"""Profiles: seconds of a step by its rows, measured when an engine starts and kept on disk.

More rows per step mean more pictures per second until the device is full; beyond that they only make every
step longer, and all others wait. So what matters is where the throughput stops growing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from app.engine.scheduler import Stage
from app.errors import OutOfMemory

STAGES: tuple[Stage, ...] = ("prior", "decoder", "decode")
WORTHWHILE_GAIN = 1.1  # least gain in rows per second for twice the rows
LONGEST_STEP_SECONDS = 5.0  # longer steps are not tried: everything else waits for whole steps
DECODE_ROWS = 2  # Stage A has the largest activations of all stages

Profile = dict[str, dict[int, float]]  # seconds of a step by rows, by "stage:HxW"


def measure(
    seconds: Callable[[Stage, int], float], has_room_for_twice: Callable[[], bool], max_rows: int
) -> dict[Stage, dict[int, float]]:
    """Measure steps of every stage with 1, 2, 4, ... rows, as long as more rows are worth it.

    `has_room_for_twice` tells whether twice the rows of the largest step so far should fit into memory; if
    they do not fit after all, `seconds` raises OutOfMemory.
    """
    measured: dict[Stage, dict[int, float]] = {}
    for stage in STAGES:
        of_stage = measured[stage] = {1: seconds(stage, 1)}
        for rows in _doubled(DECODE_ROWS if stage == "decode" else max_rows):
            if not has_room_for_twice() or 2 * of_stage[rows // 2] > LONGEST_STEP_SECONDS:
                break
            try:
                of_stage[rows] = seconds(stage, rows)
            except OutOfMemory:
                break
            # Again, in case something interfered with the measurement that speaks for the result.
            suspect = rows // 2 if _is_worthwhile(of_stage, rows) else rows
            of_stage[suspect] = min(of_stage[suspect], seconds(stage, suspect))
            if not _is_worthwhile(of_stage, rows):
                break
    return measured


def _doubled(limit: int) -> Iterator[int]:
    rows = 2
    while rows <= limit:
        yield rows
        rows *= 2


def best_rows(measured: Mapping[int, float]) -> int:
    """Return the number of rows beyond which twice as many are not worth it."""
    rows = 1
    while 2 * rows in measured and _is_worthwhile(measured, 2 * rows):
        rows *= 2
    return rows


def row_seconds(profile: Profile) -> dict[str, float]:
    """Return the seconds of a row in a batch of the best size, by "stage:HxW"."""
    best = {name: best_rows(measured) for name, measured in profile.items()}
    return {name: measured[best[name]] / best[name] for name, measured in profile.items()}


def shape_name(stage: Stage, shape: tuple[int, int]) -> str:
    """Return the name of a stage and shape, such as "prior:24x24"."""
    return f"{stage}:{shape[0]}x{shape[1]}"


def parse_shape(name: str) -> tuple[str, int, int]:
    """Return the stage, height and width of a name."""
    stage, _, shape = name.partition(":")
    height, _, width = shape.partition("x")
    return stage, int(height), int(width)


def load_profile(path: Path) -> Profile | None:
    """Load the profile of an earlier start; None if there is no usable one."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.MsgspecError):
        return None
    is_whole = len(profile) == len(STAGES) and all(1 in measured for measured in profile.values())
    return profile if is_whole else None


def save_profile(path: Path, profile: Profile) -> None:
    """Save a profile. If it cannot be written, the next start measures again."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
        partial.replace(path)


def _is_worthwhile(measured: Mapping[int, float], rows: int) -> bool:
    """Return whether a step of `rows` has enough more throughput than one of half as many."""
    return measured[rows // 2] * 2 / measured[rows] >= WORTHWHILE_GAIN
