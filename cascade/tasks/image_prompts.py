"""Image prompts: pictures that guide Stage C by their content, each encoded by the vision tower.

Without text they give variations. Unguided rows get zeros in their place, as in the networks' training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.errors import InvalidSetting
from cascade.models import Models
from cascade.tasks.settings import ImagePrompt


def encode_image_prompts(models: Models, prompts: Sequence[ImagePrompt]) -> Tensor | None:
    """Return the embedding of each picture times its weight, (1, k, d) fp32; None without pictures.

    Each picture is encoded by itself, so that no bit of its embedding depends on others.

    Raises:
        InvalidSetting: the checkpoint has no vision tower.
    """
    if not prompts:
        return None
    if models.image_encoder is None:
        message = f"need the vision tower: {models.name or 'the checkpoint'} has no image_encoder"
        raise InvalidSetting("image_prompts", message)
    encode = models.image_encoder.encode
    rows = [encode([prompt.image.convert("RGB")]).float() * prompt.weight for prompt in prompts]
    return torch.cat(rows, dim=1)
