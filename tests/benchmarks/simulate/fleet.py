"""Devices on a virtual clock: the server's own scheduler, and steps that take as long as was measured."""

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import inf

from app.engine.profile import Profile, best_rows, parse_shape
from app.engine.scheduler import Batch, BatchKey, Entry, Scheduler

STEPS = {(20, 10): 6, (12, 6): 3, (30, 15): 1}  # of the prior and of the decoder, and how often
GUIDED = 0.8  # of the pictures


class Speed:
    """How long ticks take by a profile; between the numbers of rows that were measured, on straight lines."""

    def __init__(self, profile: Profile) -> None:
        parsed = [(*parse_shape(name), measured) for name, measured in profile.items()]
        self.shapes = {stage: (height, width) for stage, height, width, _ in parsed}
        self.caps = {stage: best_rows(measured) for stage, _, _, measured in parsed}
        self._seconds = {
            stage: [_interpolated(measured, rows) for rows in range(self.caps[stage] + 1)]
            for stage, _, _, measured in parsed
        }

    def tick(self, stage: str, rows: int) -> float:
        """Of `rows` rows, in as many calls as the cap asks for."""
        calls, rest = divmod(rows, self.caps[stage])
        return calls * self._seconds[stage][self.caps[stage]] + self._seconds[stage][rest]

    @property
    def decode(self) -> float:
        """Stage A of a picture. It is counted as if nothing else could be done meanwhile."""
        return self._seconds["decode"][1]


def _interpolated(measured: Mapping[int, float], rows: int) -> float:
    if not rows or rows in measured:
        return measured.get(rows, 0.0)
    low, high = max(size for size in measured if size < rows), min(size for size in measured if size > rows)
    return measured[low] + (measured[high] - measured[low]) * (rows - low) / (high - low)


@dataclass(slots=True, eq=False)
class Picture:
    """Somebody wants it at a time, and gets it at another."""

    tenant: str
    arrived: float
    prior_steps: int
    decoder_steps: int
    rows: int
    done: float = 0.0

    def alone(self, speed: Speed) -> float:
        """Seconds that it takes with a device to itself."""
        prior = self.prior_steps * speed.tick("prior", self.rows)
        return prior + self.decoder_steps * speed.tick("decoder", 1) + speed.decode


def draw(chance: random.Random, tenant: str, arrived: float) -> Picture:
    """A picture with settings as people choose them."""
    [(prior, decoder)] = chance.choices(list(STEPS), list(STEPS.values()))
    return Picture(tenant, arrived, prior, decoder, 2 if chance.random() < GUIDED else 1)


def poisson(chance: random.Random, tenant: str, rate: float, number: int) -> Iterable[Picture]:
    """`number` pictures at random times, `rate` of them a second on average."""
    now = 0.0
    for _ in range(number):
        now += chance.expovariate(rate)
        yield draw(chance, tenant, now)


Answer = Callable[[Picture], Picture | None]  # what somebody wants who has got a picture


class Fleet(ABC):
    """Some devices and what they did. How they do it is for those below to say."""

    def __init__(self, speed: Speed, num_devices: int) -> None:
        self.speed = speed
        self.num_devices = num_devices
        self.now = 0.0
        self.done: list[Picture] = []
        self.busy = 0.0  # seconds, of all devices together
        self.served: dict[str, float] = {}  # the same by tenant, without Stage A
        self.rows: dict[str, list[int]] = {"prior": [], "decoder": []}  # of every tick
        self._numbers = count()

    @abstractmethod
    def run(
        self, pictures: Iterable[Picture], *, until: float = inf, answer: Answer = lambda picture: None
    ) -> None:
        """Go on until all is done, or a time."""

    @property
    def utilisation(self) -> float:
        """Share of the time that devices are at work."""
        return self.busy / (self.now * self.num_devices)

    def serve(self, tenant: str, seconds: float) -> None:
        """Take down who got the device."""
        self.served[tenant] = self.served.get(tenant, 0.0) + seconds


class OneByOne(Fleet):
    """How it is done elsewhere: a lock around the model; first come, first served."""

    def run(
        self, pictures: Iterable[Picture], *, until: float = inf, answer: Answer = lambda picture: None
    ) -> None:
        """Each picture to its end on the device that is free first."""
        free = [0.0] * self.num_devices
        waiting = [(picture.arrived, next(self._numbers), picture) for picture in pictures]
        heapify(waiting)
        while waiting and (began := max(waiting[0][0], free[0])) < until:
            picture = heappop(waiting)[2]
            seconds = picture.alone(self.speed)
            picture.done = began + seconds
            heapreplace(free, picture.done)
            self.now = max(self.now, picture.done)
            self.busy += seconds
            self.serve(picture.tenant, seconds - self.speed.decode)
            self.done.append(picture)
            if (wanted := answer(picture)) is not None:
                heappush(waiting, (wanted.arrived, next(self._numbers), wanted))


