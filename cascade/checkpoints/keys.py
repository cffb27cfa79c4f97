"""Names of tensors: the original, diffusers' and ComfyUI's spelling of each component.

The original spelling is canonical. The functions are pure: they map names and shapes, and join or cut stored
tensors without reading them.
"""

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Literal, TypeAlias

from cascade.checkpoints.stored import StoredTensor, concatenate
from cascade.errors import CheckpointError

Tensors: TypeAlias = Mapping[str, StoredTensor]


class Component(StrEnum):
    """The parts of a checkpoint, in the order in which they are listed."""

    STAGE_C = "stage_c"
    STAGE_B = "stage_b"
    STAGE_A = "stage_a"
    TEXT_ENCODER = "text_encoder"
    IMAGE_ENCODER = "image_encoder"
    EFFNET_ENCODER = "effnet_encoder"
    PREVIEWER = "previewer"
    CONTROLNET = "controlnet"


Layout: TypeAlias = Literal["original", "diffusers", "comfyui"]

_WRAPPERS = ("state_dict.", "module.", "generator.", "_fsdp_wrapped_module.", "_orig_mod.")
_INNER_WRAPPERS = re.compile(r"(?<=\.)(?:_fsdp_wrapped_module|_orig_mod)\.")
_IGNORED = re.compile(r"(?:^|\.)(?:position_ids|logit_scale|num_batches_tracked)$")

# Prefixes of ComfyUI's combined files; what follows `vae.` depends on the file.
_COMFYUI_UNET = "model.diffusion_model."
_COMFYUI_TEXT = re.compile(r"^(?:text_encoder|cond_stage_model)\.clip_g\.(?:transformer\.)?")
_COMFYUI_IMAGE = "clip_l_vision."
_COMFYUI_VAE = {"vae.encoder.": Component.EFFNET_ENCODER, "vae.previewer.": Component.PREVIEWER}

_TEXT_PROJECTION = "text_projection"
_FUSED = re.compile(r"^(.*\.attention)\.attn\.in_proj_(weight|bias)$")
_SPLIT = re.compile(r"^(.*\.attention)\.(?:attn\.)?to_q\.(weight|bias)$")
_OTHER_SPLIT = re.compile(r"\.attention\.(?:attn\.)?to_[kv]\.(?:weight|bias)$")
_TO_ORIGINAL = {
    Component.STAGE_B: (re.compile(r"^clip_txt_pooled_mapper\."), "clip_mapper."),
    Component.STAGE_A: (re.compile(r"^vquantizer\.embedding\."), "vquantizer.codebook."),
}
_TO_DIFFUSERS = {
    Component.STAGE_B: (re.compile(r"^clip_mapper\."), "clip_txt_pooled_mapper."),
    Component.STAGE_A: (re.compile(r"^vquantizer\.codebook\."), "vquantizer.embedding."),
}

# Names that one component alone has. Several for each, so that a damaged file is still recognised.
_SIGNS = {
    Component.STAGE_C: ("clip_txt_mapper.weight", "clip_img_mapper.weight"),
    Component.STAGE_B: ("effnet_mapper.0.weight", "pixels_mapper.0.weight", "clip_mapper.weight"),
    Component.STAGE_A: ("out_block.0.weight", "in_block.1.weight"),
    Component.TEXT_ENCODER: ("text_model.embeddings.token_embedding.weight", "text_projection.weight"),
    Component.IMAGE_ENCODER: ("visual_projection.weight", "visual.class_embedding"),
    Component.EFFNET_ENCODER: ("mapper.1.running_mean", "mapper.0.weight"),
    Component.PREVIEWER: ("blocks.24.weight", "blocks.0.weight"),
    Component.CONTROLNET: ("projections.0.0.weight", "projections.0.2.weight"),
}

_OPENCLIP_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_OPENCLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def detect(tensors: Tensors) -> Component | None:
    """Return the component that these names belong to, in any spelling; None if there is none."""
    for component, names in _SIGNS.items():
        if any(name in tensors for name in names):
            return component
    return None


def detect_layout(tensors: Tensors) -> Layout:
    """Return the spelling of one component's names; "original" where all spellings agree."""
    if any(_SPLIT.match(name) and ".attn.to_q." not in name for name in tensors):
        return "diffusers"
    if any(".attn.to_q." in name for name in tensors):
        return "comfyui"
    foreign = (
        "vquantizer.embedding.weight",
        "text_model.final_layer_norm.weight",
        "visual_projection.weight",
    )
    return "diffusers" if any(name in tensors for name in foreign) else "original"


def split_file(tensors: Tensors) -> dict[Component, dict[str, StoredTensor]]:
    """Split a file into components, without prefixes and wrappers: one, or several in ComfyUI's files.

    The result is empty if nothing in the file is known.
    """
    if any(name.startswith(_COMFYUI_UNET) for name in tensors):
        return _split_comfyui(tensors)
    tensors = strip_wrappers(tensors)
    component = detect(tensors)
    return {component: dict(tensors)} if component else {}


