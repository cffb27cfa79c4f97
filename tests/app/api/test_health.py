"""The questions of machines: up, ready, which version."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from app.jobs import forecast
from tests.app.conftest import Serve, eventually, inside
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


async def test_monitors_may_ask_for_the_head(client: httpx2.AsyncClient) -> None:
    for path in ("/healthz", "/readyz", "/version", "/metrics"):
        answer = await client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


async def test_up_at_once_and_ready_when_loaded(serve: Serve, runner: FakeRunner) -> None:
    runner.loading.clear()
    async with serve(wait=False) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "model_loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 59
        runner.loading.set()
        await inside(client).dispatcher.wait_loaded(10)
        answer = await client.get("/readyz")
        assert answer.json() == {"status": "ready", "model": "tiny", "device": "cpu", "dtype": "float32"}


async def test_a_model_that_cannot_be_loaded(serve: Serve, runner: FakeRunner) -> None:
    runner.load_error = ValueError("/srv/model: prior/ is missing")
    async with serve(wait=False) as client:
        await inside(client).dispatcher.wait_loaded(10)
        assert (await client.get("/healthz")).status_code == 200
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
        assert "/srv" not in answer.text


async def test_a_database_that_is_away_is_a_reason_to_come_back_and_prompts_stay_out_of_the_log(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "STALE_SECONDS", 2.0)
    async with serve(log_format="json", log_level="info") as client:
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as database:
            database.execute("ALTER TABLE jobs RENAME TO elsewhere")
            answer = await client.post("/v1/images/generations", json={"prompt": "my secret diary"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "2"
            await readiness(client, 503)
            database.execute("ALTER TABLE elsewhere RENAME TO jobs")
        await readiness(client, 200)
        assert (await client.post("/v1/images/generations", json={"prompt": "x"})).status_code == 200
    log = "".join(capfd.readouterr())
    assert "the database does not answer" in log
    assert "secret" not in log


async def readiness(client: httpx2.AsyncClient, status: int) -> httpx2.Response:
    """The answer once it has that status: the queue is counted twice a second."""
    answers: list[httpx2.Response] = []

    async def has_status() -> bool:
        answers.append(await client.get("/readyz"))
        return answers[-1].status_code == status

    await eventually(has_status)
    return answers[-1]


async def test_not_ready_while_the_queue_is_full(serve: Serve, runner: FakeRunner) -> None:
    runner.max_samples = 1
    async with serve(max_queue=1) as client:
        runner.gate.clear()
        post = client.post
        tasks = [asyncio.ensure_future(post("/v1/images/generations", json={"prompt": "x"}))]
        await until(lambda: runner.started)
        assert (await client.get("/readyz")).status_code == 200
        tasks.append(asyncio.ensure_future(post("/v1/images/generations", json={"prompt": "x"})))
        answer = await readiness(client, 503)
        assert answer.json()["code"] == "overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 59
        runner.gate.set()
        await asyncio.gather(*tasks)
        await readiness(client, 200)


async def test_two_servers_in_one_process_share_nothing(serve: Serve, tmp_path: Path) -> None:
    async with serve() as first, serve(data_dir=tmp_path / "second") as second:
        await first.post("/v1/images/generations", json={"prompt": "x"})
        assert "cascade_pictures_total 1.0" in (await first.get("/metrics")).text
        assert "cascade_pictures_total 0.0" in (await second.get("/metrics")).text
