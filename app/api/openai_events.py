"""OpenAI's event stream: partial pictures, then `completed` for each picture, or `error`."""

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from app.api.deps import Services
from app.api.failures import openai_error
from app.api.generation import outcome_error, read_images
from app.api.streams import sse
from app.errors import AppError, ShuttingDown, SigningFailed, StorageFull
from app.jobs.events import News, Preview
from app.jobs.job import Job, Progress, StoredImage
from app.schemas import GenerationRequest
from app.storage.credentials import Credentials
from app.storage.encoding import encode

EventFamily = Literal["image_generation", "image_edit"]


def usage(prompt_tokens: int) -> dict[str, Any]:
    """Return the token counts in OpenAI's form."""
    return {
        "total_tokens": prompt_tokens,
        "input_tokens": prompt_tokens,
        "output_tokens": 0,
        "input_tokens_details": {"text_tokens": prompt_tokens, "image_tokens": 0},
    }


@dataclass(slots=True)
class ImageStream:
    """The events of one job for one caller, and a record of what has been sent."""

    services: Services
    quality: str
    num_previews: int  # per picture, at most; without any, the picture itself is sent as one
    family: EventFamily = "image_generation"
    _previews: Counter[int] = field(default_factory=Counter)  # sent so far, by index of the picture
    _completed: set[int] = field(default_factory=set)

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """Yield all events up to the last picture or the error."""
        ended = job if job.is_finished else None
        reason: AppError = ShuttingDown()
        if ended is None:
            follow = self.services.dispatcher.follow
            try:
                async with aclosing(follow(job.id, is_patient=False)) as news:
                    async for event in news:
                        for told in await self._news(job, event.news):
                            yield told
            except StorageFull as full:
                reason = full
            ended = await self.services.store.get(job.id, job.tenant)
        for image in ended.images if ended is not None else ():
            for told in await self._picture(job, image):
                yield told
        if error := _error(ended, reason):
            yield sse("error", openai_error(error))

    async def _news(self, job: Job, news: News) -> list[bytes]:
        match news:
            case Preview():
                return await self._preview(job, news)
            case StoredImage():
                return await self._picture(job, news)
            case Progress() if self.num_previews:  # an engine has the job
                self.services.dispatcher.want_previews(job.id, self.num_previews)
        return []

    async def _preview(self, job: Job, preview: Preview) -> list[bytes]:
        index = preview.index
        if self._previews[index] >= self.num_previews or index in self._completed:
            return []
        convert = partial(_converted, preview.content, job.request, self.services.credentials)
        try:
            converted = await asyncio.get_running_loop().run_in_executor(self.services.encoders, convert)
        except SigningFailed as error:
            self.services.logger.warning("a preview could not be signed", job=job.id, exc_info=error)
            return []
        return [await self._partial(job, index, converted)]

    async def _picture(self, job: Job, image: StoredImage) -> list[bytes]:
        if image.index in self._completed:
            return []
        self._completed.add(image.index)
        [content] = await read_images(self.services, (image,))
        told = []
        if self.num_previews and not self._previews[image.index]:
            told.append(await self._partial(job, image.index, content))
        more = {"usage": usage(image.prompt_tokens), "seed": image.seed}
        return [*told, await self._told("completed", job, image.index, content, more)]

    async def _partial(self, job: Job, index: int, content: bytes) -> bytes:
        number = self._previews[index]
        self._previews[index] += 1
        return await self._told("partial_image", job, index, content, {"partial_image_index": number})

    async def _told(self, name: str, job: Job, index: int, content: bytes, more: dict[str, Any]) -> bytes:
        generation, kind = job.request, f"{self.family}.{name}"
        data = {
            "type": kind,
            "b64_json": "",
            "created_at": int(self.services.clock()),
            "size": f"{generation.width}x{generation.height}",  # also of a partial picture, which is smaller
            "quality": self.quality,
            "background": "opaque",
            "output_format": generation.output_format,
            **more,
            **({"image_index": index} if generation.num_images > 1 else {}),
        }

        def write() -> bytes:
            return sse(kind, {**data, "b64_json": base64.b64encode(content).decode()})

        return await asyncio.get_running_loop().run_in_executor(self.services.encoders, write)


def _error(ended: Job | None, reason: AppError) -> AppError | None:
    """Return the error that ends the stream, if any; `reason` is that of a job that has not ended."""
    if ended is None or not ended.is_finished:
        return reason
    return outcome_error(ended)


def _converted(preview: bytes, generation: GenerationRequest, credentials: Credentials) -> bytes:
    """Return a preview in the job's output format, marked and signed anew. Raises SigningFailed."""
    with Image.open(BytesIO(preview)) as image:
        content = encode(image.convert("RGB"), generation.output_format, generation.output_quality)
    return credentials.sign(content, generation.output_format, is_edit=generation.is_edit)
