"""Inference of a network's settings from names and shapes of canonical tensors: all but a few numbers.

So fine-tunes of other widths and depths load without a config.json. Not visible are head counts (heads are 64
wide unless stated otherwise), dropout, strides, Stage A's constants and level switches.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cascade.checkpoints.keys import Component, Tensors
from cascade.config import EFFNET_V2_S, EffNetStage
from cascade.errors import CheckpointError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_KINDS = {"depthwise": "C", "channelwise": "C", "attention": "A", "kv_mapper": "A"}
_TIME_CONDITIONS = ("sca", "crp")  # in the order in which the embedding holds them


def visible_settings(component: Component, tensors: Tensors, patch_size: int | None = None) -> dict[str, Any]:
    """Return the settings of the component's config class that shapes show.

    `patch_size` resolves the one ambiguity of Stages B and C; by default it is 2 and 1. Raises
    `CheckpointError`, naming the tensor, if one that decides a setting is missing or absurd.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if empty := next((name for name, shape in shapes.items() if 0 in shape), None):
        raise CheckpointError(f"{empty} is empty: its shape is {list(shapes[empty])}")
    try:
        match component:
            case Component.STAGE_C:
                return _unet(shapes, patch_size or 1) | _stage_c(shapes)
            case Component.STAGE_B:
                return _unet(shapes, patch_size or 2) | _stage_b(shapes)
            case Component.STAGE_A:
                return _stage_a(shapes)
            case Component.EFFNET_ENCODER:
                return _effnet(shapes)
            case Component.PREVIEWER:
                return _previewer(shapes)
            case Component.CONTROLNET:
                return _controlnet(shapes)
            case Component.TEXT_ENCODER:
                return _text_encoder(shapes)
            case Component.IMAGE_ENCODER:
                return _image_encoder(shapes)
    except KeyError as error:
        raise CheckpointError(f"missing tensor {error.args[0]}") from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"the tensors do not form a {component} that we know ({error})") from error


def _unet(shapes: Shapes, patch_size: int) -> dict[str, Any]:
    num_levels = _count(shapes, "down_blocks.")
    down = [_blocks(shapes, f"down_blocks.{level}.") for level in range(num_levels)]
    up = [_blocks(shapes, f"up_blocks.{level}.") for level in range(num_levels)]
    patterns = [_pattern(*level) for level in zip(down, reversed(up), strict=True)]
    return {
        "in_channels": shapes["embedding.1.weight"][1] // patch_size**2,
        "out_channels": shapes["clf.1.weight"][0] // patch_size**2,
        "patch_size": patch_size,
        "timestep_ratio_embedding_dim": _first(shapes, r"_blocks\..*\.mapper\.weight$")[1],
        "block_out_channels": [shapes["embedding.1.weight"][0]]
        + [_downscaler(shapes, level)[0] for level in range(1, num_levels)],
        "down_num_layers_per_block": [
            len(blocks) // len(pattern) for blocks, pattern in zip(down, patterns, strict=True)
        ],
        "up_num_layers_per_block": [
            len(blocks) // len(pattern) for blocks, pattern in zip(up, reversed(patterns), strict=True)
        ],
        "down_blocks_repeat_mappers": _repeats(shapes, "down_repeat_mappers.", num_levels),
        "up_blocks_repeat_mappers": _repeats(shapes, "up_repeat_mappers.", num_levels),
        "block_types_per_layer": patterns,
        "kernel_size": _first(shapes, r"\.depthwise\.weight$")[-1],
        "timestep_conditioning_type": _time_conditions(shapes),
    }


def _stage_c(shapes: Shapes) -> dict[str, Any]:
    width, text_channels = shapes["clip_txt_mapper.weight"]
    pooled_rows, pooled_channels = shapes["clip_txt_pooled_mapper.weight"]
    return {
        "conditioning_dim": width,
        "clip_text_in_channels": text_channels,
        "clip_text_pooled_in_channels": pooled_channels,
        "clip_image_in_channels": shapes["clip_img_mapper.weight"][1],
        "clip_seq": pooled_rows // width,
    }


