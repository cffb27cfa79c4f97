"""Generation by Stages C, B and A, for many requests at once: every task of the library ends here.

`generate` is a generator, so the caller drives it, shows progress and may stop; callers that only want the
pictures use `run_to_end`. Requests keep their own settings, and do not influence each other's pictures.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from cascade.errors import FlawedResult
from cascade.models import Models
from cascade.tasks.drawing import Drawing, Studio
from cascade.tasks.picture import decode_chunk, plan_pictures
from cascade.tasks.settings import ImageSettings

R = TypeVar("R")

_ALL_ROWS = 1 << 30  # more than any step has: all its rows share one call of the network


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished picture and how it was made."""

    image: Image.Image
    settings: ImageSettings  # with seed and size filled in: a request with them gives this picture again
    resampled_from: tuple[int, int] | None  # the size at which it was drawn, if scaled
    prompt_truncated: bool
    prompt_tokens: int  # before truncation, with begin and end tokens


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run. In "decode", steps count pictures."""

    stage: Literal["prior", "decoder", "decode"]
    step: int
    steps: int
    latents: Tensor | None = None  # (b, 16, h, w): the clean latents that Stage C predicts now, for previews


@torch.inference_mode()
def generate(
    models: Models, requests: Sequence[ImageSettings]
) -> Generator[Progress, None, list[list[GeneratedImage]]]:
    """Make the pictures of all `requests` together; return them as one list per request.

    Raises:
        InvalidSetting: the checkpoint cannot do what is requested; nothing was drawn.
        FlawedResult: a stage produced invalid values for one of the requests, even in fp32.
    """
    studio = Studio(models, {"prior": models.stage_c, "decoder": models.stage_b})
    per_request = [
        [Drawing(picture, models) for picture in plan_pictures(models, request)] for request in requests
    ]
    drawings = [drawing for group in per_request for drawing in group]
    for drawing in drawings:
        studio.begin(drawing)
    images = iter((yield from draw(studio, drawings)))
    return [[_finished(drawing, next(images)) for drawing in group] for group in per_request]


def draw(studio: Studio, drawings: Sequence[Drawing]) -> Generator[Progress, None, list[Image.Image]]:
    """Take drawings through their remaining stages; return their pictures in order."""
    yield from _run_stage(studio, "prior", drawings)
    yield from _run_stage(studio, "decoder", drawings)
    images: dict[Drawing, Image.Image] = {}
    for group in _by_shape(drawings, "decoder"):
        chunk = decode_chunk(group[0].picture.plan)
        for start in range(0, len(group), chunk):
            some = group[start : start + chunk]
            images.update(zip(some, (finish() for finish in studio.decode(some)), strict=True))
            yield Progress("decode", len(images), len(drawings))
    return [images[drawing] for drawing in drawings]


def run_to_end(run: Generator[Progress, None, R], watch: Callable[[Progress], None] | None = None) -> R:
    """Drive a run and return its result. `watch` is called after every step; if it raises, the run ends."""
    while True:
        try:
            seen = next(run)
        except StopIteration as finished:
            result: R = finished.value
            return result
        if watch is not None:
            watch(seen)


def _run_stage(
    studio: Studio, stage: Literal["prior", "decoder"], drawings: Sequence[Drawing]
) -> Iterator[Progress]:
    """Make all steps of a stage, one shape after the other."""
    groups = _by_shape([drawing for drawing in drawings if drawing.stage == stage], stage)
    lengths = [max(_num_steps(drawing, stage) for drawing in group) for group in groups]
    step = 0
    for group in groups:
        while active := [drawing for drawing in group if drawing.stage == stage]:
            studio.step(active, _ALL_ROWS)
            for drawing in active:
                if drawing.stage != stage:
                    _check(studio, drawing)
            step += 1
            latents = torch.stack([_seen(drawing) for drawing in group]) if stage == "prior" else None
            yield Progress(stage, step, sum(lengths), latents)


def _check(studio: Studio, drawing: Drawing) -> None:
    """Check the result of a stage; if it is flawed and was made in lower precision, make it again in fp32."""
    try:
        drawing.check()
    except FlawedResult:
        if not studio.retry_in_fp32(drawing):
            raise
        stage = drawing.stage
        while drawing.stage == stage:
            studio.step([drawing], _ALL_ROWS)
        drawing.check()


def _by_shape(drawings: Iterable[Drawing], stage: Literal["prior", "decoder"]) -> list[list[Drawing]]:
    groups: dict[tuple[int, int], list[Drawing]] = {}
    for drawing in drawings:
        plan = drawing.picture.plan
        groups.setdefault(plan.prior_grid if stage == "prior" else plan.decoder_grid, []).append(drawing)
    return list(groups.values())


def _num_steps(drawing: Drawing, stage: Literal["prior", "decoder"]) -> int:
    return drawing.picture.prior_steps if stage == "prior" else drawing.picture.decoder_steps


def _seen(drawing: Drawing) -> Tensor:
    """Return the clean latents that Stage C predicts, or its result once it has ended."""
    latents = drawing.sample.clean if drawing.sample is not None else drawing.semantic
    assert latents is not None
    return latents


def _finished(drawing: Drawing, image: Image.Image) -> GeneratedImage:
    assert drawing.text is not None
    return GeneratedImage(
        image=image,
        settings=drawing.picture.settings,
        resampled_from=drawing.picture.plan.resampled_from,
        prompt_truncated=drawing.text.truncated[0],
        prompt_tokens=drawing.text.num_tokens[0],
    )
