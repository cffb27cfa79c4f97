"""A head start for Stage B: its first level alone learns the picture from the code, token by token.

What a token shows follows almost entirely from the code under it, so the pointwise layers of the first level
can learn it as a plain regression, without neighbours, noise levels and deeper levels, ten times faster than
the whole network would. The layers are the network's own: afterwards it predicts clean latents from the code,
and what is left to learn is to denoise and to reconcile what neighbouring nodes say.
"""

import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cascade.networks.blocks import Pointwise, ResBlock, resize
from cascade.networks.fused import layer_norm
from cascade.networks.stage_b import StageB
from cascade.training.loop import Plan, fit
from cascade.training.preconditioning import Channels
from cascade.training.scenes import SQUARE_SIZE, Scene, sample_scene
from cascade.training.stage_a import colour_latents
from cascade.training.tensors import code_tensor, picture_tensor

PLAN = Plan(
    steps=18_000,
    learning_rate=2e-3,
    matrix_rate=1e-2,
    compute_dtype=torch.bfloat16,
    save_every=500,
    judge_every=2000,
    seed=3,
)

_SCENES = 40_000
_HELD_OUT = 200
_TOKENS_PER_SIDE = 32
_SCENES_PER_STEP, _TOKENS_PER_SCENE = 64, 64
_VARIED = 0.02  # a token whose values vary more than this shows an outline, as half of those chosen do


def pretrain(
    stage: StageB,
    channels: Channels,
    scale_factor: float,
    folder: Path,
    masks: dict[str, Tensor],
    drawn: tuple[Tensor, list[Scene]],
    plan: Plan = PLAN,
) -> None:
    """Train the first level of a preconditioned `stage` in place; its state is kept in `folder`.

    `scale_factor` is Stage A's, `masks` are those of `precondition`, `drawn` are the codes (n, 16, 6, 6) of
    `drawn_codes` and the scenes that they mean.
    """
    level = _FirstLevel(stage, channels)
    _silence_deeper_levels(stage)
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    trainable = {
        name: masks[names[id(parameter)]]
        for name, parameter in level.named_parameters()
        if names[id(parameter)] in masks
    }
    scenes = _Scenes(scale_factor, drawn)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        codes, tokens = scenes.batch(rng)
        error = F.mse_loss(module(codes, rng), tokens)
        return error, {}

    def judge(module: nn.Module, step: int) -> dict[str, float]:
        codes, tokens = scenes.held_out()
        with torch.no_grad():
            error = (module(codes, np.random.default_rng(0)) - tokens).square().mean((1, 2))
        return {"error": error.mean().item(), "median": error.median().item()}

    average = fit(level, loss, plan, folder, title="Stage B, first level", judge=judge, trainable=trainable)
    level.load_state_dict(average.state_dict())


class _FirstLevel(nn.Module):
    """The pointwise layers of the first level as one map from a token's code to its clean latents."""

    def __init__(self, stage: StageB, channels: Channels) -> None:
        super().__init__()
        self.channels = channels
        self.mapper = stage.effnet_mapper
        self.down = nn.ModuleList(_layers(cast(nn.ModuleList, stage.down_blocks[0])))
        self.up = nn.ModuleList(_layers(cast(nn.ModuleList, stage.up_blocks[-1])))

    def forward(self, codes: Tensor, rng: np.random.Generator) -> Tensor:
        """Predict clean tokens (b, n, 16) from the codes (b, n, 16) under them; the input is pure noise."""
        dtype = cast(Tensor, cast(Pointwise, self.mapper[0]).weight).dtype
        x = self.mapper(codes.to(dtype)) + self._noise(codes.shape[:2], rng).to(dtype)
        for block in self.down:
            x = x + _mlp(block, self._norm(x))
        first, *others = self.up
        # Of the first block's two inputs only the skip connection is used yet.
        widen, narrow = (cast(nn.Linear, cast(nn.Sequential, first)[i]) for i in (0, 4))
        x = narrow(F.gelu(F.linear(x, widen.weight[:, self.channels.width :], widen.bias)))
        for block in others:
            x = x + _mlp(block, self._norm(x))
        tokens = x[..., self.channels.prediction] @ self.channels.basis.to(dtype)
        return cast(Tensor, tokens.float())

    def _norm(self, x: Tensor) -> Tensor:
        """Apply a depthwise convolution that passes only its centre, and the norm."""
        kept = torch.ones(self.channels.width, dtype=x.dtype)
        kept[self.channels.pair] = 0
        return layer_norm(x * kept)

    def _noise(self, shape: torch.Size, rng: np.random.Generator) -> Tensor:
        """Return the embedding of pure noise: the constant pair and the input's channels."""
        channels = self.channels
        noise = torch.from_numpy(rng.standard_normal((*shape, channels.size), dtype=np.float32))
        embedded = torch.zeros(*shape, channels.width)
        embedded[..., channels.pair] = torch.tensor([1.0, -1.0]) * math.sqrt(channels.width / 2)
        embedded[..., channels.input] = noise @ channels.basis.T / channels.input_gain
        return embedded


