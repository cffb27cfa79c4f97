"""The real server with a fake model, and clients that call it without a network."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from app.settings import Settings
from tests.app.fakes import FakeRunner
from tests.postgresql import postgresql  # noqa: F401  # a fixture
from tests.s3 import bucket, s3  # noqa: F401  # two more

if TYPE_CHECKING:
    from app.api.deps import Services

Serve = Callable[..., AbstractAsyncContextManager[httpx2.AsyncClient]]


@pytest.fixture(autouse=True, scope="session")
def no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("CASCADE_"):
                patch.delenv(name)
        yield


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def serve(tmp_path: Path, runner: FakeRunner) -> Serve:
    """`async with serve(setting=...) as client`: a server that is ready, or that loads with `wait=False`."""
    from app.main import create_app  # here, as the tests of jobs do without HTTP

    @asynccontextmanager
    async def serve(
        *, wait: bool = True, use: FakeRunner | None = None, **settings: Any
    ) -> AsyncIterator[httpx2.AsyncClient]:
        settings = {"data_dir": tmp_path, "log_level": "error", "grace_seconds": 0.2, **settings}
        app = create_app(Settings(**settings), runner=use or runner)
        transport = httpx2.ASGITransport(app)
        async with app.router.lifespan_context(app):
            if wait:
                await app.state.services.dispatcher.wait_loaded(10)
            async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
                client.app = app  # type: ignore[attr-defined]  # for tests that look inside
                yield client
            runner.gate.set()

    return serve


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx2.AsyncClient]:
    async with serve() as client:
        yield client


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for something that has to be asked for."""
    async with asyncio.timeout(10):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.005)


def inside(client: httpx2.AsyncClient) -> "Services":
    """The parts of the server that `client` calls."""
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    return services
