"""Flights, which are jobs in the hands of engines: their pictures aboard, those missing, their progress.

All of this is in memory only. When this process dies, the database knows what there is to do.
"""

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from app.engine.protocol import Cancel, Expect, Run, Stepped, WantPreviews
from app.jobs.job import Job, Progress, StoredImage
from app.jobs.supervisor import Supervisor

ALMOST_DONE = 0.99  # largest fraction before the job has ended
ROWS_OF_GUIDED = 2
LEAST_PLENTY = 16  # a tenant with fewer pictures here is not sated, however small the batches are
LOAD_SECONDS = 0.2  # between two sums of the work left


@dataclass(slots=True, eq=False)
class Flight:
    """One job in the hands of an engine."""

    job: Job  # as it is in the database
    slot: "Slot"
    latents: dict[int, bytes]  # of Stage C, from before a crash
    inputs: dict[str, bytes]  # files of the pictures that came with the request, until all is sent
    picture_seconds: float  # of one picture with the device to itself, as predicted
    arrived_at: float  # on the clock of the event loop, as all times here
    expires_at: float | None = None
    fraction: float = 0.0  # the last one reported
    num_previews: int = 0  # wanted of each picture
    last_preview: dict[int, int] = field(default_factory=dict)  # shown of each picture, by its index
    is_over: bool = False  # the job has ended, or is no longer ours
    missing: set[int] = field(init=False)  # indices of pictures whose pixels have not come
    sent: set[int] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held to write to the job's row
    writes: set["asyncio.Task[None]"] = field(default_factory=set)
    _steps: dict[int, Stepped] = field(default_factory=dict)
    _longest: dict[int, float] = field(default_factory=dict)  # the most seconds that were left of each

    def __post_init__(self) -> None:
        self.missing = set(range(self.job.num_images)) - {image.index for image in self.job.images}

    @property
    def is_aboard(self) -> bool:
        """Whether the engine works on it."""
        return bool(self.sent & self.missing)

    def run(self, index: int, now: float) -> Run:
        """Return the order to make a picture. Stored latents go along once, and are not kept."""
        job = self.job
        return Run(
            job=job.id,
            index=index,
            seed=job.request.seeds[index],
            tenant=job.tenant,
            priority=job.priority,
            deadline=None if self.expires_at is None else self.expires_at - now,
            waited=max(0.0, now - self.arrived_at),
            request=job.request.model_dump_json().encode(),
            inputs=self.inputs,
            latents=self.latents.pop(index, None),
            is_alone=job.is_quarantined,
        )

    def stepped(self, step: Stepped) -> None:
        """Record the progress of a picture."""
        if step.index in self.missing:
            self._steps[step.index] = step
            self._longest[step.index] = max(
                self._longest.get(step.index, 0.0), step.remaining, self.picture_seconds
            )

    def job_with(self, image: StoredImage) -> Job:
        """Return the job with a picture that is in the database now."""
        images = sorted([*self.job.images, image], key=lambda image: image.index)
        return replace(self.job, images=tuple(images))

    def share_left(self) -> float:
        """Return the share of the work that is left, 0 to 1."""
        return sum(self._share_left(index) for index in self.missing) / self.job.num_images

    @property
    def seconds_left(self) -> float:
        """Seconds of the device that are left, in full batches."""
        return self.job.cost_seconds * self.share_left()

    @property
    def longest_left(self) -> float:
        """Seconds that the picture with most work left takes with the device to itself."""
        left = [self._share_left(index) * self.picture_seconds for index in self.missing]
        return max(left, default=0.0)

    def progress(self) -> Progress:
        """Return the fraction done, which never falls, and the steps of the picture with most work left."""
        self.fraction = max(self.fraction, ALMOST_DONE * (1 - self.share_left()))
        eta = self.slot.eta_seconds(self)
        if not self.missing:
            return Progress("encode", 1, 1, self.fraction, eta)
        step = self._steps.get(max(self.missing, key=lambda index: (self._share_left(index), index)))
        if step is None:
            return Progress("prior", 0, self.job.request.prior_steps, self.fraction, eta)
        return Progress(step.stage, step.step, step.steps, self.fraction, eta)

    def _share_left(self, index: int) -> float:
        step = self._steps.get(index)
        if step is None or not self._longest[index]:
            return 1.0
        return min(step.remaining / self._longest[index], 1.0)


