"""Clients: a closed loop, each waiting for its answer, and an open loop that arrives whatever happens.

An open loop measures from the moment a request was due, so a server that stalls cannot hide it by slowing
down those who ask. A load may have begun before it is measured: a server that advances many pictures together
has nothing to show for its first seconds, and as much in work at the end.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

from tests.benchmarks.serve.workload import Order

PATH = "/v1/images/generations"
LOST = 0  # status of a request that got no answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. Times are seconds since the measurement began, negative before it."""

    due: float
    answered: float
    status: int
    num_images: int  # received
    has_retry_after: bool = False

    @property
    def seconds(self) -> float:
        """From due to answered."""
        return self.answered - self.due

    @property
    def is_good(self) -> bool:
        """Whether the pictures came."""
        return self.status == 200

    @property
    def is_refusal(self) -> bool:
        """Whether the server had no room."""
        return self.status in (429, 503)


@dataclass(frozen=True, slots=True)
class Load:
    """All answers to a load that was measured for `seconds`, and warmed up before."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def images_per_second(self) -> float:
        """Pictures that came while it was measured, whenever they were asked for."""
        return self._rate(lambda answer: 0 <= answer.answered <= self.seconds)

    def goodput(self, deadline: float) -> float:
        """Pictures per second of offered load that came within `deadline` seconds of being due."""
        return self._rate(lambda answer: answer.due >= 0 and answer.seconds <= deadline)

    def percentile(self, q: float) -> float:
        """Seconds that a share `q` of the good answers took at most; infinite where there are none."""
        return percentile(self.latencies, q)

    @property
    def latencies(self) -> list[float]:
        """Seconds of the good answers to requests that were due while it was measured."""
        return [answer.seconds for answer in self.answers if answer.is_good and answer.due >= 0]

    @property
    def refusals(self) -> tuple[Answer, ...]:
        """Answers 429 and 503 to requests that were due while it was measured."""
        return tuple(answer for answer in self.answers if answer.is_refusal and answer.due >= 0)

    @property
    def num_failed(self) -> int:
        """Requests that got neither pictures nor an honest refusal, even before it was measured."""
        return sum(not answer.is_good and not answer.is_refusal for answer in self.answers)

    def _rate(self, counts: Callable[[Answer], bool]) -> float:
        kept = [answer.num_images for answer in self.answers if answer.is_good and counts(answer)]
        return sum(kept) / self.seconds


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share `q` of all does not exceed."""
    if not values:
        return math.inf
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


async def closed_loop(
    client: aiohttp.ClientSession,
    orders: Iterator[Order],
    *,
    num_clients: int,
    seconds: float,
    warm_up: float = 0.0,
) -> Load:
    """`num_clients` that ask again as soon as they have their answer."""
    start = time.monotonic() + warm_up

    async def one_client() -> list[Answer]:
        answers = []
        while time.monotonic() - start < seconds:
            answers.append(await ask(client, next(orders), time.monotonic(), start))
        return answers

    lists = await asyncio.gather(*(one_client() for _ in range(num_clients)))
    return Load(seconds, tuple(answer for answers in lists for answer in answers))


async def open_loop(
    client: aiohttp.ClientSession,
    orders: Iterator[Order],
    *,
    rate: float,
    seconds: float,
    patience: float,
    warm_up: float = 0.0,
    seed: int = 0,
) -> Load:
    """Poisson arrivals of `rate` requests a second; who is not answered within `patience` seconds leaves."""
    start = time.monotonic() + warm_up

    async def one_request(due: float, order: Order) -> Answer:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + patience):
                return await ask(client, order, start + due, start)
        except TimeoutError:
            return Answer(due, math.inf, LOST, 0)

    times = [due - warm_up for due in arrivals(rate, warm_up + seconds, seed)]
    visits = await _at_their_times(times, orders, one_request, start)
    return Load(seconds, tuple(await asyncio.gather(*visits)))


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process."""
    chance, times, now = random.Random(seed), [], 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        times.append(now)
    return times


async def ask(client: aiohttp.ClientSession, order: Order, due: float, start: float) -> Answer:
    """Send one request and read all of the answer."""
    try:
        async with client.post(PATH, json=order.body) as response:
            content = await response.read()
    except aiohttp.ClientError:
        return Answer(due - start, time.monotonic() - start, LOST, 0)
    answered = time.monotonic() - start
    num_images = content.count(b'"b64_json"') if response.status == HTTPStatus.OK else 0
    return Answer(due - start, answered, response.status, num_images, "retry-after" in response.headers)


async def _at_their_times(
    times: Sequence[float],
    orders: Iterator[Order],
    visit: Callable[[float, Order], Awaitable[Answer]],
    start: float,
) -> list["asyncio.Task[Answer]"]:
    tasks = []
    for due in times:
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        tasks.append(asyncio.ensure_future(visit(due, next(orders))))
    return tasks


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a cheap route answered while something else kept the server busy."""

    seconds: tuple[float, ...]
    num_failed: int

    def percentile(self, q: float) -> float:
        """Seconds that a share `q` of the answers took at most."""
        return percentile(self.seconds, q)


async def feel_pulse(client: aiohttp.ClientSession, path: str, every: float, stop: asyncio.Event) -> Pulse:
    """Ask `path` again and again until `stop` is set."""
    seconds, num_failed = [], 0
    while not stop.is_set():
        start = time.monotonic()
        try:
            async with client.get(path) as response:
                await response.read()
            num_failed += response.status != HTTPStatus.OK
        except aiohttp.ClientError:
            num_failed += 1
        seconds.append(time.monotonic() - start)
        await asyncio.sleep(every)
    return Pulse(tuple(seconds), num_failed)