@dataclass(slots=True, eq=False)
class Device:
    """One of ours."""

    scheduler: Scheduler
    batch: Batch | None = None
    num_aboard: int = 0
    free_at: float = 0.0  # when Stage A of what was drawn before is done


class Together(Fleet):
    """Ours: each takes pictures of all tenants in turn while it has room, and asks the scheduler."""

    def __init__(
        self, speed: Speed, num_devices: int, *, room: int, weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(speed, num_devices)
        self._room = room  # pictures aboard a device
        self._devices = [
            Device(Scheduler(lambda key: speed.caps[key.stage], weights or {})) for _ in range(num_devices)
        ]
        self._queues: dict[str, deque[Picture]] = {}  # of the tenants that wait, the next one first
        self._free = [(0, number) for number in range(num_devices)]  # a heap: pictures aboard, device
        self._events: list[tuple[float, int, Picture | int]] = []
        self._aboard: dict[str, Picture] = {}  # by the jobs of their entries
        self._steps_left: dict[Entry, int] = {}  # of the stage that a picture is in

    def run(
        self, pictures: Iterable[Picture], *, until: float = inf, answer: Answer = lambda picture: None
    ) -> None:
        """From event to event: a picture is wanted, or a tick ends."""
        for picture in pictures:
            self._at(picture.arrived, picture)
        while self._events and self._events[0][0] < until:
            self.now, _, event = heappop(self._events)
            if isinstance(event, Picture):
                self._queues.setdefault(event.tenant, deque()).append(event)
            else:
                for picture in self._end_tick(self._devices[event], event):
                    if (wanted := answer(picture)) is not None:
                        self._at(wanted.arrived, wanted)
            self._hand_out()

    def _at(self, time: float, event: Picture | int) -> None:
        heappush(self._events, (time, next(self._numbers), event))

    def _hand_out(self) -> None:
        """Give what waits to the devices with fewest aboard."""
        while self._queues and self._free:
            num_aboard, number = heappop(self._free)
            device = self._devices[number]
            if num_aboard != device.num_aboard:
                continue
            tenant, queue = next(iter(self._queues.items()))
            picture = queue.popleft()
            del self._queues[tenant]
            if queue:
                self._queues[tenant] = queue  # behind all others
            entry = self._entry(picture)
            self._aboard[entry.job] = picture
            device.scheduler.add(entry)
            self._set_aboard(number, num_aboard + 1)
            if device.batch is None:
                self._begin_tick(device, number)

    def _set_aboard(self, number: int, num_aboard: int) -> None:
        self._devices[number].num_aboard = num_aboard
        if num_aboard < self._room:
            heappush(self._free, (num_aboard, number))

    def _begin_tick(self, device: Device, number: int) -> None:
        device.batch = batch = device.scheduler.next(self.now)
        if batch is not None:
            seconds = self.speed.tick(batch.key.stage, batch.rows)
            self.rows[batch.key.stage].append(batch.rows)
            self.busy += seconds
            self._at(max(self.now, device.free_at) + seconds, number)

    def _end_tick(self, device: Device, number: int) -> list[Picture]:
        """Bring all that was stepped further; returns those that are done."""
        batch = device.batch
        assert batch is not None
        seconds = self.speed.tick(batch.key.stage, batch.rows)
        device.scheduler.stepped(batch, seconds)
        for entry in batch.entries:
            self.serve(entry.tenant, seconds * entry.rows / batch.rows)
        done = [picture for entry in batch.entries if (picture := self._advance(device, entry)) is not None]
        device.free_at = self.now
        for picture in done:
            picture.done = device.free_at = device.free_at + self.speed.decode
            self.busy += self.speed.decode
        self.done += done
        if done:
            self._set_aboard(number, device.num_aboard - len(done))
        self._begin_tick(device, number)
        return done

    def _entry(self, picture: Picture) -> Entry:
        entry = Entry(
            job=str(next(self._numbers)),
            index=0,
            tenant=picture.tenant,
            priority=0,
            deadline=None,
            arrived=picture.arrived,
            key=BatchKey("prior", self.speed.shapes["prior"]),
            rows=picture.rows,
            cost_left=picture.alone(self.speed),
            is_alone=False,
        )
        self._steps_left[entry] = picture.prior_steps
        return entry

    def _advance(self, device: Device, entry: Entry) -> Picture | None:
        self._steps_left[entry] -= 1
        entry.cost_left -= self.speed.tick(entry.key.stage, entry.rows)
        if self._steps_left[entry]:
            return None
        device.scheduler.remove(entry)
        if entry.key.stage == "decoder":
            del self._steps_left[entry]
            return self._aboard.pop(entry.job)
        entry.key = BatchKey("decoder", self.speed.shapes["decoder"])
        entry.rows, self._steps_left[entry] = 1, self._aboard[entry.job].decoder_steps
        device.scheduler.add(entry)
        return None
