"""Filling a network that was built on the meta device with the tensors of a checkpoint.

On a CPU, a tensor already of the right type stays a memory map of its file; every other one is read straight
into its destination. So no weight is in memory twice.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cascade.checkpoints.stored import StoredTensor, new_scratch
from cascade.errors import CheckpointError

# Absent from many files, without effect on pictures: filled with zeros.
OPTIONAL = ("num_batches_tracked", "vquantizer.codebook.weight")
MAX_LISTED = 20

Network = TypeVar("Network", bound=nn.Module)


def fill(
    network: Network,
    tensors: Mapping[str, StoredTensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: str,
) -> Network:
    """Load the network's weights in `dtype` on `device`; batch norms are in fp32, integers keep their type.

    The network is returned in evaluation mode, with gradients turned off for its weights.

    Raises:
        CheckpointError: names the tensors that are missing, unexpected, of another shape or not floats.
    """
    expected = network.state_dict()
    check_tensors(expected, tensors, source)
    in_fp32 = _batch_norm_tensors(network)
    weights = {}
    scratch = new_scratch()
    for name, place in expected.items():
        target = place.dtype
        if target.is_floating_point:
            target = torch.float32 if name in in_fp32 else dtype
        if name in tensors:
            weights[name] = _read(tensors[name], target, device, scratch)
        else:
            weights[name] = torch.zeros(place.shape, dtype=target, device=device)
    network.load_state_dict(weights, assign=True)
    _fill_constants(network, device)
    return network.eval().requires_grad_(False)


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, StoredTensor], source: str) -> None:
    """Raise one `CheckpointError` that lists every way in which `found` differs from `expected`."""
    missing = [name for name in expected if name not in found and not name.endswith(OPTIONAL)]
    unexpected = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    ill_shaped = [
        f"{name} is {list(found[name].shape)}, should be {list(expected[name].shape)}"
        for name in both
        if found[name].shape != tuple(expected[name].shape)
    ]
    ill_typed = [
        f"{name} is {str(found[name].dtype).removeprefix('torch.')}"
        for name in both
        if expected[name].is_floating_point() and not found[name].dtype.is_floating_point
    ]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": ill_shaped,
        "not floating point": ill_typed,
    }
    if any(faults.values()):
        lines = [f"{source}: the tensors do not fit the network"]
        lines += [_listed(fault, names) for fault, names in faults.items() if names]
        raise CheckpointError("\n".join(lines))


def _listed(fault: str, names: list[str]) -> str:
    shown = "".join(f"\n    {name}" for name in names[:MAX_LISTED])
    rest = f"\n    and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"  {len(names)} {fault}:{shown}{rest}"


def _read(stored: StoredTensor, dtype: torch.dtype, device: torch.device, scratch: Tensor) -> Tensor:
    if device.type != "cpu":
        return stored.map().to(device).to(dtype)
    return stored.map() if stored.dtype is dtype else stored.read(dtype, scratch)


def _batch_norm_tensors(network: nn.Module) -> set[str]:
    """Return the names of all batch norm tensors, whose statistics lose too much in half precision."""
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in module.state_dict()
    }


def _fill_constants(network: nn.Module, device: torch.device) -> None:
    """Fill buffers that no file holds: the position numbers of the CLIP towers."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert name == "position_ids"
                positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
                module.register_buffer(name, positions, persistent=False)
