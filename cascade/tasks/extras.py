"""Optional parts of a checkpoint beside its stages, as one picture uses them: a ControlNet and LoRAs."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops
from torch import Tensor

from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.networks.adapters import Adapter
from cascade.networks.unet import Condition
from cascade.sizes import SizePlan
from cascade.tasks.control import prepare_control
from cascade.tasks.inpainting import Canvas
from cascade.tasks.settings import Control, ImageSettings, LoRAUse

_INPAINTING = "inpainting"


@dataclass(frozen=True, slots=True, eq=False)
class ControlMaps:
    """The maps that a ControlNet adds to Stage C for one picture."""

    maps: tuple[Tensor, ...]  # (1, h, w, c) each
    places: tuple[int, ...]  # the ResBlocks before which they are added

    def on(self, condition: Condition) -> Condition:
        """Add the maps to the condition of one row."""
        return condition.controlled(self.maps, self.places)


def control_of(
    models: Models, settings: ImageSettings, plan: SizePlan, canvas: Canvas | None
) -> ControlMaps | None:
    """Return the maps of the requested control, or of an installed inpainting ControlNet if a mask is given.

    Raises:
        InvalidSetting: the ControlNet is not installed, or it cannot read this kind of input.
    """
    control = settings.control
    if (
        control is None
        and canvas is not None
        and canvas.mask is not None
        and _INPAINTING in models.controlnets
    ):
        control = Control(_INPAINTING, _without_masked(canvas))
    if control is None:
        return None
    maps = prepare_control(models, control, plan)
    return ControlMaps(maps, models.controlnets[control.kind].injections)


def adapter_of(models: Models, loras: Sequence[LoRAUse]) -> Adapter | None:
    """Return the LoRAs as one adapter, the same object for the same LoRAs.

    Raises:
        InvalidSetting: one is not installed.
        CheckpointError: the file of one is damaged, or made for other networks.
    """
    if not loras:
        return None
    if models.loras is None:
        raise InvalidSetting("loras", f"{loras[0].name!r} is not installed; installed are: none")
    return models.loras.adapter(models, [(lora.name, lora.scale) for lora in loras])


def _without_masked(canvas: Canvas) -> Image.Image:
    """Return the canvas's image as RGBA, transparent where it is to be painted."""
    assert canvas.mask is not None
    image = canvas.image.copy()
    image.putalpha(ImageChops.invert(canvas.mask))
    return image
