"""Text to image: prompts through Stage C, Stage B and Stage A, many requests at once.

`generate` is a generator, so the caller drives it, shows progress and may stop. Requests keep their own
settings, and a picture is the same in any company.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings, encode_texts
from cascade.models import Models
from cascade.networks.unet import Condition
from cascade.sampling.denoise import Network, Sample, denoise
from cascade.tasks.picture import (
    Picture,
    begin_decoder,
    begin_prior,
    decode,
    decode_chunk,
    finish,
    plan_pictures,
    prior_condition,
)
from cascade.tasks.settings import TextToImage


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """A finished picture and how it was made."""

    image: Image.Image
    settings: TextToImage  # all filled in: asked for again, they give this picture again
    resampled_from: tuple[int, int] | None  # the size it was drawn at, if scaled
    prompt_truncated: bool
    prompt_tokens: int  # before truncation, with begin and end


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. Steps of "decode" are pictures."""

    stage: Literal["prior", "decoder", "decode"]
    step: int
    steps: int
    latents: Tensor | None = None  # (b, 16, h, w): clean latents as Stage C predicts them now, for previews


@dataclass(slots=True)
class _Work:
    """A picture with what the stages have made of it so far."""

    picture: Picture
    text: TextEmbeddings = field(init=False)  # of the prompt
    semantic: Tensor = field(init=False)  # (16, h, w): the result of Stage C
    latents: Tensor = field(init=False)  # (4, h, w): the result of Stage B
    image: Image.Image = field(init=False)

    @property
    def finished(self) -> GeneratedImage:
        return GeneratedImage(
            image=self.image,
            settings=self.picture.settings,
            resampled_from=self.picture.plan.resampled_from,
            prompt_truncated=self.text.truncated[0],
            prompt_tokens=self.text.num_tokens[0],
        )


Drawn = TypeVar("Drawn", _Work, Sample[Condition])


@torch.inference_mode()
def generate(
    models: Models, requests: Sequence[TextToImage]
) -> Generator[Progress, None, list[list[GeneratedImage]]]:
    """Make the pictures of all `requests` together; returns them as one list per request."""
    per_request = [[_Work(picture) for picture in plan_pictures(models, request)] for request in requests]
    works = [work for group in per_request for work in group]
    texts = list(dict.fromkeys(text for work in works for text in work.picture.settings.texts))
    embeddings = encode_texts(models.text_encoder, texts)
    yield from _run_prior(models, works, embeddings)
    if models.decoder_text_encoder is not models.text_encoder:
        embeddings = encode_texts(models.decoder_text_encoder, texts)
    yield from _run_decoder(models, works, embeddings)
    yield from _decode(models, works)
    return [[work.finished for work in group] for group in per_request]


def _run_prior(
    models: Models, works: Sequence[_Work], texts: dict[str, TextEmbeddings]
) -> Iterator[Progress]:
    """Stage C: from noise to the semantic latents."""
    together = prior_condition(models, TextEmbeddings.cat(list(texts.values())))
    conditions = {text: together[row : row + 1] for row, text in enumerate(texts)}
    samples = [begin_prior(models, work.picture, conditions) for work in works]
    for step, steps, active in _steps(models.stage_c, samples):
        yield Progress("prior", step, steps, torch.stack([sample.clean for sample in active]))
    for work, sample in zip(works, samples, strict=True):
        work.text, work.semantic = texts[work.picture.settings.prompt], sample.result


def _run_decoder(
    models: Models, works: Sequence[_Work], texts: dict[str, TextEmbeddings]
) -> Iterator[Progress]:
    """Stage B: from noise to Stage A's latents, guided by the semantic latents."""
    samples = [begin_decoder(models, work.picture, work.semantic, texts) for work in works]
    for step, steps, _ in _steps(models.stage_b, samples):
        yield Progress("decoder", step, steps)
    for work, sample in zip(works, samples, strict=True):
        work.latents = sample.result


def _decode(models: Models, works: Sequence[_Work]) -> Iterator[Progress]:
    """Stage A: from latents to pixels, a few pictures at a time."""
    done = 0
    for group in _by_shape(works):
        chunk = decode_chunk(group[0].picture.plan)
        for start in range(0, len(group), chunk):
            some = group[start : start + chunk]
            pictures = [work.picture for work in some]
            pixels = decode(models, pictures, [work.latents for work in some])
            for work, image in zip(some, finish(pixels, pictures), strict=True):
                work.image = image
            done += len(some)
            yield Progress("decode", done, len(works))


def _steps(
    network: Network[Condition], samples: Sequence[Sample[Condition]]
) -> Iterator[tuple[int, int, list[Sample[Condition]]]]:
    """Denoise all `samples`, one shape after the other; yields step, number of steps and those in work."""
    groups = list(_by_shape(samples))
    total = sum(max(sample.levels.steps for sample in group) for group in groups)
    step = 0
    for group in groups:
        for _ in denoise(network, group, Condition.cat):
            step += 1
            yield step, total, group


def _by_shape(items: Iterable[Drawn]) -> Iterable[list[Drawn]]:
    groups: dict[torch.Size, list[Drawn]] = {}
    for item in items:
        groups.setdefault(item.latents.shape, []).append(item)
    return groups.values()
