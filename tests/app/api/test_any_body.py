"""Whatever is sent, the answer is a picture or a client error in the right shape, and never a 5xx."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.a1111 import ImageToImage
from app.api.bodies import ALIASES, ImageGenerationBody, NativeImageBody
from app.api.layers import LayerBody
from app.main import create_app
from app.settings import Settings
from tests.app.fakes import FakeRunner
from tests.app.pictures import file, sample

NAMES = [*ImageGenerationBody.model_fields, *ALIASES, "image", "mask", "loras", "control", "style"]
NATIVE_NAMES = [*NativeImageBody.model_fields, "image", "webhook", "n"]
OPENAI, NATIVE = "/v1/images/generations", "/api/v1/images"

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 4096)
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        ["auto", "url", "png", "low", "64x64", "1x1", "9" * 400 + "x1", "-1", "0", "1e9", "nan"]
    )
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), ANYTHING, max_size=6)
REQUESTS = st.builds(lambda members, prompt: {**members, "prompt": prompt}, OBJECTS, st.text(min_size=1))
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)


@pytest.fixture(scope="module")
def post(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for all examples; its loop runs only while a request does."""
    folder: Path = tmp_path_factory.mktemp("data")
    app = create_app(Settings(data_dir=folder, log_level="error", max_pixels=256 * 256), runner=FakeRunner())
    loop = asyncio.new_event_loop()
    lifespan = app.router.lifespan_context(app)
    loop.run_until_complete(lifespan.__aenter__())
    loop.run_until_complete(app.state.services.dispatcher.wait_loaded(10))
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server")

    def post(content: bytes, headers: dict[str, str], path: str = OPENAI) -> httpx2.Response:
        raw = {name.encode(): value.strip().encode("latin-1") for name, value in headers.items()}
        return loop.run_until_complete(client.post(path, content=content, headers=raw))

    yield post
    loop.run_until_complete(client.aclose())
    loop.run_until_complete(lifespan.__aexit__(None, None, None))
    loop.close()


def check(answer: httpx2.Response) -> None:
    assert answer.headers["x-request-id"]
    if answer.status_code < 300:
        kind = answer.headers["content-type"]
        is_told = kind.startswith(("image/", "text/event-stream"))
        assert is_told or answer.json().get("data") or answer.json()["object"] == "image.job"
        return
    assert 400 <= answer.status_code < 500
    assert answer.status_code != 422
    if answer.headers["content-type"] == "application/problem+json":
        problem = answer.json()
        assert problem["status"] == answer.status_code
        message = problem["detail"]
    else:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        message = error["message"]
    assert message
    assert "\n" not in message


SLOWLY = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOWLY
@given(members=OBJECTS | REQUESTS)
def test_any_object(post: Any, members: dict[str, Any]) -> None:
    check(post(json.dumps(members).encode(), {"content-type": "application/json"}))


@SLOWLY
@given(value=ANYTHING | st.binary())
def test_any_value_and_any_bytes(post: Any, value: Any) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    check(post(content, {"content-type": "application/json"}))


@SLOWLY
@given(
    headers=st.dictionaries(
        st.sampled_from(
            ["accept", "authorization", "content-type", "content-encoding", "content-length-hint", "host",
             "x-request-id", "x-api-key", "x-forwarded-host", "origin", "prefer", "range", "idempotency-key"]
        ),
        HEADER,
    ),
    response_format=st.sampled_from(["url", "b64_json"]),
    path=st.sampled_from([OPENAI, NATIVE]),
)  # fmt: skip
def test_any_headers(post: Any, headers: dict[str, str], response_format: str, path: str) -> None:
    members = {"prompt": "x", "response_format": response_format}
    check(post(json.dumps(members).encode(), {"content-type": "application/json", **headers}, path))


@SLOWLY
@given(name=st.sampled_from(NATIVE_NAMES) | st.text(max_size=10), value=ANYTHING)
def test_any_value_of_a_native_member(post: Any, name: str, value: Any) -> None:
    check(
        post(json.dumps({"prompt": "x", name: value}).encode(), {"content-type": "application/json"}, NATIVE)
    )


@SLOWLY
@given(name=st.sampled_from(NAMES), value=ANYTHING)
def test_any_value_of_a_known_member(post: Any, name: str, value: Any) -> None:
    members = {"prompt": "x", name: value}
    check(post(json.dumps(members).encode(), {"content-type": "application/json"}))


def check_layer(answer: httpx2.Response) -> str | None:
    """A picture or a mistake in the family of the layer; returns what is said of the mistake."""
    if answer.status_code == 200:
        is_picture = answer.headers["content-type"].startswith("image/")
        assert is_picture or set(answer.json()) == {"images", "parameters", "info"}
        return None
    assert 400 <= answer.status_code < 500
    body = answer.json()
    message = body["detail"] if body["error"] == "HTTPException" else body["error"]
    assert message
    assert "\n" not in message
    return str(message)


PICTURE = base64.b64encode(file(sample())).decode()


@SLOWLY
@given(
    name=st.sampled_from([*ImageToImage.model_fields, "x"]),
    value=ANYTHING,
    path=st.sampled_from(["txt2img", "img2img"]),
)
def test_any_value_of_a_member_of_a1111(post: Any, name: str, value: Any, path: str) -> None:
    members = {"prompt": "x", "width": 64, "height": 64, "init_images": [PICTURE], name: value}
    answer = post(json.dumps(members).encode(), {"content-type": "application/json"}, f"/sdapi/v1/{path}")
    check_layer(answer)


@SLOWLY
@given(
    name=st.sampled_from([*LayerBody.model_fields, "num_inference_steps", "target_size", "x"]), value=ANYTHING
)
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image"])
def test_any_parameter_of_hugging_face(post: Any, task: str, name: str, value: Any) -> None:
    members = {"inputs": PICTURE if task == "image-to-image" else "x", "parameters": {name: value}}
    check_layer(post(json.dumps(members).encode(), {"content-type": "application/json"}, f"/hf/{task}"))


@SLOWLY
@given(value=ANYTHING | st.binary())
@pytest.mark.parametrize(
    "path",
    [
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/sdapi/v1/png-info",
        "/hf/text-to-image",
        "/hf/image-to-image",
    ],
)
def test_any_value_and_any_bytes_of_the_layers(post: Any, path: str, value: Any) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    assert check_layer(post(content, {"content-type": "application/json"}, path))


@SLOWLY
@given(value=ANYTHING | st.binary())
def test_any_options(post: Any, value: Any) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    answer = post(content, {"content-type": "application/json"}, "/sdapi/v1/options")
    assert answer.json() == {} or check_layer(answer)
