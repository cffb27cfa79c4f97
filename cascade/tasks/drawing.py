"""Pictures of many callers on their way, each at a stage and step of its own, advanced together.

A `Drawing` holds all that changes while a picture is made. The `Studio` holds what all share: the
networks and what was computed last from texts. One thread begins and steps drawings; another may decode and
preview them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import TextEmbeddings, TextEncoder
from cascade.models import Models
from cascade.networks.unet import Condition
from cascade.recent import Recent
from cascade.sampling.denoise import Batch, Network, Sample, in_parts
from cascade.tasks.picture import (
    Picture,
    begin_decoder,
    begin_prior,
    decode,
    decode_chunk,
    finish,
    flaw,
    prior_condition,
    to_images,
)

CACHED_TEXTS = 256  # embeddings: 0.2 MB each at full size
CACHED_CONDITIONS = 16  # keys and values of Stage C: 45 MB each at full size
CACHED_BATCHES = 4


class Flawed(ArithmeticError):
    """What a stage made cannot be a picture: not finite, or all the same."""


@dataclass(slots=True, eq=False)
class Drawing:
    """One picture on its way through the stages. "decode" is where Stage A is all that is left."""

    picture: Picture
    models: Models
    stage: Literal["prior", "decoder", "decode"] = "prior"
    text: TextEmbeddings | None = None  # of the prompt
    sample: Sample[Condition] | None = None  # of the stage in work, once it has begun
    semantic: Tensor | None = None  # (16, h, w) fp32: the result of Stage C
    latents: Tensor | None = None  # (4, h, w) fp32: the result of Stage B

    def resume(self, semantic: Tensor) -> None:
        """Go on from the result of Stage C that was kept of an earlier run."""
        self.semantic, self.stage = semantic, "decoder"

    def end_stage(self) -> None:
        """Enter the next stage once the sample has made its last step."""
        assert self.sample is not None
        result, self.sample = self.sample.result, None
        if self.stage == "prior":
            self.semantic, self.stage = result, "decoder"
        else:
            self.latents, self.stage = result, "decode"

    def go_back(self, models: Models) -> None:
        """Stand before the stage that ended last, to make it again with other weights."""
        self.models, self.sample = models, None
        if self.stage == "decode":
            self.latents, self.stage = None, "decoder"
        else:
            self.semantic, self.stage = None, "prior"

    def check(self) -> None:
        """Raise `Flawed` when the stage that ended last made nothing that can be gone on with."""
        result = self.latents if self.stage == "decode" else self.semantic
        assert result is not None
        if fault := flaw(result):
            raise Flawed(f"the latents of Stage {'B' if self.stage == 'decode' else 'C'} are {fault}")


class Studio:
    """The networks at work on drawings."""

    def __init__(self, models: Models, networks: Mapping[str, Network[Condition]]) -> None:
        self.models = models
        self._networks = networks  # by stage
        self.texts: Recent[tuple[int, str], TextEmbeddings] = Recent(CACHED_TEXTS)
        self._conditions: Recent[str, Condition] = Recent(CACHED_CONDITIONS)
        self._batches: Recent[tuple[Sample[Condition], ...], Batch[Condition]] = Recent(CACHED_BATCHES)
        self._mappers: dict[str, Condition] = {}  # conditions without rows, of which all of a stage share
        self._in_fp32: WeakValueDictionary[str, Models] = WeakValueDictionary()

    @torch.inference_mode()
    def begin(self, drawing: Drawing) -> None:
        """Encode the text, draw the noise, prepare the condition."""
        drawing.text = self._text(self.models.text_encoder, drawing.picture.settings.prompt)
        self._begin_stage(drawing)

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing], rows: int) -> None:
        """Advance all, of one stage, shape and precision, by one step; or none, when anything fails.

        The network is called for at most so many rows at once.
        """
        for drawing in drawings:
            self._begin_stage(drawing)
        samples = [drawing.sample for drawing in drawings if drawing.sample is not None]
        batch = self._batches.get(tuple(samples), lambda same: Batch(same, Condition.cat))
        latents, clean = batch.advanced(in_parts(self._network(drawings[0]), rows))
        if latents.is_cuda:  # where an error of the step comes out, if there is one
            torch.cuda.current_stream(latents.device).synchronize()
        batch.take(latents, clean)
        for drawing, sample in zip(drawings, samples, strict=True):
            if sample.is_done:
                drawing.end_stage()
                self._batches.clear()  # they hold on to what is done with

    def retry_in_fp32(self, drawing: Drawing) -> bool:
        """Go back to where the stage that ended last began, with fp32 weights; False where it had them."""
        if self.models.dtype is torch.float32 or drawing.models is not self.models:
            return False
        network: Literal["stage_b", "stage_c"] = "stage_b" if drawing.stage == "decode" else "stage_c"
        models = self._in_fp32.get(network)
        if models is None:
            models = self._in_fp32[network] = self.models.in_fp32(network)
        drawing.go_back(models)
        return True

    @torch.inference_mode()
    def decode(self, drawings: Sequence[Drawing]) -> list[Image.Image]:
        """Stage A, of drawings of one size; raises `Flawed`."""
        chunk = decode_chunk(drawings[0].picture.plan)
        parts = [drawings[start : start + chunk] for start in range(0, len(drawings), chunk)]
        with torch.cuda.stream(self._side_stream()):
            return [image for part in parts for image in self._decode_part(part)]

    @torch.inference_mode()
    def preview(self, drawing: Drawing) -> Image.Image | None:
        """What Stage C has in mind now, if it is at work and the checkpoint has a previewer."""
        previewer, sample = self.models.previewer, drawing.sample
        if previewer is None or sample is None or sample.step == 0 or drawing.stage != "prior":
            return None
        with torch.cuda.stream(self._side_stream()):
            return to_images(previewer(sample.clean[None]))[0]

    def _decode_part(self, drawings: Sequence[Drawing]) -> list[Image.Image]:
        """One call of Stage A, and a second one in fp32 where the first in less precision went wrong."""
        pictures = [drawing.picture for drawing in drawings]
        latents = [drawing.latents for drawing in drawings if drawing.latents is not None]
        pixels = decode(self.models, pictures, latents)
        if any(map(flaw, pixels)) and self.models.dtype is not torch.float32:
            pixels = decode(self.models.in_fp32("stage_a"), pictures, latents)
        for fault in filter(None, map(flaw, pixels)):
            raise Flawed(f"the pixels are {fault}")
        return finish(pixels, pictures)

    def _side_stream(self) -> torch.cuda.Stream | None:
        """On a GPU, what runs there does not wait for a step that the other thread has begun meanwhile."""
        device = self.models.device
        return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _begin_stage(self, drawing: Drawing) -> None:
        """Draw the noise of the stage in work and prepare its condition, unless that was done already."""
        if drawing.sample is not None:
            return
        models, settings = drawing.models, drawing.picture.settings
        if drawing.semantic is not None:
            encoder = models.decoder_text_encoder
            texts = {text: self._text(encoder, text) for text in settings.texts}
            sample = begin_decoder(models, drawing.picture, drawing.semantic, texts)
        else:
            needed = settings.texts if settings.guidance_scale > 1 else settings.texts[:1]
            conditions = {text: self._condition(models, text) for text in needed}
            sample = begin_prior(models, drawing.picture, conditions)
        if models is self.models:
            mappers = self._mappers.setdefault(drawing.stage, sample.condition[:0])
            sample.condition = sample.condition.sharing(mappers)
            sample.unguided = None if sample.unguided is None else sample.unguided.sharing(mappers)
        drawing.sample = sample

    def _text(self, encoder: TextEncoder, text: str) -> TextEmbeddings:
        """A text is encoded by itself, so that no bit of it depends on others."""
        return self.texts.get((id(encoder), text), lambda _: encoder.encode([text]))

    def _condition(self, models: Models, text: str) -> Condition:
        """What a text tells Stage C; remembered, unless it is for a second try."""

        def prepare(text: str) -> Condition:
            return prior_condition(models, self._text(models.text_encoder, text))

        return self._conditions.get(text, prepare) if models is self.models else prepare(text)

    def _network(self, drawing: Drawing) -> Network[Condition]:
        if drawing.models is self.models:
            return self._networks[drawing.stage]
        return drawing.models.stage_c if drawing.stage == "prior" else drawing.models.stage_b
