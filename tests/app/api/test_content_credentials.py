"""A server with a key signs all that it gives out: results of every contract, and previews."""

import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography import x509
from PIL import Image

from app.errors import SettingsError, SigningFailed
from app.storage.credentials import Credentials
from tests.app.api.sse import told
from tests.app.certificates import Identity, identity, manifest, source_type
from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner
from tests.app.pictures import data_uri, file, sample

pytestmark = pytest.mark.anyio

OPENAI, NATIVE = "/v1/images/generations", "/api/v1/images"
PROMPT = "a very private prompt"
MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


@pytest.fixture
def files(tmp_path: Path) -> Identity:
    return identity(tmp_path)


@pytest.fixture
async def signing(serve: Serve, files: Identity) -> AsyncIterator[httpx2.AsyncClient]:
    async with serve(**files.settings) as client:
        yield client


async def post(client: httpx2.AsyncClient, path: str, **members: Any) -> Any:
    answer = await client.post(path, json={"prompt": PROMPT, **members})
    assert answer.status_code == 200, answer.text
    return answer.json()


def in_base64(data: dict[str, Any]) -> bytes:
    return base64.b64decode(data["b64_json"])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_pictures_in_json_and_under_urls_are_signed(
    signing: httpx2.AsyncClient, output_format: str
) -> None:
    [picture] = (await post(signing, OPENAI, output_format=output_format))["data"]
    [link] = (await post(signing, OPENAI, output_format=output_format, response_format="url"))["data"]
    for content in (in_base64(picture), (await signing.get(link["url"])).content):
        assert source_type(content, output_format) == MADE
        assert PROMPT not in str(manifest(content, output_format))
        assert b"digitalsourcetype/trainedAlgorithmicMedia" in Image.open(BytesIO(content)).info["xmp"]


async def test_the_metrics_tell_when_the_certificate_expires(
    signing: httpx2.AsyncClient, files: Identity, serve: Serve, tmp_path: Path
) -> None:
    chain = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    assert await expiry(signing) == chain[0].not_valid_after_utc.timestamp()
    async with serve(data_dir=tmp_path / "plain") as client:
        assert await expiry(client) == 0


