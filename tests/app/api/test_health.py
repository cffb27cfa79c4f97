"""The questions of machines: up, ready, which version."""

import asyncio

import pytest

from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner, until

pytestmark = pytest.mark.anyio


async def test_the_root_says_what_this_is(serve: Serve) -> None:
    async with serve(model="/srv/private/place/my-model") as client:
        answer = await client.get("/")
        assert answer.json()["name"] == "stable-cascade-server"
        assert answer.json()["docs"] == "/docs"
        assert answer.json()["model"] == "my-model"
        assert (await client.head("/")).status_code == 200
        assert (await client.get("/version")).json() == {
            "version": answer.json()["version"],
            "model": "my-model",
        }
        assert (await client.get("/docs")).status_code == 200


async def test_up_at_once_and_ready_when_loaded(serve: Serve, runner: FakeRunner) -> None:
    runner.loading.clear()
    async with serve(wait=False) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "model_loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 59
        runner.loading.set()
        client.app.state.services.engine.loaded.result(10)  # type: ignore[attr-defined]
        answer = await client.get("/readyz")
        assert answer.json() == {"status": "ready", "model": "tiny", "device": "cpu", "dtype": "float32"}


async def test_a_model_that_cannot_be_loaded(serve: Serve, runner: FakeRunner) -> None:
    runner.load_error = ValueError("/srv/model: prior/ is missing")
    async with serve(wait=False) as client:
        client.app.state.services.engine.loaded.exception(10)  # type: ignore[attr-defined]
        assert (await client.get("/healthz")).status_code == 200
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
        assert "/srv" not in answer.text


async def test_not_ready_while_the_queue_is_full(serve: Serve, runner: FakeRunner) -> None:
    async with serve(max_queue=1, max_batch=1) as client:
        runner.gate.clear()
        post, engine = client.post, client.app.state.services.engine  # type: ignore[attr-defined]
        tasks = [asyncio.ensure_future(post("/v1/images/generations", json={"prompt": "x"}))]
        await until(lambda: runner.batches)
        assert (await client.get("/readyz")).status_code == 200
        tasks.append(asyncio.ensure_future(post("/v1/images/generations", json={"prompt": "x"})))
        await until(lambda: engine.num_queued)
        answer = await client.get("/readyz")
        assert answer.json()["code"] == "overloaded"
        runner.gate.set()
        await asyncio.gather(*tasks)
        assert (await client.get("/readyz")).status_code == 200


async def test_two_servers_in_one_process_share_nothing(serve: Serve) -> None:
    async with serve() as first, serve() as second:
        await first.post("/v1/images/generations", json={"prompt": "x"})
        assert "cascade_pictures_total 1.0" in (await first.get("/metrics")).text
        assert "cascade_pictures_total 0.0" in (await second.get("/metrics")).text
