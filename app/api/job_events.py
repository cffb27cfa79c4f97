"""The events of one job in the native contract."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from app.api.answers import file_url, view
from app.api.deps import Services
from app.api.gateway import Exchange
from app.api.streams import sse
from app.api.views import ImageView, image_view, progress_view
from app.jobs.events import NUMBERS_PER_CLAIM, Event, Preview, Queued
from app.jobs.job import Job, Progress, StoredImage

T = TypeVar("T")


def last_number(job: Job) -> int:
    """Return the number of a job's last event, which is larger than any before it."""
    return (job.fence + 1) * NUMBERS_PER_CLAIM


@dataclass(frozen=True, slots=True)
class JobStream:
    """Streams the events of jobs to one caller."""

    services: Services
    exchange: Exchange
    base: str  # of picture URLs
    as_base64: bool = False  # send pictures themselves instead of their URLs

    async def events(self, job: Job, last_id: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the events of `job` after `last_id` up to its end; of an ended job, only its last event.

        The stream breaks off when the server stops; callers reconnect with the last number they received.
        """
        if job.is_finished:
            yield await self._end(job)
            return
        async with aclosing(self.services.dispatcher.follow(job.id, last_id)) as news:
            async for event in news:
                if job.request.previews and event.kind == "progress":  # an engine has the job
                    self.services.dispatcher.want_previews(job.id, job.request.previews)
                yield await self._told(event)

    async def _told(self, event: Event) -> bytes:
        match event.news:
            case Queued(position):
                return sse("job.queued", {"queue_position": position}, number=event.id)
            case Progress():
                return sse("job.progress", progress_view(event.news), number=event.id)
            case Preview(index, preview, content):
                shown = {
                    "index": index,
                    "preview": preview + 1,
                    "mime_type": "image/webp",
                    "b64_json": base64.b64encode(content).decode(),
                }
                return sse("job.preview", shown, number=event.id)
            case StoredImage():
                return await self._image(event.news, event.id)
            case Job():
                return await self._end(event.news)

    async def _image(self, image: StoredImage, number: int) -> bytes:
        if self.as_base64:
            return await self._off_the_loop(
                lambda: sse("job.image", self._with_content(image), number=number)
            )
        url = file_url(image, self.services, self.base)
        return sse("job.image", image_view(image, url=url), number=number)

    async def _end(self, job: Job) -> bytes:
        images = None  # as URLs
        if self.as_base64:
            images = await self._off_the_loop(lambda: [self._with_content(image) for image in job.images])
        whole = await view(job, self.services, self.exchange, self.base, images=images)
        return await self._off_the_loop(lambda: sse(f"job.{job.status}", whole, number=last_number(job)))

    def _with_content(self, image: StoredImage) -> ImageView:
        content = self.services.images.read(image.name)
        return image_view(image, in_base64=base64.b64encode(content).decode())

    async def _off_the_loop(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread: reading files and base64 of megabytes is slow."""
        return await asyncio.get_running_loop().run_in_executor(self.services.encoders, work)
