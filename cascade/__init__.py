"""Stable Cascade: text to image in three stages.

    from cascade import Cascade

    [picture] = Cascade.from_pretrained("tiny").text_to_image("a red circle on a blue background")
    picture.image.save("circle.png")

Names are imported when they are first used, so that `import cascade` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade.errors import CheckpointError, InvalidSetting
    from cascade.pipeline import Cascade
    from cascade.tasks.settings import TextToImage
    from cascade.tasks.text_to_image import GeneratedImage, Progress

__all__ = ["Cascade", "CheckpointError", "GeneratedImage", "InvalidSetting", "Progress", "TextToImage"]

_HOMES = {
    "Cascade": "cascade.pipeline",
    "CheckpointError": "cascade.errors",
    "GeneratedImage": "cascade.tasks.text_to_image",
    "InvalidSetting": "cascade.errors",
    "Progress": "cascade.tasks.text_to_image",
    "TextToImage": "cascade.tasks.settings",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
