"""The CLIP towers with their tokenizer and image processor, through transformers, from local files only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.checkpoints.keys import Component, Tensors
from cascade.checkpoints.shapes import visible_settings
from cascade.errors import CheckpointError

# What the published towers have and no shape shows: exact GELU in bigG, the quick one in ViT-L/14.
_PUBLISHED: Mapping[Component, Mapping[str, Any]] = {
    Component.TEXT_ENCODER: {
        "hidden_act": "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    },
    Component.IMAGE_ENCODER: {"hidden_act": "quick_gelu"},
}
_HEAD_WIDTH = 64
_MIN_TOKENS = 3  # begin, a word and end


def build_tower(component: Component, tensors: Tensors, stated: Mapping[str, Any]) -> nn.Module:
    """The text or vision tower without memory, by its shapes and config.json, or else as the published ones.

    Raises `CheckpointError` where the shapes contradict `stated`, the content of config.json.
    """
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    seen = visible_settings(component, tensors)
    for name, value in seen.items():
        if stated.get(name, value) != value:
            raise CheckpointError(f"config.json says {name} = {stated[name]}, but the tensors show {value}")
    heads = {"num_attention_heads": max(1, seen["hidden_size"] // _HEAD_WIDTH)}
    settings = (dict(stated) if stated else dict(_PUBLISHED[component]) | heads) | seen
    for name in ("dtype", "torch_dtype"):  # told by the file and chosen by the caller
        settings.pop(name, None)
    if component is Component.TEXT_ENCODER:
        config_class, tower_class = CLIPTextConfig, CLIPTextModelWithProjection
    else:
        config_class, tower_class = CLIPVisionConfig, CLIPVisionModelWithProjection
    try:
        with torch.device("meta"):
            tower: nn.Module = tower_class(config_class.from_dict(settings))
    except Exception as error:  # transformers refuses settings by errors of many kinds
        raise CheckpointError(f"config.json: {_first_line(error)}") from error
    return tower


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, `transformers.CLIPTokenizer`."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a broken file makes the library stumble over
        raise CheckpointError(f"{folder}: not a CLIP tokenizer: {_first_line(error)}") from error
    length = tokenizer.model_max_length
    if type(length) is not int or length < _MIN_TOKENS:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length must be a whole number "
            f"of at least {_MIN_TOKENS}, is {length!r}"
        )
    return tokenizer


def load_processor(folder: Path | None) -> Any:
    """The image processor of a folder, or that of ViT-L/14 where there is none."""
    from transformers import CLIPImageProcessorPil

    try:
        if folder is None:
            return CLIPImageProcessorPil()
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: not a CLIP image processor: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
