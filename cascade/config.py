"""Dimensions of every network as frozen dataclasses, and the published variants as data.

Field names follow the vocabulary of the diffusers configuration files. A level's pattern is a string of
block letters: C (convolution and MLP), T (noise level), A (attention).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageCConfig:
    """The prior: denoises the 16-channel latent (42.67 pixels to a cell) from text and images.

    Lists of the up path are written deepest level first, as in the published configurations.
    """

    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 1
    timestep_ratio_embedding_dim: int = 64
    conditioning_dim: int = 2048
    block_out_channels: tuple[int, ...] = (2048, 2048)
    num_attention_heads: tuple[int, ...] = (32, 32)
    down_num_layers_per_block: tuple[int, ...] = (8, 24)
    up_num_layers_per_block: tuple[int, ...] = (24, 8)
    down_blocks_repeat_mappers: tuple[int, ...] = (1, 1)
    up_blocks_repeat_mappers: tuple[int, ...] = (1, 1)
    block_types_per_layer: tuple[str, ...] = ("CTA", "CTA")
    clip_text_in_channels: int = 1280
    clip_text_pooled_in_channels: int = 1280
    clip_image_in_channels: int = 768
    clip_seq: int = 4
    kernel_size: int = 3
    dropout: tuple[float, ...] = (0.1, 0.1)
    self_attn: tuple[bool, ...] = (True, True)
    switch_level: tuple[bool, ...] = (False,)
    timestep_conditioning_type: tuple[str, ...] = ("sca", "crp")


@dataclass(frozen=True, slots=True)
class StageBConfig:
    """The decoder: denoises Stage A's 4-channel latent (4 pixels to a cell) from Stage C's latent."""

    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 2
    timestep_ratio_embedding_dim: int = 64
    conditioning_dim: int = 1280
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_attention_heads: tuple[int, ...] = (0, 0, 20, 20)
    down_num_layers_per_block: tuple[int, ...] = (2, 6, 28, 6)
    up_num_layers_per_block: tuple[int, ...] = (6, 28, 6, 2)
    down_blocks_repeat_mappers: tuple[int, ...] = (1, 1, 1, 1)
    up_blocks_repeat_mappers: tuple[int, ...] = (3, 3, 2, 2)
    block_types_per_layer: tuple[str, ...] = ("CT", "CT", "CTA", "CTA")
    clip_text_pooled_in_channels: int = 1280
    clip_seq: int = 4
    effnet_in_channels: int = 16
    pixel_mapper_in_channels: int = 3
    kernel_size: int = 3
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)
    self_attn: tuple[bool, ...] = (True, True, True, True)
    timestep_conditioning_type: tuple[str, ...] = ("sca",)


@dataclass(frozen=True, slots=True)
class StageAConfig:
    """The VQGAN ("Paella") between pixels and the 4-channel latent.

    `hidden_channels` is the width at the latent's resolution; each level towards the pixels halves it.
    `scale_factor` divides encoded latents: 0.43 in the official code, 0.3764 in the diffusers repository.
    """

    levels: int = 2
    bottleneck_blocks: int = 12
    hidden_channels: int = 384
    latent_channels: int = 4
    codebook_size: int = 8192
    scale_factor: float = 0.43


@dataclass(frozen=True, slots=True)
class EffNetStage:
    """A stage of EfficientNet-V2: `kind` is "fused" (FusedMBConv) or "mbconv" (with squeeze, excitation)."""

    kind: str
    expand: int
    stride: int
    channels: int
    repeats: int


@dataclass(frozen=True, slots=True)
class EffNetConfig:
    """The semantic encoder: EfficientNet-V2 features and a 1x1 mapper to the latent of Stage C."""

    stem_channels: int = 24
    stages: tuple[EffNetStage, ...] = (
        EffNetStage("fused", 1, 1, 24, 2),
        EffNetStage("fused", 4, 2, 48, 4),
        EffNetStage("fused", 4, 2, 64, 4),
        EffNetStage("mbconv", 4, 2, 128, 6),
        EffNetStage("mbconv", 6, 1, 160, 9),
        EffNetStage("mbconv", 6, 2, 256, 15),
    )
    head_channels: int = 1280
    latent_channels: int = 16


@dataclass(frozen=True, slots=True)
class PreviewerConfig:
    """The small convolutional network that turns Stage C latents into pictures of 8 pixels to a cell."""

    in_channels: int = 16
    hidden_channels: int = 512
    out_channels: int = 3


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """The cosine schedule of noise levels, as the checkpoint's scheduler configuration states it.

    `clamp_min` and `clamp_max` bound the share of signal (abar) before the shift; `scaler` is the time
    warp of diffusers' scheduler; `shift` moves all levels towards more noise (1: none).
    """

    s: float = 0.008
    scaler: float = 1.0
    clamp_min: float = 1e-4
    clamp_max: float = 0.9999
    shift: float = 1.0


STAGE_C_3_6B = StageCConfig()
STAGE_C_1B = StageCConfig(
    conditioning_dim=1536,
    block_out_channels=(1536, 1536),
    num_attention_heads=(24, 24),
    down_num_layers_per_block=(4, 12),
    up_num_layers_per_block=(12, 4),
)
STAGE_B_1_5B = StageBConfig()
STAGE_B_700M = StageBConfig(
    block_out_channels=(320, 576, 1152, 1152),
    num_attention_heads=(0, 9, 18, 18),
    down_num_layers_per_block=(2, 4, 14, 4),
    up_num_layers_per_block=(4, 14, 4, 2),
    up_blocks_repeat_mappers=(2, 2, 2, 2),
)
STAGE_A = StageAConfig()
EFFNET_V2_S = EffNetConfig()
PREVIEWER = PreviewerConfig()

SCHEDULE_C = ScheduleConfig(shift=2.0)
SCHEDULE_B = ScheduleConfig(shift=1.0)
