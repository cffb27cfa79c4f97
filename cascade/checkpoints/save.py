"""Saving of networks and whole checkpoints in diffusers' or the original layout."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from cascade.checkpoints.configs import CONFIG_CLASSES, NetworkConfig, to_json, variant_name
from cascade.checkpoints.files import CONFIG_METADATA
from cascade.checkpoints.keys import Component, to_diffusers
from cascade.checkpoints.stored import StoredTensor
from cascade.checkpoints.sums import write_sums
from cascade.checkpoints.writing import atomic_folder, write_json, write_tensors
from cascade.config import ScheduleConfig
from cascade.models import Models

TargetLayout: TypeAlias = Literal["diffusers", "original"]

FOLDERS = {
    Component.STAGE_C: "prior",
    Component.STAGE_B: "decoder",
    Component.STAGE_A: "vqgan",
    Component.TEXT_ENCODER: "text_encoder",
    Component.IMAGE_ENCODER: "image_encoder",
    Component.EFFNET_ENCODER: "effnet_encoder",
    Component.PREVIEWER: "previewer",
}
CONTROLNET_FOLDER = "controlnet"
TOWERS = (Component.TEXT_ENCODER, Component.IMAGE_ENCODER)

_STATISTICS = ("running_mean", "running_var")  # of batch norms; half precision would shift whole pictures
_LITE = ("1B", "700M")
# The class of each folder, as in diffusers' model_index.json, which finds Stage A by its full path only.
_LOADERS = {
    "prior": ["diffusers", "StableCascadeUNet"],
    "decoder": ["diffusers", "StableCascadeUNet"],
    "vqgan": ["diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model", "PaellaVQModel"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "prior_scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
}


@dataclass(frozen=True, slots=True)
class Weights:
    """One component, ready to be written."""

    component: Component
    tensors: Mapping[str, StoredTensor]  # by canonical name
    content: Mapping[str, Any]  # of config.json
    variant: str = "custom"

    @classmethod
    def of_network(cls, network: nn.Module) -> "Weights":
        """Take the weights of one of our networks, or of a CLIP tower of transformers."""
        tensors = {name: StoredTensor.of(tensor) for name, tensor in network.state_dict().items()}
        config: Any = network.config
        for known, config_class in CONFIG_CLASSES.items():
            if isinstance(config, config_class):
                return cls.of_config(known, tensors, config)
        kind = Component.TEXT_ENCODER if hasattr(network, "text_model") else Component.IMAGE_ENCODER
        return cls(kind, tensors, tower_settings(network))

    @classmethod
    def of_config(
        cls, component: Component, tensors: Mapping[str, StoredTensor], config: NetworkConfig
    ) -> "Weights":
        """Combine tensors with the configuration of their network."""
        return cls(component, tensors, to_json(config), variant_name(config))


def tower_settings(tower: nn.Module) -> dict[str, Any]:
    """Return the content of config.json for a CLIP tower of transformers."""
    config: Any = tower.config
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return content | {"architectures": [type(tower).__name__]}


def save_component(
    network: nn.Module, folder: Path, dtype: torch.dtype | None = None, *, layout: TargetLayout = "diffusers"
) -> Path:
    """Write a network's config.json and weights into `folder`, in its own types or in `dtype`.

    The original layout is one file with the configuration in its header. Files are replaced only when the new
    ones are complete. Returns the file of the weights.

    Raises:
        CheckpointError: no space or permission, or values too large for float16.
    """
    return write_component(Weights.of_network(network), folder, dtype, layout)


def save_cascade(
    models: Models, folder: Path, dtype: torch.dtype | None = None, *, layout: TargetLayout = "diffusers"
) -> None:
    """Write a whole checkpoint into a new folder, which appears only when it is complete."""
    networks = {
        FOLDERS[Component.STAGE_C]: models.stage_c,
        FOLDERS[Component.STAGE_B]: models.stage_b,
        FOLDERS[Component.STAGE_A]: models.stage_a,
        FOLDERS[Component.TEXT_ENCODER]: models.decoder_text_encoder.model,
        FOLDERS[Component.EFFNET_ENCODER]: models.effnet,
        FOLDERS[Component.PREVIEWER]: models.previewer,
        FOLDERS[Component.IMAGE_ENCODER]: models.image_encoder and models.image_encoder.model,
    }
    if models.text_encoder is not models.decoder_text_encoder:
        networks["prior_text_encoder"] = models.text_encoder.model
    with atomic_folder(folder) as partial:
        for name, network in networks.items():
            if network is not None:
                write_named(Weights.of_network(network), partial, name, dtype, layout)
        for controlnet in models.controlnets.values():
            write_controlnet(Weights.of_network(controlnet), controlnet.kind, partial, dtype)
        models.decoder_text_encoder.tokenizer.save_pretrained(partial / "tokenizer")
        if models.text_encoder is not models.decoder_text_encoder:
            models.text_encoder.tokenizer.save_pretrained(partial / "prior_tokenizer")
        if models.image_encoder is not None:
            models.image_encoder.processor.save_pretrained(partial / "feature_extractor")
        write_schedule(models.decoder_schedule, partial / "scheduler")
        write_schedule(models.prior_schedule, partial / "prior_scheduler")
        sizes = [list(size) for size in models.native.sizes] if models.native.resamples else None
        write_model_index(partial, sizes)
        write_sums(partial)


def write_named(
    weights: Weights, folder: Path, name: str, dtype: torch.dtype | None, layout: TargetLayout
) -> None:
    """Write a component into a checkpoint: in the sub-folder `name`, or as a file of the original layout."""
    is_file = layout == "original" and weights.component not in TOWERS
    write_component(weights, folder if is_file else folder / name, dtype, layout)


def write_controlnet(weights: Weights, kind: str, folder: Path, dtype: torch.dtype | None) -> Path:
    """Write a ControlNet into a checkpoint; in both layouts it is a file named by kind, in `controlnet`."""
    file = folder / CONTROLNET_FOLDER / f"{kind}.safetensors"
    return write_component(weights, file.parent, dtype, "original", file)


def write_component(
    weights: Weights, folder: Path, dtype: torch.dtype | None, layout: TargetLayout, file: Path | None = None
) -> Path:
    """Write one component; `file` replaces the published name of the original layout's single file."""

    def dtype_of(name: str, present: torch.dtype) -> torch.dtype:
        if dtype is None or not present.is_floating_point or name.endswith(_STATISTICS):
            return present
        return dtype

    if layout == "original" and weights.component not in TOWERS:
        kept = dtype or max(weights.tensors.values(), key=lambda tensor: tensor.num_bytes).dtype
        file = file or folder / _original_name(weights, kept)
        metadata = {CONFIG_METADATA: json.dumps(weights.content)}
        if weights.component is Component.CONTROLNET:  # for other programs
            metadata["injections"] = ",".join(map(str, weights.content["injections"]))
        write_tensors(file, weights.tensors, dtype_of, metadata)
        return file
    stem = "model" if weights.component in TOWERS else "diffusion_pytorch_model"
    file = folder / f"{stem}.safetensors"
    write_tensors(file, to_diffusers(weights.component, weights.tensors), dtype_of, {})
    write_json(folder / "config.json", weights.content)
    return file


def write_schedule(schedule: ScheduleConfig, folder: Path) -> None:
    """Write a scheduler_config.json with the settings that diffusers' scheduler reads, and our own."""
    content = {"_class_name": "DDPMWuerstchenScheduler", **asdict(schedule)}
    write_json(folder / "scheduler_config.json", content)


def write_model_index(folder: Path, native_sizes: list[list[int]] | None) -> None:
    """Write a model_index.json from which both pipelines of diffusers can load the folder."""
    content: dict[str, object] = {"_class_name": "StableCascadeDecoderPipeline"}
    content |= {name: loader for name, loader in _LOADERS.items() if (folder / name).is_dir()}
    if native_sizes:
        content["native_sizes"] = native_sizes
    write_json(folder / "model_index.json", content)


def _original_name(weights: Weights, dtype: torch.dtype) -> str:
    lite = "_lite" if weights.variant in _LITE else ""
    suffix = "_bf16" if dtype is torch.bfloat16 else ""
    return f"{weights.component}{lite}{suffix}.safetensors"
