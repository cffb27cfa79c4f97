"""Every published component, built without data, has the published names and shapes, no more and no less."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.checkpoints.configs import network_config, variant_name
from cascade.checkpoints.keys import Component, detect, to_diffusers, to_original
from cascade.checkpoints.stored import MemoryRange, StoredTensor
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
)
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC

INVENTORIES = Path(__file__).parents[2] / "golden" / "tensors"

Shapes = dict[str, tuple[int, ...]]


def text_tower() -> nn.Module:
    """OpenCLIP ViT-bigG/14, the text side."""
    config = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(config)


def image_tower() -> nn.Module:
    """OpenAI CLIP ViT-L/14, the picture side."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    )
    return CLIPVisionModelWithProjection(config)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "stage_c": lambda: StageC(STAGE_C_3_6B),
    "stage_c_lite": lambda: StageC(STAGE_C_1B),
    "stage_b": lambda: StageB(STAGE_B_1_5B),
    "stage_b_lite": lambda: StageB(STAGE_B_700M),
    "stage_a": lambda: StageA(STAGE_A),
    "text_encoder": text_tower,
    "image_encoder": image_tower,
    "effnet_encoder": lambda: EffNetEncoder(EFFNET_V2_S),
    "previewer": lambda: Previewer(PREVIEWER),
    "controlnet_canny": lambda: ControlNet(CONTROLNET_CANNY),
    "controlnet_inpainting": lambda: ControlNet(CONTROLNET_INPAINTING),
    "controlnet_super_resolution": lambda: ControlNet(CONTROLNET_SUPER_RESOLUTION),
    "controlnet_identity": lambda: ControlNet(CONTROLNET_IDENTITY),
}
CONTROLNETS = [name for name in BUILD if name.startswith("controlnet")]
ORIGINAL = ["stage_c", "stage_c_lite", "stage_b", "stage_b_lite", "stage_a", "effnet_encoder", "previewer"]
ORIGINAL += CONTROLNETS
DIFFUSERS = {
    "stage_c": ("stage_c", Component.STAGE_C),
    "stage_c_lite": ("stage_c_lite", Component.STAGE_C),
    "stage_b": ("stage_b", Component.STAGE_B),
    "stage_b_lite": ("stage_b_lite", Component.STAGE_B),
    "vqgan": ("stage_a", Component.STAGE_A),
    "text_encoder": ("text_encoder", Component.TEXT_ENCODER),
    "image_encoder": ("image_encoder", Component.IMAGE_ENCODER),
}
PARAMETERS = {
    "stage_c": 3_589_103_632,
    "stage_c_lite": 1_030_785_040,
    "stage_b": 1_562_941_136,
    "stage_b_lite": 699_471_248,
    "stage_a": 18_406_894,
    "text_encoder": 694_659_840,
    "image_encoder": 303_966_208,
    "effnet_encoder": 20_197_968,
    "previewer": 3_979_651,
    "controlnet_canny": 54_255_776,
    "controlnet_inpainting": 54_256_424,
    "controlnet_super_resolution": 203_491_584,
    "controlnet_identity": 102_763_008,
}


@cache
def built(name: str) -> tuple[Shapes, int]:
    """Names and shapes of all tensors of a component, and the number of its parameters."""
    with torch.device("meta"):
        network = BUILD[name]()
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    return shapes, sum(weight.numel() for weight in network.parameters())


def published(name: str, layout: str) -> Shapes:
    listed = json.loads((INVENTORIES / f"{name}.{layout}.json").read_text())
    return {tensor: tuple(shape) for tensor, shape in listed.items()}


def stored(tensors: Shapes) -> dict[str, StoredTensor]:
    """Stored tensors of these shapes, all of whose bytes are the same one."""
    byte = torch.zeros(1, dtype=torch.uint8)
    result = {}
    for name, shape in tensors.items():
        size = StoredTensor(shape, torch.float32, ()).num_bytes
        result[name] = StoredTensor(shape, torch.float32, (MemoryRange(byte.expand(size)),))
    return result


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_layout(name: str) -> None:
    assert built(name)[0] == published(name, "original")


@pytest.mark.parametrize("folder", DIFFUSERS)
def test_diffusers_layout(folder: str) -> None:
    name, component = DIFFUSERS[folder]
    translated = to_diffusers(component, stored(built(name)[0]))
    assert {key: tensor.shape for key, tensor in translated.items()} == published(folder, "diffusers")


@pytest.mark.parametrize("folder", DIFFUSERS)
def test_diffusers_names_translate_to_ours(folder: str) -> None:
    name, component = DIFFUSERS[folder]
    translated = to_original(component, stored(published(folder, "diffusers")))
    ours = built(name)[0]
    weights = {key: shape for key, shape in ours.items() if not key.endswith("num_batches_tracked")}
    assert {key: tensor.shape for key, tensor in translated.items()} == weights


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_is_known_by_its_shapes(name: str) -> None:
    listed = stored(published(name, "original"))
    assert detect(listed) is Component.CONTROLNET
    config = network_config(Component.CONTROLNET, to_original(Component.CONTROLNET, listed))
    with torch.device("meta"):
        assert config == BUILD[name]().config
    assert variant_name(config) == name.removeprefix("controlnet_")


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    assert built(name)[1] == PARAMETERS[name]
