"""Classifier-free guidance: away from the negative prompt's prediction, towards the prompt's."""

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor, rescale: Tensor | None = None) -> Tensor:
    """Return the guided noise, (b, c, h, w); `scale` and `rescale` are (b,), and None rescales no row.

    Guidance inflates the prediction. `rescale` (rho) says how far its standard deviation is brought back to
    the conditional one's (Lin et al. 2023, section 3.4): 0 not at all, 1 fully. The deviation is taken per
    sample, so that it does not depend on the batch; the official code takes it over the whole batch.
    """
    guided = torch.lerp(unconditional, conditional, _per_row(scale, conditional))
    if rescale is None:
        return guided
    rho = _per_row(rescale, conditional)
    return guided * (rho * _deviation(conditional) / (_deviation(guided) + 1e-9) + (1 - rho))


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(-1, 1, 1, 1)


def _deviation(noise: Tensor) -> Tensor:
    return noise.std(dim=(1, 2, 3), keepdim=True)
