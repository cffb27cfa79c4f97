"""Image prompts: pictures that guide Stage C by their content, each encoded by the vision tower.

Without text they give variations. Unguided rows get zeros in their place, as in the networks' training.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from cascade.conditioning import ImageEncoder
from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.tasks.settings import ImagePrompt

Embed = Callable[[Image.Image], Tensor]


def encode_image_prompts(
    models: Models, prompts: Sequence[ImagePrompt], embed: Embed | None = None
) -> Tensor | None:
    """Return the embedding of each picture times its weight, (1, k, d) fp32; None without pictures.

    Each picture is encoded by itself, so that no bit of its embedding depends on others. `embed` takes the
    place of `embed_image` where its results are remembered.

    Raises:
        InvalidSetting: the checkpoint has no vision tower.
    """
    if not prompts:
        return None
    if models.image_encoder is None:
        message = f"need the vision tower: {models.name or 'the checkpoint'} has no image_encoder"
        raise InvalidSetting("image_prompts", message)
    embed = embed or partial(embed_image, models.image_encoder)
    return torch.cat([embed(prompt.image) * prompt.weight for prompt in prompts], dim=1)


def embed_image(encoder: ImageEncoder, image: Image.Image) -> Tensor:
    """Return the embedding of a picture, (1, 1, d) fp32."""
    return encoder.encode([image.convert("RGB")]).float()