def _stage_b(shapes: Shapes) -> dict[str, Any]:
    width = _first(shapes, r"\.kv_mapper\.1\.weight$")[1]
    pooled_rows, pooled_channels = shapes["clip_mapper.weight"]
    return {
        "conditioning_dim": width,
        "clip_text_pooled_in_channels": pooled_channels,
        "clip_seq": pooled_rows // width,
        "effnet_in_channels": shapes["effnet_mapper.0.weight"][1],
        "pixel_mapper_in_channels": shapes["pixels_mapper.0.weight"][1],
    }


def _stage_a(shapes: Shapes) -> dict[str, Any]:
    hidden_channels, latent_channels = shapes["up_blocks.0.0.weight"][:2]
    levels = 1 + _matches(shapes, r"^down_blocks\.\d+\.weight$")
    settings = {
        "levels": levels,
        "bottleneck_blocks": _matches(shapes, r"^up_blocks\.\d+\.gammas$") - (levels - 1),
        "hidden_channels": hidden_channels,
        "latent_channels": latent_channels,
    }
    if codebook := shapes.get("vquantizer.codebook.weight"):  # trimmed files lack it
        settings["codebook_size"] = codebook[0]
    return settings


def _effnet(shapes: Shapes) -> dict[str, Any]:
    last = _count(shapes, "backbone.") - 1
    return _effnet_features(shapes, last) | {
        "head_channels": shapes[f"backbone.{last}.0.weight"][0],
        "latent_channels": shapes["mapper.0.weight"][0],
    }


def _effnet_features(shapes: Shapes, last: int) -> dict[str, Any]:
    """Return the settings of backbone layers 0 to `last`, exclusive."""
    stages = [_effnet_stage(shapes, index) for index in range(1, last)]
    return {"stem_channels": shapes["backbone.0.0.weight"][0], "stages": stages}


def _effnet_stage(shapes: Shapes, index: int) -> EffNetStage:
    """Return a stage's settings; its stride, which no shape shows, is the published one at this place."""
    stage = f"backbone.{index}."
    depth = 1 + max(int(name.split(".")[4]) for name in shapes if name.startswith(f"{stage}0.block."))
    widened, in_channels = shapes[f"{stage}0.block.0.0.weight"][:2]
    kind = "mbconv" if depth == 4 else "fused"
    expand = 1 if depth == 1 else widened // in_channels
    channels = shapes[f"{stage}0.block.{depth - 1}.0.weight"][0]
    published = EFFNET_V2_S.stages
    stride = published[index - 1].stride if index <= len(published) else 1
    return EffNetStage(kind, expand, stride, channels, _count(shapes, stage))


def _controlnet(shapes: Shapes) -> dict[str, Any]:
    num_projections = _count(shapes, "projections.")
    settings: dict[str, Any] = {
        "channels": shapes["projections.0.0.weight"][1],
        "out_channels": [shapes[f"projections.{index}.2.weight"][0] for index in range(num_projections)],
    }
    last = _count(shapes, "backbone.") - 1
    if "backbone.0.0.weight" in shapes:
        in_channels = shapes["backbone.0.0.weight"][1]
        return settings | {"mode": "effnet", "in_channels": in_channels} | _effnet_features(shapes, last)
    first, second = shapes["backbone.0.weight"], shapes["backbone.2.weight"]
    settings["in_channels"] = first[1]
    if "backbone.3.blocks.0.weight" in shapes:
        return settings | {
            "mode": "large",
            "hidden_channels": [first[0], second[0]],
            "num_blocks": last - 3,
        }
    return settings | {"mode": "simple", "hidden_channels": [first[0]]}


def _previewer(shapes: Shapes) -> dict[str, Any]:
    hidden_channels, in_channels = shapes["blocks.0.weight"][:2]
    out_channels = shapes["blocks.24.weight"][0]
    return {"in_channels": in_channels, "hidden_channels": hidden_channels, "out_channels": out_channels}


