"""One process or many under `torchrun`: the rank of this one, and what they do together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cascade.checkpoints.load import parse_device


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among all; a single process has rank 0 of 1."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and prints."""
        return self.rank == 0

    def gather(self, rows: Tensor) -> Tensor:
        """Gather the rows of all processes in the order of the global batch: row i from process i % size."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def wait(self) -> None:
        """Wait until all processes have arrived."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` started, if any; yield the place of this one."""
    if not dist.is_torchelastic_launched():
        yield World(parse_device(device))
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        own = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(own)
        yield World(own, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def distribute(objective: nn.Module, world: World, *, sharded: bool) -> nn.Module:
    """Return the module that runs forward and backward; for a single process it is `objective` itself.

    Sharded, every process keeps a share of the weights, gradients and moments and gathers the weights at the
    start of each pass (FSDP2 with one group, as the official code's SHARD_GRAD_OP). Otherwise each keeps all.
    """
    if world.size == 1:
        return objective
    if not sharded:
        return nn.parallel.DistributedDataParallel(objective)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    return objective


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded, on the CPU. All processes must call it."""
    full: Any = tensor.detach()
    return torch.as_tensor(full.full_tensor() if hasattr(full, "full_tensor") else full).cpu()


def share_like(full: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's share of a tensor, laid out and placed as `parameter` is."""
    if not hasattr(parameter, "device_mesh") or full.shape != parameter.shape:
        return full.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    moved = full.to(mesh.device_type)
    return distribute_tensor(moved, mesh, parameter.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process."""
    here: Any = tensor
    return torch.as_tensor(here.to_local() if hasattr(here, "to_local") else here)
