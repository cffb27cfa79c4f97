"""Pages of other sites: what browsers send for them unasked, and host names that resolve to this machine."""

from typing import Any

import httpx2
import pytest

from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner

pytestmark = pytest.mark.anyio
PATH = "/v1/images/generations"
JSON: dict[str, Any] = {"json": {"prompt": "x"}}
FORM: dict[str, Any] = {"files": {"prompt": (None, "x")}}
EVIL = {"origin": "http://evil.example"}


@pytest.mark.parametrize("body", [FORM, {"data": {"prompt": "x"}}, {"content": b'{"prompt": "x"}'}])
async def test_simple_requests_of_other_sites_are_refused(
    client: httpx2.AsyncClient, runner: FakeRunner, body: dict[str, Any]
) -> None:
    for origin in ("http://evil.example", "null", "http://[", ""):
        answer = await client.post(PATH, headers={"origin": origin}, **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert "CASCADE_CORS_ORIGINS" in answer.json()["error"]["message"]
    for path in ("/api/v1/images", "/sdapi/v1/interrupt"):
        assert (await client.post(path, headers=EVIL, **body)).status_code == 403
    assert runner.started == []


@pytest.mark.parametrize(
    ("headers", "members"),
    [
        ({}, FORM),  # a program
        (EVIL, JSON),  # the browser has asked before, or it is a program that is built like one
        (EVIL | {"authorization": "Bearer any"}, FORM),
        (EVIL | {"x-api-key": "any"}, FORM),
        ({"origin": "http://server"}, FORM),
        ({"origin": "https://server:8443"}, FORM),  # behind a proxy that passes the host without its port
        (EVIL | {"api-key": "any"}, FORM),
        ({"origin": "http://localhost:5173", "host": "127.0.0.1:8000"}, FORM),
        ({"origin": "http://app.localhost", "host": "[::1]:8000"}, FORM),
    ],
)
async def test_all_else_is_served(
    client: httpx2.AsyncClient, headers: dict[str, str], members: dict[str, Any]
) -> None:
    assert (await client.post(PATH, headers=headers, **members)).status_code == 200


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        ({"cors_origins": "http://evil.example"}, EVIL),
        ({"cors_origins": "*"}, EVIL),
        ({"public_base_url": "https://pictures.example"}, {"origin": "https://pictures.example"}),
        (
            {"trusted_proxies": "127.0.0.0/8"},
            {"origin": "https://pictures.example", "x-forwarded-host": "pictures.example"},
        ),
    ],
)
async def test_pages_that_the_settings_name_are_served(
    serve: Serve, settings: dict[str, Any], headers: dict[str, str]
) -> None:
    async with serve(**settings) as client:
        assert (await client.post(PATH, headers=headers, **FORM)).status_code == 200
        other = {"origin": "http://other.example"}
        refused = (await client.post(PATH, headers=other, **FORM)).status_code
    assert refused == (200 if settings == {"cors_origins": "*"} else 403)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "a..b"])
@pytest.mark.parametrize("settings", [{}, {"host": "0.0.0.0", "allow_anonymous": True}])
async def test_without_keys_a_name_that_a_stranger_may_own_is_refused(
    serve: Serve, settings: dict[str, Any], host: str
) -> None:
    async with serve(**settings) as client:
        await refused(client, host)


async def refused(client: httpx2.AsyncClient, host: str) -> None:
    for method, path in (("GET", "/api/v1/jobs"), ("POST", PATH), ("GET", "/files/x.png"), ("GET", "/docs")):
        answer = await client.request(method, path, headers={"host": host})
        assert answer.status_code == 403
        assert "CASCADE_PUBLIC_BASE_URL" in answer.text
    assert (await client.get("/healthz", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "[::1]",
        "LOCALHOST",
        "localhost.",
        "a.localhost",
        "host.docker.internal",
        "gpu.lan:8000",
    ],
)
async def test_addresses_and_local_names_are_served(client: httpx2.AsyncClient, host: str) -> None:
    assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "settings",
    [
        {"api_keys": "secret"},
        {"public_base_url": "https://pictures.example"},
        {"public_base_url": "https://pictures.example:8443"},
        {"trusted_proxies": "127.0.0.0/8"},
    ],
)
async def test_a_server_for_others_has_the_names_that_they_give_it(
    serve: Serve, settings: dict[str, Any]
) -> None:
    async with serve(**settings) as client:
        headers = {"host": "pictures.example", "authorization": "Bearer secret"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
