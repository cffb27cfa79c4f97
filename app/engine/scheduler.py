"""The scheduler: decides which pictures step next. It knows rows and seconds, no tensors and no clock.

A tick belongs to the tenant that has had least of the device. Of its queues, one for each batch key, one
leads: the priority and a pressing deadline of its first picture count first, then how full a batch of that
key would be, how far the picture is, and how long the queue has waited. Pictures of all tenants with that key
fill the batch and share its cost by rows: a lone row is dear, so it is seldom stepped before it has company.

Example: a batch takes 4 rows, a tick 1 s, and every picture 20 ticks with 2 rows each. Ann sends a1 and a2,
whose latents are 24x24; then Bob sends b1 of 24x24 and b2 of 32x32.

    ticks 1-8    b1 a1  Bob came last and so starts 20 s, one picture, ahead: he leads. His 24x24 is worth 1
                        (6 rows for 4 seats), his 32x32 only 0.5 (2 rows). b1 takes a seat first, then a1;
                        none is left for a2. Each tenant pays 0.5 s per tick.
    tick 9       b2     After 8 ticks of waiting 32x32 is worth 0.5 + 8/12; 24x24, 8 steps on, 1 + 0.4 * 8/20.
    ticks 10-20  b1 a1  b2 has just stepped. It has to wait for 11 ticks, because b1 is further by now.
    tick 21      b2     As in tick 9.
    tick 22      b1 a1  Their last step.
    ticks 23-34  b2     Bob pays 1 s per tick until he has had as much as Ann: 4 s, the limit of TICKS_AHEAD.
    ticks 35-46  a2 b2  In turn: whoever has had less leads. Then b2 is done; a2 steps alone to tick 60.
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
COMPANY = 12  # ticks of waiting that outweigh a full batch; 32 gain nothing and make rare sizes late
NEARLY_DONE = 0.4  # worth of a first picture about to end over one just begun, in full batches
TICKS_AHEAD = 4  # by which a tenant can get ahead of the least served; see `Shares.charge`
PRESSING = 3.0  # a deadline is pressing when the time to it is at most so many times the work left
SCAN = 64  # how many of the longest waiting queues, or pictures, are looked at in a tick

Stage = Literal["prior", "decoder", "decode"]


class BatchKey(NamedTuple):
    """What pictures must have in common to be stepped by one call of a network.

    It is a tuple because several dictionaries look it up in every tick.
    """

    stage: Stage
    shape: tuple[int, int]  # (h, w) of the latents
    adapters: str = ""  # other weights than those of the model, such as "fp32"


@dataclass(slots=True, eq=False)
class Entry:
    """One picture aboard: what its turn depends on.

    While it is in the scheduler, only `cost_left` may change; to change anything else, remove it before and
    add it again after.
    """

    job: str
    index: int
    tenant: str
    priority: int  # within the tenant, higher first
    deadline: float | None  # on the loop's clock
    arrived: float
    key: BatchKey
    rows: int  # 2 where guided
    cost_left: float  # seconds that the rest of the picture takes with the device to itself
    is_alone: bool  # stepped only while nothing else is in work
    is_begun: bool = field(default=False, init=False)  # this and the next two are set by the scheduler
    since: int = field(default=0, init=False)  # the tick since which it waits
    whole_cost: float = field(default=0.0, init=False)  # the most that `cost_left` was when it was added

    @property
    def order(self) -> tuple[int, float, float, str, int]:
        """Sort key among its tenant's pictures of the same batch key."""
        deadline = inf if self.deadline is None else self.deadline
        return -self.priority, deadline, self.arrived, self.job, self.index

    @property
    def done(self) -> float:
        """Share of its cost that is done."""
        return 1 - self.cost_left / self.whole_cost if self.whole_cost else 0.0

    def is_pressing(self, now: float) -> bool:
        """Return whether its deadline can still be met, but not after a long wait."""
        return (
            self.deadline is not None and 1 <= (self.deadline - now) / max(self.cost_left, 1e-9) <= PRESSING
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures to step together."""

    key: BatchKey
    entries: list[Entry]
    rows: int
    has_backlog: bool  # whether rows of its key did not fit in


class Scheduler:
    """Chooses batches, each only when the device is free for it."""

    def __init__(self, caps: Callable[[BatchKey], int], weights: Mapping[str, float]) -> None:
        self._caps = caps
        self._shares = Shares(weights)
        self._tenants: dict[str, _Tenant] = {}
        self._turns: Turns[_Tenant] = Turns()
        self._groups: dict[BatchKey, _Group] = {}
        self._queued: OrderedDict[Entry, None] = OrderedDict()  # in any queue, the longest waiting first
        self._alone: dict[Entry, None] = {}
        self._held: dict[Entry, None] = {}  # not begun when one came that must be alone
        self._tick = 0
        self._aged_at = 0  # the last tick that was for the longest waiting

    def __len__(self) -> int:
        return len(self._queued) + len(self._alone) + len(self._held)

    def add(self, entry: Entry) -> None:
        """Add a picture. One that must be alone waits for those begun, and all others wait for it."""
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
        """Remove a picture, for good or to change it. Raises KeyError if it is not here."""
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
        """Return the batch to step now; None when there is nothing to step."""
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
        """Charge the seconds that a batch took to the tenants in it."""
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
        """Put a picture into the queue of its tenant and batch key."""
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
        """Add a tenant. If others are at work, the cost of its first picture is its head start."""
        share = self._shares.of(entry.tenant)
        self._shares.arrive(share, entry.cost_left if self._tenants else 0.0)
        self._tenants[entry.tenant] = tenant = _Tenant(share)
        return tenant

    def _leave(self, entry: Entry) -> None:
        """Take a picture out of its queue, and delete the queue, tenant and group that become empty."""
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
        """Return the batch of the only picture in the queues, without choosing."""
        [entry] = self._queued
        self._shares.lead(self._tenants[entry.tenant].share)
        return Batch(entry.key, [entry], entry.rows, has_backlog=False)

    def _oldest(self) -> list[Entry]:
        """Return the longest waiting pictures of one key if this tick is for them, else none."""
        oldest = next(iter(self._queued))
        if self._tick - max(oldest.since, self._aged_at) < PATIENCE:
            return []
        self._aged_at = self._tick
        return [entry for entry in islice(self._queued, SCAN) if entry.key == oldest.key]

    def _worth(self, queue: "_Queue", now: float) -> tuple[int, bool, float]:
        """Return the worth of a queue among those of its tenant: the largest leads."""
        head = queue.entries[0]
        fill = min(1.0, self._groups[queue.key].rows / self._caps(queue.key))
        waited = (self._tick - queue.since) / COMPANY
        return head.priority, head.is_pressing(now), fill + waited + NEARLY_DONE * head.done

    def _fill(self, key: BatchKey, first: Iterable[Entry] = ()) -> Batch:
        """Fill a batch with the pictures `first`, then one by one with those of the least served tenant."""
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
    """A tenant with waiting pictures."""

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
    """A tenant's pictures of one batch key, in order."""

    __slots__ = ("entries", "key", "share", "since")

    def __init__(self, key: BatchKey, share: Share, since: int) -> None:
        self.key = key
        self.share = share
        self.since = since  # the tick since which none of it was stepped
        self.entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def served(self) -> float:
        return self.share.served


class _Group:
    """The pictures of all tenants with one batch key."""

    __slots__ = ("row_seconds", "rows", "turns")

    def __init__(self) -> None:
        self.rows = 0
        self.row_seconds = 1.0  # of its last batch; 1 before that, so that tenants take turns
        self.turns: Turns[_Queue] = Turns()


class _Seats:
    """The rows of a batch. A single picture always fits: beyond the cap the runner steps it in parts."""

    __slots__ = ("cap", "entries", "rows")

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.rows = 0
        self.entries: dict[Entry, None] = {}

    def take(self, entry: Entry) -> bool:
        """Add a picture if there is room; return whether there was."""
        if self.rows and self.rows + entry.rows > self.cap:
            return False
        self.entries[entry] = None
        self.rows += entry.rows
        return True


def _order(entry: Entry) -> tuple[int, float, float, str, int]:
    return entry.order
