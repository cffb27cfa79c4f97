"""Pictures in requests: in every form, on every route, kept for the job and told to the engine."""

import asyncio
import base64
import io
import json
import os
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from app.api.sources import Received, _decoded
from app.schemas import GenerationRequest
from app.storage.inputs import InputStore
from tests.app.api.sse import told
from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner, closed, until
from tests.app.pictures import SIZE, bomb, data_uri, file, sample

pytestmark = pytest.mark.anyio
NATIVE, OPENAI = "/api/v1/images", "/v1/images/generations"
EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
PICTURE = file(sample())
CUT_OUT = file(sample("RGBA"))


def last(runner: FakeRunner) -> GenerationRequest:
    return runner.started[-1].request


def sent(runner: FakeRunner, sha256: str) -> Image.Image:
    """The picture as the engine got it."""
    image = Image.open(BytesIO(runner.started[-1].run.inputs[sha256]))
    assert image.format == "PNG"
    return image


def first_error(answer: httpx2.Response) -> tuple[int, str, str]:
    body = answer.json()
    if "error" in body:
        return answer.status_code, body["error"]["param"], body["error"]["code"]
    return answer.status_code, body["errors"][0]["pointer"], body["code"]


@pytest.mark.parametrize(
    "value",
    [
        data_uri(PICTURE),
        base64.b64encode(PICTURE).decode(),
        base64.b64encode(PICTURE).decode().rstrip("="),
        "data:;base64,\n" + base64.encodebytes(PICTURE).decode(),
        "DATA:image/png;charset=utf-8;base64," + base64.b64encode(PICTURE).decode(),
        data_uri(file(sample(), "WEBP", lossless=True)),
    ],
)
@pytest.mark.parametrize("path", [NATIVE, OPENAI, EDITS])
async def test_text_in_json(client: httpx2.AsyncClient, runner: FakeRunner, path: str, value: str) -> None:
    answer = await client.post(path, json={"prompt": "x", "image": value, "strength": 0.5})
    assert answer.status_code == 200
    request = last(runner)
    assert request.image is not None
    assert (request.image.width, request.image.height) == (request.width, request.height) == SIZE
    assert (request.strength, request.prior_steps) == (0.5, 10)
    assert sent(runner, request.image.sha256).tobytes() == sample().tobytes()


@pytest.mark.parametrize("path", [NATIVE, OPENAI, EDITS])
async def test_file_parts_and_texts_of_a_form(
    client: httpx2.AsyncClient, runner: FakeRunner, path: str
) -> None:
    fields = {
        "prompt": "x",
        "prior_num_inference_steps": "10",
        "strength": "0.25",
        "embed_metadata": "true",
        "width": "",
        "loras": "[]",
        "guidance_interval": "[0, 0.5]",
    }
    answer = await client.post(path, data=fields, files={"image": ("blob", PICTURE, "text/plain")})
    assert answer.status_code == 200, answer.text
    request = last(runner)
    assert (request.prior_steps, request.strength, request.embed_metadata) == (2, 0.25, True)
    assert request.guidance_interval == (0.0, 0.5)
    assert (request.width, request.height) == SIZE


