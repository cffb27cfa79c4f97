"""Dimensions of every network as frozen dataclasses, and the published variants as data.

Field names follow the vocabulary of the diffusers configuration files. A level's pattern is a string of
block letters: C (convolution and MLP), T (noise level), A (attention). Dimensions with which no network could
be built or run are refused with a `CheckpointError`, because it is a checkpoint that states them.
"""

from dataclasses import dataclass, fields, replace

from cascade.errors import CheckpointError

CONTROL_KINDS = ("canny", "inpainting", "super_resolution", "identity")  # of the published ControlNets


def _check_counts(config: object, but: tuple[str, ...] = ()) -> None:
    """Raise unless all whole numbers of a config, except the fields `but`, are at least 1."""
    for field in fields(config):  # type: ignore[arg-type]  # always a dataclass of this module
        value = getattr(config, field.name)
        if field.type not in (int, tuple[int, ...]) or field.name in but:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if any(type(number) is not int or number < 1 for number in numbers):
            shown = list(value) if isinstance(value, tuple) else value
            raise CheckpointError(f"{field.name} must be a whole number of at least 1, but is {shown!r}")


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

    def __post_init__(self) -> None:
        _check_unet(self)
        if len(self.switch_level) != len(self.block_out_channels) - 1:
            raise CheckpointError(f"switch_level = {self.switch_level} is not one value less than levels")


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

    def __post_init__(self) -> None:
        _check_unet(self)


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

    def __post_init__(self) -> None:
        _check_counts(self)
        if self.hidden_channels % 2 ** (self.levels - 1):
            raise CheckpointError(
                f"hidden_channels = {self.hidden_channels} cannot be halved for each of {self.levels} levels"
            )


@dataclass(frozen=True, slots=True)
class EffNetStage:
    """A stage of EfficientNet-V2: `kind` is "fused" (FusedMBConv) or "mbconv" (with squeeze-excitation)."""

    kind: str
    expand: int
    stride: int
    channels: int
    repeats: int

    def __post_init__(self) -> None:
        _check_counts(self)
        if self.kind not in ("fused", "mbconv"):
            raise CheckpointError(f"a stage has the kind {self.kind!r}; known are fused and mbconv")
        if self.stride > 2:
            raise CheckpointError(f"a stage has the stride {self.stride}; allowed are 1 and 2")


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

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_stages(self.stem_channels, self.stages)


@dataclass(frozen=True, slots=True)
class ControlNetConfig:
    """A ControlNet of Stage C: a backbone over a picture or a map, and a projection for every injection.

    `mode` names the backbone: "effnet" (EfficientNet-V2 features of a picture), "large" (residual blocks over
    a latent of Stage C) or "simple" (two convolutions over any map). `injections` are the ResBlocks of Stage
    C, in running order with repeats counted, before which the projections are added.

    Dimensions that the mode does not have are 0 or empty.
    """

    mode: str
    in_channels: int
    channels: int  # of the backbone's result
    injections: tuple[int, ...]
    out_channels: tuple[int, ...]  # widths of Stage C at the injections
    stem_channels: int = 0  # effnet
    stages: tuple[EffNetStage, ...] = ()  # effnet
    hidden_channels: tuple[int, ...] = ()  # large: of the first two layers; simple: of the first
    num_blocks: int = 0  # large: residual blocks

    def __post_init__(self) -> None:
        needed = {"effnet": ("stem_channels",), "large": ("num_blocks",), "simple": ()}
        if self.mode not in needed:
            raise CheckpointError(f"mode must be one of {', '.join(needed)}, but is {self.mode!r}")
        absent = {"stem_channels", "num_blocks"}.difference(needed[self.mode])
        _check_counts(self, but=("injections", *absent))
        if len(self.hidden_channels) != {"effnet": 0, "large": 2, "simple": 1}[self.mode]:
            raise CheckpointError(f"hidden_channels = {list(self.hidden_channels)} do not suit {self.mode!r}")
        if self.mode == "effnet":
            _check_stages(self.stem_channels, self.stages)
        places = list(self.injections)
        if any(type(place) is not int or place < 0 for place in places) or places != sorted(set(places)):
            raise CheckpointError(f"injections must be different numbers that rise, but are {places}")
        if not places or len(places) != len(self.out_channels):
            raise CheckpointError(
                f"injections = {places} are not one for each of {len(self.out_channels)} projections"
            )

    @property
    def kind(self) -> str:
        """Kind of control, inferred from the shapes; "custom" if none of the published ones fits."""
        if self.mode == "effnet":
            return {1: "canny", 4: "inpainting"}.get(self.in_channels, "custom")
        return {"large": "super_resolution", "simple": "identity"}[self.mode]


