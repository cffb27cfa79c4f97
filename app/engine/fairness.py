"""What tenants have had of the device, and so whose turn it is.

Deficit round-robin in seconds of the device: next is who has had least for its weight, and what it then gets
is added to what it has had. To be away earns nothing but one picture: a tenant that comes back starts so much
before those who are at work, so that a single picture now and then does not wait behind many.
"""

from collections.abc import Mapping
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import Generic, Protocol, TypeVar


class Share:
    """One tenant's part of the device."""

    __slots__ = ("served", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.served = -inf  # seconds by weight; never falls


class Shares:
    """Those of all tenants ever seen."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._shares: dict[str, Share] = {}
        self._level = 0.0  # the least that anybody at work has had

    def of(self, tenant: str) -> Share:
        """The share of a tenant."""
        if tenant not in self._shares:
            self._shares[tenant] = Share(self._weights.get(tenant, 1.0))
        return self._shares[tenant]

    def arrive(self, share: Share, head_start: float) -> None:
        """A tenant that had nothing to do comes in, so many seconds before those who are at work."""
        share.served = max(share.served, self._level - head_start / share.weight)

    def lead(self, share: Share) -> None:
        """Of all tenants at work this one has had least."""
        self._level = max(self._level, share.served)

    def charge(self, share: Share, seconds: float, *, most: float) -> None:
        """Note that a tenant was served.

        It gets no more than `most` seconds ahead. Else those who ask for less than their part would save up
        all that they leave to it, and take the whole device once they ask for more.
        """
        limit = self._level + most / share.weight
        share.served = max(share.served, min(share.served + seconds / share.weight, limit))


class Waiting(Protocol):
    """Somebody who takes turns, as long as it is not empty."""

    @property
    def served(self) -> float:
        """What it has had; never falls."""

    def __len__(self) -> int: ...


Who = TypeVar("Who", bound=Waiting)


class Turns(Generic[Who]):
    """Those who wait, the least served first: a heap that is put right where it is looked at, at its top."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Who]] = []
        self._listed: set[Who] = set()
        self._numbers = count()

    def enlist(self, who: Who) -> None:
        """Let somebody wait for a turn. Who has become empty leaves by itself."""
        if who not in self._listed:
            self._listed.add(who)
            heappush(self._heap, (who.served, next(self._numbers), who))

    def least(self) -> Who | None:
        """Whose turn it is."""
        while self._heap:
            served, _, who = self._heap[0]
            if not who:
                self._pop()
            elif served < who.served:
                heapreplace(self._heap, (who.served, next(self._numbers), who))
            else:
                return who
        return None

    def first(self, number: int) -> list[Who]:
        """The next `number`, in order."""
        found: list[Who] = []
        while len(found) < number and self.least() is not None:
            found.append(self._pop())
        for who in found:
            self.enlist(who)
        return found

    def _pop(self) -> Who:
        who = heappop(self._heap)[2]
        self._listed.remove(who)
        return who
