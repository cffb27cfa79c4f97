import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cascade.config import ScheduleConfig, StageBConfig
from cascade.networks.stage_b import StageB
from cascade.sampling.schedule import CosineSchedule
from cascade.training import regression
from cascade.training.code import scene_code
from cascade.training.preconditioning import Channels, precondition
from cascade.training.regression import PLAN, pretrain
from cascade.training.scenes import sample_scene

CONFIG = StageBConfig(
    timestep_ratio_embedding_dim=32,
    conditioning_dim=16,
    block_out_channels=(48, 16),
    num_attention_heads=(0, 2),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 2),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=("CT", "CTA"),
    clip_text_pooled_in_channels=16,
    dropout=(0.0, 0.0),
    self_attn=(True, True),
)
SCHEDULE = CosineSchedule(ScheduleConfig(clamp_min=0.02))
CHANNELS = Channels.of(CONFIG)
SCENES = [sample_scene(np.random.default_rng(seed)) for seed in range(4)]
DRAWN = torch.from_numpy(np.stack([scene_code(scene) for scene in SCENES])), SCENES


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageB]:
    """A Stage B whose first level was trained on few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "_SCENES", 40)
        patch.setattr(regression, "_HELD_OUT", 8)
        patch.setattr(regression, "_SCENES_PER_STEP", 8)
        torch.manual_seed(0)
        stage = StageB(CONFIG)
        masks = precondition(stage, SCHEDULE, 200.0)
        plan = dataclasses.replace(PLAN, steps=80, warmup=5, judge_every=0)
        pretrain(stage, CHANNELS, 0.5, tmp_path_factory.mktemp("first_level"), masks, DRAWN, plan)
        yield stage.eval()


@torch.no_grad()
def test_whole_network_predicts_what_its_first_level_learned(stage: StageB) -> None:
    scenes = regression._Scenes(0.5, DRAWN)
    codes, tokens = scenes._codes[:2], scenes._tokens[:2].float()
    level = regression._FirstLevel(stage, CHANNELS)
    alone = level(regression._under_tokens(codes), np.random.default_rng(0))
    noise = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    log_snr = SCHEDULE.log_snr(torch.ones(2))
    condition = stage.prepare(codes, torch.zeros(2, 1, 16), (64, 64))
    predicted = stage(noise, SCHEDULE.ratio(log_snr).float(), condition)
    alpha, sigma = log_snr.sigmoid().sqrt()[0], (-log_snr).sigmoid().sqrt()[0]
    clean = ((noise - sigma * predicted) / alpha).unfold(2, 2, 2).unfold(3, 2, 2)
    whole = clean.permute(0, 2, 3, 1, 4, 5).reshape(2, 1024, 16)
    assert (whole - alone).square().mean() < 0.01 * tokens.var()


def test_first_level_learns_the_pictures(stage: StageB) -> None:
    scenes = regression._Scenes(0.5, DRAWN)
    level = regression._FirstLevel(stage, CHANNELS)
    codes, tokens = scenes.held_out()
    with torch.no_grad():
        error = (level(codes, np.random.default_rng(0)) - tokens).square().mean()
    assert error < 0.9 * tokens.var()
