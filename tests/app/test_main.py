"""How a server is put together: what it says at the start, what it cleans up, what it does not load."""

import asyncio
import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from app.main import create_app
from app.settings import Settings
from tests.app.conftest import Serve
from tests.app.fakes import FakeRunner, until


def test_the_api_process_needs_no_tensors() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'cascade'}"
    program = f"import sys, app.main; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.anyio
async def test_without_a_terminal_the_log_is_json_and_nothing_else(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve(log_level="info", port=8123, host="::1"):
        pass
    ready, stopped = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ready["event"], ready["url"], ready["model"], ready["device"]) == (
        "ready",
        "http://[::1]:8123",
        "tiny",
        "cpu",
    )
    assert stopped["event"] == "stopped"


@pytest.mark.anyio
async def test_only_beyond_this_machine_a_missing_key_is_worth_a_warning(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve(log_level="warning", host="0.0.0.0", allow_anonymous=True):
        pass
    assert "no API key" in json.loads(capsys.readouterr().err)["event"]
    async with serve(log_level="warning"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.anyio
async def test_a_terminal_gets_a_request_to_paste(
    serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    async with serve(port=8123):
        pass
    [example] = capsys.readouterr().err.splitlines()
    words = shlex.split(example)
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8123/v1/images/generations"]
    assert json.loads(words[-1])["prompt"] == "a red circle on a blue background"
    async with serve(api_keys="secret"):
        pass
    example = capsys.readouterr().err
    assert "-H \"authorization: Bearer $KEY\" -H 'content-type: application/json'" in example
    assert "secret" not in example
    async with serve(log_format="json"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.anyio
async def test_a_model_that_cannot_be_loaded_is_told_to_the_program_or_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner, told = FakeRunner(), list[BaseException]()
    runner.load_error = ValueError("prior/ is missing")
    settings = Settings(data_dir=tmp_path, log_format="json")
    app = create_app(settings, runner=runner, on_unusable=told.append)
    async with app.router.lifespan_context(app):
        await until(lambda: told)
    assert told == [runner.load_error]
    app = create_app(settings, runner=runner)
    async with app.router.lifespan_context(app):
        await until(app.state.services.engine.loaded.done)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event.get("reason") for event in events] == [None, "prior/ is missing", None]


@pytest.mark.anyio
async def test_old_pictures_are_removed_in_the_background(serve: Serve, tmp_path: Path) -> None:
    async with serve(file_ttl=0.05) as client:
        members = {"prompt": "x", "response_format": "url"}
        await client.post("/v1/images/generations", json=members)
        assert len(list((tmp_path / "files").iterdir())) == 1
        await until(lambda: not list((tmp_path / "files").iterdir()))


@pytest.mark.anyio
async def test_nothing_is_left_behind_when_a_server_stops(tmp_path: Path, serve: Serve) -> None:
    descriptors = open_descriptors()
    for _ in range(5):
        async with serve() as client:
            answers = [client.post("/v1/images/generations", json={"prompt": "x"}) for _ in range(4)]
            await asyncio.gather(*answers)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith(("engine", "encoder"))]
    assert ours == []
    assert open_descriptors() <= descriptors + 2


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_and_secret_are_for_the_owner_alone(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path / "data"), runner=FakeRunner())
    app.state.services.encoders.shutdown()
    assert (tmp_path / "data" / "files").stat().st_mode & 0o077 == 0
    assert (tmp_path / "data" / "secret").stat().st_mode & 0o077 == 0
