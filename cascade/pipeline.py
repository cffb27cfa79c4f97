"""`Cascade`, the entry point of the library: a checkpoint that is ready to make pictures."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from os import PathLike
from typing import Self, Unpack

import torch
from PIL import Image

from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.tasks.autoencode import DecodeSettings, decode_all, reconstruct_all
from cascade.tasks.encoding import encode
from cascade.tasks.generation import GeneratedImage, Progress, generate, run_to_end
from cascade.tasks.latents import Latents
from cascade.tasks.settings import STRENGTH, ImagePrompt, ImageSettings, Options


class Cascade(Models):
    """The loaded models of a checkpoint with the tasks that they can do.

    It keeps no state between calls, so threads may share one, though without a gain in speed.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] = "tiny",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a checkpoint: "tiny" (shipped with the library), a folder, or a repository of the hub.

        Raises:
            CheckpointError: the checkpoint is incomplete or not what it says it is.
            InvalidSetting: device or dtype is unknown, or does not fit the checkpoint.
        """
        from cascade.checkpoints.load import load_cascade

        models = load_cascade(
            source,
            device=device,
            dtype=dtype,
            revision=revision,
            token=token,
            variant=variant,
            local_files_only=local_files_only,
        )
        return cls(**{field.name: getattr(models, field.name) for field in fields(Models)})

    def text_to_image(
        self,
        prompt: str,
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        """Make `num_images` pictures of `prompt`, of exactly `width` x `height` pixels.

        The options are those of `ImageSettings`. `progress` is called after every step; an exception that it
        raises ends the run.

        Raises:
            InvalidSetting: a setting is out of range; nothing was computed.
        """
        return self._generate(ImageSettings(prompt=prompt, **options), progress)

    def image_to_image(
        self,
        image: Image.Image,
        prompt: str = "",
        *,
        strength: float = STRENGTH,
        noise_at_sampling_shift: bool = False,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        """Draw `image` again, more freely the larger `strength` is.

        At 0 the picture comes back as the model reconstructs it, at 1 it has no influence. It is scaled and
        cropped to `width` and `height`, by default its own size or the nearest that is allowed.

        Raises:
            InvalidSetting: a setting is out of range, or the checkpoint has no encoder.
        """
        settings = ImageSettings(
            prompt=prompt,
            image=image,
            strength=strength,
            noise_at_sampling_shift=noise_at_sampling_shift,
            **options,
        )
        return self._generate(settings, progress)

    def inpaint(
        self,
        image: Image.Image,
        prompt: str,
        mask: Image.Image | None = None,
        *,
        strength: float = 1.0,
        feather: int = 0,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        """Redraw what is white in `mask` or, without a mask, transparent in `image`.

        The rest is returned bit-identical. With `strength` below 1 the new part still resembles the old one.
        The new part fades in over `feather` pixels inside the mask.

        Raises:
            InvalidSetting: a setting is out of range, there is nothing to draw, or the checkpoint has no
                encoder.
        """
        settings = ImageSettings(
            prompt=prompt, image=image, mask=mask, strength=strength, feather=feather, **options
        )
        if not settings.repaints:
            raise InvalidSetting("mask", "is needed: no pixel of the image is transparent")
        return self._generate(settings, progress)

    def outpaint(
        self,
        image: Image.Image,
        prompt: str,
        *,
        anchor: str = "center",
        feather: int = 0,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        """Draw what is around `image`, which stands at `anchor` on a canvas of `width` x `height`.

        Raises:
            InvalidSetting: a setting is out of range, the picture is larger than the canvas, or the
                checkpoint has no encoder.
        """
        settings = ImageSettings(prompt=prompt, image=image, anchor=anchor, feather=feather, **options)
        return self._generate(settings, progress)

    def image_variation(
        self,
        images: Image.Image | Sequence[Image.Image | ImagePrompt],
        prompt: str = "",
        *,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> list[GeneratedImage]:
        """Draw variations of up to 15 `images`, mixed, with or without a prompt.

        Raises:
            InvalidSetting: a setting is out of range, or the checkpoint has no vision tower.
        """
        several = [images] if isinstance(images, Image.Image) else images
        prompts = [each if isinstance(each, ImagePrompt) else ImagePrompt(each) for each in several]
        if not prompts:
            raise InvalidSetting("image_prompts", "must be one picture or more")
        options["image_prompts"] = tuple(prompts)
        return self._generate(ImageSettings(prompt=prompt, **options), progress)

    def _generate(
        self, request: ImageSettings, progress: Callable[[Progress], None] | None
    ) -> list[GeneratedImage]:
        """Make the pictures of one request, of any task."""
        [images] = run_to_end(generate(self, [request]), progress)
        return images

    def encode(
        self,
        image: Image.Image,
        *,
        width: int | None = None,
        height: int | None = None,
        preset: str = "official",
    ) -> Latents:
        """Encode a picture as latents of Stage C, 42 times smaller per side: 1024x1024 becomes 16 x 24 x 24.

        It is scaled and cropped to `width` and `height`, by default its own size or the nearest allowed.

        Raises:
            InvalidSetting: the size is not allowed, or the checkpoint has no encoder.
        """
        return encode(self, [image], width=width, height=height, preset=preset)[0]

    def decode(
        self,
        latents: Latents,
        settings: DecodeSettings | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Image.Image:
        """Decode latents to a picture with Stages B and A.

        Raises:
            InvalidSetting: a setting is wrong, or another encoder made the latents; nothing was computed.
        """
        [image] = run_to_end(decode_all(self, [latents], [settings or DecodeSettings()]), progress)
        return image

    def reconstruct(
        self,
        image: Image.Image,
        settings: DecodeSettings | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Image.Image:
        """Encode and decode a picture, which shows what the model keeps of it.

        Raises:
            InvalidSetting: a setting is wrong, or the checkpoint has no encoder; nothing was computed.
        """
        [drawn] = run_to_end(reconstruct_all(self, [image], [settings or DecodeSettings()]), progress)
        return drawn
