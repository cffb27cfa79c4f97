"""`/files`: whoever holds a signed URL gets the picture, and nobody else gets anything."""

import hashlib
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from tests.app.conftest import Serve

pytestmark = pytest.mark.anyio

TRAVERSALS = [
    "../secret", "..%2fsecret", "%2e%2e%2fsecret", "..\\secret", "%2fetc%2fpasswd", "....//secret", "secret",
    "%00", "x.png%00", "a" * 32 + ".exe", "A" * 32 + ".png", "a" * 31 + ".png", "a" * 32 + ".png.partial",
]  # fmt: skip


async def picture_url(client: httpx2.AsyncClient) -> str:
    members = {"prompt": "x", "seed": 1, "response_format": "url"}
    answer = await client.post("/v1/images/generations", json=members)
    url: str = answer.json()["data"][0]["url"]
    return url


async def test_the_headers_of_a_picture(client: httpx2.AsyncClient) -> None:
    url = await picture_url(client)
    answer = await client.get(url)
    digest = hashlib.sha256(answer.content).hexdigest()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert "content-disposition" not in answer.headers
    private, age, immutable = answer.headers["cache-control"].split(", ")
    assert (private, immutable) == ("private", "immutable")
    assert 3590 < int(age.removeprefix("max-age=")) <= 3600
    head = await client.head(url)
    assert head.content == b""
    assert {name: head.headers[name] for name in ("etag", "content-length", "content-type")} == {
        name: answer.headers[name] for name in ("etag", "content-length", "content-type")
    }
    download = await client.get(f"{url}&download=1")
    assert download.headers["content-disposition"].startswith('attachment; filename="')
    assert download.headers["content-disposition"].endswith('.png"')


async def test_a_known_picture_is_not_sent_again(client: httpx2.AsyncClient) -> None:
    url = await picture_url(client)
    etag = (await client.get(url)).headers["etag"]
    for known in (etag, f'W/{etag}, "x"', "*"):
        answer = await client.get(url, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert (await client.get(url, headers={"if-none-match": '"other"'})).status_code == 200


async def test_parts_of_a_picture(client: httpx2.AsyncClient) -> None:
    url = await picture_url(client)
    whole = (await client.get(url)).content
    size = len(whole)
    for asked, start, end in [
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=5-{size * 2}", 5, size),
    ]:
        answer = await client.get(url, headers={"range": asked})
        assert (answer.status_code, answer.content) == (206, whole[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)
    for ignored in ("bytes=0-1,3-4", "lines=1-2", "bytes=-", "bytes=", "x"):
        answer = await client.get(url, headers={"range": ignored})
        assert (answer.status_code, answer.content) == (200, whole)
    other = {"range": "bytes=0-9", "if-range": '"other"'}
    assert (await client.get(url, headers=other)).status_code == 200
    for beyond in (f"bytes={size}-", "bytes=9-3", "bytes=-0"):
        answer = await client.get(url, headers={"range": beyond})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
        assert answer.headers["content-type"] == "application/problem+json"


async def test_a_tampered_url_opens_nothing(client: httpx2.AsyncClient) -> None:
    url, other = await picture_url(client), await picture_url(client)
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    later = str(int(query["exp"]) + 1)
    flipped = query["sig"][:-1] + ("0" if query["sig"][-1] != "0" else "1")
    for path, exp, sig in [
        (parts.path, later, query["sig"]),
        (parts.path, query["exp"], flipped),
        (parts.path, query["exp"], query["sig"][:32]),
        (parts.path, query["exp"], query["sig"].upper()),
        (parts.path, query["exp"], ""),
        (parts.path, f"0{query['exp']}", query["sig"]),
        (parts.path, "", ""),
        (parts.path, "é", "é"),
        (parts.path.replace(".png", ".webp"), query["exp"], query["sig"]),
        (urlsplit(other).path, query["exp"], query["sig"]),
    ]:
        answer = await client.get(path, params={"exp": exp, "sig": sig})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert (await client.get(parts.path)).status_code == 403
    assert (await client.post(url)).status_code == 405
    assert (await client.get(url)).status_code == 200


async def test_an_expired_url_is_gone_and_a_removed_picture_not_found(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = client.app.state.services  # type: ignore[attr-defined]
    url = await picture_url(client)
    now = services.signer._clock()
    monkeypatch.setattr(services.signer, "_clock", lambda: now + 3600)
    answer = await client.get(url)
    assert (answer.status_code, answer.json()["code"]) == (410, "expired")
    monkeypatch.undo()
    monkeypatch.setattr(services.images, "_clock", lambda: now + 2 * 86_400)
    assert services.images.sweep() == 1
    assert (await client.get(url)).status_code == 404


async def test_names_cannot_be_steered(serve: Serve) -> None:
    async with serve() as client:
        signer = client.app.state.services.signer  # type: ignore[attr-defined]
        for name in TRAVERSALS:
            answer = await client.get(f"/files/{name}")
            assert answer.status_code in (403, 404)
            # Even with a genuine signature, which nobody outside can make.
            decoded = httpx2.URL(f"http://server/files/{name}").path.removeprefix("/files/")
            answer = await client.get(f"/files/{name}?{signer.sign(decoded)}")
            assert answer.status_code == 404
            assert "secret" not in answer.text or "secret" in name
