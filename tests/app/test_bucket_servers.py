"""Whole servers on one PostgreSQL and one bucket, each with its own folder; and a bucket that goes away."""

import asyncio
import base64
import shutil
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from app.jobs import maintenance, results
from app.storage import bucket as bucket_module
from tests.app.conftest import Serve, eventually, inside
from tests.app.fakes import FakeRunner, closed, until
from tests.app.pictures import data_uri, file, sample
from tests.s3 import TestBucket

pytestmark = pytest.mark.anyio
IMAGES = "/api/v1/images"
SECRET = "the same secret for both of them"

Servers = tuple[httpx2.AsyncClient, httpx2.AsyncClient]


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(maintenance, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(results, "LONGEST_PAUSE", 0.1)


@pytest.fixture
async def servers(
    serve: Serve, bucket: TestBucket, postgresql: str, tmp_path: Path
) -> AsyncIterator[Servers]:
    shared = {"database_url": postgresql, "bucket_url": bucket.url, "signing_secret": SECRET}
    async with (
        serve(data_dir=tmp_path / "one", **shared) as one,
        serve(data_dir=tmp_path / "other", use=FakeRunner(), **shared) as other,
    ):
        yield one, other


async def test_either_gives_the_pictures_of_both(servers: Servers, tmp_path: Path) -> None:
    answer = await servers[0].post(
        IMAGES, json={"prompt": "x", "num_images_per_prompt": 2, "response_format": "url"}
    )
    assert answer.status_code == 200, answer.text
    images = answer.json()["images"]
    for image in images:
        target = urlsplit(image["url"])
        pictures = [
            await client.get(f"{target.path}?{target.query}", headers={"host": target.netloc})
            for client in servers
        ]
        assert [picture.status_code for picture in pictures] == [200, 200]
        assert pictures[0].content == pictures[1].content
        assert pictures[0].headers["etag"] == pictures[1].headers["etag"] == f'"{image["sha256"]}"'
    assert not list((tmp_path / "one").glob("secret")), "the secret was given"


async def test_a_picture_that_came_to_one_is_read_by_the_other(servers: Servers, tmp_path: Path) -> None:
    """Whichever does the job, and whatever has become of the first one's disk."""
    one, other = servers
    picture = data_uri(file(sample()))
    answer = await one.post(IMAGES, json={"prompt": "x", "image": picture})
    assert answer.status_code == 200
    digest = answer.json()["request"]["image"]["sha256"]
    for folder in ("one", "other"):
        shutil.rmtree(tmp_path / folder / "inputs")
        (tmp_path / folder / "inputs").mkdir()
    for client in servers:
        again = await client.post(IMAGES, json={"prompt": "y", "image": {"sha256": digest}})
        assert again.status_code == 200
    assert inside(other).inputs.read(digest) == inside(one).inputs.read(digest)


async def test_while_the_bucket_is_away_nothing_is_lost(
    serve: Serve, runner: FakeRunner, bucket: TestBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(bucket_url=bucket.url) as client:
        before = await client.post(IMAGES, json={"prompt": "x", "seed": 4})
        with closed(runner.gate):
            waits = asyncio.create_task(client.post(IMAGES, json={"prompt": "x", "seed": 4}))
            later = await client.post(
                IMAGES, json={"prompt": "x", "seed": 4}, headers={"prefer": "respond-async"}
            )
            await until(lambda: runner.started)
            bucket.s3.stop()
        await eventually(lambda: _is_refused(client))
        refused = await client.post(IMAGES, json={"prompt": "x"})
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
        assert "does not answer" in refused.json()["detail"]
        assert "127.0.0.1" not in refused.text
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, refused.headers["retry-after"])
        assert "does not answer" in ready.json()["detail"]
        answer = await waits
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert "goes on when it does" in answer.json()["detail"]
        bucket.s3.start()
        job = later.json()["urls"]["self"]
        await eventually(lambda: _has_ended(client, job))
        ended = (await client.get(job)).json()
        assert ended["status"] == "succeeded"
        assert ended["images"][0]["sha256"] == before.json()["images"][0]["sha256"]
        await eventually(lambda: _is_ready(client))
        picture = (await client.post("/v1/images/generations", json={"prompt": "x"})).json()["data"][0]
        assert base64.b64decode(picture["b64_json"]).startswith(b"\x89PNG")


async def test_a_job_whose_picture_cannot_be_read_now_waits_for_the_bucket(
    serve: Serve, bucket: TestBucket, tmp_path: Path
) -> None:
    body = {"prompt": "x", "image": data_uri(file(sample()))}
    slow = FakeRunner(steps=1000)
    slow.on_step = lambda _: time.sleep(0.01)
    async with serve(bucket_url=bucket.url, use=slow) as client:
        accepted = await client.post(IMAGES, json=body, headers={"prefer": "respond-async"})
        await until(lambda: slow.started)
    shutil.rmtree(tmp_path / "inputs")  # as with a new server
    async with serve(bucket_url=bucket.url, wait=False, use=(late := FakeRunner())) as client:
        with closed(late.loading):
            bucket.s3.stop()
        await eventually(lambda: _is_refused(client))
        job = accepted.json()["urls"]["self"]
        assert (await client.get(job)).json()["status"] in ("queued", "running")
        bucket.s3.start()
        await eventually(lambda: _has_ended(client, job))
        assert (await client.get(job)).json()["status"] == "succeeded"
        await eventually(lambda: _is_ready(client))


async def test_a_deletion_that_failed_can_be_repeated(serve: Serve, bucket: TestBucket) -> None:
    async with serve(bucket_url=bucket.url) as client:
        job = (await client.post(IMAGES, json={"prompt": "x", "response_format": "url"})).json()
        bucket.s3.stop()
        assert (await client.delete(job["urls"]["self"])).status_code == 503
        bucket.s3.start()
        assert (await client.delete(job["urls"]["self"])).status_code == 204
        assert bucket.keys() == []
        assert (await client.get(job["images"][0]["url"])).status_code == 404


async def test_a_bucket_that_hangs_holds_up_no_copies_and_no_end(
    serve: Serve, runner: FakeRunner, bucket: TestBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_REQUEST", timedelta(seconds=3))
    async with serve(bucket_url=bucket.url) as client:
        job = (await client.post(IMAGES, json={"prompt": "x", "response_format": "url"})).json()
        bucket.s3.hang()
        try:
            later = [
                (await client.post(IMAGES, json={"prompt": "x"}, headers={"prefer": "respond-async"})).json()
                for _ in range(4)
            ]
            await until(lambda: len(runner.started) == 5)
            start = time.monotonic()
            assert (await client.get(job["images"][0]["url"])).status_code == 200
            assert time.monotonic() - start < 1
            await eventually(lambda: _is_refused(client))
        finally:
            bucket.s3.go_on()
        for url in (one["urls"]["self"] for one in later):
            await eventually(partial(_has_ended, client, url))
            assert (await client.get(url)).json()["status"] == "succeeded"


async def test_a_picture_that_comes_while_the_bucket_is_away_is_not_accepted(
    serve: Serve, bucket: TestBucket
) -> None:
    async with serve(bucket_url=bucket.url) as client:
        body = {"prompt": "x", "image": data_uri(file(sample()))}
        bucket.s3.stop()
        refused = await client.post(IMAGES, json=body)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert (await client.get("/api/v1/jobs")).json()["data"] == []
        bucket.s3.start()
        assert (await client.post(IMAGES, json=body)).status_code == 200


async def _is_refused(client: httpx2.AsyncClient) -> bool:
    return not inside(client).dispatcher.has_room


async def _is_ready(client: httpx2.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def _has_ended(client: httpx2.AsyncClient, job: str) -> bool:
    return (await client.get(job)).json()["status"] not in ("queued", "running")
