"""The CLIP towers, tokenizer and image processor, loaded with transformers from local files only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.checkpoints.keys import Component, Tensors
from cascade.checkpoints.shapes import visible_settings
from cascade.errors import CheckpointError

# Settings of the published towers that no shape shows: exact GELU in bigG, quick GELU in ViT-L/14.
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
    """Build a text or vision tower on the meta device from its shapes and config.json or published settings.

    Raises `CheckpointError` if the shapes contradict `stated`, the content of config.json.
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
    for name in ("dtype", "torch_dtype"):  # the tensors have one, and the caller chooses one
        settings.pop(name, None)
    if component is Component.TEXT_ENCODER:
        config_class, tower_class = CLIPTextConfig, CLIPTextModelWithProjection
    else:
        config_class, tower_class = CLIPVisionConfig, CLIPVisionModelWithProjection
    try:
        with torch.device("meta"):
            tower: nn.Module = tower_class(config_class.from_dict(settings))
    except Exception as error:  # transformers refuses settings with errors of many kinds
        raise CheckpointError(f"config.json: {_first_line(error)}") from error
    return tower


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, a `transformers.CLIPTokenizer`."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a broken file can make the library raise anything
        raise CheckpointError(f"{folder}: not a CLIP tokenizer: {_first_line(error)}") from error
    length = tokenizer.model_max_length
    if type(length) is not int or length < _MIN_TOKENS:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: model_max_length must be a whole number "
            f"of at least {_MIN_TOKENS}, is {length!r}"
        )
    return tokenizer


def load_processor(folder: Path | None) -> Any:
    """Load the image processor of a folder, or that of ViT-L/14 if there is none."""
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
