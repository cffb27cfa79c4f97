"""Which pictures step next. Knows rows and seconds, no tensors, and no clock but what it is told.

A tick belongs to the tenant that has had least of the device. Of its queues, one for each kind of batch, one
leads: rather a full one than a lone one, rather near the end than at the beginning, the more the longer it
waits. Everybody's pictures of that kind fill the batch, and share its cost by rows: a lone row is dear, so it
is seldom stepped before it has company.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heapreplace
from itertools import islice
from math import inf
from typing import Literal, NamedTuple

from app.engine.fairness import Share, Shares, Turns

PATIENCE = 64  # ticks. With n pictures aboard, none waits for more than n + 1 times as many
COMPANY = 12  # ticks by which a full batch goes before an empty one; 32 gain nothing and make rare sizes late
NEARLY_DONE = 0.4  # of a batch: so much fuller a queue must be that has just begun than one about to end
TICKS_AHEAD = 4  # that a tenant can get before those who ask for little
PRESSING = 3.0  # a deadline is, when no more than so many times the rest of the work fits before it
SCAN = 64  # queues, or pictures, of those that wait longest, that are looked at in a tick

Stage = Literal["prior", "decoder", "decode"]


class BatchKey(NamedTuple):
    """What pictures must have in common to be stepped by one call of a network.

    A tuple, because several dictionaries are asked for it in every tick.
    """

    stage: Stage
    shape: tuple[int, int]  # (h, w) of the latents
    adapters: str = ""


@dataclass(slots=True, eq=False)
class Entry:
    """One picture aboard, as far as its turn depends on it.

    While it is in the scheduler, only `cost_left` may change; for the rest it is removed before and added
    again after.
    """

    job: str
    index: int
    tenant: str
    priority: int  # within the tenant, higher first
    deadline: float | None  # on the loop's clock
    arrived: float
    key: BatchKey
    rows: int  # 2 where guided
    cost_left: float  # seconds that the whole rest of the picture takes alone
    is_alone: bool  # stepped only while nothing else is in work
    is_begun: bool = field(default=False, init=False)  # this and the next two are the scheduler's own
    since: int = field(default=0, init=False)  # the tick from which on it waits
    whole_cost: float = field(default=0.0, init=False)  # `cost_left` when it came

    @property
    def order(self) -> tuple[int, float, float, str, int]:
        """Its place among its tenant's pictures of the same kind."""
        deadline = inf if self.deadline is None else self.deadline
        return -self.priority, deadline, self.arrived, self.job, self.index

    @property
    def done(self) -> float:
        """The share of it that is done."""
        return 1 - self.cost_left / self.whole_cost if self.whole_cost else 0.0

    def is_pressing(self, now: float) -> bool:
        """Whether its deadline can still be kept, but not if it waits for long."""
        return (
            self.deadline is not None and 1 <= (self.deadline - now) / max(self.cost_left, 1e-9) <= PRESSING
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures to step together."""

    key: BatchKey
    entries: list[Entry]
    rows: int
    has_backlog: bool  # whether rows of its key had to stay behind


class Scheduler:
    """Chooses a batch when the device is free for it, and not earlier."""

    def __init__(self, caps: Callable[[BatchKey], int], weights: Mapping[str, float]) -> None:
        self._caps = caps
        self._shares = Shares(weights)
        self._tenants: dict[str, _Tenant] = {}
        self._turns: Turns[_Tenant] = Turns()
        self._groups: dict[BatchKey, _Group] = {}
        self._queued: OrderedDict[Entry, None] = OrderedDict()  # in whatever queue, the longest waiting first
        self._alone: dict[Entry, None] = {}
        self._held: dict[Entry, None] = {}  # not begun yet when one came that must be alone
        self._tick = 0
        self._aged_at = 0  # the last tick that was for the longest waiting

    def __len__(self) -> int:
        return len(self._queued) + len(self._alone) + len(self._held)

    def add(self, entry: Entry) -> None:
        """Take a picture in. One that must be alone waits for those begun, and all others wait for it."""
        if entry.is_alone:
            self._alone[entry] = None
            for waiting in [queued for queued in self._queued if not queued.is_begun]:
                self._leave(waiting)
                self._held[waiting] = None
        elif self._alone and not entry.is_begun:
            self._held[entry] = None
        else:
            self._enter(entry)

    def remove(self, entry: Entry) -> None:
        """Let a picture go, or change. KeyError when it is not here."""
        if entry in self._held:
            del self._held[entry]
        elif not entry.is_alone:
            self._leave(entry)
        else:
            del self._alone[entry]
            if not self._alone:
                held, self._held = self._held, {}
                for waiting in held:
                    self._enter(waiting)

    def next(self, now: float) -> Batch | None:
        """The batch to step now; None when there is nothing to step."""
        if not self._queued:
            return self._next_alone()
        if len(self._queued) == 1:
            return self._next_lone()
        if oldest := self._oldest():
            return self._fill(oldest[0].key, oldest)
        tenant = self._turns.least()
        assert tenant is not None
        self._shares.lead(tenant.share)
        queues = islice(tenant.queues.values(), SCAN)
        return self._fill(max(queues, key=lambda queue: self._worth(queue, now)).key)

    def stepped(self, batch: Batch, seconds: float) -> None:
        """Charge what a batch took to those who were in it."""
        self._tick += 1
        row_seconds = seconds / batch.rows
        for entry in batch.entries:
            entry.is_begun, entry.since = True, self._tick
            if entry in self._queued:
                self._queued.move_to_end(entry)
                tenant = self._tenants[entry.tenant]
                tenant.queues.move_to_end(entry.key)
                tenant.queues[entry.key].since = self._tick
                self._shares.charge(tenant.share, row_seconds * entry.rows, most=TICKS_AHEAD * seconds)
        if batch.key in self._groups:
            self._groups[batch.key].row_seconds = row_seconds

    def _enter(self, entry: Entry) -> None:
        """Into the queue of its tenant and kind."""
        entry.since = self._tick
        entry.whole_cost = max(entry.whole_cost, entry.cost_left)
        self._queued[entry] = None
        tenant = self._tenants.get(entry.tenant) or self._arrive(entry)
        group = self._groups.setdefault(entry.key, _Group())
        queue = tenant.queues.setdefault(entry.key, _Queue(entry.key, tenant.share, self._tick))
        insort(queue.entries, entry, key=_order)
        group.rows += entry.rows
        group.turns.enlist(queue)
        self._turns.enlist(tenant)

    def _arrive(self, entry: Entry) -> "_Tenant":
        """A tenant comes in with a picture, which is its head start where others are at work."""
        share = self._shares.of(entry.tenant)
        self._shares.arrive(share, entry.cost_left if self._tenants else 0.0)
        self._tenants[entry.tenant] = tenant = _Tenant(share)
        return tenant

    def _leave(self, entry: Entry) -> None:
        """Out of its queue, and out of the world with whatever becomes empty by that."""
        del self._queued[entry]
        tenant, group = self._tenants[entry.tenant], self._groups[entry.key]
        entries = tenant.queues[entry.key].entries
        place = bisect_left(entries, entry.order, key=_order)
        assert entries[place] is entry, "its place has changed while it was here"
        del entries[place]
        group.rows -= entry.rows
        if not group.rows:
            del self._groups[entry.key]
        if not entries:
            del tenant.queues[entry.key]
        if not tenant.queues:
            del self._tenants[entry.tenant]

    def _next_alone(self) -> Batch | None:
        if not self._alone:
            return None
        entry = max(self._alone, key=lambda entry: entry.is_begun)
        return Batch(entry.key, [entry], entry.rows, has_backlog=False)

    def _next_lone(self) -> Batch:
        """That of the only picture, which nobody has to be weighed against."""
        [entry] = self._queued
        self._shares.lead(self._tenants[entry.tenant].share)
        return Batch(entry.key, [entry], entry.rows, has_backlog=False)

    def _oldest(self) -> list[Entry]:
        """The pictures of one kind that wait longest, when this tick is for them."""
        oldest = next(iter(self._queued))
        if self._tick - max(oldest.since, self._aged_at) < PATIENCE:
            return []
        self._aged_at = self._tick
        return [entry for entry in islice(self._queued, SCAN) if entry.key == oldest.key]

    def _worth(self, queue: "_Queue", now: float) -> tuple[int, bool, float]:
        """What a queue has for it, against others of its tenant."""
        head = queue.entries[0]
        fill = min(1.0, self._groups[queue.key].rows / self._caps(queue.key))
        waited = (self._tick - queue.since) / COMPANY
        return head.priority, head.is_pressing(now), fill + waited + NEARLY_DONE * head.done

    def _fill(self, key: BatchKey, first: Iterable[Entry] = ()) -> Batch:
        """A batch with those given `first`, and then, one by one, with pictures of who had least."""
        group, seats = self._groups[key], _Seats(self._caps(key))
        for oldest in first:
            seats.take(oldest)
        bids = [
            (queue.served, number, queue.share.weight, iter(queue.entries))
            for number, queue in enumerate(group.turns.first(seats.cap))
        ]
        while bids and seats.rows < seats.cap:
            served, number, weight, ahead = bids[0]
            entry = next((entry for entry in ahead if entry not in seats.entries), None)
            if entry is None or not seats.take(entry):
                heappop(bids)
            else:
                heapreplace(bids, (served + entry.rows * group.row_seconds / weight, number, weight, ahead))
        return Batch(key, list(seats.entries), seats.rows, has_backlog=group.rows > seats.rows)


class _Tenant:
    """A tenant with pictures that wait."""

    __slots__ = ("queues", "share")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.queues: OrderedDict[BatchKey, _Queue] = OrderedDict()  # the one stepped longest ago first

    def __len__(self) -> int:
        return len(self.queues)

    @property
    def served(self) -> float:
        return self.share.served


class _Queue:
    """A tenant's pictures of one kind, in order."""

    __slots__ = ("entries", "key", "share", "since")

    def __init__(self, key: BatchKey, share: Share, since: int) -> None:
        self.key = key
        self.share = share
        self.since = since  # the tick from which on all of it waits
        self.entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def served(self) -> float:
        return self.share.served


class _Group:
    """Everybody's pictures of one kind."""

    __slots__ = ("row_seconds", "rows", "turns")

    def __init__(self) -> None:
        self.rows = 0
        self.row_seconds = 1.0  # of its last batch; before that, rows go round in turn
        self.turns: Turns[_Queue] = Turns()


class _Seats:
    """The rows of a batch. A picture by itself always fits: the runner steps it in parts."""

    __slots__ = ("cap", "entries", "rows")

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.rows = 0
        self.entries: dict[Entry, None] = {}

    def take(self, entry: Entry) -> bool:
        """Seat a picture if there is room."""
        if self.rows and self.rows + entry.rows > self.cap:
            return False
        self.entries[entry] = None
        self.rows += entry.rows
        return True


def _order(entry: Entry) -> tuple[int, float, float, str, int]:
    return entry.order