async def expiry(client: httpx2.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    [line] = [line for line in lines if line.startswith("cascade_c2pa_certificate_expiry_timestamp_seconds ")]
    return float(line.split()[1])


async def test_the_pixels_are_those_of_a_server_without_a_key(
    serve: Serve, signing: httpx2.AsyncClient, tmp_path: Path
) -> None:
    signed = in_base64((await post(signing, OPENAI, seed=7))["data"][0])
    (tmp_path / "plain").mkdir()
    async with serve(data_dir=tmp_path / "plain") as client:
        plain = in_base64((await post(client, OPENAI, seed=7))["data"][0])
    assert b"c2pa" in signed
    assert b"c2pa" not in plain
    assert Image.open(BytesIO(signed)).tobytes() == Image.open(BytesIO(plain)).tobytes()


async def test_a_job_tells_size_and_digest_of_the_signed_file(signing: httpx2.AsyncClient) -> None:
    [image] = (await post(signing, NATIVE))["images"]
    content = in_base64(image)
    assert manifest(content, "png")
    assert (image["bytes"], image["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


async def test_the_embedded_settings_are_the_only_place_of_the_prompt(signing: httpx2.AsyncClient) -> None:
    content = in_base64((await post(signing, OPENAI, embed_metadata=True))["data"][0])
    assert Image.open(BytesIO(content)).info["parameters"].startswith(PROMPT)
    assert content.count(PROMPT.encode()) == 1
    assert PROMPT not in str(manifest(content, "png"))


async def test_the_contracts_of_other_programs_give_out_the_same(signing: httpx2.AsyncClient) -> None:
    a1111 = await post(signing, "/sdapi/v1/txt2img", width=64, height=64)
    face = await signing.post("/hf/text-to-image", json={"inputs": PROMPT})
    raw = await signing.post(OPENAI, json={"prompt": PROMPT}, headers={"accept": "image/webp"})
    assert source_type(base64.b64decode(a1111["images"][0]), "png") == MADE
    assert source_type(face.content, face.headers["content-type"].removeprefix("image/")) == MADE
    assert source_type(raw.content, "webp") == MADE


async def test_what_was_redrawn_counts_as_edited_and_what_was_looked_at_does_not(
    signing: httpx2.AsyncClient,
) -> None:
    given = data_uri(file(sample()))
    requests: list[tuple[dict[str, Any], str]] = [
        ({"image": given, "strength": 0.5}, EDITED),
        ({"image": given, "mask": data_uri(file(sample("L")))}, EDITED),
        ({"image_prompts": [{"image": given}]}, MADE),
        ({"control": {"type": "canny", "image": given}}, MADE),
        ({"control": {"type": "super_resolution", "image": given}}, EDITED),
    ]
    for members, expected in requests:
        [image] = (await post(signing, NATIVE, **members))["images"]
        assert source_type(in_base64(image), "png") == expected, members


def slow_down(runner: FakeRunner) -> None:
    """Leave time for previews: a picture that is finished needs none."""
    runner.steps = (8, 2)
    runner.on_step = lambda tracks: time.sleep(0.02)


async def test_previews_are_signed_too(signing: httpx2.AsyncClient, runner: FakeRunner) -> None:
    slow_down(runner)
    body = {"prompt": PROMPT, "stream": True, "partial_images": 2, "output_format": "jpeg"}
    events = told((await signing.post(OPENAI, json=body)).text)
    partial = [event.data for event in events if event.event.endswith("partial_image")]
    assert partial
    for data in partial:
        assert source_type(in_base64(data), "jpeg") == MADE
    answer = await signing.post(
        NATIVE, json={"prompt": PROMPT, "previews": 2}, headers={"accept": "text/event-stream"}
    )
    previews = [event.data for event in told(answer.text) if event.event == "job.preview"]
    assert previews
    for data in previews:
        assert source_type(in_base64(data), "webp") == MADE


async def test_a_picture_that_cannot_be_signed_fails_its_job_and_is_not_given_out(
    serve: Serve,
    files: Identity,
    runner: FakeRunner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    runner.steps = (6, 2)
    async with serve(**files.settings, sync_timeout=20) as client:

        def sign(*_: Any, **__: Any) -> bytes:
            raise SigningFailed("the picture could not be signed") from ValueError("the reason")

        monkeypatch.setattr(Credentials, "sign", sign)
        answer = await client.post(OPENAI, json={"prompt": PROMPT})
        body = {"prompt": PROMPT, "stream": True, "partial_images": 2}
        events = told((await client.post(OPENAI, json=body)).text)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "internal_error")
    assert error["message"] == "the picture could not be signed"
    assert answer.headers["x-should-retry"] == "false"
    assert [event.event for event in events] == ["error"]
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert "a picture could not be kept" in [line["event"] for line in logged]
    assert "the reason" in str(logged)
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize("unsigned", ["webp", "jpeg"], ids=["as it comes", "converted"])
async def test_a_preview_that_cannot_be_signed_is_left_out(
    signing: httpx2.AsyncClient, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, unsigned: str
) -> None:
    sign, refused = Credentials.sign, []

    def only_whole_pictures(self: Credentials, content: bytes, output_format: Any, *, is_edit: bool) -> bytes:
        if output_format == unsigned and Image.open(BytesIO(content)).size != (64, 64):
            refused.append(content)
            raise SigningFailed("the picture could not be signed")
        return sign(self, content, output_format, is_edit=is_edit)

    monkeypatch.setattr(Credentials, "sign", only_whole_pictures)
    slow_down(runner)
    body = {"prompt": PROMPT, "stream": True, "partial_images": 2, "output_format": "jpeg"}
    answer = await signing.post(OPENAI, json=body)
    partial, last = told(answer.text)
    assert refused
    job = await inside(signing).store.get(answer.headers["x-job-id"], None)
    assert job is not None
    assert job.crashes == 0
    assert partial.data["b64_json"] == last.data["b64_json"]


async def test_a_server_whose_key_is_of_no_use_does_not_start(serve: Serve, files: Identity) -> None:
    files.key.write_text("no key")
    with pytest.raises(SettingsError, match="CASCADE_C2PA_KEY"):
        async with serve(**files.settings):
            pass
