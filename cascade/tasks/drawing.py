"""Pictures of many callers in progress, each at its own stage and step, advanced together.

A `Drawing` holds all that changes while a picture is made. The `Studio` holds what drawings share: the
networks and caches of what was computed from texts. One thread begins and steps drawings; another may decode
and preview them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor

from cascade.acceleration import Graphs
from cascade.conditioning import TextEmbeddings, TextEncoder, pad_chunks
from cascade.errors import FlawedResult
from cascade.models import Models
from cascade.networks.adapters import Adapter
from cascade.networks.unet import Condition, Constants, UNet
from cascade.recent import Recent
from cascade.sampling.denoise import Batch, Guides, Network, Sample, in_parts
from cascade.tasks.image_prompts import embed_image
from cascade.tasks.picture import (
    NO_INPUTS,
    EncodedInputs,
    Picture,
    begin_decoder,
    begin_prior,
    decode,
    decode_chunk,
    encode_inputs,
    find_defect,
    finished,
    prior_condition,
    to_images,
)

CACHED_TEXTS = 256  # embeddings, 0.2 MB each at full size
CACHED_CONDITIONS = 16  # keys and values of Stage C, 45 MB each at full size
CACHED_BATCHES = 4
CACHED_IMAGES = 16  # of image prompts, with their embeddings


@dataclass(frozen=True, slots=True)
class TextKey:
    """Cache key of an encoded text."""

    text: str
    is_weighted: bool
    is_long: bool
    adapter: Adapter | None  # LoRAs that change the encoding of texts: one object for equal LoRAs


# Cache key of a condition of Stage C: text, number of its tokens, number of image prompts, LoRAs
ConditionKey = tuple[TextKey, int, int, Adapter | None]


@dataclass(slots=True, eq=False)
class Drawing:
    """The state of one picture on its way through the stages. At "decode", only Stage A is left."""

    picture: Picture
    models: Models
    caption: str | None = None  # read by Stage B in place of the prompt
    inputs: EncodedInputs = NO_INPUTS  # computed from the request's own pictures when it begins
    stage: Literal["prior", "decoder", "decode"] = "prior"
    text: TextEmbeddings | None = None  # of the prompt
    sample: Sample[Condition] | None = None  # of the current stage, once it has begun
    semantic: Tensor | None = None  # (16, h, w) fp32: the result of Stage C
    latents: Tensor | None = None  # (4, h, w) fp32: the result of Stage B
    usual_models: Models = field(init=False)  # what `models` is but for a stage in fp32
    fp32_stage: Literal["prior", "decoder"] | None = None  # the last stage sent back to be made in fp32

    def __post_init__(self) -> None:
        self.usual_models = self.models

    @property
    def step(self) -> int:
        """Number of steps made in the current stage."""
        return 0 if self.sample is None else self.sample.step

    @property
    def texts(self) -> tuple[str, str]:
        """Prompt, or the caption in its place, and negative prompt."""
        prompt, negative = self.picture.settings.texts
        return prompt if self.caption is None else self.caption, negative

    def resume(self, semantic: Tensor) -> None:
        """Continue with Stage B from a known result of Stage C, such as one kept from an earlier run."""
        self.semantic, self.stage = semantic, "decoder"

    def end_stage(self) -> None:
        """Enter the next stage, after the sample's last step."""
        assert self.sample is not None
        result, self.sample = self.sample.result, None
        self.models = self.usual_models
        if self.stage == "prior":
            self.semantic, self.stage = result, "decoder"
        else:
            self.latents, self.stage = result, "decode"

    def go_back(self, models: Models) -> None:
        """Return to the start of the stage that ended last, to repeat it with other weights."""
        self.models, self.sample = models, None
        if self.stage == "decode":
            self.latents, self.stage = None, "decoder"
        else:
            self.semantic, self.stage = None, "prior"
        self.fp32_stage = self.stage

    def check(self) -> None:
        """Raise `FlawedResult` if the result of the stage that ended last is unusable."""
        result = self.latents if self.stage == "decode" else self.semantic
        assert result is not None
        if fault := find_defect(result):
            raise FlawedResult(f"the latents of Stage {'B' if self.stage == 'decode' else 'C'} are {fault}")