def _text_encoder(shapes: Shapes) -> dict[str, Any]:
    embeddings = "text_model.embeddings."
    vocab_size, width = shapes[f"{embeddings}token_embedding.weight"]
    return _tower(shapes, "text_model.", width) | {
        "vocab_size": vocab_size,
        "max_position_embeddings": shapes[f"{embeddings}position_embedding.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0],
    }


def _image_encoder(shapes: Shapes) -> dict[str, Any]:
    embeddings = "vision_model.embeddings."
    width, num_channels, patch_size, _ = shapes[f"{embeddings}patch_embedding.weight"]
    num_patches = shapes[f"{embeddings}position_embedding.weight"][0] - 1
    return _tower(shapes, "vision_model.", width) | {
        "num_channels": num_channels,
        "patch_size": patch_size,
        "image_size": patch_size * round(num_patches**0.5),
        "projection_dim": shapes["visual_projection.weight"][0],
    }


def _tower(shapes: Shapes, prefix: str, width: int) -> dict[str, Any]:
    layers = f"{prefix}encoder.layers."
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{layers}0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, layers),
    }


def _blocks(shapes: Shapes, prefix: str) -> str:
    """Return the letters of a level's blocks in order, inferred from the names inside each block."""
    letters = [""] * _count(shapes, prefix)
    for name in shapes:
        if name.startswith(prefix):
            index, part = name.removeprefix(prefix).split(".")[:2]
            letters[int(index)] = _KINDS.get(part, "T" if part.startswith("mapper") else "")
    if "" in letters:
        raise KeyError(f"{prefix}{letters.index('')}.* (block {letters.index('')} of {len(letters)})")
    return "".join(letters)


def _pattern(down: str, up: str) -> str:
    """Return the shortest pattern whose repetitions give both lists of blocks."""
    longest = down or up
    for length in range(1, len(longest) + 1):
        pattern = longest[:length]
        if all(blocks == pattern * (len(blocks) // length) for blocks in (down, up)):
            return pattern
    raise ValueError(f"the blocks {down} and {up} of one level repeat no common pattern")


def _downscaler(shapes: Shapes, level: int) -> tuple[int, ...]:
    """Return the shape of the weight that leads to a level: plain in Stage B, inside `blocks` in Stage C."""
    plain, switchable = f"down_downscalers.{level}.1.weight", f"down_downscalers.{level}.1.blocks.0.weight"
    return shapes[switchable] if switchable in shapes else shapes[plain]


def _repeats(shapes: Shapes, prefix: str, num_levels: int) -> list[int]:
    return [1 + _count(shapes, f"{prefix}{level}.", allow_none=True) for level in range(num_levels)]


def _time_conditions(shapes: Shapes) -> list[str]:
    found = {match[1] for name in shapes if (match := re.search(r"\.mapper_(\w+)\.weight$", name))}
    return sorted(
        found, key=lambda name: (_TIME_CONDITIONS.index(name) if name in _TIME_CONDITIONS else 9, name)
    )


def _count(shapes: Shapes, prefix: str, *, allow_none: bool = False) -> int:
    """Return one more than the highest number that follows `prefix`."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    if not numbers and not allow_none:
        raise KeyError(f"{prefix}*")
    count = max(numbers, default=-1) + 1
    if count > len(shapes):  # a list of that length could exhaust memory
        raise ValueError(f"{prefix}{count - 1}.* among {len(shapes)} tensors")
    return count


def _matches(shapes: Shapes, pattern: str) -> int:
    return sum(re.search(pattern, name) is not None for name in shapes)


def _first(shapes: Shapes, pattern: str) -> Sequence[int]:
    """Return the shape of the first tensor whose name matches `pattern`."""
    for name, shape in shapes.items():
        if re.search(pattern, name):
            return shape
    raise KeyError(pattern.strip("$^").replace("\\", ""))
