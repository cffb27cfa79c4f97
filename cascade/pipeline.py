"""Cascade: a checkpoint, ready to make pictures. The front door of the library."""

from collections.abc import Callable
from dataclasses import fields
from os import PathLike
from typing import Self

import torch

from cascade.models import Models
from cascade.tasks.settings import TextToImage
from cascade.tasks.text_to_image import GeneratedImage, Progress, generate


class Cascade(Models):
    """The loaded models of a checkpoint with the tasks that they can do.

    It keeps nothing between calls, so threads may share one; they gain no time by it.
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
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        num_images: int = 1,
        seed: int | None = None,
        steps: int = 20,
        guidance_scale: float = 4.0,
        decoder_steps: int = 10,
        decoder_guidance_scale: float = 0.0,
        preset: str = "official",
        sampler: str = "ddpm",
        shares_generator: bool = True,
        progress: Callable[[Progress], None] | None = None,
    ) -> list[GeneratedImage]:
        """Make `num_images` pictures of `prompt`, of exactly `width` x `height` pixels.

        The settings are those of `TextToImage`. `progress` is called after every step; what it raises ends
        the run.

        Raises:
            InvalidSetting: a setting is out of range; nothing was computed.
        """
        request = TextToImage(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_images=num_images,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            decoder_steps=decoder_steps,
            decoder_guidance_scale=decoder_guidance_scale,
            preset=preset,
            sampler=sampler,
            shares_generator=shares_generator,
        )
        run = generate(self, [request])
        while True:
            try:
                step = next(run)
            except StopIteration as finished:
                images: list[list[GeneratedImage]] = finished.value
                return images[0]
            if progress is not None:
                progress(step)
