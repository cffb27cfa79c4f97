"""Puts trained ControlNets and LoRAs into a checkpoint folder, where they are found by their names."""

import shutil
from pathlib import Path

from cascade.checkpoints.sums import write_sums
from cascade.errors import CheckpointError
from cascade.training.controlnet import CONFIGS

FOLDERS = {"controlnet": tuple(CONFIGS), "loras": ("lcm", "night", "azure")}


def pack_extras(run: Path, checkpoint: Path) -> list[Path]:
    """Copy the finished files of `run` into `checkpoint` and list them in its checksums.

    Returns the copies. Raises `CheckpointError` when there is nothing to copy.
    """
    copies = []
    for folder, names in FOLDERS.items():
        for name in names:
            file = run / f"{name}.safetensors"
            if file.is_file():
                copy = checkpoint / folder / file.name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
                copies.append(copy)
    if not copies:
        known = ", ".join(name for names in FOLDERS.values() for name in names)
        raise CheckpointError(f"{run}: nothing to pack; trained are {known}, each to NAME.safetensors")
    write_sums(checkpoint)
    return copies
