"""What all contracts share: from a checked request to finished files, while somebody waits for them."""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request

from app.api.deps import Services
from app.errors import ClientGone, TimedOut
from app.jobs.job import Job, Picture
from app.schemas import GenerationRequest
from app.storage.encoding import encode, parameters_text


@dataclass(frozen=True, slots=True)
class FinishedImage:
    """An encoded picture and what is told about it."""

    content: bytes
    picture: Picture

    @property
    def seed(self) -> int:
        """The seed that gives this picture when asked for alone."""
        return self.picture.seed


async def wait_for_model(services: Services) -> None:
    """Give a model that is still loading some time: a caller right after the start need not ask again.

    Whether there is one, whoever needs it finds out from the engine.
    """
    engine = services.engine
    if engine.loaded.done():
        return
    either: set[asyncio.Future[Any]] = {
        asyncio.wrap_future(engine.loaded),
        asyncio.wrap_future(engine.closed),
    }
    done, _ = await asyncio.wait(
        either, timeout=services.settings.loading_wait, return_when=asyncio.FIRST_COMPLETED
    )
    for future in done:
        future.exception()  # seen here, raised where the model is needed


async def wait_for_images(request: Request, services: Services, job: Job) -> list[FinishedImage]:
    """Wait for the pictures of `job` and encode them. When the caller leaves, the work is dropped."""
    generation = job.request
    pictures = await _wait(request, services, job)
    loop = asyncio.get_running_loop()
    encoded = [
        loop.run_in_executor(
            services.encoders, partial(_encode, generation, picture, services.settings.model_name)
        )
        for picture in pictures
    ]
    files = await asyncio.gather(*encoded)
    services.metrics.pictures.inc(len(files))
    return [FinishedImage(content, picture) for content, picture in zip(files, pictures, strict=True)]


async def _wait(request: Request, services: Services, job: Job) -> list[Picture]:
    outcome = asyncio.wrap_future(job.outcome)
    gone = asyncio.ensure_future(_disconnected(request))
    seconds = services.settings.sync_timeout
    try:
        either: set[asyncio.Future[Any]] = {outcome, gone}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return outcome.result()
        if gone.done():
            raise ClientGone("the caller left before the picture was ready")
        raise TimedOut(f"the picture was not ready within {seconds:g} seconds; ask for fewer steps or pixels")
    finally:
        gone.cancel()
        outcome.cancel()
        services.engine.cancel(job)


async def _disconnected(request: Request) -> None:
    """Returns when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encode(generation: GenerationRequest, picture: Picture, model: str) -> bytes:
    text = parameters_text(generation, picture.seed, model) if generation.embed_metadata else None
    return encode(picture.image, generation.output_format, generation.output_quality, text)
