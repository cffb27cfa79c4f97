"""Image to image: Stage C begins with a picture's own semantic latents, noised to a time between 0 and 1.

Source: the Stable Cascade code release, `inference/img2img.ipynb`. It noises at shift 1 and samples at the
schedule's shift, so the network is told of more noise than there is and redraws more freely; the setting
`noise_at_sampling_shift` makes it noise at that shift, too.
"""

import torch
from torch import Tensor

from cascade.sampling.noise import NoiseSource
from cascade.sampling.presets import PRESETS
from cascade.sampling.schedule import CosineSchedule, signal_and_noise
from cascade.tasks.settings import ImageSettings


def noised(settings: ImageSettings, schedule: CosineSchedule, clean: Tensor, draw: NoiseSource) -> Tensor:
    """Add the noise of the time at which Stage C begins to clean latents (16, h, w)."""
    is_shifted = settings.noise_at_sampling_shift and PRESETS[settings.preset].shifts
    at = schedule if is_shifted else schedule.unshifted
    alpha, sigma = signal_and_noise(at.log_snr(torch.tensor(settings.start, dtype=torch.float64)))
    return float(alpha) * clean + float(sigma) * draw(0).to(clean.device)
