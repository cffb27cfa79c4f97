"""How a server is put together: what it says at the start, what it cleans up, what it does not load."""

import asyncio
import errno
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.errors import SettingsError, StorageFull
from app.jobs.store import JobStore
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import Serve, inside
from tests.app.fakes import FakeRunner, until


def test_the_api_process_needs_no_tensors() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'cascade'}"
    program = f"import sys, app.main; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


class Announced:
    """What a server told its program."""

    def __init__(self) -> None:
        self.is_ready = False
        self.reasons: list[str] = []

    def ready(self) -> None:
        self.is_ready = True

    def unusable(self, error: Exception) -> None:
        self.reasons.append(str(error))


@asynccontextmanager
async def announced(runner: FakeRunner, **settings: Any) -> AsyncIterator[Announced]:
    """A server, and what it said when it had loaded its model."""
    told = Announced()
    app = create_app(Settings(**settings), runner=runner, on_ready=told.ready, on_unusable=told.unusable)
    async with app.router.lifespan_context(app):
        await until(lambda: told.is_ready or told.reasons)
        yield told


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.anyio
async def test_without_a_terminal_the_log_is_json_and_nothing_else(
    tmp_path: Path, runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    async with announced(runner, data_dir=tmp_path, port=8123, host="::1"):
        pass
    ready, stopped = (line for line in logged(capsys) if line["event"] in ("ready", "stopped"))
    assert (ready["event"], ready["url"], ready["model"], ready["device"]) == (
        "ready",
        "http://[::1]:8123",
        "tiny",
        "cpu",
    )
    assert stopped["event"] == "stopped"


@pytest.mark.anyio
async def test_a_missing_key_is_told_and_beyond_this_machine_it_is_worth_a_warning(
    tmp_path: Path, runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {"data_dir": tmp_path, "log_level": "warning"}
    async with announced(runner, host="0.0.0.0", allow_anonymous=True, **quiet):
        pass
    assert "no API key" in logged(capsys)[0]["event"]
    async with announced(FakeRunner(), **quiet):
        pass
    assert capsys.readouterr().err == ""
    async with announced(FakeRunner(), data_dir=tmp_path):
        pass
    assert sum("no API key" in line["event"] for line in logged(capsys)) == 1
    async with announced(FakeRunner(), data_dir=tmp_path, api_keys="x"):
        pass
    assert "no API key" not in capsys.readouterr().err


@pytest.mark.anyio
async def test_a_terminal_gets_a_request_to_paste(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    quiet = {"data_dir": tmp_path, "log_level": "error"}
    async with announced(FakeRunner(), port=8123, **quiet):
        pass
    [example] = capsys.readouterr().err.splitlines()
    words = shlex.split(example)
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8123/v1/images/generations"]
    assert json.loads(words[-1])["prompt"] == "a red circle on a blue background"
    async with announced(FakeRunner(), api_keys="secret", **quiet):
        pass
    example = capsys.readouterr().err
    assert "-H \"authorization: Bearer $KEY\" -H 'content-type: application/json'" in example
    assert "secret" not in example
    async with announced(FakeRunner(), log_format="json", **quiet):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.anyio
async def test_a_model_that_cannot_be_loaded_is_told_to_the_program_and_the_log(
    tmp_path: Path, runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.load_error = ValueError("prior/ is missing")
    async with announced(runner, data_dir=tmp_path, log_format="json") as told:
        pass
    assert (told.reasons, told.is_ready) == (["prior/ is missing"], False)
    assert "prior/ is missing" in [line.get("reason") for line in logged(capsys)]


@pytest.mark.anyio
async def test_two_servers_do_not_share_a_folder_of_jobs(tmp_path: Path, runner: FakeRunner) -> None:
    async with announced(runner, data_dir=tmp_path, log_level="error"):
        with pytest.raises(SettingsError, match="another server works in"):
            async with announced(FakeRunner(), data_dir=tmp_path):
                pass


def test_a_folder_without_space_is_named_at_the_start(
    tmp_path: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SettingsError, match=f"^there is no space left in {tmp_path}; make some"):
        create_app(Settings(data_dir=tmp_path), runner=runner)


@pytest.mark.anyio
async def test_a_database_without_room_at_the_start_is_told_to_the_program(
    tmp_path: Path, runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object, **__: object) -> None:
        raise StorageFull("no room")

    monkeypatch.setattr(JobStore, "release", full)
    told = Announced()
    app = create_app(Settings(data_dir=tmp_path), runner=runner, on_unusable=told.unusable)
    with pytest.raises(SettingsError):
        async with app.router.lifespan_context(app):
            pass
    assert told.reasons == [f"there is no space left in {tmp_path}; make some, and start again"]


@pytest.mark.anyio
async def test_every_device_has_an_engine_configured_by_the_settings(
    tmp_path: Path, serve: Serve, runner: FakeRunner
) -> None:
    async with serve(devices="cpu,cpu", strict=True, max_rows=3, weights="a=2", model="/m") as client:
        assert [engine.device for engine in inside(client).dispatcher.engines] == ["cpu", "cpu"]
        configure = runner.configure
    assert configure is not None
    assert (configure.is_strict, configure.max_rows, configure.weights) == (True, 3, {"a": 2.0})
    assert (configure.model, configure.cache_dir) == ("/m", str(tmp_path / "cache"))


@pytest.mark.anyio
async def test_a_server_that_is_started_again_goes_on(
    tmp_path: Path, serve: Serve, runner: FakeRunner
) -> None:
    runner.gate.clear()
    async with serve() as client:
        headers = {"prefer": "respond-async"}
        answer = await client.post("/api/v1/images", json={"prompt": "x", "seed": 1}, headers=headers)
        await until(lambda: runner.started)
    async with serve(use=FakeRunner()) as client:
        job = await inside(client).dispatcher.wait(answer.json()["id"])
        assert job.status == "succeeded"
        assert job.crashes == 0


@pytest.mark.anyio
async def test_old_jobs_and_their_pictures_are_removed_in_the_background(
    serve: Serve, tmp_path: Path
) -> None:
    async with serve(job_ttl=0.3) as client:
        answer = await client.post("/api/v1/images", json={"prompt": "x"})
        await until(lambda: not list((tmp_path / "files").iterdir()))
        assert (await client.get(answer.json()["urls"]["self"])).status_code == 404


@pytest.mark.anyio
async def test_nothing_is_left_behind_when_a_server_stops(tmp_path: Path, serve: Serve) -> None:
    descriptors, others = open_descriptors(), set(threading.enumerate())
    for _ in range(5):
        async with serve() as client:
            answers = [client.post("/v1/images/generations", json={"prompt": "x"}) for _ in range(4)]
            await asyncio.gather(*answers)
    names = ("engine", "encoder", "reader", "writer", "database")
    left = set(threading.enumerate()) - others
    assert [thread for thread in left if thread.name.startswith(names)] == []
    assert open_descriptors() <= descriptors + 2


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.anyio
async def test_what_is_kept_is_for_the_owner_alone(tmp_path: Path, serve: Serve) -> None:
    folder = tmp_path / "data"
    async with serve(data_dir=folder):
        for path in (folder, folder / "files", folder / "secret"):
            assert path.stat().st_mode & 0o077 == 0
