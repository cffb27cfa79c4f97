"""Evaluation: draw prompts, read the pictures with the verifier and count what is right.

Held-out prompts have the wordings of the training, but scenes that it never saw. Free prompts are in
wordings of their own: a language model composed them one by one, without knowing any wording of the training.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from PIL import Image

from cascade.evaluation.reconstruction import Reconstruction, reconstruct
from cascade.evaluation.verifier import Verdict, judge, read_picture
from cascade.models import Models
from cascade.tasks.generation import generate, run_to_end
from cascade.tasks.settings import ImageSettings
from cascade.training.captions import Caption, caption
from cascade.training.scenes import Scene, held_out_generator, sample_scene

Aspect = Literal["background", "count", "colours", "shapes", "is_right", "place", "size"]
ASPECTS: dict[Aspect, str] = {
    "background": "background",
    "count": "number",
    "colours": "colours",
    "shapes": "shapes",
    "is_right": "all of these",
    "place": "place, where named",
    "size": "size, where named",
}
NUM_TIMED = 10
BATCH_SIZE = 16

Draw = Callable[[list[ImageSettings]], list[Image.Image]]  # returns the first picture of each request


@dataclass(frozen=True, slots=True)
class Judged:
    """A prompt, its picture, and what the verifier found in it."""

    caption: Caption
    seed: int
    image: Image.Image
    seen: Scene
    verdict: Verdict

    @property
    def num_things(self) -> int:
        """Number of things that the prompt asks for."""
        return 2 if "second_shape" in self.caption.facts else 1


@dataclass(frozen=True, slots=True)
class Score:
    """Number of pictures that are right in an aspect, of those where it could be judged."""

    right: int
    of: int

    def __str__(self) -> str:
        if not self.of:
            return "-"
        return f"{100 * self.right / self.of:.1f} % ({self.right}/{self.of})"


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of an evaluation."""

    model: str
    settings: ImageSettings  # shared by all pictures, except prompt and seed; `seed` is that of the first
    judged: tuple[Judged, ...]  # of held-out prompts
    free: tuple[Judged, ...]  # of free prompts
    seconds_per_picture: float  # median over the pictures drawn one by one
    reconstruction: Reconstruction | None  # None: no encoder, or none were asked for

    def score(self, aspect: Aspect, num_things: int | None = None, *, free: bool = False) -> Score:
        """Return the score over all held-out or free prompts, or those that ask for `num_things` things."""
        judged = self.free if free else self.judged
        chosen = [one for one in judged if num_things in (None, one.num_things)]
        values = [value for one in chosen if (value := getattr(one.verdict, aspect)) is not None]
        return Score(sum(values), len(values))


def evaluate(
    models: Models,
    num_prompts: int = 300,
    seed: int = 0,
    *,
    num_free: int = 370,
    steps: int = 20,
    guidance_scale: float = 4.0,
    decoder_steps: int = 10,
    num_reconstructions: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Draw `num_prompts` held-out prompts, half with one thing and half with two, and judge the pictures.

    Args:
        seed: chooses the held-out prompts and is the seed of the first picture.
        num_free: free prompts to draw, too: the first ones, at most all.
        progress: called with the number of pictures made and the number to make.
    """
    settings = ImageSettings(
        prompt="-", seed=seed, steps=steps, guidance_scale=guidance_scale, decoder_steps=decoder_steps
    )
    num_reconstructions = num_reconstructions if models.effnet is not None else 0
    held_out, free = held_out_captions(num_prompts, seed), free_captions()[:num_free]
    total = num_prompts + len(free) + num_reconstructions

    def report_done(done: int) -> None:
        if progress is not None:
            progress(done, total)

    def draw(requests: list[ImageSettings]) -> list[Image.Image]:
        return [images[0].image for images in run_to_end(generate(models, requests))]

    judged, seconds = draw_and_judge(draw, held_out, settings, report_done)
    judged_free: tuple[Judged, ...] = ()
    if free:
        judged_free, _ = draw_and_judge(draw, free, settings, lambda done: report_done(num_prompts + done))
    reconstruction = reconstruct(models, num_reconstructions, seed) if num_reconstructions else None
    report_done(total)
    return Report(models.name, settings, judged, judged_free, seconds, reconstruction)


def draw_and_judge(
    draw: Draw, captions: list[Caption], settings: ImageSettings, report_done: Callable[[int], None]
) -> tuple[tuple[Judged, ...], float]:
    """Draw and judge pictures of `captions`; also return the median seconds of those drawn one by one."""
    assert settings.seed is not None
    first = settings.seed
    requests = [replace(settings, prompt=one.text, seed=first + i) for i, one in enumerate(captions)]
    images: list[Image.Image] = []
    seconds = []
    for batch in _batches(requests):
        start = time.perf_counter()
        images += draw(batch)
        if len(batch) == 1:
            seconds.append(time.perf_counter() - start)
        report_done(len(images))
    return tuple(map(_judge, captions, requests, images)), statistics.median(seconds)


def held_out_captions(count: int, seed: int) -> list[Caption]:
    """Return captions of held-out scenes, alternately with one thing and with two."""
    rng = held_out_generator(seed)
    return [caption(_scene_with(1 + index % 2, rng), rng) for index in range(count)]


def free_captions() -> list[Caption]:
    """Return all free prompts, with what each states."""
    lines = (
        files("cascade.evaluation").joinpath("free_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [_free_caption(json.loads(line)) for line in lines]


def _free_caption(prompt: dict[str, Any]) -> Caption:
    facts = {"background": prompt["background"]} if "background" in prompt else {}
    for mention, thing in zip(("first", "second"), prompt["things"], strict=False):
        facts |= {f"{mention}_{name}": value for name, value in thing.items()}
    return Caption(prompt["prompt"], facts)


def _scene_with(num_things: int, rng: np.random.Generator) -> Scene:
    while len((scene := sample_scene(rng)).things) != num_things:
        pass
    return scene


def _batches(requests: list[ImageSettings]) -> Iterator[list[ImageSettings]]:
    """Yield the first few requests alone, to be timed; the rest in batches, which give the same pictures."""
    yield from ([request] for request in requests[:NUM_TIMED])
    for start in range(NUM_TIMED, len(requests), BATCH_SIZE):
        yield requests[start : start + BATCH_SIZE]


def _judge(asked: Caption, request: ImageSettings, image: Image.Image) -> Judged:
    assert request.seed is not None
    seen = read_picture(np.asarray(image))
    return Judged(asked, request.seed, image, seen, judge(asked.facts, seen))
