"""What holds for every request: ids, error families, OPTIONS, browsers, logs, figures, health under load."""

import asyncio
import json
import re
import time
from typing import Any

import httpx2
import pytest

from app.api.gateway import CROWDED
from app.errors import NotFound
from tests.app.conftest import Serve, eventually, inside
from tests.app.fakes import FakeRunner, until

pytestmark = pytest.mark.anyio
PATH = "/v1/images/generations"


async def test_every_answer_has_an_id(client: httpx2.AsyncClient) -> None:
    for method, path in [("GET", "/healthz"), ("GET", "/nothing"), ("PUT", PATH), ("OPTIONS", PATH)]:
        given = await client.request(method, path)
        assert re.fullmatch(r"req_[0-9a-f]{24}", given.headers["x-request-id"])
    for name in ("x-request-id", "x-client-request-id"):
        assert (await client.get("/", headers={name: "mine 1"})).headers["x-request-id"] == "mine 1"
    for unusable in ("é", "x" * 201, "a\x7f", " "):
        headers = {b"x-request-id": unusable.encode()}
        assert (await client.get("/", headers=headers)).headers["x-request-id"].startswith("req_")
        headers[b"x-client-request-id"] = b"mine 2"
        assert (await client.get("/", headers=headers)).headers["x-request-id"] == "mine 2"


