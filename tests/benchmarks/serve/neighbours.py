"""Two tenants: one has ordered sixty-four pictures, the other waits for the first step of its only one."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.serve.contestants import OURS, Contestants

KEYS = {"crowd": "crowd-key", "guest": "guest-key"}
ORDERED = (10, 10, 10, 10, 10, 10, 4)  # pictures of the crowd's requests, sixty-four together
IMAGES = "/api/v1/images"


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Seconds from a request to its first step, alone and beside the crowd, and of a tick meanwhile."""

    alone: tuple[float, ...]
    beside: tuple[float, ...]
    tick_seconds: float

    @property
    def ticks(self) -> float:
        """By how many ticks the crowd delays the guest."""
        return (median(self.beside) - median(self.alone)) / self.tick_seconds


async def neighbours(contestants: Contestants, rounds: int) -> Neighbours:
    """Measure the guest's wait without and with the crowd at work."""
    keys = ",".join(f"{name}={key}" for name, key in KEYS.items())
    async with contestants.running(OURS, key=KEYS["crowd"], api_keys=keys) as client:
        alone = [await _first_step(client, seed) for seed in range(rounds)]
        beside: list[float] = []
        before = await _step_seconds(client)
        while len(beside) < rounds:
            async with _crowd_at_work(client) as crowd:
                while len(beside) < rounds and await _is_at_work(client, crowd):
                    beside.append(await _first_step(client, len(beside)))
        after = await _step_seconds(client)
    seconds, count = (now - then for now, then in zip(after, before, strict=True))
    return Neighbours(tuple(alone), tuple(beside), seconds / count)


@asynccontextmanager
async def _crowd_at_work(client: aiohttp.ClientSession) -> AsyncIterator[list[str]]:
    """Ids of jobs of sixty-four pictures, of which the first has begun. What is left of them is cancelled."""
    jobs = []
    for number, count in enumerate(ORDERED):
        body = {"prompt": "a blue ring", "seed": 100 * number, "num_images_per_prompt": count}
        headers = {"Prefer": "respond-async"}
        async with client.post(IMAGES, json=body, headers=headers, raise_for_status=True) as answer:
            jobs.append(str((await answer.json())["id"]))
    try:
        await _until_stepped(client, jobs[0])
        yield jobs
    finally:
        for job in jobs:
            await (await client.post(f"/api/v1/jobs/{job}/cancel")).read()


async def _until_stepped(client: aiohttp.ClientSession, job: str) -> None:
    while True:
        if (await _job(client, job))["progress"]["step"]:
            return
        await asyncio.sleep(0.01)


async def _is_at_work(client: aiohttp.ClientSession, crowd: list[str]) -> bool:
    return (await _job(client, crowd[-1]))["status"] in ("queued", "running")


async def _job(client: aiohttp.ClientSession, job: str) -> dict[str, Any]:
    async with client.get(f"/api/v1/jobs/{job}", raise_for_status=True) as answer:
        told: dict[str, Any] = await answer.json()
        return told


async def _first_step(client: aiohttp.ClientSession, seed: int) -> float:
    """Seconds until the guest hears that a step of its picture is done. Leaving cancels the rest."""
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {KEYS['guest']}"}
    start = time.monotonic()
    body = {"prompt": "a red star", "seed": seed}
    async with client.post(IMAGES, json=body, headers=headers, raise_for_status=True) as answer:
        async for line in answer.content:
            name, _, value = line.partition(b": ")
            if name == b"data" and json.loads(value).get("step"):
                return time.monotonic() - start
    raise RuntimeError("the stream ended before a step was done")


async def _step_seconds(client: aiohttp.ClientSession) -> tuple[float, float]:
    """Sum and count of all ticks so far."""
    async with client.get("/metrics", raise_for_status=True) as answer:
        text = await answer.text()
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    samples = families["cascade_step_seconds"]
    total, count = (
        sum(sample.value for sample in samples if sample.name == f"cascade_step_seconds_{suffix}")
        for suffix in ("sum", "count")
    )
    return total, count
