"""Scenes of one size as tensors for training: their pictures and their codes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cascade.training.code import scene_code
from cascade.training.scenes import Scene, render


def picture_tensor(scenes: Sequence[Scene]) -> Tensor:
    """Return the pictures of scenes, (b, 3, h, w) in 0..1."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes])).permute(0, 3, 1, 2) / 255


def code_tensor(scenes: Sequence[Scene]) -> Tensor:
    """Return the codes of scenes, (b, 16, gh, gw)."""
    return torch.from_numpy(np.stack([scene_code(scene) for scene in scenes]))
