"""The state of a run: weights, their average and the optimiser's moments, whole and in one file.

Sharded tensors are written whole, so that a run may be resumed with another number of processes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cascade.checkpoints.stored import StoredTensor
from cascade.checkpoints.writing import write_tensors
from cascade.errors import CheckpointError, InvalidSetting
from cascade.training.finetune.objective import LossWeights
from cascade.training.finetune.parallel import World, share_like, whole

STATE_FILE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that changes in the course of a run."""

    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor]  # of the parameters; empty if none is kept
    optimizer: torch.optim.Optimizer
    weights: LossWeights


def save_state(path: Path, world: World, state: State, progress: Mapping[str, Any]) -> None:
    """Write the state file: every process must call this, and the first one writes.

    Raises `CheckpointError` if the disk is full; an older file then stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.parameters.items():
        tensors[f"weights/{name}"] = whole(parameter)
        if name in state.average:
            tensors[f"average/{name}"] = whole(state.average[name])
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = whole(value)
    tensors |= {f"loss/{name}": tensor for name, tensor in state.weights.state().items()}
    if world.is_first:
        stored = {name: StoredTensor.of(tensor.contiguous()) for name, tensor in tensors.items()}
        write_tensors(path, stored, lambda _, dtype: dtype, {"progress": json.dumps(progress)})
    world.wait()


def restore_state(path: Path, state: State, identity: Mapping[str, Any]) -> int:
    """Restore the state from its file, if there is one, and return the number of updates already made.

    Raises:
        InvalidSetting: the file is of a run with other settings.
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            _check_identity(path, progress["identity"], identity)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(share_like(tensors[f"weights/{name}"], parameter))
                if name in state.average:
                    state.average[name].copy_(share_like(tensors[f"average/{name}"], parameter))
        for joined, tensor in tensors.items():
            kind, _, rest = joined.partition("/")
            if kind == "optimizer":
                key, _, name = rest.partition("/")
                parameter = state.parameters[name]
                placed = tensor if key == "step" else share_like(tensor, parameter)
                state.optimizer.state[parameter][key] = placed
        if learned := {n.removeprefix("loss/"): t for n, t in tensors.items() if n.startswith("loss/")}:
            state.weights.restore(learned)
        return int(progress["step"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: damaged state of a training run: {error}; delete it to begin anew"
        ) from error


def _check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        name = changed[0]
        raise InvalidSetting(
            name,
            f"the unfinished run in {path.parent} has {found.get(name)!r}, not {wanted[name]!r}; "
            "continue it with its own settings, delete that folder, or name another output",
        )
