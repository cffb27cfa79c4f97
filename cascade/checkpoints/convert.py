"""Conversion of checkpoints between the original and diffusers' layouts, streamed from file to file."""

import shutil
from os import PathLike
from pathlib import Path
from typing import get_args

import torch

from cascade.checkpoints.configs import CONFIG_CLASSES
from cascade.checkpoints.files import (
    TOKENIZER_FILES,
    Part,
    are_equal,
    by_kind,
    companion,
    folder_beside,
    ranked,
    scan,
    stated_native_sizes,
)
from cascade.checkpoints.fill import check_tensors
from cascade.checkpoints.keys import Component
from cascade.checkpoints.load import DTYPES, build, existing
from cascade.checkpoints.save import (
    FOLDERS,
    TargetLayout,
    Weights,
    tower_settings,
    write_component,
    write_controlnet,
    write_model_index,
    write_named,
)
from cascade.checkpoints.sums import write_sums
from cascade.checkpoints.writing import atomic_folder
from cascade.errors import CheckpointError, InvalidSetting

STORED_DTYPES = DTYPES | {"float16": torch.float16, "fp16": torch.float16}

# Folder in the new checkpoint -> its possible names in the old one, and files of which it must hold one.
_COMPANIONS = {
    "tokenizer": (("tokenizer", "prior_tokenizer"), TOKENIZER_FILES),
    "prior_tokenizer": (("prior_tokenizer",), TOKENIZER_FILES),
    "feature_extractor": (("feature_extractor", "prior_feature_extractor"), ("preprocessor_config.json",)),
    "scheduler": (("scheduler",), ("scheduler_config.json",)),
    "prior_scheduler": (("prior_scheduler", "scheduler"), ("scheduler_config.json",)),
}


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    layout: TargetLayout,
    dtype: str | torch.dtype = "auto",
) -> Path:
    """Write a component or a whole checkpoint in another layout.

    Args:
        source: a file, the folder of a component, or the folder of a checkpoint in any layout.
        target: a new folder or, for one component in the original layout, a new .safetensors file.
        layout: "original" or "diffusers".
        dtype: type of the written weights; "auto" keeps the stored type. Here float16 is allowed, too.

    Returns:
        The file or folder that was written; it appears only when it is complete.

    Raises:
        CheckpointError: the source is damaged or incomplete, or the target exists or cannot be written.
        InvalidSetting: layout or dtype is unknown.
    """
    if layout not in get_args(TargetLayout):
        raise InvalidSetting(
            "layout", f"{layout!r} is unknown; allowed are {', '.join(get_args(TargetLayout))}"
        )
    chosen = _parse_dtype(dtype)
    path, target = existing(source), Path(target)
    candidates = ranked(scan(path).parts, path, dtype=chosen)
    if not candidates:
        raise CheckpointError(f"{path}: holds no component of Stable Cascade")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name a new file or folder")
    if len(candidates) == 1:
        part = next(iter(candidates.values()))[0]
        return _convert_part(part, target, layout, chosen)
    if target.suffix == ".safetensors":
        raise InvalidSetting(
            "target", f"{target} must be a folder: the source has {len(candidates)} components"
        )
    with atomic_folder(target) as partial:
        _convert_checkpoint(candidates, partial, layout, chosen)
        write_sums(partial)
    return target


def _convert_part(part: Part, target: Path, layout: TargetLayout, dtype: torch.dtype | None) -> Path:
    weights = _checked_weights(part)
    if target.suffix != ".safetensors":
        with atomic_folder(target) as partial:
            write_component(weights, partial, dtype, layout)
        return target
    if layout == "diffusers" or part.component not in CONFIG_CLASSES:
        raise InvalidSetting(
            "target", f"{target} must be a folder: a {part.component} has a config.json here"
        )
    return write_component(weights, target.parent, dtype, layout, file=target)


def _convert_checkpoint(
    candidates: dict[Component, list[Part]], folder: Path, layout: TargetLayout, dtype: torch.dtype | None
) -> None:
    chosen = {FOLDERS[component]: parts[0] for component, parts in candidates.items() if component in FOLDERS}
    stages = [candidates[stage][0] for stage in (Component.STAGE_C, Component.STAGE_B) if stage in candidates]
    anchor = stages[-1] if stages else next(iter(chosen.values()))
    if texts := candidates.get(Component.TEXT_ENCODER):
        chosen["text_encoder"] = companion(anchor, texts)
        prior_text = companion(stages[0] if stages else anchor, texts)
        if not are_equal(prior_text, chosen["text_encoder"]):
            chosen["prior_text_encoder"] = prior_text
    for name, part in chosen.items():
        write_named(_checked_weights(part), folder, name, dtype, layout)
    for kind, part in by_kind(candidates.get(Component.CONTROLNET, ())).items():
        write_controlnet(_checked_weights(part), kind, folder, dtype)
    for name, (names, files) in _COMPANIONS.items():
        part = stages[0] if stages and name.startswith(("prior", "feature")) else anchor
        if found := folder_beside(part, names, files):
            shutil.copytree(found, folder / name)
    sizes = stated_native_sizes(anchor)
    if layout == "diffusers" or sizes:
        write_model_index(folder, sizes)


def _checked_weights(part: Part) -> Weights:
    """Return the weights of a part after checking that every tensor fits."""
    network = build(part)
    check_tensors(network.state_dict(), part.tensors, str(part))
    if part.component in CONFIG_CLASSES:
        return Weights.of_config(part.component, part.tensors, part.config)
    return Weights(part.component, part.tensors, part.stated or tower_settings(network))


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in STORED_DTYPES:
        allowed = "auto, float32, bfloat16, float16"
        raise InvalidSetting("dtype", f"{name!r} is unknown; allowed are {allowed}")
    return STORED_DTYPES.get(name)