@dataclass(frozen=True, slots=True)
class PreviewerConfig:
    """The small convolutional network that turns Stage C latents into pictures of 8 pixels to a cell."""

    in_channels: int = 16
    hidden_channels: int = 512
    out_channels: int = 3

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """The cosine schedule of noise levels, as the checkpoint's scheduler configuration states it.

    `clamp_min` and `clamp_max` bound the signal fraction (abar) before the shift; `scaler` is the time
    warp of diffusers' scheduler; `shift` moves all levels towards more noise (1: none).
    """

    s: float = 0.008
    scaler: float = 1.0
    clamp_min: float = 1e-4
    clamp_max: float = 0.9999
    shift: float = 1.0


def _check_stages(stem_channels: int, stages: tuple[EffNetStage, ...]) -> None:
    """Raise unless every stage of an EfficientNet gets as many channels as it needs."""
    entering = (stem_channels, *(stage.channels for stage in stages))
    for stage, channels in zip(stages, entering, strict=False):
        if stage.kind == "mbconv" and channels < 4:  # it squeezes to a quarter of them
            raise CheckpointError(f"a stage of the kind mbconv needs 4 channels before it, has {channels}")


def _check_unet(config: StageBConfig | StageCConfig) -> None:
    """Raise unless a UNet of Stage B or C can be built and run."""
    _check_counts(config, but=("num_attention_heads",))  # any number on levels without attention
    _check_patterns(config.block_types_per_layer)
    for name in _PER_LEVEL:
        if len(getattr(config, name)) != len(config.block_out_channels):
            raise CheckpointError(
                f"{name} = {getattr(config, name)} has not one value for each of "
                f"{len(config.block_out_channels)} levels"
            )
    if config.kernel_size % 2 == 0:
        raise CheckpointError(f"kernel_size must be odd, but is {config.kernel_size}")
    if config.timestep_ratio_embedding_dim < 4:
        raise CheckpointError(
            f"timestep_ratio_embedding_dim must be at least 4, but is {config.timestep_ratio_embedding_dim}"
        )
    levels = zip(
        config.block_types_per_layer, config.block_out_channels, config.num_attention_heads, strict=True
    )
    for pattern, width, heads in levels:
        if "A" in pattern and (heads < 1 or width % heads):
            raise CheckpointError(f"num_attention_heads: {heads} heads do not divide the width {width}")


def _check_patterns(patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        if unknown := set(pattern) - set("CTA"):
            raise CheckpointError(
                f"block_types_per_layer: {min(unknown)!r} is not a known block; known are C, T and A"
            )
        if not pattern.startswith("C"):  # only a first block C joins the level's skip
            raise CheckpointError(
                f"block_types_per_layer: {pattern!r} must begin with C, which joins the skip"
            )
    if not any("T" in pattern for pattern in patterns):
        raise CheckpointError("block_types_per_layer: no level has a block T, so the noise level is unknown")


_PER_LEVEL = (
    "num_attention_heads",
    "down_num_layers_per_block",
    "up_num_layers_per_block",
    "down_blocks_repeat_mappers",
    "up_blocks_repeat_mappers",
    "block_types_per_layer",
    "dropout",
    "self_attn",
)


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

_OFFICIAL_INJECTIONS = (0, 4, 8, 12, 51, 55, 59, 63)
CONTROLNET_CANNY = ControlNetConfig(
    mode="effnet",
    in_channels=1,
    channels=1280,
    injections=_OFFICIAL_INJECTIONS,
    out_channels=(2048,) * 8,
    stem_channels=24,
    stages=EFFNET_V2_S.stages,
)
CONTROLNET_INPAINTING = replace(CONTROLNET_CANNY, in_channels=4)
CONTROLNET_SUPER_RESOLUTION = ControlNetConfig(
    mode="large",
    in_channels=16,
    channels=1280,
    injections=_OFFICIAL_INJECTIONS,
    out_channels=(2048,) * 8,
    hidden_channels=(16384, 1024),
    num_blocks=8,
)
CONTROLNET_IDENTITY = ControlNetConfig(
    mode="simple",
    in_channels=512,
    channels=512,
    injections=tuple(range(64)),
    out_channels=(2048,) * 64,
    hidden_channels=(2048,),
)

SCHEDULE_C = ScheduleConfig(shift=2.0)
SCHEDULE_B = ScheduleConfig(shift=1.0)
