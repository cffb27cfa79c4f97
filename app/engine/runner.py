"""The bridge to `cascade`, and the only file of the server that knows it: requests in, pictures out.

Everything heavy is imported inside the methods, which only the engine's thread calls.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from app.engine.engine import ModelFacts, Steps
from app.errors import InvalidRequest, OutOfMemory
from app.jobs.job import Picture, Progress
from app.schemas import GenerationRequest

if TYPE_CHECKING:
    from cascade import Cascade, GeneratedImage, TextToImage


class CascadeRunner:
    """Makes pictures with a checkpoint."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self._source = model
        self._device = device
        self._dtype = dtype
        self._cascade: Cascade | None = None

    def load(self) -> ModelFacts:
        """Read the checkpoint onto the device."""
        from cascade import Cascade
        from cascade.cpu import suit_threads

        cascade = Cascade.from_pretrained(self._source, device=self._device, dtype=self._dtype)
        suit_threads(cascade)
        return self.take(cascade)

    def take(self, cascade: "Cascade") -> ModelFacts:
        """Work with a checkpoint that is loaded already."""
        self._cascade = cascade
        return ModelFacts(
            device=str(cascade.device),
            dtype=str(cascade.dtype).removeprefix("torch."),
            native_size=cascade.native.sizes[0],
        )

    def generate(self, requests: Sequence[GenerationRequest]) -> Steps:
        """Make the pictures of `requests` together; each picture is a run of its own seed."""
        import torch

        from cascade import InvalidSetting
        from cascade.tasks.text_to_image import generate

        assert self._cascade is not None, "load() comes first"
        settings = [_settings(request, seed) for request in requests for seed in request.seeds]
        try:
            with closing(generate(self._cascade, settings)) as run:
                while True:
                    try:
                        step = next(run)
                    except StopIteration as end:
                        images = [image for group in end.value for image in group]
                        break
                    yield Progress(step.stage, step.step, step.steps)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(
                "the device has not enough memory for this; ask for fewer pixels or pictures"
            ) from error
        except InvalidSetting as error:
            raise InvalidRequest(f"{error.field} {error.message}", param=error.field) from error
        return [[_picture(images.pop(0)) for _ in request.seeds] for request in requests]


def _picture(made: "GeneratedImage") -> Picture:
    assert made.settings.seed is not None
    return Picture(
        image=made.image,
        seed=made.settings.seed,
        resampled_from=made.resampled_from,
        prompt_truncated=made.prompt_truncated,
        prompt_tokens=made.prompt_tokens,
    )


def _settings(request: GenerationRequest, seed: int) -> "TextToImage":
    from cascade import TextToImage

    return TextToImage(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        seed=seed,
        steps=request.prior_num_inference_steps,
        guidance_scale=request.prior_guidance_scale,
        decoder_steps=request.decoder_num_inference_steps,
        decoder_guidance_scale=request.decoder_guidance_scale,
        preset=request.preset,
        sampler=request.sampler,
    )
