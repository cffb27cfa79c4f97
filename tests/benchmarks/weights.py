"""Networks at published sizes with random weights, made in seconds, and the same weights in diffusers."""

from typing import Any, TypeVar

import torch
from torch import nn

from cascade.checkpoints.configs import to_json
from cascade.checkpoints.keys import Component, to_diffusers
from cascade.checkpoints.stored import StoredTensor
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC

Network = TypeVar("Network", bound=nn.Module)
_PERIOD = (
    1_000_003  # random numbers that are repeated: a billion of them would take longer than the benchmark
)


def random_network(kind: type[Network], config: Any, dtype: torch.dtype, device: str = "cpu") -> Network:
    """A network ready to run, activations of about unit size."""
    with torch.device("meta"):
        network = kind(config)
    network.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(_PERIOD, generator=generator, device=device)
    with torch.no_grad():
        for name, weight in network.state_dict().items():
            if not weight.is_floating_point():
                weight.zero_()
                continue
            wide = weight.dim() > 1 and weight.shape[0] > 1
            size = weight[0].numel() ** -0.5 if wide else 0.2
            size *= 0.1 if ".mapper" in name else 1  # factors 1 + a of a hundred blocks multiply
            repeated = numbers.to(weight.dtype) * size
            flat = weight.view(-1)
            whole = len(flat) // _PERIOD * _PERIOD
            flat[:whole].view(-1, _PERIOD).copy_(repeated)
            flat[whole:].copy_(repeated[: len(flat) - whole])
        for name, statistic in network.named_buffers():
            if name.endswith("running_var"):
                statistic.abs_().add_(0.5)
    return network.eval().requires_grad_(False)


def in_diffusers(network: StageA | StageB | StageC) -> Any:
    """diffusers' network of the same dimensions and weights."""
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    settings = to_json(network.config)
    del settings["_class_name"]
    component = {StageA: Component.STAGE_A, StageB: Component.STAGE_B, StageC: Component.STAGE_C}[
        type(network)
    ]
    stored = {name: StoredTensor.of(tensor) for name, tensor in network.state_dict().items()}
    tensors = {name: tensor.read() for name, tensor in to_diffusers(component, stored).items()}
    with torch.device("meta"):
        theirs = (PaellaVQModel if component is Component.STAGE_A else StableCascadeUNet)(**settings)
    theirs.load_state_dict(tensors, assign=True)
    return theirs.to(next(network.parameters()).device).eval().requires_grad_(False)
