"""The balance after a scenario: what was asked for, against what the server says it did."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.client import FINAL, Outcome

References = Mapping[int, tuple[str, ...]]  # number of an order -> digests of its pictures


@dataclass(frozen=True, slots=True)
class Audit:
    """Tickets by what went wrong with them."""

    num_requests: int
    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    stuck: tuple[str, ...]
    different: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.duplicated or self.stuck or self.different)


def audit(outcomes: Sequence[Outcome], jobs: Iterable[Mapping[str, Any]], references: References) -> Audit:
    """Compare the clients' outcomes with the server's jobs and the pictures of an undisturbed run."""
    of_ticket: dict[str, list[Mapping[str, Any]]] = {}
    for job in jobs:
        of_ticket.setdefault(job["metadata"].get("ticket", ""), []).append(job)
    counts = Counter({ticket: len(found) for ticket, found in of_ticket.items()})
    lost = [one for one in outcomes if not _is_kept(one, of_ticket.get(one.ticket, []))]
    unended = [
        ticket for ticket, found in of_ticket.items() if any(job["status"] not in FINAL for job in found)
    ]
    differing = [
        one for one in outcomes if one.status == "succeeded" and one.digests != references[one.order.number]
    ]
    return Audit(
        num_requests=len(outcomes),
        lost=tuple(one.ticket for one in lost),
        duplicated=tuple(ticket for ticket, count in counts.items() if count > 1),
        stuck=tuple(unended),
        different=tuple(one.ticket for one in differing),
        remarks=tuple(f"{one.ticket} {one.way} {one.job}: {one.status} {one.remark}" for one in lost)
        + tuple(
            f"{one.ticket} {one.way} {one.job}: other pixels (order {one.order.number})" for one in differing
        ),
    )


def _is_kept(outcome: Outcome, jobs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the client has its pictures, and the server's one job of that ticket agrees."""
    return outcome.status == "succeeded" and any(
        job["id"] == outcome.job and job["status"] == "succeeded" for job in jobs
    )