class Slot:
    """One device: its engine, the jobs in its hands, and which of them may board.

    A job that was aboard two engines that died flies alone: if the third one dies, too, the cause is known.
    """

    def __init__(self, engine: Supervisor, worker: str) -> None:
        self.engine = engine
        self.worker = worker  # the name under which its jobs are claimed
        self.flights: dict[str, Flight] = {}
        self.may_hold_strays = False  # a claim failed, perhaps after it was committed
        self._waiting: deque[tuple[Flight, int]] = deque()
        self._load = 0.0  # seconds left of all its flights, as last summed up
        self._load_known_until = 0.0

    @property
    def num_aboard(self) -> int:
        """Number of pictures that the engine works on."""
        return sum(len(flight.sent & flight.missing) for flight in self.flights.values())

    @property
    def room(self) -> int:
        """Number of pictures that could be sent now."""
        ready = self.engine.ready
        if ready is None or not self.engine.is_ready or self.may_hold_strays or self._waiting:
            return 0
        if any(flight.job.is_quarantined for flight in self.flights.values()):
            return 0
        return max(ready.max_samples - self.num_aboard, int(not self.flights))

    @property
    def sated(self) -> frozenset[str]:
        """Tenants with enough pictures here to fill the batches.

        More would only wait here rather than in the queue, where they count against its bound; each would
        take longer, and none would be done sooner.
        """
        full_rows = self.engine.ready.full_rows if self.engine.ready else 0
        plenty = max(LEAST_PLENTY, full_rows // ROWS_OF_GUIDED)
        num_missing: Counter[str] = Counter()
        for flight in self.flights.values():
            num_missing[flight.job.tenant] += len(flight.missing)
        return frozenset(tenant for tenant, number in num_missing.items() if number >= plenty)

    @property
    def seconds_left(self) -> float:
        """Seconds of work in its hands. Cached for a moment, as every step of every job asks for it."""
        now = time.monotonic()
        if now >= self._load_known_until:
            self._load = sum(flight.seconds_left for flight in self.flights.values())
            self._load_known_until = now + LOAD_SECONDS
        return self._load

    def eta_seconds(self, flight: Flight) -> float:
        """Return the seconds until a flight is done, if all share the device and shorter ones end first."""
        shared = min(self.seconds_left, flight.seconds_left * len(self.flights))
        return max(shared, flight.longest_left)

    def add(self, flight: Flight, now: float) -> None:
        """Add a job, whose pictures board as soon as they may."""
        self.flights[flight.job.id] = flight
        self._load_known_until = 0.0
        self._waiting.extend((flight, index) for index in sorted(flight.missing))
        self.board(now)

    def expect(self, job: Job) -> None:
        """Let an idle engine prepare for a job while it is being accepted."""
        if not self.flights and not job.request.input_names:
            self.engine.send(Expect(job.request.model_dump_json().encode()))

    def board(self, now: float) -> None:
        """Send the waiting pictures that may board, in order."""
        if not self._waiting:  # the usual case; counting pictures aboard takes long with many jobs
            return
        num_aboard = self.num_aboard
        while self._waiting and self._may_board(self._waiting[0][0], num_aboard):
            flight, index = self._waiting.popleft()
            num_aboard += 1
            self.engine.send(flight.run(index, now))
            if not flight.sent and flight.num_previews:
                self.engine.send(WantPreviews(flight.job.id, flight.num_previews))
            flight.sent.add(index)
            if flight.missing <= flight.sent:
                flight.inputs = {}

    def remove(self, flight: Flight) -> None:
        """Forget a flight, and let the engine drop its job. A later flight of the same job stays."""
        if self.flights.get(flight.job.id) is not flight:
            return
        del self.flights[flight.job.id]
        self._load_known_until = 0.0
        if self._waiting:
            self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not flight)
        if flight.is_aboard:
            self.engine.send(Cancel(flight.job.id))

    def want_previews(self, flight: Flight, count: int) -> None:
        """Have `count` previews made of each picture, unless more are wanted already."""
        if count > flight.num_previews:
            flight.num_previews = count
            if flight.is_aboard:
                self.engine.send(WantPreviews(flight.job.id, count))

    def _may_board(self, flight: Flight, num_aboard: int) -> bool:
        ready = self.engine.ready
        if ready is None or not self.engine.is_ready:
            return False
        if flight.job.is_quarantined or self._is_taken:
            return num_aboard == len(flight.sent & flight.missing)
        return num_aboard < max(ready.max_samples, 1)

    @property
    def _is_taken(self) -> bool:
        """Whether a job that must be alone is aboard. Then it is the only one."""
        first = next((flight for flight in self.flights.values() if flight.is_aboard), None)
        return first is not None and first.job.is_quarantined
