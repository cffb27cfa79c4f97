import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from cascade.checkpoints.configs import (
    PUBLISHED,
    NetworkConfig,
    network_config,
    schedule_config,
    to_json,
    variant_name,
)
from cascade.checkpoints.keys import Component, to_original
from cascade.checkpoints.stored import StoredTensor
from cascade.config import (
    SCHEDULE_C,
    STAGE_B_700M,
    STAGE_C_1B,
    ControlNetConfig,
    EffNetConfig,
    EffNetStage,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)
from cascade.errors import CheckpointError
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC

NETWORKS: dict[type, tuple[Component, Any]] = {
    StageCConfig: (Component.STAGE_C, StageC),
    StageBConfig: (Component.STAGE_B, StageB),
    StageAConfig: (Component.STAGE_A, StageA),
    EffNetConfig: (Component.EFFNET_ENCODER, EffNetEncoder),
    PreviewerConfig: (Component.PREVIEWER, Previewer),
    ControlNetConfig: (Component.CONTROLNET, ControlNet),
}
# Nobody published these: three levels, other widths, unequal depths up and down, repeats, further types.
DEEP_C = StageCConfig(
    conditioning_dim=96,
    block_out_channels=(64, 128, 192),
    num_attention_heads=(1, 0, 3),
    down_num_layers_per_block=(1, 2, 3),
    up_num_layers_per_block=(2, 1, 1),
    down_blocks_repeat_mappers=(1, 2, 1),
    up_blocks_repeat_mappers=(3, 1, 2),
    block_types_per_layer=("CTA", "CT", "CCTA"),
    clip_text_in_channels=40,
    clip_text_pooled_in_channels=48,
    clip_image_in_channels=24,
    clip_seq=2,
    kernel_size=5,
    dropout=(0.1, 0.0, 0.1),
    self_attn=(True, True, True),
    switch_level=(False, False),
    timestep_conditioning_type=("sca",),
)
FLAT_B = dataclasses.replace(
    STAGE_B_700M,
    block_out_channels=(64, 64, 64, 128),
    num_attention_heads=(0, 0, 1, 2),
    down_num_layers_per_block=(1, 1, 2, 1),
    up_num_layers_per_block=(3, 1, 1, 2),
)
SMALL_EFFNET = EffNetConfig(
    stem_channels=8,
    stages=(
        EffNetStage("fused", 1, 1, 8, 1),
        EffNetStage("fused", 2, 2, 16, 2),
        EffNetStage("mbconv", 4, 2, 24, 1),
    ),
    head_channels=32,
    latent_channels=16,
)


def unread(config: NetworkConfig) -> tuple[Component, dict[str, StoredTensor]]:
    component, network = NETWORKS[type(config)]
    with torch.device("meta"):
        tensors = network(config).state_dict()
    stored = {name: StoredTensor(tuple(t.shape), t.dtype, ()) for name, t in tensors.items()}
    return component, to_original(component, stored)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_known_by_their_shapes(name: str) -> None:
    component, tensors = unread(PUBLISHED[name])
    config = network_config(component, tensors)
    assert variant_name(config) == name
    heads = getattr(PUBLISHED[name], "num_attention_heads", ())
    for pattern, ours, published in zip(
        getattr(config, "block_types_per_layer", ()),
        getattr(config, "num_attention_heads", ()),
        heads,
        strict=True,
    ):
        assert ours == published or "A" not in pattern
    unseen = {"num_attention_heads": heads} if heads else {}
    assert dataclasses.replace(config, **unseen) == PUBLISHED[name]


@pytest.mark.parametrize("config", [DEEP_C, FLAT_B], ids=["C", "B"])
def test_any_depth_and_width_follows_from_shapes(config: NetworkConfig) -> None:
    component, tensors = unread(config)
    assert network_config(component, tensors) == config
    assert variant_name(config) == "custom"


def test_stage_a_follows_from_shapes_also_without_its_codebook() -> None:
    config = StageAConfig(levels=3, bottleneck_blocks=4, hidden_channels=64, codebook_size=100)
    component, tensors = unread(config)
    assert network_config(component, tensors) == config
    del tensors["vquantizer.codebook.weight"]
    assert network_config(component, tensors) == dataclasses.replace(config, codebook_size=8192)


def test_a_small_encoder_needs_its_config_for_the_strides_only() -> None:
    component, tensors = unread(SMALL_EFFNET)
    other_strides = dataclasses.replace(
        SMALL_EFFNET, stages=tuple(dataclasses.replace(stage, stride=1) for stage in SMALL_EFFNET.stages)
    )
    assert network_config(component, tensors, to_json(SMALL_EFFNET)) == SMALL_EFFNET
    assert network_config(component, tensors, to_json(other_strides)) == other_strides


def test_a_stride_that_no_encoder_can_have_is_refused() -> None:
    content = to_json(SMALL_EFFNET)
    content["stages"][1]["stride"] = 0
    with pytest.raises(CheckpointError, match="stride must be a whole number of at least 1, but is 0"):
        network_config(*unread(SMALL_EFFNET), content)


@pytest.mark.parametrize(
    "config",
    [DEEP_C, FLAT_B, STAGE_C_1B, SMALL_EFFNET, PreviewerConfig(16, 64, 3), StageAConfig(codebook_size=9)],
)
def test_what_is_written_is_read_again(config: NetworkConfig, tmp_path: Path) -> None:
    content = json.loads(json.dumps(to_json(config)))
    component, tensors = unread(config)
    assert network_config(component, tensors, content) == config