async def test_a_form_may_carry_a_whole_object_and_pictures_of_its_entries(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    params = {
        "prompt": "from the object",
        "seed": 5,
        "image_prompts": [{"weight": 0.5}],
        "control": {"type": "canny", "scale": 0.7},
    }
    files = [
        ("image_prompts", ("a", PICTURE)),
        ("image_prompts", ("b", CUT_OUT)),
        ("control", ("c", PICTURE)),
    ]
    answer = await client.post(NATIVE, data={"params": json.dumps(params), "seed": "6"}, files=files)
    assert answer.status_code == 200, answer.text
    request = last(runner)
    assert (request.prompt, request.seeds) == ("from the object", (6,))
    assert [prompt.weight for prompt in request.image_prompts] == [0.5, 1.0]
    assert request.control is not None
    assert (request.control.type, request.control.scale) == ("canny", 0.7)
    assert set(runner.started[-1].run.inputs) == set(request.input_names)
    flat = sent(runner, request.image_prompts[1].image.sha256)
    assert (flat.mode, flat.getpixel((5, 60))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"", "multipart/form-data", 400, "invalid_value"),
        (b"nonsense", "multipart/form-data; boundary=b", 400, None),
        (b"--b\r\nnonsense\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, None),
        (b"--b\r\n\r\n", "multipart/form-data; boundary=" + "b" * 300, 400, None),
    ],
)
@pytest.mark.parametrize("path", [NATIVE, EDITS])
async def test_a_form_that_is_none(
    client: httpx2.AsyncClient, path: str, content: bytes, kind: str, status: int, code: str | None
) -> None:
    answer = await client.post(path, content=content, headers={"content-type": kind})
    assert answer.status_code == status
    found = (answer.json().get("error") or answer.json())["code"]
    assert code is None or found == code
    gzip = {"content-type": kind, "content-encoding": "gzip"}
    assert (await client.post(path, content=content, headers=gzip)).status_code == 415


FORM = '--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{}\r\n--b--\r\n'


@pytest.mark.parametrize("charset", ["punycode", "PunyCode", '"punycode"', "utf-7", "latin-1", "none", '""'])
@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_forms_are_in_utf_8(client: httpx2.AsyncClient, path: str, charset: str) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    answer = await client.post(path, content=FORM.format("a-b").encode(), headers=headers)
    error = answer.json().get("error") or answer.json()
    assert (answer.status_code, error["code"]) == (415, "unsupported_media_type")
    assert "utf-8" in answer.text


@pytest.mark.parametrize("charset", ["; charset=utf-8", '; CHARSET="UTF-8"', "; charset=utf8", ""])
async def test_a_form_may_say_that_it_is_in_utf_8(
    client: httpx2.AsyncClient, runner: FakeRunner, charset: str
) -> None:
    headers = {"content-type": f"multipart/form-data; boundary=b{charset}"}
    answer = await client.post(NATIVE, content=FORM.format("löwe").encode(), headers=headers)
    assert (answer.status_code, last(runner).prompt) == (200, "löwe")


async def test_limits_of_forms(serve: Serve) -> None:
    async with serve(max_upload_bytes=20_000, max_body_bytes=2000) as client:
        files = {"image": ("a.png", PICTURE)}
        assert (await client.post(EDITS, data={"prompt": "x"}, files=files)).status_code == 200
        answer = await client.post(EDITS, data={"prompt": "x"}, files={"image": ("a.png", bytes(20_001))})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        answer = await client.post(EDITS, data={"prompt": "x" * 3000}, files=files)
        assert answer.status_code == 400
        answer = await client.post(EDITS, json={"prompt": "x", "image": "A" * 3000})
        assert answer.status_code == 413


@pytest.mark.parametrize(
    ("members", "pointer", "code"),
    [
        ({"image": data_uri(b"hello")}, "/image", "invalid_image"),
        ({"image": data_uri(PICTURE[:100])}, "/image", "invalid_image"),
        ({"image": data_uri(bomb(5000, 5000))}, "/image", "invalid_image"),
        ({"image": "data:image/png,%89PNG"}, "/image", "invalid_image"),
        ({"image": "no base64!"}, "/image", "invalid_image"),
        ({"image": data_uri(file(sample(), "GIF"))}, "/image", "invalid_image"),
        ({"image": "file:///etc/passwd"}, "/image", "invalid_image"),
        ({"image": "http://127.0.0.1/a.png"}, "/image", "unsupported_parameter"),
        ({"image": data_uri(PICTURE), "mask": data_uri(file(sample(size=(8, 8))))}, "/mask", "invalid_image"),
        ({"image_prompts": [data_uri(PICTURE), "AAAA"]}, "/image_prompts/1/image", "invalid_image"),
        ({"control": {"type": "canny", "image": "AAAA"}}, "/control/image", "invalid_image"),
        ({"image": {"sha256": "0" * 64}}, "/image", "invalid_image"),
        ({"image": {"sha256": "../x"}}, "/image", "invalid_image"),
        (
            {"control": {"type": "inpaint", "image": data_uri(PICTURE)}},
            "/control/type",
            "unsupported_parameter",
        ),
        ({"loras": [{"name": "absent"}]}, "/loras/0/name", "invalid_value"),
        ({"loras": [{"name": "../../etc/passwd"}]}, "/loras/0/name", "invalid_value"),
        ({"image": data_uri(PICTURE), "anchor": "left"}, "/anchor", "invalid_value"),
    ],
)
async def test_what_is_wrong_is_named_before_anything_is_kept(
    client: httpx2.AsyncClient,
    runner: FakeRunner,
    tmp_path: Path,
    members: dict[str, Any],
    pointer: str,
    code: str,
) -> None:
    answer = await client.post(NATIVE, json={"prompt": "x", **members})
    assert first_error(answer) == (400, pointer, code)
    assert runner.started == []
    assert not [path for path in (tmp_path / "inputs").iterdir() if path.name != ".lock"]


