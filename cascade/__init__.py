"""Stable Cascade: pictures from prompts and other pictures, in three stages.

    from cascade import Cascade

    [picture] = Cascade.from_pretrained("tiny").text_to_image("a red circle on a blue background")
    picture.image.save("circle.png")

Names are imported on first use, so that `import cascade` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade.errors import CheckpointError, FlawedResult, InvalidSetting
    from cascade.pipeline import Cascade
    from cascade.tasks.autoencode import DecodeSettings
    from cascade.tasks.generation import GeneratedImage, Progress
    from cascade.tasks.latents import Latents
    from cascade.tasks.settings import Control, ImagePrompt, ImageSettings, LoRAUse

__all__ = [
    "Cascade",
    "CheckpointError",
    "Control",
    "DecodeSettings",
    "FlawedResult",
    "GeneratedImage",
    "ImagePrompt",
    "ImageSettings",
    "InvalidSetting",
    "Latents",
    "LoRAUse",
    "Progress",
]

_HOMES = {
    "Cascade": "cascade.pipeline",
    "CheckpointError": "cascade.errors",
    "Control": "cascade.tasks.settings",
    "DecodeSettings": "cascade.tasks.autoencode",
    "FlawedResult": "cascade.errors",
    "GeneratedImage": "cascade.tasks.generation",
    "ImagePrompt": "cascade.tasks.settings",
    "ImageSettings": "cascade.tasks.settings",
    "InvalidSetting": "cascade.errors",
    "Latents": "cascade.tasks.latents",
    "LoRAUse": "cascade.tasks.settings",
    "Progress": "cascade.tasks.generation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