def strip_wrappers(tensors: Tensors) -> dict[str, StoredTensor]:
    """Remove the prefixes of training frameworks that all names carry, and wrappers inside names."""
    names = dict(tensors)
    while wrapper := next((w for w in _WRAPPERS if names and all(n.startswith(w) for n in names)), None):
        names = {name.removeprefix(wrapper): tensor for name, tensor in names.items()}
    return {_INNER_WRAPPERS.sub("", name): tensor for name, tensor in names.items()}


def to_original(component: Component, tensors: Tensors) -> dict[str, StoredTensor]:
    """Convert any spelling of one component to canonical names, with query, key and value fused.

    Counters and constants that carry no weights are left out.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not _IGNORED.search(name)}
    if component is Component.IMAGE_ENCODER and "visual.class_embedding" in tensors:
        return dict(_vision_from_openclip(tensors))
    return dict(_to_original(component, tensors))


def to_diffusers(component: Component, tensors: Tensors) -> dict[str, StoredTensor]:
    """Convert canonical names of one component to diffusers', with query, key and value split."""
    result = {}
    for name, tensor in tensors.items():
        if match := _FUSED.match(name):
            width = tensor.shape[0] // 3
            for index, letter in enumerate("qkv"):
                part = tensor.rows(index * width, (index + 1) * width)
                result[f"{match[1]}.to_{letter}.{match[2]}"] = part
        else:
            renamed = name.replace(".attention.attn.out_proj.", ".attention.to_out.0.")
            result[_rename(renamed, _TO_DIFFUSERS.get(component))] = tensor
    return result


def _to_original(component: Component, tensors: Tensors) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in tensors.items():
        if match := _SPLIT.match(name):
            yield f"{match[1]}.attn.in_proj_{match[2]}", _fuse(name, tensors)
        elif not _OTHER_SPLIT.search(name):
            renamed = name.replace(".attention.to_out.0.", ".attention.attn.out_proj.")
            yield _rename(renamed, _TO_ORIGINAL.get(component)), tensor


def _rename(name: str, rule: tuple[re.Pattern[str], str] | None) -> str:
    return rule[0].sub(rule[1], name) if rule else name


def _fuse(query_name: str, tensors: Tensors) -> StoredTensor:
    """Join query, key and value, in this order, into one tensor."""
    names = [query_name.replace("to_q.", f"to_{letter}.") for letter in "qkv"]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"missing tensors beside {query_name}: {', '.join(missing)}")
    parts = [tensors[name] for name in names]
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(names, parts, strict=True))
        raise CheckpointError(f"query, key and value differ in shape or dtype: {shapes}")
    return concatenate(parts)


def _split_comfyui(tensors: Tensors) -> dict[Component, dict[str, StoredTensor]]:
    unet = _with_prefix(tensors, _COMFYUI_UNET)
    text = {
        _COMFYUI_TEXT.sub("", name): tensor for name, tensor in tensors.items() if _COMFYUI_TEXT.match(name)
    }
    if _TEXT_PROJECTION in text:  # stored as (input, output) in this spelling
        text[f"{_TEXT_PROJECTION}.weight"] = text.pop(_TEXT_PROJECTION).transpose()
    found = [unet, text, _with_prefix(tensors, _COMFYUI_IMAGE)]
    vae = [_with_prefix(tensors, prefix) for prefix in _COMFYUI_VAE]
    found += vae if any(vae) else [_with_prefix(tensors, "vae.")]
    constants = ("mean", "std")  # input normalisation of the encoder, a constant of the network
    components = {}
    for part in found:
        if component := detect(part):
            components[component] = {name: t for name, t in part.items() if name not in constants}
    return components


def _with_prefix(tensors: Tensors, prefix: str) -> dict[str, StoredTensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _vision_from_openclip(tensors: Tensors) -> Iterator[tuple[str, StoredTensor]]:
    """Rename OpenCLIP's vision tower as in transformers, where query, key and value are split."""
    for name, tensor in tensors.items():
        rest = name.removeprefix("visual.")
        if rest == "proj":
            yield "visual_projection.weight", tensor.transpose()
        elif block := re.match(r"transformer\.resblocks\.(\d+)\.(.+)$", rest):
            yield from _openclip_block(f"vision_model.encoder.layers.{block[1]}", block[2], tensor)
        else:
            yield f"vision_model.{_replace_start(rest, _OPENCLIP_VISION)}", tensor


def _openclip_block(layer: str, name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    if match := re.match(r"attn\.in_proj_(weight|bias)$", name):
        width = tensor.shape[0] // 3
        for index, letter in enumerate("qkv"):
            part = tensor.rows(index * width, (index + 1) * width)
            yield f"{layer}.self_attn.{letter}_proj.{match[1]}", part
    else:
        yield f"{layer}.{_replace_start(name, _OPENCLIP_BLOCK)}", tensor


def _replace_start(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
