"""The clients count what they should: rates, deadlines, refusals, and arrivals that wait for nobody."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import islice

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.benchmarks.serve.load import PATH, Answer, Load, arrivals, closed_loop, open_loop, percentile
from tests.benchmarks.serve.ticks import Ticks, parse_ticks
from tests.benchmarks.serve.workload import mean_images, orders

LOAD = Load(
    2.0,
    (
        Answer(0.0, 1.0, 200, 4),
        Answer(0.5, 2.5, 200, 2),  # when the load was over
        Answer(1.0, 1.1, 503, 0, has_retry_after=True),
        Answer(1.0, math.inf, 0, 0),
    ),
)


def test_rates_count_pictures_and_not_requests() -> None:
    assert LOAD.images_per_second == 2.0
    assert LOAD.goodput(deadline=5) == 3.0
    assert LOAD.goodput(deadline=1.5) == 2.0
    assert (len(LOAD.refusals), LOAD.num_failed) == (1, 1)


def test_a_picture_asked_for_before_the_measurement_counts_when_it_comes() -> None:
    before = Answer(-3.0, -1.0, 200, 4), Answer(-1.0, 0.5, 200, 1)
    warm = Load(2.0, (*LOAD.answers, *before))
    assert warm.images_per_second == 2.5
    assert warm.goodput(deadline=5) == LOAD.goodput(deadline=5)
    assert warm.latencies == LOAD.latencies == [1.0, 2.0]


def test_percentiles_are_of_good_answers() -> None:
    assert (LOAD.percentile(0.5), LOAD.percentile(0.95)) == (1.0, 2.0)
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([], 0.5) == math.inf


def test_arrivals_keep_their_rate() -> None:
    times = arrivals(rate=50, seconds=100, seed=1)
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert times == sorted(times)
    assert times == arrivals(rate=50, seconds=100, seed=1)


def test_both_servers_get_the_same_mix() -> None:
    drawn = list(islice(orders(3), 2000))
    assert drawn == list(islice(orders(3), 2000))
    mean = sum(order.num_images for order in drawn) / len(drawn)
    assert mean == pytest.approx(mean_images(), rel=0.1)


@asynccontextmanager
async def client_of(
    handler: Callable[[web.Request], Awaitable[web.Response]],
) -> AsyncIterator[aiohttp.ClientSession]:
    app = web.Application()
    app.router.add_post(PATH, handler)
    async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as client:
        yield client


@pytest.mark.anyio
async def test_an_open_loop_arrives_although_nobody_is_answered() -> None:
    waiting = 0

    async def never(_: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        await asyncio.Event().wait()
        raise AssertionError

    async with client_of(never) as client:
        load = await open_loop(client, orders(0), rate=200, seconds=0.2, patience=0.3)
    assert waiting == len(load.answers) == len(arrivals(200, 0.2, 0)) > 10
    assert load.num_failed == waiting


@pytest.mark.anyio
@pytest.mark.parametrize("is_open", [False, True])
async def test_a_load_begins_before_it_is_measured(is_open: bool) -> None:
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(0.01)
        return web.json_response({"data": [{"b64_json": ""}]})

    async with client_of(answer) as client:
        if is_open:
            load = await open_loop(client, orders(0), rate=100, seconds=0.2, patience=1, warm_up=0.2)
        else:
            load = await closed_loop(client, orders(0), num_clients=2, seconds=0.2, warm_up=0.2)
    due = [one.due for one in load.answers]
    assert -0.2 <= min(due) < -0.1
    assert 0.1 < max(due) <= 0.2


@pytest.mark.anyio
async def test_a_closed_loop_has_as_many_requests_in_work_as_clients() -> None:
    at_once, most = 0, 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        return web.json_response({"data": [{"b64_json": ""}, {"b64_json": ""}]})

    async with client_of(answer) as client:
        load = await closed_loop(client, orders(0), num_clients=3, seconds=0.1)
    assert most == 3
    assert {one.num_images for one in load.answers} == {2}


METRICS = """\
# TYPE cascade_tick_rows histogram
cascade_tick_rows_count{stage="prior",shape="6x6"} 10
cascade_tick_rows_sum{stage="prior",shape="6x6"} 160
cascade_tick_rows_count{stage="prior",shape="6x9"} 10
cascade_tick_rows_sum{stage="prior",shape="6x9"} 40
# TYPE cascade_tick_fill_ratio histogram
cascade_tick_fill_ratio_count{stage="prior"} 5
cascade_tick_fill_ratio_sum{stage="prior"} 4.5
"""


def test_ticks_are_read_over_all_shapes_and_from_a_moment_on() -> None:
    ticks = parse_ticks(METRICS)
    assert ticks.mean_rows("prior") == 10
    assert ticks.mean_fill == 0.9
    later = ticks.since(Ticks({"prior": 160}, {"prior": 10}, 4.5, 5))
    assert later.mean_rows("prior") == 4
    assert later.mean_fill is None
