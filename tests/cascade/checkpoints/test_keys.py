from typing import Any

import pytest
import torch
from diffusers import StableCascadeUNet
from torch import Tensor, nn

from cascade.checkpoints.configs import to_json
from cascade.checkpoints.keys import (
    Component,
    detect,
    detect_layout,
    split_file,
    strip_wrappers,
    to_diffusers,
    to_original,
)
from cascade.checkpoints.stored import StoredTensor
from cascade.config import STAGE_B_1_5B, STAGE_B_700M, STAGE_C_1B, STAGE_C_3_6B, StageBConfig, StageCConfig
from cascade.errors import CheckpointError
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from tests.cascade.diffusers_pipelines import Pipelines


def stored(values: dict[str, Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(value) for name, value in values.items()}


def unread(network: nn.Module) -> dict[str, StoredTensor]:
    """Names and shapes of a network on the meta device."""
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, ())
        for name, tensor in network.state_dict().items()
    }


def shapes(tensors: dict[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("config", [STAGE_C_3_6B, STAGE_C_1B, STAGE_B_1_5B, STAGE_B_700M])
def test_published_networks_have_diffusers_names_after_translation(
    config: StageCConfig | StageBConfig,
) -> None:
    settings = {name: value for name, value in to_json(config).items() if not name.startswith("_")}
    component = Component.STAGE_C if isinstance(config, StageCConfig) else Component.STAGE_B
    with torch.device("meta"):
        ours = unread(StageC(config) if isinstance(config, StageCConfig) else StageB(config))
        theirs = unread(StableCascadeUNet(**settings))
    assert shapes(to_original(component, theirs)) == shapes(ours)
    # diffusers never reads ranges of unread tensors, so only names and shapes are compared here
    assert shapes(to_diffusers(component, to_original(component, theirs))) == shapes(theirs)
    assert (detect(ours), detect(theirs)) == (component, component)
    assert (detect_layout(ours), detect_layout(theirs)) == ("original", "diffusers")


@pytest.mark.parametrize("name", ["prior.prior", "decoder.decoder", "decoder.vqgan"])
def test_there_and_back_is_bit_equal(name: str, pipelines: Pipelines) -> None:
    pipeline, attribute = name.split(".")
    values = getattr(getattr(pipelines, pipeline), attribute).state_dict()
    component = detect(stored(values))
    assert component is not None
    back = to_diffusers(component, to_original(component, stored(values)))
    counters = {name for name in values if name.endswith("num_batches_tracked")}
    assert back.keys() == values.keys() - counters
    for key, tensor in back.items():
        assert torch.equal(tensor.read(), values[key]), key


def test_query_key_and_value_are_fused_in_this_order() -> None:
    names = {letter: f"down_blocks.0.2.attention.to_{letter}.weight" for letter in "vkq"}
    values = {names[letter]: torch.full((2, 2), float(number)) for number, letter in enumerate("vkq")}
    fused = to_original(Component.STAGE_C, stored(values))
    assert fused["down_blocks.0.2.attention.attn.in_proj_weight"].read()[:, 0].tolist() == [2, 2, 1, 1, 0, 0]


def test_the_pooled_mapper_is_renamed_in_stage_b_only() -> None:
    values = stored({"clip_txt_pooled_mapper.weight": torch.zeros(2, 2)})
    assert list(to_original(Component.STAGE_B, values)) == ["clip_mapper.weight"]
    assert list(to_original(Component.STAGE_C, values)) == ["clip_txt_pooled_mapper.weight"]


def test_a_lost_key_projection_is_named() -> None:
    values = stored({f"a.attention.to_{letter}.bias": torch.zeros(2) for letter in "qv"})
    with pytest.raises(CheckpointError, match=r"a\.attention\.to_k\.bias"):
        to_original(Component.STAGE_B, values)


def test_projections_of_different_shapes_are_refused() -> None:
    values = {f"a.attention.to_{letter}.bias": torch.zeros(2 if letter == "q" else 3) for letter in "qkv"}
    with pytest.raises(CheckpointError, match=r"differ in shape or dtype: a\.attention\.to_q\.bias \[2\]"):
        to_original(Component.STAGE_B, stored(values))


@pytest.mark.parametrize(
    "prefix", ["module.", "generator.", "state_dict.", "generator._fsdp_wrapped_module.", "_orig_mod."]
)
def test_wrappers_of_training_are_stripped(prefix: str) -> None:
    values = {f"{prefix}clip_txt_mapper.weight": torch.zeros(1), f"{prefix}embedding.1.bias": torch.zeros(1)}
    assert split_file(stored(values))[Component.STAGE_C].keys() == {
        "clip_txt_mapper.weight",
        "embedding.1.bias",
    }


def test_wrappers_inside_names_are_stripped_too() -> None:
    name = "module.down_blocks.0._fsdp_wrapped_module.0.depthwise.bias"
    assert list(strip_wrappers(stored({name: torch.zeros(1)}))) == ["down_blocks.0.0.depthwise.bias"]


def test_a_prefix_of_some_names_only_stays() -> None:
    names = {"module.clip_txt_mapper.weight", "clip_img_mapper.weight"}
    assert strip_wrappers(stored({name: torch.zeros(1) for name in names})).keys() == names


def test_counters_and_constants_are_left_out() -> None:
    names = ("text_model.embeddings.position_ids", "logit_scale", "text_projection.weight")
    values = stored({name: torch.zeros(1) for name in names})
    assert list(to_original(Component.TEXT_ENCODER, values)) == ["text_projection.weight"]


def comfyui_files(pipelines: Pipelines) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two combined files as ComfyUI writes them."""
    text = pipelines.prior.text_encoder.state_dict()
    clip = {f"text_encoder.clip_g.transformer.{name}": value for name, value in text.items()}
    projection = clip.pop("text_encoder.clip_g.transformer.text_projection.weight")
    clip["text_encoder.clip_g.text_projection"] = projection.T.contiguous()
    clip["text_encoder.clip_g.logit_scale"] = torch.tensor(4.6)
    vision = {f"clip_l_vision.{name}": v for name, v in pipelines.prior.image_encoder.state_dict().items()}
    first = clip | vision | comfyui_unet(pipelines.prior.prior.state_dict())
    stage_a = {f"vae.{name}": value for name, value in pipelines.decoder.vqgan.state_dict().items()}
    return first, clip | stage_a | comfyui_unet(pipelines.decoder.decoder.state_dict())


def comfyui_unet(values: dict[str, Tensor]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        name = name.replace(".attention.to_out.0.", ".attention.attn.out_proj.")
        return "model.diffusion_model." + name.replace(".attention.to_", ".attention.attn.to_")

    return {renamed(name): value for name, value in values.items()}


def test_combined_files_are_taken_apart(pipelines: Pipelines) -> None:
    first, second = (split_file(stored(values)) for values in comfyui_files(pipelines))
    assert first.keys() == {Component.STAGE_C, Component.TEXT_ENCODER, Component.IMAGE_ENCODER}
    assert second.keys() == {Component.STAGE_B, Component.TEXT_ENCODER, Component.STAGE_A}
    same: dict[Component, Any] = {
        Component.STAGE_C: pipelines.prior.prior,
        Component.TEXT_ENCODER: pipelines.prior.text_encoder,
        Component.IMAGE_ENCODER: pipelines.prior.image_encoder,
    }
    for component, network in same.items():
        expected = to_original(component, stored(network.state_dict()))
        found = to_original(component, first[component])
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.read(), expected[name].read()), name


def test_the_encoder_and_the_previewer_in_a_combined_file_are_found() -> None:
    names = ["model.diffusion_model.clip_txt_mapper.weight", "vae.encoder.mapper.1.running_mean"]
    names += ["vae.encoder.mean", "vae.encoder.std", "vae.previewer.blocks.0.weight"]
    found = split_file(stored({name: torch.zeros(1) for name in names}))
    assert found[Component.EFFNET_ENCODER].keys() == {"mapper.1.running_mean"}
    assert found[Component.PREVIEWER].keys() == {"blocks.0.weight"}


def test_openclip_names_of_the_vision_tower_are_understood() -> None:
    width = 4
    values = {
        "visual.class_embedding": torch.zeros(width),
        "visual.positional_embedding": torch.zeros(5, width),
        "visual.conv1.weight": torch.zeros(width, 3, 2, 2),
        "visual.ln_pre.weight": torch.zeros(width),
        "visual.transformer.resblocks.1.attn.in_proj_weight": torch.arange(48.0).view(12, 4),
        "visual.transformer.resblocks.1.attn.out_proj.bias": torch.zeros(width),
        "visual.transformer.resblocks.1.ln_2.bias": torch.zeros(width),
        "visual.transformer.resblocks.1.mlp.c_proj.weight": torch.zeros(width, 8),
        "visual.ln_post.bias": torch.zeros(width),
        "visual.proj": torch.arange(8.0).view(width, 2),
    }
    found = to_original(Component.IMAGE_ENCODER, stored(values))
    layer = "vision_model.encoder.layers.1"
    assert found.keys() == {
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.pre_layrnorm.weight",
        "vision_model.post_layernorm.bias",
        f"{layer}.self_attn.q_proj.weight",
        f"{layer}.self_attn.k_proj.weight",
        f"{layer}.self_attn.v_proj.weight",
        f"{layer}.self_attn.out_proj.bias",
        f"{layer}.layer_norm2.bias",
        f"{layer}.mlp.fc2.weight",
        "visual_projection.weight",
    }
    assert found["visual_projection.weight"].read().tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found[f"{layer}.self_attn.v_proj.weight"].read()[0].tolist() == [32, 33, 34, 35]


def test_nothing_known_is_no_component() -> None:
    assert split_file(stored({"unet.conv_in.weight": torch.zeros(1)})) == {}
    assert split_file({}) == {}
