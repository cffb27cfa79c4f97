"""Who may call: every form of a key, every route with a policy, nothing of a key in answers or logs."""

import base64
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from fastapi.routing import iter_route_contexts

from app.api import key_ring
from app.api_keys import KeyEntry, read_entries, write_entries
from app.errors import SettingsError
from app.settings import Settings
from tests.app.conftest import Serve, eventually

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


def entry(key: str, name: str = "web", *, seconds: float | None = None, limit: int | None = None) -> KeyEntry:
    expires = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return KeyEntry(name=name, sha256=digest, expires=expires, rate_limit=limit)


async def status(client: httpx2.AsyncClient, key: str) -> int:
    answer = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    return answer.status_code


@pytest.fixture
def keys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(key_ring, "LOOK_SECONDS", 0.01)
    return tmp_path / "keys.json"


async def test_a_file_adds_keys_and_takes_them_away_while_the_server_runs(
    serve: Serve, keys_file: Path
) -> None:
    write_entries(keys_file, [entry("one")])
    async with serve(api_keys="fixed", api_keys_file=keys_file) as client:
        assert [await status(client, key) for key in ("fixed", "one", "two")] == [200, 200, 401]
        write_entries(keys_file, [entry("two")])

        async def is_changed() -> bool:
            return await status(client, "two") == 200

        await eventually(is_changed)
        assert [await status(client, key) for key in ("fixed", "one")] == [200, 401]


async def test_of_a_file_that_has_become_wrong_or_is_gone_nothing_counts(
    serve: Serve, keys_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_entries(keys_file, [entry("one")])
    async with serve(api_keys_file=keys_file, log_format="json") as client:
        for change in (lambda: keys_file.write_text("[{}]"), keys_file.unlink):
            change()
            log = ""

            async def is_told() -> bool:
                nonlocal log
                log += capsys.readouterr().err
                return "keys stay as they were" in log

            await eventually(is_told)
            assert [await status(client, key) for key in ("one", "two")] == [200, 401]
        write_entries(keys_file, [entry("two")])

        async def is_right() -> bool:
            return await status(client, "two") == 200

        await eventually(is_right)


async def test_a_file_that_could_not_be_read_is_read_when_it_can_be(
    serve: Serve, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entries(keys_file, [entry("one")])
    async with serve(api_keys_file=keys_file) as client:
        tries = 0

        def refused(path: Path) -> list[KeyEntry]:
            nonlocal tries
            tries += 1
            if tries < 5:
                raise SettingsError("permission denied")
            return read_entries(path)

        monkeypatch.setattr(key_ring, "read_entries", refused)
        write_entries(keys_file, [entry("two")])

        async def is_read() -> bool:
            return await status(client, "two") == 200

        await eventually(is_read)
        assert await status(client, "one") == 401


async def test_a_server_does_not_start_with_a_wrong_file(serve: Serve, keys_file: Path) -> None:
    with pytest.raises(SettingsError, match=r"keys\.json: No such file"):
        async with serve(api_keys_file=keys_file):
            pass


async def test_a_file_without_keys_is_a_closed_door(serve: Serve, keys_file: Path) -> None:
    write_entries(keys_file, [])
    async with serve(api_keys_file=keys_file, host="0.0.0.0") as client:
        assert await status(client, "anything") == 401


async def test_an_expired_key_is_told_apart_and_refused(serve: Serve, keys_file: Path) -> None:
    write_entries(keys_file, [entry("old", seconds=-1), entry("young", seconds=60)])
    async with serve(api_keys_file=keys_file) as client:
        answer = await client.get("/v1/models", headers={"authorization": "Bearer old"})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["message"] == "this API key has expired"
        assert await status(client, "young") == 200


async def test_a_key_expires_while_the_server_runs(serve: Serve, keys_file: Path) -> None:
    write_entries(keys_file, [entry("short", seconds=3.0)])
    async with serve(api_keys_file=keys_file) as client:
        assert await status(client, "short") == 200

        async def is_over() -> bool:
            return await status(client, "short") == 401

        await eventually(is_over)


async def test_keys_of_one_name_see_the_same_jobs_and_have_their_own_limits(
    serve: Serve, keys_file: Path
) -> None:
    write_entries(
        keys_file, [entry("old"), entry("new"), entry("limited", limit=1), entry("other", "bob", limit=1)]
    )
    async with serve(api_keys_file=keys_file, rate_limit=50) as client:

        async def draw(key: str) -> httpx2.Response:
            body = {"prompt": "x", "response_format": "url"}
            return await client.post("/api/v1/images", json=body, headers={"x-api-key": key})

        job = (await draw("old")).json()
        for key, expected in (("new", 200), ("other", 404)):
            found = await client.get(f"/api/v1/jobs/{job['id']}", headers={"x-api-key": key})
            assert found.status_code == expected
        answers = [await draw("new"), await draw("limited"), await draw("limited"), await draw("new")]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 200]
        assert answers[2].headers["x-ratelimit-remaining-requests"] == "0"
        answers = [await draw("other"), await draw("other")]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "1"
        assert (await draw("new")).headers["x-ratelimit-limit-requests"] == "50"
