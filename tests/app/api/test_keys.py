"""Who may call: every form of a key, every route with a policy, nothing of a key in answers or logs."""

import base64
import hashlib
from pathlib import Path

import httpx2
import pytest
from fastapi.routing import iter_route_contexts

from app.settings import Settings
from tests.app.conftest import Serve

pytestmark = pytest.mark.anyio

KEY = "s3cret-Ключ"
PUBLIC = {"/", "/healthz", "/readyz", "/version", "/openapi.json", "/docs", "/docs/{name}"}
SIGNED = {"/files/{name}"}


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def encoded(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in headers.items()}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bEARER   {KEY}"},
        {"authorization": basic("anybody", KEY)},
        {"authorization": basic("", KEY)},
        {"x-api-key": KEY},
        {"api-key": KEY},
        {"authorization": "Bearer wrong", "x-api-key": KEY},
        {"authorization": "", "x-api-key": KEY},
        {"authorization": "Bearer second"},
        {"authorization": "Bearer third"},
    ],
)
async def test_every_form_of_a_key_opens(serve: Serve, headers: dict[str, str]) -> None:
    third = "ops=sha256:" + hashlib.sha256(b"third").hexdigest()
    async with serve(api_keys=f"{KEY}, web=second, {third}") as client:
        assert (await client.get("/v1/models", headers=encoded(headers))).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY.upper()}"},
        {"authorization": f"Token {KEY}"},
        {"authorization": KEY},
        {"authorization": basic(KEY, "")},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(b"\xff\xfe").decode()},
        {"x-api-key": " "},
        {"api-key": hashlib.sha256(KEY.encode()).hexdigest()},
    ],
)
async def test_everything_else_does_not(serve: Serve, headers: dict[str, str]) -> None:
    async with serve(api_keys=KEY) as client:
        for answer in (
            await client.get("/v1/models", headers=encoded(headers)),
            await client.post("/v1/images/generations", content=b"{", headers=encoded(headers)),
        ):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == 'Bearer realm="images"'
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.json()["error"]["type"] == "authentication_error"


async def test_without_keys_everybody_may_call(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/v1/models", headers={"authorization": "Bearer whatever"})
    assert answer.status_code == 200


async def test_every_route_has_a_policy(serve: Serve) -> None:
    async with serve(api_keys=KEY) as client:
        seen = set()
        routes = iter_route_contexts(client.app.routes)  # type: ignore[attr-defined]
        for route in routes:
            assert route.path is not None
            seen.add(route.path)
            path = route.path.replace("docs/{name}", "docs/swagger-ui.css")
            path = path.replace("{model:path}", "x").replace("{name}", "x.png")
            for method in route.methods or ():
                status = (await client.request(method, path)).status_code
                if route.path in PUBLIC:
                    assert status in (200, 503), route.path
                elif route.path in SIGNED:
                    assert status == 403, route.path
                else:
                    assert status == 401, route.path
        assert seen > PUBLIC | SIGNED, "a public route is listed here that does not exist"
        assert "/v1/images/generations" in seen


async def test_no_answer_and_no_log_holds_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], serve: Serve
) -> None:
    async with serve(api_keys=f"web={KEY}", log_level="debug", log_format="json") as client:
        wrong = "a-wrong-key-by-a-typing-error"
        texts = [
            (await client.get("/v1/models", headers={"authorization": f"Bearer {wrong}"})).text,
            (await client.get("/v1/models", headers=encoded({"authorization": f"Bearer {KEY}"}))).text,
            (await client.get("/v1/nothing", headers=encoded({"x-api-key": KEY}))).text,
        ]
        texts += [repr(client.app.state.services.settings)]  # type: ignore[attr-defined]
    log = capsys.readouterr()
    texts += [log.out, log.err]
    assert '"key": "web"' in log.err
    for text in texts:
        assert KEY not in text
        assert KEY.encode("unicode_escape").decode() not in text
        assert wrong not in text


def test_keys_are_kept_as_digests() -> None:
    (key,) = Settings.model_validate({"api_keys": KEY}).api_keys
    assert key.sha256 == hashlib.sha256(KEY.encode()).digest()
