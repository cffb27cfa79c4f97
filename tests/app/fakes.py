"""A runner without a model: its pictures tell which request and seed they were made for."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence

from PIL import Image

from app.engine.engine import ModelFacts, Steps
from app.jobs.job import Picture, Progress
from app.schemas import GenerationRequest

NATIVE_SIZE = (64, 64)
WINDOW_CHARACTERS = 300  # longer prompts count as truncated


class FakeRunner:
    """Makes one-coloured pictures. `gate` holds it before every step, `broken` is raised for that prompt."""

    def __init__(self, *, steps: int = 2) -> None:
        self.steps = steps
        self.gate = threading.Event()
        self.gate.set()
        self.loading = threading.Event()
        self.loading.set()
        self.load_error: Exception | None = None
        self.broken: dict[str, Exception] = {}
        self.batches: list[list[GenerationRequest]] = []
        self.steps_done = 0
        self.num_stopped = 0

    def load(self) -> ModelFacts:
        self.loading.wait(10)
        if self.load_error is not None:
            raise self.load_error
        return ModelFacts("cpu", "float32", NATIVE_SIZE)

    def generate(self, requests: Sequence[GenerationRequest]) -> Steps:
        self.batches.append(list(requests))
        try:
            for step in range(1, self.steps + 1):
                self.gate.wait(10)
                self.steps_done += 1
                yield Progress("prior", step, self.steps)
        except GeneratorExit:
            self.num_stopped += 1
            raise
        for request in requests:
            if request.prompt in self.broken:
                raise self.broken[request.prompt]
        return [[picture(request, seed) for seed in request.seeds] for request in requests]


def picture(request: GenerationRequest, seed: int) -> Picture:
    size = (request.width, request.height)
    return Picture(
        image=Image.new("RGB", size, colour(request, seed)),
        seed=seed,
        resampled_from=None if size == NATIVE_SIZE else NATIVE_SIZE,
        prompt_truncated=len(request.prompt) > WINDOW_CHARACTERS,
        prompt_tokens=len(request.prompt.split()),
    )


def colour(request: GenerationRequest, seed: int) -> tuple[int, int, int]:
    settings = request.model_dump(
        exclude={"seeds", "output_format", "output_quality", "embed_metadata"}, mode="json"
    )
    red, green, blue, *_ = hashlib.sha256(f"{settings} {seed}".encode()).digest()
    return red, green, blue


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)
