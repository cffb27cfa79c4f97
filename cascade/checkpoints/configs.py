"""Configurations of networks: read from tensor shapes first, from config.json in its two vocabularies second.

A config.json that contradicts the shapes is refused; it only supplies settings that the shapes do not show.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin

from cascade.checkpoints.keys import Component, Tensors
from cascade.checkpoints.shapes import visible_settings
from cascade.config import (
    CONTROLNET_CANNY,
    CONTROLNET_IDENTITY,
    CONTROLNET_INPAINTING,
    CONTROLNET_SUPER_RESOLUTION,
    EFFNET_V2_S,
    PREVIEWER,
    STAGE_A,
    STAGE_B_1_5B,
    STAGE_B_700M,
    STAGE_C_1B,
    STAGE_C_3_6B,
    ControlNetConfig,
    EffNetConfig,
    EffNetStage,
    PreviewerConfig,
    ScheduleConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from cascade.errors import CheckpointError

NetworkConfig: TypeAlias = (
    StageCConfig | StageBConfig | StageAConfig | EffNetConfig | PreviewerConfig | ControlNetConfig
)

CONFIG_CLASSES: Mapping[Component, type[NetworkConfig]] = {
    Component.STAGE_C: StageCConfig,
    Component.STAGE_B: StageBConfig,
    Component.STAGE_A: StageAConfig,
    Component.EFFNET_ENCODER: EffNetConfig,
    Component.PREVIEWER: PreviewerConfig,
    Component.CONTROLNET: ControlNetConfig,
}
PUBLISHED: Mapping[str, NetworkConfig] = {
    "3.6B": STAGE_C_3_6B,
    "1B": STAGE_C_1B,
    "1.5B": STAGE_B_1_5B,
    "700M": STAGE_B_700M,
    "18M": STAGE_A,
    "EfficientNet-V2-S": EFFNET_V2_S,
    "4M": PREVIEWER,
    "canny": CONTROLNET_CANNY,
    "inpainting": CONTROLNET_INPAINTING,
    "super_resolution": CONTROLNET_SUPER_RESOLUTION,
    "identity": CONTROLNET_IDENTITY,
}
HEAD_WIDTH = 64
_PUBLISHED_BLOCKS = 64  # ResBlocks of the Stage C that the published ControlNets are for

_BLOCKS = {"SDCascadeResBlock": "C", "SDCascadeTimestepBlock": "T", "SDCascadeAttnBlock": "A"}
# The vocabulary of the original code, which old revisions of the diffusers folders use too.
_OLD_NAMES = {
    "c_in": "in_channels",
    "c_out": "out_channels",
    "c_r": "timestep_ratio_embedding_dim",
    "c_cond": "conditioning_dim",
    "c_hidden": "block_out_channels",
    "nhead": "num_attention_heads",
    "level_config": "block_types_per_layer",
    "c_clip_text": "clip_text_in_channels",
    "c_clip_text_pooled": "clip_text_pooled_in_channels",
    "c_clip": "clip_text_pooled_in_channels",
    "c_clip_img": "clip_image_in_channels",
    "c_clip_seq": "clip_seq",
    "c_effnet": "effnet_in_channels",
    "c_pixels": "pixel_mapper_in_channels",
    "t_conds": "timestep_conditioning_type",
    "embed_dim": "hidden_channels",
    "num_vq_embeddings": "codebook_size",
}
_OLD_PAIRS = {  # [down, up] in one list
    "blocks": ("down_num_layers_per_block", "up_num_layers_per_block"),
    "block_repeat": ("down_blocks_repeat_mappers", "up_blocks_repeat_mappers"),
}
_MOST = {"down_num_layers_per_block": 1_000, "up_num_layers_per_block": 1_000, "levels": 8, "patch_size": 64}
_MOST |= {"down_blocks_repeat_mappers": 1_000, "up_blocks_repeat_mappers": 1_000, "bottleneck_blocks": 1_000}
_STAGE_A_CONSTANTS = {"in_channels": 3, "out_channels": 3, "up_down_scale_factor": 2}
_OPTIONAL_IN_DIFFUSERS = (
    "clip_text_in_channels",
    "clip_image_in_channels",
    "effnet_in_channels",
    "pixel_mapper_in_channels",
    "switch_level",
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def network_config(
    component: Component, tensors: Tensors, content: Mapping[str, Any] | None = None
) -> NetworkConfig:
    """Return the configuration of a network from its canonical tensors and its config.json, if any.

    Raises `CheckpointError` if the two contradict each other, or a needed setting cannot be determined.
    """
    stated = _stated(component, content or {})
    try:
        seen = visible_settings(component, tensors, stated.get("patch_size"))
    except CheckpointError:
        if not _is_complete(component, stated):
            raise
        seen = {}  # the tensors are later checked one by one against the stated sizes
    _check(stated, seen)
    strides = {name: stated[name] for name in ("stages",) if name in stated}
    settings = stated | seen | strides
    if component in (Component.STAGE_B, Component.STAGE_C):
        _check_levels(settings)
        settings = _assumed(component, settings) | settings
        _check_heads(settings, is_stated="num_attention_heads" in stated)
    if component is Component.CONTROLNET and "injections" not in settings:
        settings["injections"] = usual_injections(len(settings["out_channels"]), _PUBLISHED_BLOCKS)
    return CONFIG_CLASSES[component](**{name: _frozen(value) for name, value in settings.items()})


def schedule_config(path: Path | None, default: ScheduleConfig) -> ScheduleConfig:
    """Read the noise schedule of a scheduler_config.json; settings that it lacks come from `default`."""
    if path is None:
        return default
    stated = read_json(path)
    names = [field.name for field in dataclasses.fields(ScheduleConfig)]
    found = {name: stated[name] for name in names if name in stated}
    for name, value in found.items():
        highest = 1 if name.startswith("clamp") else 1_000
        if type(value) not in (int, float) or not 0 < value < highest:
            raise CheckpointError(f"{path}: {name} must be a number between 0 and {highest}, is {value!r}")
    schedule = dataclasses.replace(default, **{name: float(value) for name, value in found.items()})
    if schedule.clamp_min >= schedule.clamp_max:
        raise CheckpointError(
            f"{path}: clamp_min must be less than clamp_max, is {schedule.clamp_min} of {schedule.clamp_max}"
        )
    return schedule


def to_json(config: NetworkConfig) -> dict[str, Any]:
    """Return the content of config.json, in diffusers' vocabulary where diffusers has the class."""
    settings = dataclasses.asdict(config)
    match config:
        case StageCConfig() | StageBConfig():
            names = {letter: name for name, letter in _BLOCKS.items()}
            patterns = [[names[letter] for letter in pattern] for pattern in config.block_types_per_layer]
            absent = dict.fromkeys(_OPTIONAL_IN_DIFFUSERS)
            return (
                {"_class_name": "StableCascadeUNet"} | absent | settings | {"block_types_per_layer": patterns}
            )
        case StageAConfig():
            settings["embed_dim"] = settings.pop("hidden_channels")
            settings["num_vq_embeddings"] = settings.pop("codebook_size")
            return {"_class_name": "PaellaVQModel"} | _STAGE_A_CONSTANTS | settings
        case EffNetConfig():
            return {"_class_name": "EffNetEncoder"} | settings
        case PreviewerConfig():
            return {"_class_name": "Previewer"} | settings
        case ControlNetConfig():
            kept = {name: value for name, value in settings.items() if value not in (0, ())}
            return {"_class_name": "ControlNet"} | kept


