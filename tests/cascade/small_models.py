"""The real networks at tiny dimensions with random weights, and a text encoder that needs no files."""

import zlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from cascade.conditioning import TextEmbeddings, TextEncoder
from cascade.config import SCHEDULE_B, SCHEDULE_C, StageAConfig, StageBConfig, StageCConfig
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.pipeline import Cascade
from cascade.sizes import NativeSizes

TEXT_WIDTH = 8
MAX_WORDS = 6

STAGE_C = StageCConfig(
    timestep_ratio_embedding_dim=16,
    conditioning_dim=16,
    block_out_channels=(16, 16),
    num_attention_heads=(2, 2),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1),
    clip_text_in_channels=TEXT_WIDTH,
    clip_text_pooled_in_channels=TEXT_WIDTH,
    clip_image_in_channels=4,
    clip_seq=2,
)
STAGE_B = StageBConfig(
    timestep_ratio_embedding_dim=16,
    conditioning_dim=16,
    block_out_channels=(8, 16),
    num_attention_heads=(0, 2),
    down_num_layers_per_block=(1, 1),
    up_num_layers_per_block=(1, 1),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=("CT", "CTA"),
    clip_text_pooled_in_channels=TEXT_WIDTH,
    clip_seq=2,
    dropout=(0.0, 0.0),
    self_attn=(True, True),
)
STAGE_A = StageAConfig(bottleneck_blocks=1, hidden_channels=16, codebook_size=16)


class WordEncoder:
    """A vector for every word, found by its hash; the rest of the row is the end of the text."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> TextEmbeddings:
        self.calls.append(list(prompts))
        rows = [[*prompt.split()[:MAX_WORDS], *["<end>"] * MAX_WORDS][:MAX_WORDS] for prompt in prompts]
        hidden = torch.stack([torch.stack([_vector(word) for word in row]) for row in rows])
        counts = tuple(len(prompt.split()) for prompt in prompts)
        return TextEmbeddings(
            hidden=hidden,
            pooled=hidden.mean(dim=1, keepdim=True),
            num_tokens=counts,
            truncated=tuple(count > MAX_WORDS for count in counts),
        )


def small_cascade(native: NativeSizes | None = None, **changes: Any) -> Cascade:
    """A checkpoint that makes colourful noise, in milliseconds if asked for a small size."""
    encoder = cast(TextEncoder, WordEncoder())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "stage_a": _ready(StageA(STAGE_A)),
            "stage_b": _ready(StageB(STAGE_B)),
            "stage_c": _ready(StageC(STAGE_C)),
            "text_encoder": encoder,
            "decoder_text_encoder": encoder,
            "prior_schedule": SCHEDULE_C,
            "decoder_schedule": SCHEDULE_B,
            "native": native or NativeSizes(),
        }
    with torch.no_grad():  # random stages make latents that are far too large: decode them faintly
        parts["stage_a"].out_block[0].weight *= 0.01
        parts["stage_a"].out_block[0].bias.fill_(0.5)
    return Cascade(**(parts | changes))


def _ready(network: nn.Module) -> nn.Module:
    for weight in network.parameters():
        fan_in = weight[0].numel() if weight.dim() > 1 and weight.shape[0] > 1 else 25
        nn.init.normal_(weight, 0, fan_in**-0.5)
    return network.eval().requires_grad_(False)


def _vector(word: str) -> torch.Tensor:
    return torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
