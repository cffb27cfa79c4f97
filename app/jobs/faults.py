"""Fault points: named places where a test kills the process or raises an error, at the n-th passage.

Only a setting arms them. Every transaction that writes passes `before_commit` and `after_commit`, so counting
passages reaches each write; the other points are named after what is done already or not yet.
"""

import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from app.errors import SettingsError

Point = Literal[
    "before_commit",  # of any write: written, not committed
    "after_commit",  # of any write: committed, nobody told
    "after_submit",  # the job is accepted, its caller does not know
    "after_claim",  # the job is ours, no engine knows
    "after_latents",  # the latents of Stage C are in the row, Stage B goes on
    "after_image_before_commit",  # the file is there, no row names it
    "after_image",  # the picture is in its row, nobody is told
    "after_commit_before_event",  # the job has ended, nobody who waits knows
    "before_delivery",  # an attempt is counted, the webhook's receiver knows nothing
    "after_delivery",  # the receiver knows, no row says so
    "engine_before_step",  # a batch is chosen, not stepped
]
POINTS: tuple[Point, ...] = get_args(Point)


class InjectedFault(Exception):
    """The error that an armed point raises, which no code expects."""


@dataclass(frozen=True, slots=True)
class _Fault:
    action: str  # kill or raise
    passage: int  # at which it happens, counted from 1
    passages: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # safe between threads


class Faults:
    """The points armed in this process, each as `POINT:kill@3` or `POINT:raise@1`."""

    def __init__(self, armed: Iterable[str] = ()) -> None:
        self._faults = dict(_parse(text) for text in armed)

    def hit(self, point: Point) -> None:
        """Pass a point: die or raise if it is armed and this is the passage."""
        fault = self._faults.get(point)
        if fault is None or next(fault.passages) != fault.passage:
            return
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InjectedFault(f"{point}, passage {fault.passage}")


NO_FAULTS = Faults()


def _parse(text: str) -> tuple[str, _Fault]:
    point, _, rest = text.partition(":")
    action, _, passage = rest.partition("@")
    if point not in POINTS:
        raise SettingsError(f"{point!r} is no fault point; there are {', '.join(POINTS)}")
    if action not in ("kill", "raise") or not passage.isdecimal() or int(passage) < 1:
        raise SettingsError(f"a fault must be written POINT:kill@3 or POINT:raise@1, not {text!r}")
    return point, _Fault(action, int(passage))
