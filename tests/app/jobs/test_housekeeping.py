"""Tidying up: what is old goes, and a bad day does not end it."""

import asyncio
import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from app.errors import StorageFull
from app.jobs.housekeeping import prune_periodically
from app.jobs.store import JobStore
from app.logs import make_logger
from app.settings import Settings
from app.storage.images import ImageStore
from app.storage.inputs import InputStore
from tests.app.fakes import until

pytestmark = pytest.mark.anyio


class Things:
    """A store of jobs and one of pictures, which note what is thrown away."""

    def __init__(self) -> None:
        self.pruned_before: list[float] = []
        self.removed: list[str] = []
        self.errors: list[Exception] = []

    async def prune(self, ended_before: float) -> list[str]:
        self.pruned_before.append(ended_before)
        if self.errors:
            raise self.errors.pop()
        return ["a.png", "b.png"]

    async def unused_inputs(self, names: list[str]) -> list[str]:
        return [name for name in names if name != "a"]

    def remove(self, names: Iterable[str]) -> int:
        self.removed += names
        return 2

    def sweep(self) -> int:
        return 1


class Inputs:
    """Pictures that came with requests: of the old ones, `a` is in use."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def old(self) -> list[str]:
        return ["a", "b"]

    def remove(self, names: Iterable[str]) -> int:
        self.removed += names
        return 1


@pytest.mark.parametrize("error", [OSError, StorageFull])
async def test_what_is_old_goes_and_an_error_holds_up_nothing_else(
    error: type[Exception],
) -> None:
    things, inputs, stream = Things(), Inputs(), io.StringIO()
    things.errors = [error("the disk is away")]
    settings = Settings(job_ttl=0.01, log_format="json")
    with ThreadPoolExecutor(1) as encoders:
        tidying = asyncio.create_task(
            prune_periodically(
                cast(JobStore, things),
                cast(ImageStore, things),
                cast(InputStore, inputs),
                encoders,
                settings,
                make_logger(settings, stream),
                clock=lambda: 100.0,
            )
        )
        await until(lambda: stream.getvalue().count("\n") >= 3)
        tidying.cancel()
    assert things.pruned_before[:2] == [99.99, 99.99]
    assert things.removed[:2] == ["a.png", "b.png"]
    bad, rest, good = (json.loads(line) for line in stream.getvalue().splitlines()[:3])
    assert (bad["level"], bad["reason"]) == ("warning", "the disk is away")
    assert rest["files"] == 1 + 1
    assert good["files"] == 1 + 2 + 1
    assert inputs.removed[:1] == ["b"]