async def test_a_model_that_cannot_is_said_so(serve: Serve, runner: FakeRunner) -> None:
    runner.reads_pictures = False
    async with serve() as client:
        for members in ({"image": data_uri(PICTURE)}, {"image_prompts": [data_uri(PICTURE)]}):
            answer = await client.post(NATIVE, json={"prompt": "x", **members})
            assert first_error(answer) == (400, f"/{next(iter(members))}", "unsupported_parameter")
        abilities = (await client.get("/api/v1/models")).json()["data"][0]["abilities"]
        assert not any(abilities[name] for name in ("image_to_image", "inpainting", "image_prompts"))


async def test_masks_come_as_pictures_as_alpha_or_with_the_image(
    client: httpx2.AsyncClient, runner: FakeRunner
) -> None:
    white = Image.new("RGB", SIZE, "black")
    white.paste("white", (0, SIZE[1] // 2, *SIZE))
    forms = [
        {"image": data_uri(PICTURE), "mask": data_uri(file(white))},
        {"image": data_uri(PICTURE), "mask": data_uri(CUT_OUT)},
        {"image": data_uri(CUT_OUT)},
    ]
    names = set()
    for members in forms:
        answer = await client.post(NATIVE, json={"prompt": "x", "feather": 4, **members})
        assert answer.status_code == 200
        request = last(runner)
        assert request.mask is not None
        assert request.prior_steps == 20  # wholly anew where nothing else is said
        names.add(request.mask.sha256)
    assert len(names) == 1
    mask = sent(runner, names.pop())
    assert (mask.mode, mask.getpixel((5, 5)), mask.getpixel((5, 60))) == ("L", 0, 255)


async def test_the_size_is_that_of_the_picture(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    def uri(*size: int) -> str:
        return data_uri(file(Image.new("RGB", (size[0], size[1]))))

    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({"image": uri(100, 75)}, (96, 72)),
        ({"image": uri(20, 10)}, (128, 64)),
        ({"image": uri(1000, 10)}, (256, 64)),
        ({"image": uri(200, 100), "width": 400}, (400, 200)),
        ({"image": uri(200, 100), "height": 400}, (800, 400)),
        ({"image": uri(200, 100), "width": 64, "height": 128}, (64, 128)),
        ({"control": {"type": "canny", "image": uri(96, 64)}}, (96, 64)),
        ({"control": {"type": "super_resolution", "image": uri(96, 64)}}, (192, 128)),
        ({"image_prompts": [uri(96, 128)]}, (64, 64)),
    ]
    for members, size in cases:
        answer = await client.post(NATIVE, json={"prompt": "x", **members})
        assert answer.status_code == 200, (members.keys(), answer.text)
        assert (last(runner).width, last(runner).height) == size


async def test_an_edit_takes_several_pictures(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    other = file(Image.new("RGB", (32, 32), "lime"))
    forms: list[dict[str, Any]] = [
        {
            "files": [("image[]", ("a", PICTURE)), ("image[]", ("b", other))],
            "data": {"prompt": "x", "seed": "1"},
        },
        {"files": [("image", ("a", PICTURE)), ("image", ("b", other))], "data": {"prompt": "x", "seed": "1"}},
        {
            "files": [("image[0]", ("a", PICTURE)), ("image[1]", ("b", other))],
            "data": {"prompt": "x", "seed": "1"},
        },
        {"json": {"prompt": "x", "seed": 1, "image": [data_uri(PICTURE), data_uri(other)]}},
        {
            "json": {
                "prompt": "x",
                "seed": 1,
                "images": [{"image_url": data_uri(PICTURE)}, {"image_url": data_uri(other)}],
            }
        },
    ]
    for form in forms:
        answer = await client.post(EDITS, **form)
        assert answer.status_code == 200, answer.text
        assert "x-ignored-params" not in answer.headers
    assert len({track.request for track in runner.started}) == 1
    request = last(runner)
    assert request.image is not None
    assert (request.image.width, request.image.height) == SIZE
    assert [(prompt.image.width, prompt.weight) for prompt in request.image_prompts] == [(32, 1.0)]
    assert request.strength is None
    assert request.prior_steps == 15


@pytest.mark.parametrize(
    ("form", "param", "code"),
    [
        ({"data": {"prompt": "x"}}, "image", "missing_required_parameter"),
        ({"files": {"image": ("a", PICTURE)}}, "prompt", "missing_required_parameter"),
        ({"files": {"image": ("a", PICTURE)}, "data": {"prompt": ""}}, "prompt", "invalid_value"),
        ({"files": {"image": ("a", b"x")}, "data": {"prompt": "x"}}, "image", "invalid_image"),
        ({"json": {"prompt": "x", "image": 3}}, "image", "invalid_image"),
        ({"json": {"prompt": "x", "images": [{"file_id": "f"}]}}, "images", "invalid_image"),
        ({"json": {"prompt": "x", "image": "AAAA", "images": ["AAAA"]}}, "images", "invalid_value"),
        (
            {
                "files": [("image", ("a", PICTURE)), ("mask", ("a", PICTURE)), ("mask", ("b", PICTURE))],
                "data": {"prompt": "x"},
            },
            "mask",
            "invalid_value",
        ),
        ({"files": {"image": ("a", PICTURE)}, "data": {"prompt": ["x", "y"]}}, "prompt", "invalid_value"),
        ({"json": {"prompt": "x", "image": "https://a/b.png"}}, "image", "unsupported_parameter"),
        ({"json": {"prompt": "x", "image": [data_uri(PICTURE)] * 17}}, "image", "invalid_value"),
        ({"json": {"prompt": "x", "image": [data_uri(PICTURE), "AAAA"]}}, "image", "invalid_image"),
        (
            {"files": {"image": ("a", PICTURE)}, "data": {"prompt": "x", "n": "11"}},
            "n",
            "integer_out_of_range",
        ),
    ],
)
async def test_an_edit_that_is_wrong(
    client: httpx2.AsyncClient, form: dict[str, Any], param: str, code: str
) -> None:
    if "files" not in form and "json" not in form:
        form = {**form, "files": {"unknown": ("a", b"x")}}
    answer = await client.post(EDITS, **form)
    assert first_error(answer) == (400, param, code)


async def test_a_form_that_breaks_off_is_refused(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    parts = [("prompt", b"x"), ("num_images_per_prompt", b"3")]
    head = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    body = b"".join(head % (name.encode(), value) for name, value in parts)
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert (await client.post(NATIVE, content=body + b"--b--", headers=kind)).status_code == 200
    answer = await client.post(NATIVE, content=body, headers=kind)
    assert answer.status_code == 400
    assert "ends without the closing boundary" in answer.json()["detail"]
    assert len(runner.started) == 3


async def test_a_list_of_one_may_be_a_single_part(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    for name, value in [("seeds[]", "7"), ("seeds", "7"), ("seeds", "[7]")]:
        form = {"prompt": (None, "x"), name: (None, value)}
        assert (await client.post(NATIVE, files=form)).status_code == 200
        assert last(runner).seeds == (7,)


async def test_what_means_nothing_may_come_often(client: httpx2.AsyncClient) -> None:
    texts = {"prompt": "x", "tags[]": ["a", "b"]}
    answer = await client.post(OPENAI, data=texts, files=[("extra", PICTURE), ("extra", PICTURE)])
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-params"] == "extra, tags"


async def test_a_variation_is_an_image_prompt(client: httpx2.AsyncClient, runner: FakeRunner) -> None:
    answer = await client.post(VARIATIONS, files={"image": ("blob", PICTURE)}, data={"n": "2", "user": "u"})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 2
    assert answer.headers["x-ignored-params"] == "user"
    request = last(runner)
    assert (request.prompt, request.image, len(request.image_prompts)) == ("", None, 1)
    assert (request.width, request.height) == SIZE
    answer = await client.post(VARIATIONS, json={"image": data_uri(PICTURE), "size": "64x64"})
    assert answer.json()["size"] == "64x64"
    wrong: list[dict[str, Any]] = [{}, {"image": [data_uri(PICTURE)] * 2}, {"image": "AAAA"}]
    for members in wrong:
        assert first_error(await client.post(VARIATIONS, json=members))[:2] == (400, "image")


async def test_an_edit_is_streamed_under_its_own_names(client: httpx2.AsyncClient) -> None:
    answer = await client.post(
        EDITS,
        data={"prompt": "x", "stream": "true", "partial_images": "1"},
        files={"image": ("a", PICTURE)},
    )
    assert [event.event for event in told(answer.text)] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]


@pytest.mark.parametrize(
    ("form", "members"),
    [
        ({}, {"url", "b64_json"}),
        ({"response_format": "url"}, {"url"}),
        ({"response_format": "b64_json"}, {"b64_json"}),
    ],
)
async def test_dall_e_edits_are_what_their_clients_read(
    client: httpx2.AsyncClient, form: dict[str, str], members: set[str]
) -> None:
    """LangChain's and OpenAI's own read a URL, the AI SDK base64, and neither asks for it."""
    data = {"prompt": "x", "model": "dall-e-2", **form}
    answer = await client.post(EDITS, data=data, files={"image": ("a", PICTURE)})
    [item] = answer.json()["data"]
    assert set(item) == {*members, "seed"}
    assert item.get("url", "http://server/files/").startswith("http://server/files/")


async def test_a_variation_is_given_raw(client: httpx2.AsyncClient) -> None:
    form: dict[str, Any] = {"files": {"image": ("a", PICTURE)}}
    raw = await client.post(VARIATIONS, headers={"accept": "image/png"}, **form)
    assert Image.open(BytesIO(raw.content)).size == SIZE


async def test_the_job_tells_of_pictures_by_name_and_can_be_asked_for_again(
    serve: Serve, runner: FakeRunner
) -> None:
    async with serve(api_keys="a=one,b=two") as client:
        one, two = {"x-api-key": "one"}, {"x-api-key": "two"}
        members = {"prompt": "x", "image": data_uri(PICTURE), "image_prompts": [data_uri(CUT_OUT)], "seed": 1}
        first = (await client.post(NATIVE, json=members, headers=one)).json()
        assert set(first["request"]["image"]) == {"sha256", "width", "height"}
        assert len(json.dumps(first["request"])) < 2000
        again = await client.post(NATIVE, json=first["request"], headers=one)
        assert again.status_code == 200, again.text
        assert again.json()["request"] == first["request"]
        assert runner.started[0].run.inputs == runner.started[1].run.inputs
        stolen = await client.post(NATIVE, json=first["request"], headers=two)
        assert first_error(stolen) == (400, "/image", "invalid_image")


@pytest.mark.parametrize("path", [NATIVE, EDITS])
async def test_idempotency_is_by_the_content_of_pictures(
    client: httpx2.AsyncClient, runner: FakeRunner, path: str
) -> None:
    async def post(picture: bytes, **files: Any) -> httpx2.Response:
        return await client.post(
            path,
            data={"prompt": "x"},
            files={"image": ("a", picture), **files},
            headers={"idempotency-key": "k"},
        )

    first, same = await post(PICTURE), await post(file(sample(), "PNG", compress_level=9))
    assert same.headers["idempotency-replayed"] == "true"
    assert first.headers["x-job-id"] == same.headers["x-job-id"]
    assert (await post(file(Image.new("RGB", SIZE)))).status_code == 422
    assert (await post(PICTURE, mask=("m", CUT_OUT))).status_code == 422
    assert len(runner.started) == 1


@pytest.mark.parametrize("path", [NATIVE, OPENAI, EDITS, VARIATIONS])
async def test_a_full_queue_refuses_pictures_before_they_are_decoded(
    serve: Serve, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def spy(body: Any, inputs: InputStore) -> Received:
        decoded.append(body)
        return _decoded(body, inputs)

    async def post(**headers: str) -> httpx2.Response:
        return await client.post(path, json={"prompt": "x", "image": data_uri(PICTURE)}, headers=headers)

    decoded: list[Any] = []
    monkeypatch.setattr("app.api.sources._decoded", spy)
    runner.max_samples = 1
    async with serve(max_queue=1) as client:
        runner.gate.clear()
        for key in ("first", "second"):  # one is drawn, one waits
            kept = {"prefer": "respond-async", "idempotency-key": key}
            assert (await post(**kept)).status_code == 202
            await until(lambda: runner.started)
        assert len(decoded) == 2
        answer = await post()
        error = answer.json().get("error") or answer.json()
        assert (answer.status_code, error["code"]) == (503, "overloaded")
        assert 1 <= int(answer.headers["retry-after"]) <= 59
        assert len(decoded) == 2
        again = await post(**kept)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
        assert (await post(**{"idempotency-key": "third"})).status_code == 503


async def test_pictures_are_on_the_disk_before_the_job_is_and_survive_a_restart(
    serve: Serve, runner: FakeRunner, tmp_path: Path
) -> None:
    held = threading.Event()

    def hold(_: object) -> None:
        held.wait(10)

    runner.on_step = hold
    async with serve() as client:
        store = inside(client).store
        submit = store.submit

        async def submit_later(*args: Any, **options: Any) -> Any:
            [kept] = [path for path in (tmp_path / "inputs").iterdir() if path.name != ".lock"]
            assert kept.read_bytes()
            return await submit(*args, **options)

        store.submit = submit_later  # type: ignore[method-assign]
        answer = await client.post(
            NATIVE,
            json={"prompt": "x", "image": data_uri(PICTURE), "seed": 1},
            headers={"prefer": "respond-async"},
        )
        assert answer.status_code == 202
        [name] = [path.name for path in (tmp_path / "inputs").iterdir() if path.name != ".lock"]
        assert answer.json()["request"]["image"]["sha256"] == name
        await until(lambda: runner.started)
    held.set()
    other = FakeRunner()
    async with serve(use=other) as client:
        await until(lambda: other.started)
        assert set(other.started[0].run.inputs) == {name}


async def test_a_picture_that_is_gone_fails_its_job(serve: Serve, runner: FakeRunner, tmp_path: Path) -> None:
    async with serve() as client:
        runner.max_samples = 1
        with closed(runner.gate):
            ahead = await client.post(NATIVE, json={"prompt": "a"}, headers={"prefer": "respond-async"})
            await until(lambda: runner.started)
            engine = inside(client).dispatcher.engines[0]
            assert engine.ready is not None
            object.__setattr__(engine, "ready", type(engine.ready)(**{
                name: getattr(engine.ready, name) for name in engine.ready.__struct_fields__
            } | {"max_samples": 1}))  # fmt: skip
            members = {"prompt": "x", "image": data_uri(PICTURE)}
            behind = await client.post(NATIVE, json=members, headers={"prefer": "respond-async"})
            for path in (tmp_path / "inputs").iterdir():
                path.unlink()
        waited = await client.post(NATIVE, json={"prompt": "after"})
        assert waited.status_code == 200  # the others go on
        jobs = [(await client.get(f"/api/v1/jobs/{job.json()['id']}")).json() for job in (ahead, behind)]
        assert [job["status"] for job in jobs] == ["succeeded", "failed"]
        assert "cannot be read" in jobs[1]["error"]["detail"]


async def test_pictures_go_when_no_job_names_them(client: httpx2.AsyncClient, tmp_path: Path) -> None:
    services = inside(client)
    members = {"prompt": "x", "image": data_uri(PICTURE)}
    first = (await client.post(NATIVE, json=members)).json()
    second = (await client.post(NATIVE, json=members)).json()
    [path] = [path for path in (tmp_path / "inputs").iterdir() if path.name != ".lock"]
    os.utime(path, (0, 0))
    assert services.inputs.old() == [path.name]
    assert await services.store.unused_inputs([path.name, "0" * 64]) == ["0" * 64]
    await client.delete(f"/api/v1/jobs/{first['id']}")
    assert await services.store.unused_inputs([path.name]) == []
    await client.delete(f"/api/v1/jobs/{second['id']}")
    assert await services.store.unused_inputs([path.name]) == [path.name]


async def test_decoding_does_not_hold_up_the_event_loop(client: httpx2.AsyncClient) -> None:
    large = file(sample(size=(4000, 4000)), compress_level=1)
    posting = asyncio.ensure_future(
        client.post(EDITS, data={"prompt": "x", "size": "64x64"}, files={"image": ("a", large)})
    )
    longest, loop = 0.0, asyncio.get_running_loop()
    while not posting.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        longest = max(longest, loop.time() - before)
    assert posting.result().status_code == 200
    assert longest < 0.25


async def test_the_model_and_its_loras_are_listed(serve: Serve, runner: FakeRunner, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    runner.lora_dirs = (str(folder),)
    async with serve() as client:
        model = (await client.get("/api/v1/models")).json()["data"][0]
        assert model["abilities"]["controls"] == ["canny", "super_resolution"]
        assert (model["defaults"]["width"], model["limits"]["max_image_prompts"]) == (64, 4)
        assert (await client.get("/api/v1/loras")).json() == {"object": "list", "data": []}
        (folder / "sketch.safetensors").write_bytes(b"abc")
        [lora] = (await client.get("/api/v1/loras")).json()["data"]
        assert (lora["name"], lora["bytes"], len(lora["sha256"])) == ("sketch", 3, 64)
        answer = await client.post(NATIVE, json={"prompt": "x", "loras": [{"name": "sketch", "scale": -1}]})
        assert answer.status_code == 200
        assert [(lora.name, lora.scale) for lora in last(runner).loras] == [("sketch", -1.0)]
        answer = await client.post(NATIVE, json={"prompt": "x", "loras": [{"name": "ink"}]})
        assert "sketch" in answer.json()["detail"]


async def test_a_kept_picture_has_no_metadata(client: httpx2.AsyncClient, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    content = io.BytesIO()
    sample().save(content, "JPEG", exif=exif)
    await client.post(EDITS, data={"prompt": "x"}, files={"image": ("a", content.getvalue())})
    [path] = [path for path in (tmp_path / "inputs").iterdir() if path.name != ".lock"]
    assert b"where I live" not in path.read_bytes()


async def test_an_edit_takes_sixteen_pictures(client: httpx2.AsyncClient) -> None:
    files = [("image[]", ("a", PICTURE))] * 16
    assert (await client.post(EDITS, data={"prompt": "x"}, files=files)).status_code == 200
    native = {"prompt": "x", "image_prompts": [{"image": data_uri(PICTURE)}] * 5}
    assert (await client.post(NATIVE, json=native)).status_code == 400


async def test_image_prompts_are_kept_as_small_as_they_are_seen(client: httpx2.AsyncClient) -> None:
    large = file(Image.new("RGB", (1600, 1200), "red"))
    prompts = [{"image": data_uri(large)}, {"image": data_uri(PICTURE)}]
    answer = await client.post(NATIVE, json={"prompt": "x", "image_prompts": prompts})
    seen = [prompt["image"] for prompt in answer.json()["request"]["image_prompts"]]
    assert [(image["width"], image["height"]) for image in seen] == [(683, 512), SIZE]
    variation = await client.post("/v1/images/variations", files={"image": ("a.png", large)})
    assert variation.json()["size"] == "1600x1200"