class Studio:
    """The networks that make drawings, and the caches that drawings share."""

    def __init__(self, models: Models, networks: Mapping[str, Network[Condition]]) -> None:
        self.models = models
        self._networks = networks  # by stage
        self.texts: Recent[tuple[int, TextKey], TextEmbeddings] = Recent(CACHED_TEXTS)
        self._conditions: Recent[ConditionKey, Condition] = Recent(CACHED_CONDITIONS)
        self._batches: Recent[tuple[Sample[Condition], ...], Batch[Condition]] = Recent(CACHED_BATCHES)
        self._images: Recent[int, tuple[Image.Image, Tensor]] = Recent(CACHED_IMAGES)
        self._constants: WeakKeyDictionary[UNet, Constants] = WeakKeyDictionary()
        self._in_fp32: WeakValueDictionary[str, Models] = WeakValueDictionary()

    @torch.inference_mode()
    def begin(self, drawing: Drawing) -> None:
        """Encode the text and the request's pictures, draw the noise and prepare the condition.

        Raises:
            InvalidSetting: the checkpoint lacks a part that is needed, or a picture does not fit.
            CheckpointError: a LoRA's file cannot be used.
        """
        picture = drawing.picture
        drawing.inputs = encode_inputs(self.models, picture, self._embed)
        key, _ = self._keys(drawing)
        drawing.text = self._text(self.models.text_encoder, key)
        if picture.prior_steps == 0 and drawing.inputs.semantic is not None:
            drawing.resume(drawing.inputs.semantic)
        self._begin_stage(drawing)

    @torch.inference_mode()
    def step(self, drawings: Sequence[Drawing], rows: int) -> None:
        """Advance drawings of one stage, shape and precision by one step, or none if an error occurs.

        Each call of the network gets at most `rows` rows.
        """
        for drawing in drawings:
            self._begin_stage(drawing)
        groups: dict[int, list[Sample[Condition]]] = {}
        for drawing in drawings:
            if drawing.sample is not None:
                groups.setdefault(drawing.sample.guides.conditional.num_tokens, []).append(drawing.sample)
        network = in_parts(self._network(drawings[0]), rows)
        # Batches of an fp32 retry are not cached: its weights are to be freed when it ends.
        known = self._batches if drawings[0].models is self.models else Recent(0)
        batches = [known.get(tuple(samples), _batch) for samples in groups.values()]
        computed = [batch.compute_step(network) for batch in batches]
        if self.models.device.type == "cuda":  # synchronizing raises any error of the step here
            torch.cuda.current_stream(self.models.device).synchronize()
        for batch, (latents, clean) in zip(batches, computed, strict=True):
            batch.commit(latents, clean)
        for drawing in drawings:
            if drawing.sample is not None and drawing.sample.is_done:
                drawing.end_stage()
                self._batches.clear()  # they keep finished samples alive

    def forget(self, drawing: Drawing) -> None:
        """Release an abandoned drawing, by dropping all cached batches: the others are joined anew."""
        if drawing.sample is not None:
            self._batches.clear()

    def free_memory(self) -> None:
        """Drop what makes steps faster and could be made again."""
        self._batches.clear()
        for network in self._networks.values():
            if isinstance(network, Graphs):
                network.drop()

    def retry_in_fp32(self, drawing: Drawing) -> bool:
        """Go back to the start of the stage that ended last, in fp32; return False if it was already."""
        ended = "decoder" if drawing.stage == "decode" else "prior"
        network: Literal["stage_b", "stage_c"] = "stage_b" if ended == "decoder" else "stage_c"
        if self.models.dtype is torch.float32 or drawing.fp32_stage == ended:
            return False
        models = self._in_fp32.get(network)
        if models is None:
            models = self._in_fp32[network] = self.models.in_fp32(network)
        drawing.go_back(models)
        return True

    @torch.inference_mode()
    def decode(self, drawings: Sequence[Drawing]) -> list[Callable[[], Image.Image]]:
        """Run Stage A on drawings of one size; raises `FlawedResult`. Each returned call finishes a picture.

        Finishing is separate, because it needs no network, but a core for a time that grows with the size.
        """
        chunk = decode_chunk(drawings[0].picture.plan)
        parts = [drawings[start : start + chunk] for start in range(0, len(drawings), chunk)]
        with torch.cuda.stream(self._side_stream):
            return [image for part in parts for image in self._decode_part(part)]

    @torch.inference_mode()
    def preview(self, drawing: Drawing) -> Image.Image | None:
        """Return a preview of Stage C's prediction; None if it is not running, or there is no previewer."""
        previewer, sample = self.models.previewer, drawing.sample
        if previewer is None or sample is None or sample.step == 0 or drawing.stage != "prior":
            return None
        with torch.cuda.stream(self._side_stream):
            return to_images(previewer(sample.clean[None]))[0]

    def _decode_part(self, drawings: Sequence[Drawing]) -> list[Callable[[], Image.Image]]:
        """Call Stage A once, and again in fp32 if the result in lower precision is flawed."""
        pictures = [drawing.picture for drawing in drawings]
        latents = [drawing.latents for drawing in drawings if drawing.latents is not None]
        pixels = decode(self.models, pictures, latents)
        faults = [find_defect(each) for each in pixels]
        if any(faults) and self.models.dtype is not torch.float32:
            pixels = decode(self.models.in_fp32("stage_a"), pictures, latents)
            faults = [find_defect(each) for each in pixels]
        for fault in filter(None, faults):
            raise FlawedResult(f"the pixels are {fault}")
        drawn = zip(to_images(pixels), pictures, strict=True)
        return [partial(finished, image, picture) for image, picture in drawn]

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream | None:
        """Stream on a GPU whose work does not wait for a step that the other thread has begun meanwhile.

        There is only one, because freed memory is cached per stream: a new one would need as much again.
        """
        device = self.models.device
        return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _begin_stage(self, drawing: Drawing) -> None:
        """Draw the noise of the current stage and prepare its condition, unless that was done already."""
        if drawing.sample is not None:
            return
        models, picture, inputs = drawing.models, drawing.picture, drawing.inputs
        keys = self._keys(drawing)
        if drawing.semantic is not None:
            encoder = models.decoder_text_encoder
            pooled = [self._text(encoder, key).pooled for key in keys]
            constants = self._constants_of(models.stage_b)
            sample = begin_decoder(models, picture, drawing.semantic, pooled, inputs, constants=constants)
        else:
            sample = begin_prior(models, picture, self._guides(drawing, keys), inputs)
        drawing.sample = sample

    def _keys(self, drawing: Drawing) -> tuple[TextKey, TextKey]:
        """Return the keys of the prompt and of the negative prompt."""
        settings = drawing.picture.settings
        prompt, negative = drawing.texts
        adapter = drawing.inputs.adapter
        adapter = adapter if adapter is not None and adapter.changes_text else None
        key = TextKey(prompt, settings.weighted_prompt, settings.long_prompt, adapter)
        return key, replace(key, text=negative)

    def _text(self, encoder: TextEncoder, key: TextKey) -> TextEmbeddings:
        """Return the embeddings of a text, encoded by itself so that no bit of them depends on others."""
        return self.texts.get((id(encoder), key), lambda _: _encoded(encoder, key))

    def _embed(self, image: Image.Image) -> Tensor:
        """Return the embedding of an image prompt, (1, 1, d); pictures of one request share the object."""
        encoder = self.models.image_encoder
        assert encoder is not None, "whoever asks for an embedding has looked"
        # The image is kept with its embedding, so that no other object can have its id.
        _, embedding = self._images.get(id(image), lambda _: (image, embed_image(encoder, image)))
        return embedding

    def _guides(self, drawing: Drawing, keys: tuple[TextKey, TextKey]) -> Guides[Condition]:
        """Return equally long conditions of the prompt with image prompts and of the negative one without."""
        models, embeds = drawing.models, drawing.inputs.image_embeds
        num_images = 1 if embeds is None else embeds.shape[1]
        is_guided = drawing.picture.prior_rows > 1
        texts = [self._text(models.text_encoder, key) for key in keys[: 1 + is_guided]]
        length = max(text.hidden.shape[1] for text in texts)
        adapter = drawing.inputs.adapter
        conditions = [
            self._prior_condition(models, self._padded(text, keys[0], length), embeds, adapter)
            if embeds is not None and row == 0
            else self._condition(models, (key, length, num_images, adapter))
            for row, (key, text) in enumerate(zip(keys, texts, strict=False))
        ]
        return Guides(conditions[0], conditions[1] if is_guided else None)

    def _condition(self, models: Models, key: ConditionKey) -> Condition:
        """Return Stage C's condition of a text without image prompts; cached, except for fp32 retries."""

        def prepare(key: ConditionKey) -> Condition:
            text, length, num_images, adapter = key
            embeddings = self._padded(self._text(models.text_encoder, text), text, length)
            width = models.stage_c.config.clip_image_in_channels
            none = torch.zeros(1, num_images, width, device=models.device)
            return self._prior_condition(models, embeddings, none, adapter)

        return self._conditions.get(key, prepare) if models is self.models else prepare(key)

    def _prior_condition(
        self, models: Models, text: TextEmbeddings, embeds: Tensor, adapter: Adapter | None
    ) -> Condition:
        constants = self._constants_of(models.stage_c)
        return prior_condition(models, text, embeds, adapter, constants=constants)

    def _constants_of(self, network: UNet) -> Constants:
        """Return the constants of a network, shared by all its conditions and kept as long as it lives."""
        if network not in self._constants:
            self._constants[network] = network.constants()
        return self._constants[network]

    def _padded(self, text: TextEmbeddings, key: TextKey, length: int) -> TextEmbeddings:
        if text.hidden.shape[1] == length:
            return text
        empty = TextKey("", is_weighted=False, is_long=False, adapter=key.adapter)
        return pad_chunks(text, self._text(self.models.text_encoder, empty), length)

    def _network(self, drawing: Drawing) -> Network[Condition]:
        if drawing.models is self.models:
            return self._networks[drawing.stage]
        return drawing.models.stage_c if drawing.stage == "prior" else drawing.models.stage_b


def _batch(samples: tuple[Sample[Condition], ...]) -> Batch[Condition]:
    return Batch(samples, Condition.cat)


def _encoded(encoder: TextEncoder, key: TextKey) -> TextEmbeddings:
    """Encode one text. An ordinary one takes the plain path, so that unused options cannot change it."""
    if not key.is_weighted and not key.is_long and key.adapter is None:
        return encoder.encode([key.text])
    return encoder.encode([key.text], weighted=key.is_weighted, long=key.is_long, adapter=key.adapter)
