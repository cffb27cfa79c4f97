"""What callers of each contract are told while a disk is full, and that they were promised the truth."""

import asyncio
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from app.jobs import disk_space, results
from tests.app.api.sse import Watcher, told
from tests.app.conftest import eventually, inside
from tests.app.pictures import file, sample

pytestmark = pytest.mark.anyio


class Disk:
    """Of everything that a server keeps in files of its own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        sync = os.fsync

        def limited(opened: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(opened)

        patch.setattr("os.fsync", limited)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(disk_space, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(disk_space, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(results, "LONGEST_PAUSE", 0.1)
    disk = Disk(monkeypatch)
    yield disk
    disk.is_full = False


async def readiness(client: httpx2.AsyncClient, status: int) -> httpx2.Response:
    answers: list[httpx2.Response] = []

    async def has_status() -> bool:
        answers.append(await client.get("/readyz"))
        return answers[-1].status_code == status

    await eventually(has_status)
    return answers[-1]


async def status_of(client: httpx2.AsyncClient, job_id: str) -> str:
    return str((await client.get(f"/api/v1/jobs/{job_id}")).json()["status"])


async def succeeded(client: httpx2.AsyncClient, job_id: str) -> None:
    async def has() -> bool:
        return await status_of(client, job_id) == "succeeded"

    await eventually(has)


@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/v1/images/generations", {"prompt": "a red circle"}),
        ("/api/v1/images", {"prompt": "a red circle"}),
        ("/sdapi/v1/txt2img", {"prompt": "a red circle"}),
        ("/hf/text-to-image", {"inputs": "a red circle"}),
    ],
)
async def test_who_waits_is_told_soon_and_the_job_is_not_lost(
    client: httpx2.AsyncClient, disk: Disk, path: str, members: dict[str, Any]
) -> None:
    key = {"idempotency-key": "mine"}
    disk.is_full = True
    async with asyncio.timeout(10):
        answer = await client.post(path, json=members, headers=key)
    assert answer.status_code == 507
    assert 1 <= int(answer.headers["retry-after"]) <= 59
    assert "x-should-retry" not in answer.headers
    job_id = answer.headers["x-job-id"]
    assert "no room" in answer.text
    assert job_id in answer.text
    assert await status_of(client, job_id) == "running"
    assert (await client.post(path, json=members, headers=key)).headers["x-job-id"] == job_id
    refused = await client.post(path, json=members)
    assert refused.status_code == 507
    assert "x-job-id" not in refused.headers
    assert 1 <= int(refused.headers["retry-after"]) <= 59
    folder = inside(client).settings.data_dir / "files"
    assert list(folder.iterdir()) == []
    disk.is_full = False
    await readiness(client, 200)
    again = await client.post(path, json=members, headers=key)
    assert (again.status_code, again.headers["x-job-id"]) == (200, job_id)
    assert again.headers["idempotency-replayed"] == "true"
    assert len(list(folder.iterdir())) == 1


async def test_readiness_follows_the_disk(client: httpx2.AsyncClient, disk: Disk) -> None:
    disk.is_full = True
    async with asyncio.timeout(10):
        await client.post("/api/v1/images", json={"prompt": "x"})
    answer = await readiness(client, 503)
    assert "no room" in answer.json()["detail"]
    assert 1 <= int(answer.headers["retry-after"]) <= 59
    assert (await client.get("/healthz")).status_code == 200
    assert "cascade_out_of_room 1.0" in (await client.get("/metrics")).text
    disk.is_full = False
    await readiness(client, 200)
    assert "cascade_out_of_room 0.0" in (await client.get("/metrics")).text


@pytest.mark.parametrize("preference", ["respond-async", "wait=60"])
async def test_who_need_not_wait_has_the_job_as_it_stands(
    client: httpx2.AsyncClient, disk: Disk, preference: str
) -> None:
    disk.is_full = True
    headers = {"prefer": preference}
    async with asyncio.timeout(10):
        answer = await client.post("/api/v1/images", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    await readiness(client, 503)
    assert await status_of(client, job_id) == "running"
    disk.is_full = False
    await succeeded(client, job_id)


async def test_a_stream_of_openais_ends_with_the_error(client: httpx2.AsyncClient, disk: Disk) -> None:
    disk.is_full = True
    async with asyncio.timeout(10):
        answer = await client.post("/v1/images/generations", json={"prompt": "x", "stream": True})
    [event] = told(answer.text)
    job_id = answer.headers["x-job-id"]
    assert (event.event, event.data["error"]["code"]) == ("error", "insufficient_storage")
    assert job_id in event.data["error"]["message"]
    assert await status_of(client, job_id) == "running"
    disk.is_full = False
    await succeeded(client, job_id)


async def test_the_events_of_a_job_go_on(client: httpx2.AsyncClient, disk: Disk) -> None:
    disk.is_full = True
    watcher = Watcher(client)
    accept = {"accept": "text/event-stream"}
    async with watcher.watching("POST", "/api/v1/images", {"prompt": "x"}, accept):
        await readiness(client, 503)
        await asyncio.sleep(0.2)
        assert not watcher.is_over
        assert {event.event for event in watcher.events} <= {"job.queued", "job.progress"}
        disk.is_full = False
        assert (await watcher.until("job.succeeded")).data["images"]


async def test_no_room_for_a_picture_that_came(client: httpx2.AsyncClient, disk: Disk) -> None:
    disk.is_full = True
    answer = await client.post(
        "/api/v1/images",
        data={"prompt": "x"},
        files={"image": ("a.png", file(sample(size=(64, 64))), "image/png")},
    )
    assert (answer.status_code, answer.json()["code"]) == (507, "insufficient_storage")
    assert "the picture that came" in answer.json()["detail"]
    assert answer.headers["retry-after"]
    disk.is_full = False


@pytest.mark.parametrize("path", ["/api/v1/images", "/v1/images/edits"])
async def test_no_room_for_a_form_on_its_way(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    files = {"image": ("a.png", os.urandom(2_000_000), "image/png")}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
        answer = await client.post(path, data={"prompt": "x"}, files=files)
    assert answer.status_code == 507
    assert "no room to keep the files of the form" in answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 59
    assert (await client.post(path, data={"prompt": "x"}, files=files)).status_code == 400  # no picture