async def test_errors_of_the_openai_family(client: httpx2.AsyncClient) -> None:
    for method, path, status, code in [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/images/generations/", 404, "unknown_url"),
        ("POST", "/v1/chat/completions", 404, "unknown_url"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("BREW", PATH, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ]:
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["content-type"] == "application/json"
    assert (await client.get(PATH)).headers["allow"] == "POST, OPTIONS"


async def test_a_base_url_without_v1_is_told(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/images/generations", json={})
    assert answer.status_code == 404
    message = "there is nothing at /images/generations; did you mean /v1/images/generations?"
    assert answer.json()["error"]["message"] == message
    assert "did you mean" not in (await client.post("/images/generation")).json()["detail"]


async def test_errors_elsewhere_are_problems(client: httpx2.AsyncClient) -> None:
    for method, path, status, code in [
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/v1x", 404, "unknown_url"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("GET", "/files/x.png", 403, "forbidden"),
    ]:
        answer = await client.request(method, path, headers={"x-request-id": "r1"})
        problem = answer.json()
        assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert problem["instance"] == path
        assert problem["request_id"] == "r1"
        assert {"type", "title", "detail"} <= set(problem)
    assert (await client.post("/files/x.png")).headers["allow"] == "GET, HEAD, OPTIONS"


async def test_an_unforeseen_error_is_an_answer_of_the_family(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("inner secret")

    monkeypatch.setattr("app.api.openai._answer", broken)
    async with serve() as client:
        answer = await client.post(PATH, json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"].startswith("req_")
    assert "secret" not in answer.text
    assert "inner secret" in capsys.readouterr().err


async def test_a_picture_that_is_removed_while_it_is_sent_is_no_fault_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    def gone(*_: object) -> bytes:
        raise NotFound("there is no such file")

    async with serve(log_level="info", log_format="json") as client:
        monkeypatch.setattr(inside(client).images, "read_part", gone)
        with pytest.raises(AssertionError):  # of the client, whose answer does not come to an end
            await client.post(PATH, json={"prompt": "x"})
    log = capsys.readouterr().err
    assert '"answer broken off"' in log
    assert "there is no such file" in log
    assert "Traceback" not in log


async def test_options_needs_no_key_and_names_the_methods(serve: Serve) -> None:
    async with serve(api_keys="k") as client:
        for path, allowed in [
            (PATH, "POST, OPTIONS"),
            ("/v1/models", "GET, OPTIONS"),
            ("/files/x.png", "GET, HEAD, OPTIONS"),
            ("/nothing", "OPTIONS"),
        ]:
            answer = await client.options(path)
            assert (answer.status_code, answer.headers["allow"]) == (204, allowed)
            assert "access-control-allow-origin" not in answer.headers


async def test_browsers_of_the_listed_origins_may_call(serve: Serve) -> None:
    preflight = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-os",
    }
    async with serve(cors_origins="https://page.example,https://other.example") as client:
        answer = await client.options(PATH, headers=preflight)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "allow" in answer.headers
        for answer in (
            await client.get("/v1/models", headers={"origin": "https://page.example"}),
            await client.post(PATH, json={}, headers={"origin": "https://page.example"}),
        ):
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            assert "x-seed" in answer.headers["access-control-expose-headers"]
            assert "Origin" in answer.headers["vary"]
        answer = await client.options(PATH, headers={**preflight, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-methods" not in answer.headers
        answer = await client.get("/v1/models")
        assert answer.headers["vary"] == "Origin"
    async with serve(cors_origins="*") as client:
        answer = await client.options(PATH, headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"


async def test_one_line_for_each_request_and_no_prompt(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve(log_level="info", log_format="json") as client:
        capsys.readouterr()
        await client.post(
            PATH, json={"prompt": "a very private prompt", "n": 2}, headers={"x-request-id": "r"}
        )
        await client.get(
            "/evil\r\n\x1b[31m{}".replace("\r", "%0D").replace("\n", "%0A").replace("\x1b", "%1B")
        )
        await client.get("/healthz")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    first, second = (line for line in lines if line["event"] == "request")
    assert {name: first[name] for name in ("event", "request_id", "method", "status", "images", "size")} == {
        "event": "request",
        "request_id": "r",
        "method": "POST",
        "status": 200,
        "images": 2,
        "size": "64x64",
    }
    assert 0 < first["seconds"] < 10
    assert first["prompt_characters"] == 21
    assert "private" not in str(lines)
    assert second["path"] == "/evil\r\n\x1b[31m{}"
    async with serve(log_level="info", log_format="json", log_prompts=True) as client:
        await client.post(PATH, json={"prompt": "a very private prompt"})
    assert "a very private prompt" in capsys.readouterr().err


async def test_a_terminal_gets_no_escape_sequences_of_others(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve(log_level="info", log_format="console") as client:
        capsys.readouterr()
        await client.get("/evil%0D%0A%1B%5B31m", headers={"x-request-id": "[31m"})
        log = capsys.readouterr().err
    assert len(log.splitlines()) == 1
    assert "\x1b[31m" not in log


async def test_figures_count_routes_and_not_paths(serve: Serve) -> None:
    async with serve() as client:
        await client.post(PATH, json={"prompt": "x", "n": 2})
        await client.post(PATH, json={"prompt": "x", "n": 0})
        await client.get("/v1/models/some-name-that-is-no-label")
        await client.get("/no-label-either")

        async def is_counted() -> bool:
            return "cascade_model_loaded 1.0" in (await client.get("/metrics")).text

        await eventually(is_counted)
        text = (await client.get("/metrics")).text
    assert f'cascade_http_requests_total{{method="POST",route="{PATH}",status="200"}} 1.0' in text
    assert f'cascade_http_requests_total{{method="POST",route="{PATH}",status="400"}} 1.0' in text
    assert 'route="/v1/models/{model:path}"' in text
    assert 'route="unmatched",status="404"' in text
    assert "no-label" not in text
    assert "cascade_pictures_total 2.0" in text
    assert 'cascade_jobs_total{outcome="succeeded",reason=""} 1.0' in text
    assert 'cascade_job_phase_seconds_count{phase="prior"} 1.0' in text
    assert "cascade_queue_jobs 0.0" in text


async def test_health_answers_while_the_engine_is_busy(serve: Serve, runner: FakeRunner) -> None:
    async with serve() as client:
        runner.gate.clear()
        tasks = [asyncio.ensure_future(client.post(PATH, json={"prompt": "x"})) for _ in range(8)]
        await until(lambda: runner.started)
        seconds = []
        for _ in range(50):
            started = time.perf_counter()
            assert (await client.get("/healthz")).status_code == 200
            seconds.append(time.perf_counter() - started)
        assert sorted(seconds)[25] < 0.1
        assert not any(task.done() for task in tasks)
        runner.gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 8


async def test_a_client_that_leaves_frees_the_device(serve: Serve, runner: FakeRunner) -> None:
    runner.max_samples = 1
    async with serve() as client:
        runner.gate.clear()
        store, dispatcher = inside(client).store, inside(client).dispatcher
        running = _Visitor(client)
        await until(lambda: runner.started)
        waiting = _Visitor(client)

        async def has_queued() -> int:
            return (await store.counts()).queued

        await eventually(has_queued)
        jobs, _ = await store.list("", limit=10)
        for visitor, job in zip((waiting, running), jobs, strict=True):
            visitor.leave()
            await visitor.visit
            assert visitor.statuses == [499]
            assert (await dispatcher.wait(job.id)).status == "canceled"
        runner.gate.set()
        assert (await client.post(PATH, json={"prompt": "x"})).status_code == 200
        outcomes = (await client.get("/metrics")).text
    assert len(runner.started) == 2, "the one that waited was never begun"
    assert 'cascade_jobs_total{outcome="canceled",reason=""} 2.0' in outcomes


async def test_a_client_that_leaves_while_sending_is_no_fault_of_ours(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve() as client:
        visitor = _Visitor(client, is_whole=False)
        visitor.leave()
        await visitor.visit
        figures = (await client.get("/metrics")).text
    assert visitor.statuses == [499]
    assert f'route="{PATH}",status="499"}} 1.0' in figures
    assert "Traceback" not in capsys.readouterr().err


async def test_a_request_that_the_server_gives_up_is_told_so(serve: Serve, runner: FakeRunner) -> None:
    async with serve() as client:
        runner.gate.clear()
        visitor = _Visitor(client)
        await until(lambda: runner.started)
        visitor.visit.cancel()  # as uvicorn does when its time to stop is over
        await visitor.visit
    assert visitor.statuses == [503]
    assert (b"retry-after", b"5") in visitor.headers
    assert json.loads(visitor.body)["error"]["code"] == "overloaded"


async def test_a_request_that_waits_for_the_model_is_answered_when_the_server_stops(
    serve: Serve, runner: FakeRunner
) -> None:
    runner.loading.clear()
    async with serve(wait=False) as client:
        visitor = _Visitor(client)
        await asyncio.sleep(0.05)
        assert not visitor.visit.done()
        inside(client).dispatcher.close()
        await asyncio.wait_for(visitor.visit, 5)
        runner.loading.set()
    assert visitor.statuses == [503]


async def test_health_answers_fast_under_load_and_large_bodies(serve: Serve, runner: FakeRunner) -> None:
    runner.steps = (10, 10)
    is_over = asyncio.Event()
    large = json.dumps({"prompt": "x", "junk": [{"a": [1, 2.5, "y" * 5000]}] * 190}).encode()
    crowded = json.dumps({"prompt": "x", "junk": [{"a": [1, 2.5, "y"]}] * 45_000}).encode()
    assert all(900_000 < len(body) < 1024 * 1024 for body in (large, crowded))

    async with serve() as client:

        async def keep_sending(body: bytes, status: int = 200) -> int:
            count = 0
            while not is_over.is_set():
                answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
                assert answer.status_code == status
                count += 1
            return count

        bodies = [b'{"prompt": "x", "size": "512x512"}'] * 8 + [large]
        senders = [asyncio.ensure_future(keep_sending(body)) for body in bodies]
        senders.append(asyncio.ensure_future(keep_sending(crowded, status=400)))
        slowest = 0.0
        for _ in range(50):
            started = time.perf_counter()
            assert (await client.get("/healthz")).status_code == 200
            slowest = max(slowest, time.perf_counter() - started)
            await asyncio.sleep(0.01)
        is_over.set()
        assert min(await asyncio.gather(*senders)) > 0
    assert slowest < 1


class _Visitor:
    """A raw ASGI client that posts a prompt and may close the connection before the answer."""

    def __init__(self, client: httpx2.AsyncClient, *, is_whole: bool = True) -> None:
        self._gone = asyncio.Event()
        self._has_sent = False
        self._is_whole = is_whole  # whether all of the body is sent
        self.statuses: list[int] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"server")],
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("server", 80),
            "http_version": "1.1",
        }
        app = client.app  # type: ignore[attr-defined]
        self.visit = asyncio.ensure_future(app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, object]:
        if not self._has_sent:
            self._has_sent = True
            return {"type": "http.request", "body": b'{"prompt": "x"}', "more_body": not self._is_whole}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
            self.headers += message["headers"]
        else:
            self.body += message["body"]


async def test_over_a_connection_too_many_only_health_is_told(client: httpx2.AsyncClient) -> None:
    app = client.app  # type: ignore[attr-defined]

    async def crowded(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": {CROWDED: True}}, receive, send)

    transport = httpx2.ASGITransport(crowded)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as beyond:
        refused = await beyond.post(PATH, json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "5"
        problem = await beyond.get("/api/v1/queue")
        assert (problem.status_code, problem.json()["code"]) == (503, "overloaded")
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await beyond.get(path)).status_code == 200


async def test_long_answers_are_sent_in_parts(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.gateway.PART_BYTES", 1000)
    parts: list[int] = []

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            parts.append(len(message.get("body", b"")))
            await send(message)

        await client.app(scope, receive, count)  # type: ignore[attr-defined]

    transport = httpx2.ASGITransport(counting)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as counted:
        answer = await counted.get("/openapi.json")
    assert max(parts) == 1000 < sum(parts) == len(answer.content)
    assert answer.json()["openapi"]


async def test_a_body_of_two_lengths_ends_the_connection(client: httpx2.AsyncClient) -> None:
    headers = {"content-length": "200", "transfer-encoding": "chunked", "content-type": "application/json"}
    answer = await client.post(PATH, content=b"{}", headers=headers)
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")
    assert "not both" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("target", "status"),
    [("http://server/healthz", 200), ("HTTPS://x:1/healthz", 200), ("http://x", 200), ("http://x/a", 404)],
)
async def test_a_target_may_be_absolute(client: httpx2.AsyncClient, target: str, status: int) -> None:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": target}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await client.app(scope | {"headers": [], "query_string": b""}, None, send)  # type: ignore[attr-defined]
    assert sent[0]["status"] == status
    assert target not in str(sent)
