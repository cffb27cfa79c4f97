"""What is asked of the scheduler on measured step times, and of one picture at a time for comparison."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from app.engine.scheduler import BatchKey, Entry, Scheduler
from tests.benchmarks.simulate.fleet import Fleet, OneByOne, Picture, Speed, Together, draw, poisson

ROOM = 256  # pictures aboard a device, unless said otherwise
FLEETS = {1: 2_000, 10: 5_000, 100: 20_000, 1_000: 100_000}  # devices: pictures
LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2)  # of what one picture at a time can do
CLIENTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run came to."""

    name: str
    rate: float  # pictures a second
    p50: float  # seconds from the wish to the picture
    p95: float
    utilisation: float
    rows: dict[str, float]  # of a tick, on average, by stage

    @classmethod
    def of(cls, name: str, fleet: Fleet) -> "Figures":
        """After a run; the first tenth of the pictures saw an empty fleet and does not count."""
        done = fleet.done[len(fleet.done) // 10 :]
        seconds = [picture.done - picture.arrived for picture in done]
        rows = {stage: sum(ticks) / max(len(ticks), 1) for stage, ticks in fleet.rows.items()}
        return cls(
            name,
            len(fleet.done) / fleet.now,
            percentile(seconds, 0.5),
            percentile(seconds, 0.95),
            fleet.utilisation,
            rows,
        )


class Lab:
    """Runs on devices of one speed, either way."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed

    def together(
        self, num_devices: int = 1, *, weights: dict[str, float] | None = None, room: int = ROOM
    ) -> Fleet:
        """Devices with our scheduler."""
        return Together(self.speed, num_devices, room=room, weights=weights)

    def one_by_one(self, num_devices: int = 1) -> Fleet:
        """Devices that finish a picture before they begin another."""
        return OneByOne(self.speed, num_devices)

    def closed_loop(self, name: str, fleet: Fleet, num_clients: int, num_pictures: int) -> Figures:
        """Clients that want another picture as soon as they have one."""
        chance = random.Random(num_clients)
        left = iter(range(num_pictures - num_clients))

        def next_of(picture: Picture) -> Picture | None:
            return None if next(left, None) is None else draw(chance, picture.tenant, picture.done)

        fleet.run([draw(chance, "", 0.01 * number) for number in range(num_clients)], answer=next_of)
        return Figures.of(name, fleet)

    def open_loop(self, name: str, fleet: Fleet, rate: float, num_pictures: int) -> Figures:
        """Clients that come at random, however long others wait."""
        fleet.run(poisson(random.Random(num_pictures), "", rate, num_pictures))
        return Figures.of(name, fleet)

    def capacity(self, fleet: Fleet) -> float:
        """Pictures a second of a device that never runs out of work."""
        return self.closed_loop("", fleet, 64, 1_000).rate


def by_clients(lab: Lab) -> list[tuple[Figures, Figures]]:
    """One device, more and more clients."""
    return [
        (
            lab.closed_loop(f"{number}", lab.together(), number, 400 + 10 * number),
            lab.closed_loop(f"{number}", lab.one_by_one(), number, 400 + 10 * number),
        )
        for number in CLIENTS
    ]


def by_load(lab: Lab) -> list[tuple[Figures, Figures]]:
    """One device, more and more pictures a second."""
    capacity = lab.capacity(lab.one_by_one())
    return [
        (
            lab.open_loop(f"{load:.0%}", lab.together(), load * capacity, 3_000),
            lab.open_loop(f"{load:.0%}", lab.one_by_one(), load * capacity, 3_000),
        )
        for load in LOADS
    ]


def by_fleet(lab: Lab) -> list[tuple[Figures, Figures]]:
    """More and more devices with nine tenths of what ours can do."""
    rate = 0.9 * lab.capacity(lab.together())
    return [
        (
            lab.open_loop(f"{number:,}", lab.together(number), number * rate, num_pictures),
            lab.open_loop(f"{number:,}", lab.one_by_one(number), number * rate, num_pictures),
        )
        for number, num_pictures in FLEETS.items()
    ]


@dataclass(frozen=True, slots=True)
class Company:
    """How it is to want a picture now and then beside somebody who wants a thousand."""

    name: str
    alone: float  # p95 of the seconds to a picture without that somebody
    p50: float
    p95: float
    bulk_rate: float  # pictures a second that somebody gets


def beside_bulk(name: str, make: Callable[[], Fleet]) -> Company:
    """A thousand pictures of one tenant at once, and one of each of five others about every ten seconds."""
    others = [
        picture
        for number in range(5)
        for picture in poisson(random.Random(number), f"other {number}", 0.1, 15)
    ]
    alone, fleet = make(), make()
    alone.run(others)
    p95 = percentile([picture.done - picture.arrived for picture in alone.done], 0.95)
    chance = random.Random(0)
    fleet.run([*(draw(chance, "bulk", 0.0) for _ in range(1_000)), *others])
    seconds = [picture.done - picture.arrived for picture in fleet.done if picture.tenant != "bulk"]
    bulk = [picture.done for picture in fleet.done if picture.tenant == "bulk"]
    return Company(name, p95, percentile(seconds, 0.5), percentile(seconds, 0.95), len(bulk) / max(bulk))


@dataclass(frozen=True, slots=True)
class Shares:
    """How the device is divided among ten tenants who all want more than they get."""

    name: str
    jain: float  # of what each got for its weight
    worst: float  # the largest distance of a tenant from its share, as a part of it


def shares(name: str, fleet: Fleet, weights: dict[str, float]) -> Shares:
    """Tenant 0 wants 100 pictures and tenant 9 ten times as many; there is time for some 300 in all."""
    chance = random.Random(0)
    wanted = [draw(chance, f"{number}", 0.0) for number in range(10) for _ in range(100 * (number + 1))]
    chance.shuffle(wanted)
    fleet.run(wanted, until=300 * wanted[0].alone(fleet.speed))
    had = {tenant: fleet.served.get(tenant, 0.0) / weights.get(tenant, 1.0) for tenant in map(str, range(10))}
    mean = sum(had.values()) / len(had)
    return Shares(name, jain(had.values()), max(abs(value / mean - 1) for value in had.values()))


@dataclass(frozen=True, slots=True)
class Decision:
    """How long the scheduler takes to choose, in milliseconds."""

    aboard: int
    tenants: int
    shapes: int
    p50: float
    p99: float


def decision(aboard: int, tenants: int, shapes: int) -> Decision:
    """Time a thousand decisions among so many pictures, on the clock of this thread."""
    scheduler = Scheduler(lambda key: 16, {})
    for number in range(aboard):
        key = BatchKey("prior", (6, 6 + number % shapes))
        tenant = str(number % tenants)
        scheduler.add(Entry(f"{number}", 0, tenant, 0, None, number, key, 2, 1.0, False))
    taken = []
    for _ in range(1_000):
        began = time.thread_time()
        batch = scheduler.next(0.0)
        taken.append(1e3 * (time.thread_time() - began))
        assert batch is not None
        scheduler.stepped(batch, 1.0)
    return Decision(aboard, tenants, shapes, percentile(taken, 0.5), percentile(taken, 0.99))


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which so many lie."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def jain(values: Iterable[float]) -> float:
    """Jain's index of fairness: 1 when all have the same, 1/n when one has all."""
    listed = list(values)
    return sum(listed) ** 2 / (len(listed) * sum(value**2 for value in listed))
