"""Decoding of Stage C's latents by Stages B and A, and reconstruction of pictures by encoding and decoding.

Decoding draws a new picture from the latents: shapes, colours and places are kept, fine texture is not.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from cascade.models import Models
from cascade.sizes import plan_size
from cascade.tasks.drawing import Drawing, Studio
from cascade.tasks.encoding import encode
from cascade.tasks.generation import Progress, draw
from cascade.tasks.latents import Latents
from cascade.tasks.picture import Picture
from cascade.tasks.settings import ImageSettings

_NO_CAPTION = "-"  # replaces an empty caption in the settings, which refuse a blank prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """Settings for decoding latents. Sizes and a preset that are None are taken from the latents.

    `prompt` is an optional caption of the picture for Stage B; the official code leaves it empty.
    """

    width: int | None = None
    height: int | None = None
    seed: int = 0
    prompt: str = ""
    decoder_steps: int = 10
    decoder_guidance_scale: float = 0.0
    preset: str | None = None
    sampler: str = "ddpm"
    any_model: bool = False  # accept latents of another encoder, too

    def check(self) -> None:
        """Raise `InvalidSetting` if a setting is wrong regardless of the latents."""
        self._request(self.width, self.height, self.preset or "official")

    def of(self, latents: Latents) -> ImageSettings:
        """Return checked image settings, with absent ones taken from `latents`."""
        return self._request(
            latents.width if self.width is None else self.width,
            latents.height if self.height is None else self.height,
            latents.preset if self.preset is None else self.preset,
        )

    def _request(self, width: int | None, height: int | None, preset: str) -> ImageSettings:
        return ImageSettings(
            prompt=self.prompt if self.prompt.strip() else _NO_CAPTION,
            width=width,
            height=height,
            seed=self.seed,
            decoder_steps=self.decoder_steps,
            decoder_guidance_scale=self.decoder_guidance_scale,
            preset=preset,
            sampler=self.sampler,
            shares_generator=False,  # no run of Stage C comes before
        )


@torch.inference_mode()
def decode_all(
    models: Models, latents: Sequence[Latents], settings: Sequence[DecodeSettings]
) -> Generator[Progress, None, list[Image.Image]]:
    """Decode several latents, each by its own settings; latents of one shape share the steps of Stage B.

    Raises:
        InvalidSetting: a setting is wrong, or other models made the latents; nothing was computed.
        FlawedResult: a stage produced invalid values for one of them, even in fp32.
    """
    studio = Studio(models, {"decoder": models.stage_b})
    drawings = [_planned(models, *pair) for pair in zip(latents, settings, strict=True)]
    return (yield from draw(studio, drawings))


def _planned(models: Models, latents: Latents, wanted: DecodeSettings) -> Drawing:
    request = wanted.of(latents)
    plan = plan_size(request.width, request.height, models.native)
    if not wanted.any_model:
        latents.check_model(models)
    drawing = Drawing(Picture(request, plan), models, caption=wanted.prompt if wanted.prompt.strip() else "")
    drawing.resume(latents.values.to(models.device))
    return drawing


def reconstruct_all(
    models: Models, images: Sequence[Image.Image], settings: Sequence[DecodeSettings]
) -> Generator[Progress, None, list[Image.Image]]:
    """Encode pictures, and decode them by Stages B and A: the result shows what the model keeps of them."""
    latents = [
        encode(
            models,
            [image],
            width=wanted.width,
            height=wanted.height,
            preset=wanted.preset or "official",
        )[0]
        for image, wanted in zip(images, settings, strict=True)
    ]
    return (yield from decode_all(models, latents, settings))