@pytest.mark.parametrize("config", [STAGE_C_1B, FLAT_B, StageAConfig(levels=1, bottleneck_blocks=1)])
def test_diffusers_builds_the_same_network_from_what_is_written(config: NetworkConfig) -> None:
    content = to_json(config)
    theirs = {"StableCascadeUNet": StableCascadeUNet, "PaellaVQModel": PaellaVQModel}[
        content.pop("_class_name")
    ]
    with torch.device("meta"):
        tensors = theirs(**content).state_dict()
    component, expected = unread(config)
    stored = {name: StoredTensor(tuple(t.shape), t.dtype, ()) for name, t in tensors.items()}
    found = to_original(component, stored)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}


OLD_STAGE_B = {
    "_class_name": "StableCascadeUnet",
    "c_in": 4,
    "c_out": 4,
    "c_r": 64,
    "patch_size": 2,
    "c_cond": 1280,
    "c_hidden": [64, 64, 64, 128],
    "nhead": [-1, 9, 2, 4],
    "blocks": [[1, 1, 2, 1], [3, 1, 1, 2]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
    "level_config": ["CT", "CT", "CTA", "CTA"],
    "c_clip_text": None,
    "c_clip_text_pooled": 1280,
    "c_clip_img": None,
    "c_clip_seq": 4,
    "c_effnet": 16,
    "c_pixels": 3,
    "kernel_size": 3,
    "dropout": [0, 0, 0.1, 0.1],
    "self_attn": True,
    "t_conds": ["sca"],
    "switch_level": None,
}


def test_the_old_vocabulary_is_understood_and_unused_head_counts_are_ignored() -> None:
    component, tensors = unread(FLAT_B)
    config = network_config(component, tensors, OLD_STAGE_B)
    assert config == dataclasses.replace(FLAT_B, num_attention_heads=(-1, 9, 2, 4))


def test_old_level_configs_may_be_lists_of_class_names() -> None:
    blocks = ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]
    component, tensors = unread(FLAT_B)
    content = OLD_STAGE_B | {"level_config": [blocks[:2], blocks[:2], blocks, blocks]}
    assert network_config(component, tensors, content) == network_config(component, tensors, OLD_STAGE_B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"c_hidden": [64, 64, 64, 192]},
            r"block_out_channels = \[64, 64, 64, 192\].*show \[64, 64, 64, 128\]",
        ),
        ({"blocks": [[1, 1, 3, 1], [3, 1, 1, 2]]}, "down_num_layers_per_block = .*CTACTACTA"),
        ({"c_effnet": 8}, "effnet_in_channels = 8, but the tensors show 16"),
        ({"nhead": [0, 0, 3, 2]}, "num_attention_heads must .* divide the width 64"),
        ({"nhead": [0, 0, 2]}, "num_attention_heads = .*not 4 values"),
        ({"dropout": [0.1]}, "dropout = .*not 4 values"),
        ({"level_config": [3, 4]}, "config.json is malformed"),
    ],
)
def test_a_config_that_contradicts_the_shapes_is_refused(change: dict[str, Any], message: str) -> None:
    component, tensors = unread(FLAT_B)
    with pytest.raises(CheckpointError, match=message):
        network_config(component, tensors, OLD_STAGE_B | change)


def test_a_width_that_heads_do_not_divide_must_state_its_heads() -> None:
    config = dataclasses.replace(
        FLAT_B, block_out_channels=(64, 64, 64, 96), num_attention_heads=(0, 0, 1, 3)
    )
    component, tensors = unread(config)
    with pytest.raises(CheckpointError, match=r"must be stated in config\.json and divide the width 96"):
        network_config(component, tensors)
    for heads in (1, 3):
        stated = network_config(component, tensors, {"num_attention_heads": [0, 0, 1, heads]})
        assert stated == dataclasses.replace(config, num_attention_heads=(0, 0, 1, heads))


def test_a_lost_tensor_is_named() -> None:
    component, tensors = unread(FLAT_B)
    del tensors["clf.1.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor clf\.1\.weight"):
        network_config(component, tensors)
    whole = network_config(*unread(FLAT_B), OLD_STAGE_B)
    assert network_config(component, tensors, OLD_STAGE_B) == whole  # the loader will list what is lost


def test_a_lost_block_is_named() -> None:
    component, tensors = unread(FLAT_B)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("up_blocks.0.3.")}
    with pytest.raises(CheckpointError, match=r"up_blocks\.0\.3\.\*"):
        network_config(component, kept)


def test_schedules_take_absent_settings_from_their_stage(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"_class_name": "DDPMWuerstchenScheduler", "s": 0.01, "clamp_min": 0.005}')
    assert schedule_config(path, SCHEDULE_C) == dataclasses.replace(SCHEDULE_C, s=0.01, clamp_min=0.005)
    assert schedule_config(None, SCHEDULE_C) == SCHEDULE_C


@pytest.mark.parametrize(
    "content",
    [
        '{"s": "x"}',
        '{"shift": true}',
        "[1]",
        "{",
        '{"s": null}',
        '{"s": NaN}',
        '{"clamp_max": 1.5}',
        '{"clamp_min": 0.5, "clamp_max": 0.5}',
        '{"clamp_min": 0.6, "clamp_max": 0.4}',
        '{"clamp_min": 0.99995}',
        '{"clamp_max": 0.00005}',
        '{"scaler": 0}',
    ],
)
def test_malformed_schedules_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        schedule_config(path, SCHEDULE_C)