class _Scenes:
    """Codes and latents of many scenes: true codes, some of them held out at the end, and drawn ones."""

    def __init__(self, scale_factor: float, drawn: tuple[Tensor, list[Scene]]) -> None:
        rng = np.random.default_rng(77)
        scenes = [sample_scene(rng, SQUARE_SIZE) for _ in range(_SCENES)]
        self._codes = code_tensor(scenes)
        self._tokens = _tokens(scenes, scale_factor)
        self._outlines = _outlines(self._tokens)
        self._drawn = drawn[0]
        self._drawn_tokens = _tokens(drawn[1], scale_factor)
        self._drawn_outlines = _outlines(self._drawn_tokens)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Sample codes and tokens, (b, n, 16) each, at some places of some scenes; half are on outlines."""
        num_drawn = _SCENES_PER_STEP // 2 if len(self._drawn) else 0
        true = rng.integers(0, _SCENES - _HELD_OUT, _SCENES_PER_STEP - num_drawn)
        drawn = rng.integers(0, max(1, len(self._drawn)), num_drawn)
        codes = torch.cat([_disturb(self._codes[true], rng), self._drawn[drawn]])
        tokens = torch.cat([self._tokens[true], self._drawn_tokens[drawn]])
        outlines = [self._outlines[i] for i in true] + [self._drawn_outlines[i] for i in drawn]
        places = torch.from_numpy(np.stack([_places(one, rng) for one in outlines]))[..., None]
        chosen = places.expand(-1, -1, 16)
        return _under_tokens(codes).gather(1, chosen), tokens.gather(1, chosen).float()

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return codes and tokens of all places of the scenes that training never sees."""
        return _under_tokens(self._codes[-_HELD_OUT:]), self._tokens[-_HELD_OUT:].float()


def _tokens(scenes: list[Scene], scale_factor: float) -> Tensor:
    """Return Stage B's clean tokens, (n, tokens, 16), in half precision, as there are many."""
    tokens = [torch.empty(0, _TOKENS_PER_SIDE**2, 16, dtype=torch.half)]
    for start in range(0, len(scenes), 100):
        means = F.avg_pool2d(picture_tensor(scenes[start : start + 100]), 4)
        tokens.append(F.pixel_unshuffle(colour_latents(means) / scale_factor, 2).flatten(2).mT.half())
    return torch.cat(tokens)


def _outlines(tokens: Tensor) -> list[NDArray[np.int64]]:
    """Return the places in each scene where a token shows more than one colour."""
    parts = torch.split(tokens, 1000)
    varied = torch.cat([part.float().view(*part.shape[:2], 4, 4).std(-1).sum(-1) > _VARIED for part in parts])
    return [row.nonzero().flatten().numpy() for row in varied]


def _places(outlines: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    places = rng.integers(0, _TOKENS_PER_SIDE**2, _TOKENS_PER_SCENE)
    if len(outlines):
        places[::2] = rng.choice(outlines, len(places[::2]))
    return places


def _under_tokens(codes: Tensor) -> Tensor:
    """Enlarge codes (b, 16, h, w) to (b, tokens, 16), as Stage B does."""
    return resize(codes.permute(0, 2, 3, 1), _TOKENS_PER_SIDE, _TOKENS_PER_SIDE).flatten(1, 2)


def _disturb(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Add a little noise to half of the codes, and scale half of them as guidance does."""
    count = len(codes)
    sigma = rng.uniform(0, 0.06, count) * (rng.random(count) < 0.5)
    scale = np.where(rng.random(count) < 0.5, rng.uniform(0.95, 1.3, count), 1.0)
    noise = torch.from_numpy(rng.standard_normal(tuple(codes.shape), dtype=np.float32))
    sigma_rows, scale_rows = (
        torch.from_numpy(v.astype(np.float32)).view(-1, 1, 1, 1) for v in (sigma, scale)
    )
    return (codes + sigma_rows * noise) * scale_rows


def _layers(level: nn.ModuleList) -> list[nn.Module]:
    return [block.channelwise for block in level if isinstance(block, ResBlock)]


def _mlp(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply the block's MLP without its response norm, which does nothing yet."""
    widen, _, _, _, narrow = cast(nn.Sequential, layers)
    return cast(Tensor, narrow(F.gelu(widen(x))))


@torch.no_grad()
def _silence_deeper_levels(stage: StageB) -> None:
    """Zero what comes from deeper levels and neighbours: the network starts as its first level alone."""
    upscaler = cast(nn.Sequential, stage.up_upscalers[-2])[1]
    cast(Tensor, upscaler.weight).zero_()
    cast(Tensor, upscaler.bias).zero_()
    first_up = next(
        block for block in cast(nn.ModuleList, stage.up_blocks[-1]) if isinstance(block, ResBlock)
    )
    width = stage.config.block_out_channels[0]
    cast(nn.Linear, first_up.channelwise[0]).weight[:, :width] = 0
    for level in (stage.down_blocks[0], stage.up_blocks[-1]):
        for block in cast(nn.ModuleList, level):
            if isinstance(block, ResBlock):
                centre = torch.zeros_like(block.depthwise.weight)
                centre[:, :, 1, 1] = (block.depthwise.weight.flatten(1) != 0).any(1)[:, None]
                block.depthwise.weight.copy_(centre)
