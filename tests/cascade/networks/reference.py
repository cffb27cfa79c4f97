"""What the parity tests share: random weights that leave nothing at zero, also under diffusers' names."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from diffusers.models import StableCascadeUNet
from torch import Tensor, nn

from cascade.checkpoints.configs import to_json
from cascade.checkpoints.keys import Component, to_diffusers
from cascade.checkpoints.stored import StoredTensor
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC

# fp32 on both sides, outputs of about unit size: the sums of some hundred products per layer are taken in
# another order, and the fastest ratio frequency carries 1e-3 rad in fp32. Measured: 5e-6 to 4e-5.
TOLERANCE = 1e-4

Module = TypeVar("Module", bound=nn.Module)


def randomized(network: Module, seed: int) -> Module:
    """Draw every weight and statistic, so that each one matters; activations stay of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            wide = weight.dim() > 1 and weight.shape[0] > 1
            weight.normal_(0, weight[0].numel() ** -0.5 if wide else 0.3, generator=generator)
        for name, statistic in network.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(0, 0.3, generator=generator)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 2, generator=generator)
    return network.eval()


def with_statistics_of(network: Module, inputs: Tensor) -> Module:
    """Batch norms that have seen these inputs; random statistics would let the signal fade away."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1
    with torch.no_grad():
        network.train()(inputs)
    return network.eval()


def diffusers_names(component: Component, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of one of our networks under diffusers' names."""
    stored = {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
    return {name: tensor.read() for name, tensor in to_diffusers(component, stored).items()}


def diffusers_unet(network: StageB | StageC) -> StableCascadeUNet:
    """diffusers' UNet with the dimensions and the weights of ours."""
    settings = to_json(network.config)
    del settings["_class_name"]
    unet = StableCascadeUNet(**settings)
    unet.load_state_dict(diffusers_names(component_of(network), network.state_dict()))
    return unet.eval()


def component_of(network: StageB | StageC) -> Component:
    return Component.STAGE_B if isinstance(network, StageB) else Component.STAGE_C


def worst_gradient(network: StageB | StageC, ours: Tensor, unet: StableCascadeUNet, theirs: Tensor) -> float:
    """Largest difference between the gradients of the same function of two outputs.

    As a share of the tensor's largest gradient, over all tensors. Those that are zero but for rounding count
    by the largest gradient of all: softmax does not see the bias of the keys.
    """
    weights, their_weights = dict(network.named_parameters()), dict(unet.named_parameters())
    gradients = torch.autograd.grad(ours.sin().sum(), list(weights.values()))
    translated = diffusers_names(component_of(network), dict(zip(weights, gradients, strict=True)))
    expected = torch.autograd.grad(theirs.sin().sum(), list(their_weights.values()))
    negligible = 1e-3 * max(gradient.abs().max().item() for gradient in expected)
    return max(
        worst(translated[name], gradient) / max(gradient.abs().max().item(), negligible)
        for name, gradient in zip(their_weights, expected, strict=True)
    )


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; shapes must agree."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def difference(rows: Tensor) -> float:
    """How much the output for the first input differs from that for the second: large, if inputs matter."""
    return (rows[0] - rows[1]).std().item()


def noise(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
