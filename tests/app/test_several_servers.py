"""Two whole servers on one PostgreSQL and one folder of pictures: none is special."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from app.jobs import maintenance
from tests.app.api.sse import told
from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner, closed, until

pytestmark = pytest.mark.anyio
IMAGES = "/api/v1/images"


Servers = tuple[httpx2.AsyncClient, httpx2.AsyncClient]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(maintenance, "RENEW_SECONDS", 0.2)


@pytest.fixture
def second() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
async def servers(serve: Serve, second: FakeRunner, postgresql: str) -> AsyncIterator[Servers]:
    """The first works with `runner`."""
    async with serve(database_url=postgresql) as one, serve(database_url=postgresql, use=second) as other:
        yield one, other


async def test_either_tells_of_a_job_and_gives_its_pictures(servers: Servers) -> None:
    jobs = []
    for client in servers:
        answer = await client.post(
            IMAGES, json={"prompt": "x", "seed": 3}, headers={"prefer": "respond-async"}
        )
        jobs.append(answer.json())
    for job in jobs:
        for client in servers:
            async with asyncio.timeout(20):
                events = told((await client.get(job["urls"]["events"])).text)
            assert events[-1].event == "job.succeeded"
            [image] = events[-1].data["images"]
            assert (await client.get(image["url"])).status_code == 200


async def test_a_key_is_known_to_both(servers: Servers) -> None:
    headers = {"idempotency-key": "k"}
    async with asyncio.timeout(20):
        answers = await asyncio.gather(
            *(client.post(IMAGES, json={"prompt": "y"}, headers=headers) for client in servers * 4)
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7


async def test_either_cancels_what_the_other_works_on(
    servers: Servers, runner: FakeRunner, second: FakeRunner
) -> None:
    with closed(runner.gate), closed(second.gate):
        answer = await servers[0].post(IMAGES, json={"prompt": "z"}, headers={"prefer": "respond-async"})
        await until(lambda: runner.started or second.started)
        holder, other = servers if runner.started else reversed(servers)
        await other.post(answer.json()["urls"]["cancel"])
        async with asyncio.timeout(20):
            job = await inside(holder).dispatcher.wait(answer.json()["id"])
    assert job.status == "canceled"
