"""How much of the device each tenant has had, and so whose turn it is.

Deficit round-robin in seconds of the device: the tenant that has had least for its weight is next, and is
charged for what it gets. Absence earns nothing but one picture: a tenant that comes back starts that much
ahead of those at work, so that a single picture now and then does not wait behind many.
"""

from collections.abc import Mapping
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import Generic, Protocol, TypeVar


class Share:
    """One tenant's share of the device."""

    __slots__ = ("served", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.served = -inf  # seconds of the device, divided by the weight; never falls


class Shares:
    """The shares of all tenants ever seen."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._shares: dict[str, Share] = {}
        self._level = 0.0  # the least that a tenant at work has had

    def of(self, tenant: str) -> Share:
        """Return the share of a tenant."""
        if tenant not in self._shares:
            self._shares[tenant] = Share(self._weights.get(tenant, 1.0))
        return self._shares[tenant]

    def arrive(self, share: Share, head_start: float) -> None:
        """Let a tenant that was away start `head_start` seconds ahead of those at work."""
        share.served = max(share.served, self._level - head_start / share.weight)

    def lead(self, share: Share) -> None:
        """Note that of all tenants at work this one has had least."""
        self._level = max(self._level, share.served)

    def charge(self, share: Share, seconds: float, *, most: float) -> None:
        """Charge a tenant for seconds of the device.

        It is charged to at most `most` seconds above the least served. Otherwise tenants that use less than
        their share would save up what they leave to it, and take the whole device once they ask for more.
        """
        limit = self._level + most / share.weight
        share.served = max(share.served, min(share.served + seconds / share.weight, limit))


class Waiting(Protocol):
    """Something that takes turns as long as it is not empty."""

    @property
    def served(self) -> float:
        """What it has had so far; never falls."""

    def __len__(self) -> int: ...


Who = TypeVar("Who", bound=Waiting)


class Turns(Generic[Who]):
    """A queue with the least served first: a heap that is only repaired at its top, when it is read."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Who]] = []
        self._listed: set[Who] = set()
        self._numbers = count()

    def enlist(self, who: Who) -> None:
        """Add one that waits for a turn. It leaves by itself when it has become empty."""
        if who not in self._listed:
            self._listed.add(who)
            heappush(self._heap, (who.served, next(self._numbers), who))

    def least(self) -> Who | None:
        """Return the one whose turn it is; None when nobody waits."""
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
        """Return the next `number`, in order."""
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