def variant_name(config: NetworkConfig) -> str:
    """Return the publishers' name for a network of these dimensions, or "custom"."""
    for name, published in PUBLISHED.items():
        if type(published) is type(config) and _dimensions(published) == _dimensions(config):
            return name
    return f"{config.kind}, custom" if isinstance(config, ControlNetConfig) else "custom"


def _stated(component: Component, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json under the config class's names, without null ones."""
    flat = {_OLD_NAMES.get(name, name): value for name, value in content.items()}
    for name, (down, up) in _OLD_PAIRS.items():
        if isinstance(pair := content.get(name), list) and len(pair) == 2:
            flat[down], flat[up] = pair
    types = {field.name: field.type for field in dataclasses.fields(CONFIG_CLASSES[component])}
    stated = {name: flat[name] for name in types if flat.get(name) is not None}
    try:
        stated = {name: _plain(name, value, stated) for name, value in stated.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json is malformed: {error}") from error
    for name, value in stated.items():
        if not _fits(name, value, types[name]):
            raise CheckpointError(f"config.json says {name} = {_listed(value)}, which is no possible value")
    return stated


def _fits(name: str, value: Any, expected: Any) -> bool:
    """Tell whether a value of a config.json has the type of the setting and a sane size."""
    if get_origin(expected) is tuple:
        return isinstance(value, list) and all(_fits(name, item, get_args(expected)[0]) for item in value)
    if expected is float:
        is_positive = name != "scale_factor" or value != 0
        return type(value) in (int, float) and 0 <= value < 1_000_000 and is_positive
    if expected is int:
        lowest = {"num_attention_heads": -1, "injections": 0}.get(name, 1)
        return type(value) is int and lowest <= value <= _MOST.get(name, 1_000_000)
    return isinstance(value, expected)


def _plain(name: str, value: Any, stated: Mapping[str, Any]) -> Any:
    """Convert the several ways of writing a setting to a single form."""
    if name == "block_types_per_layer":
        return ["".join(_BLOCKS.get(block, block) for block in level) for level in value]
    if name in ("dropout", "self_attn") and not isinstance(value, list):
        return [value] * len(stated["block_out_channels"])
    if name == "stages":
        return [EffNetStage(**stage) for stage in value]
    if name == "injections" and isinstance(value, str):
        return [int(place) for place in value.split(",")]
    return value


def _is_complete(component: Component, stated: Mapping[str, Any]) -> bool:
    """Tell whether a config.json alone determines the sizes of the network."""
    fields = dataclasses.fields(CONFIG_CLASSES[component])
    optional = ("dropout", "self_attn", "switch_level", "scale_factor", "patch_size", "codebook_size")
    return all(field.name in stated or field.name in optional for field in fields)


def _check(stated: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if config.json contradicts the shapes."""
    said, shown = _comparable(stated), _comparable(seen)
    for name in sorted(said.keys() & shown.keys()):
        if said[name] != shown[name]:
            raise CheckpointError(
                f"config.json says {name} = {_listed(said[name])}, "
                f"but the tensors show {_listed(shown[name])}"
            )


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert patterns and counts to the blocks of each level, so that equal networks compare equal."""
    result = {name: _frozen(value) for name, value in settings.items()}
    patterns = result.pop("block_types_per_layer", None)
    if patterns:
        for name, order in (("down_num_layers_per_block", 1), ("up_num_layers_per_block", -1)):
            counts = result.get(name, ())
            result[name] = tuple(p * count for p, count in zip(patterns[::order], counts, strict=False))
    if "stages" in result:
        result["stages"] = tuple(dataclasses.replace(stage, stride=1) for stage in result["stages"])
    return result


def usual_injections(count: int, num_blocks: int) -> tuple[int, ...]:
    """Return the places of `count` injections among `num_blocks` ResBlocks of Stage C if no file states them.

    They are the published ones for the published 8 of 64, and evenly spaced for other numbers.
    """
    official = CONTROLNET_CANNY.injections
    if (count, num_blocks) == (len(official), _PUBLISHED_BLOCKS):
        return official
    return tuple(index * num_blocks // count for index in range(count))


def _check_levels(settings: Mapping[str, Any]) -> None:
    """Raise unless all lists of a UNet have one entry for each level."""
    num_levels = len(settings["block_out_channels"])
    for name, value in settings.items():
        is_per_level = isinstance(value, list) and name != "timestep_conditioning_type"
        expected = num_levels - 1 if name == "switch_level" else num_levels
        if is_per_level and len(value) != expected:
            raise CheckpointError(f"config.json says {name} = {value}, which are not {expected} values")


def _check_heads(settings: Mapping[str, Any], *, is_stated: bool) -> None:
    """Raise if attention cannot be split into the heads that are stated or assumed."""
    levels = zip(
        settings["block_types_per_layer"],
        settings["block_out_channels"],
        settings["num_attention_heads"],
        strict=True,
    )
    for pattern, width, heads in levels:
        divisor = heads if is_stated else HEAD_WIDTH
        if "A" in pattern and (divisor < 1 or width % divisor):
            raise CheckpointError(
                f"num_attention_heads must be stated in config.json and divide the width {width}"
            )


def _assumed(component: Component, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the UNet settings that no shape shows, as in all published checkpoints."""
    widths = settings["block_out_channels"]
    attends = ["A" in pattern for pattern in settings["block_types_per_layer"]]
    assumed: dict[str, Any] = {
        "num_attention_heads": [
            width // HEAD_WIDTH * has for width, has in zip(widths, attends, strict=True)
        ],
        "dropout": [0.1 * has for has in attends],
        "self_attn": [True] * len(widths),
    }
    return assumed | ({"switch_level": [False] * (len(widths) - 1)} if component is Component.STAGE_C else {})


def _dimensions(config: NetworkConfig) -> dict[str, Any]:
    """Return the settings that determine the shapes of a network's tensors."""
    unseen = ("num_attention_heads", "dropout", "self_attn", "switch_level", "scale_factor")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unseen}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> str:
    return str(list(value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
