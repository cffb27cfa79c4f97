"""Code shared by the layers for other programs' clients: from their members to an ended job.

A layer renames the members of a request and shapes the answer. It waits for its pictures, because its clients
know nothing of jobs, and ignores unknown members, because clients send what only other servers understand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import ConfigDict

from app.api.bodies import GenerationMembers
from app.api.deps import Services
from app.api.gateway import Exchange
from app.api.generation import (
    Order,
    accept,
    picture_size,
    seeds_for,
    shared_members,
    size_for,
    wait_for_end,
)
from app.api.idempotency import idempotency_of
from app.api.mistakes import validated
from app.api.prefer import Preference
from app.api.sources import Received
from app.jobs.job import Job
from app.schemas import (
    AnySide,
    DecoderSteps,
    GenerationRequest,
    NumImages,
    OutputFormat,
    PriorSteps,
    Quality100,
)


class LayerBody(GenerationMembers):
    """The native members of a request to a layer. Sides may be any whole numbers."""

    model_config = ConfigDict(extra="ignore")

    width: AnySide | None = None
    height: AnySide | None = None
    num_images: NumImages = 1
    prior_num_inference_steps: PriorSteps = 20
    decoder_num_inference_steps: DecoderSteps = 10
    output_quality: Quality100 = 90


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to a layer: its body as received, and in native members."""

    members: Mapping[str, Any]
    body: LayerBody
    output_format: OutputFormat
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The result of a request to a layer."""

    job: Job  # ended, with pictures or without
    is_replay: bool


def in_native_members(given: Mapping[str, Any], sent_as: Mapping[str, str]) -> LayerBody:
    """Validate members that a layer has renamed; `sent_as` maps them to the caller's names.

    None counts as absent. Raises InvalidRequest.
    """
    present = {name: value for name, value in given.items() if value is not None}
    return validated(LayerBody, present, sent_as)


async def draw(request: Request, services: Services, exchange: Exchange, asked: Asked) -> Drawn:
    """Submit a job and wait for its end; by default it is canceled when the caller disconnects.

    Raises what `accept` and `wait_for_end` raise; the layer reports how the job ended.
    """
    order_of = partial(_order, request, services, asked)
    submitted = await accept(request, services, exchange, asked.body, order_of)
    ended = await wait_for_end(request, services, submitted.now, Preference())
    assert ended is not None, "only a caller that prefers so is answered before the end"
    return Drawn(ended, submitted.is_replay)


def _order(request: Request, services: Services, asked: Asked, received: Received) -> Order:
    """Return the order, with all defaults filled in and all limits checked."""
    body = asked.body
    like = picture_size(received) or received.prompt_size
    width, height = size_for(body.width, body.height, services, param="width", like=like, step=1)
    generation = GenerationRequest(
        width=width,
        height=height,
        seeds=seeds_for(body.seed, None, body.num_images, services, param="num_images"),
        prior_num_inference_steps=body.prior_num_inference_steps,
        decoder_num_inference_steps=body.decoder_num_inference_steps,
        output_format=asked.output_format,
        output_quality=body.output_quality,
        **shared_members(body, received),
    )
    return Order(
        generation=generation,
        body=body,
        preference=Preference(),
        received=received,
        idempotency=idempotency_of(request, asked.members, generation, services.settings.key_ttl),
        metadata=asked.metadata,
    )
