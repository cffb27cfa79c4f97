"""Trains small ControlNets for the tiny Stage C, which is frozen.

They are trained as Stage C was, on noised codes. Every second row also runs without its caption, with less
weight, so that what the control shows has to come from the control. `canny` reads edges, `inpainting` what a
mask leaves of a picture, `super_resolution` the code that the encoder reads from a picture of half the size.

How well outlines are met depends on the precision of the last steps, where Stage C relies on the noised code
and its own small errors add up. So for `canny` low noise has a large weight, the channels that say where a
thing stands have more weight than its colours, and many rows show their things a few pixels off, which the
control has to correct. A trained `canny` is trained further at a fraction of the cost: the first layers of
the backbone are frozen, and their outputs for the table are computed once.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.checkpoints.stored import StoredTensor, open_weights
from cascade.checkpoints.writing import write_tensors
from cascade.config import ControlNetConfig, EffNetStage
from cascade.errors import CheckpointError
from cascade.networks.blocks import ResBlock
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from cascade.sampling.schedule import CosineSchedule
from cascade.training.code import CHANNELS
from cascade.training.control_inputs import Inputs, Kind, Read, control_inputs
from cascade.training.control_judge import judge
from cascade.training.denoising import PRIOR_EMPHASIS, NoisedBatch, noise_batch
from cascade.training.loop import Plan, fit
from cascade.training.low_rank import named_blocks
from cascade.training.preconditioning import Channels
from cascade.training.stage_c import SCHEDULE, load_text_encoder
from cascade.training.tables import CPU, Extras, Table, choose_table, embed_table, make_tables

PLAN = Plan(
    steps=20_000,
    learning_rate=2e-3,
    warmup=200,
    ema_decay=0.998,
    final_fraction=0.02,
    save_every=500,
    judge_every=1000,
    seed=81,
)

_INJECTIONS = tuple(range(8))
_WIDTHS = (96,) * 8
_CHANNELS = 96
_STAGES = (
    EffNetStage("fused", 1, 1, 12, 1),
    EffNetStage("fused", 4, 2, 20, 1),
    EffNetStage("fused", 4, 2, 32, 1),
    EffNetStage("mbconv", 4, 2, 48, 2),
    EffNetStage("mbconv", 4, 1, 64, 1),
    EffNetStage("mbconv", 4, 2, 80, 2),
)
CONFIGS: dict[str, ControlNetConfig] = {
    "canny": ControlNetConfig("effnet", 1, _CHANNELS, _INJECTIONS, _WIDTHS, 12, _STAGES),
    "inpainting": ControlNetConfig("effnet", 4, _CHANNELS, _INJECTIONS, _WIDTHS, 12, _STAGES),
    "super_resolution": ControlNetConfig(
        "large", 16, _CHANNELS, _INJECTIONS, _WIDTHS, hidden_channels=(192, 64), num_blocks=4
    ),
}

_EMPHASIS = replace(PRIOR_EMPHASIS, starts=0.25)
_TO_THE_PIXEL = replace(_EMPHASIS, starts=0.1, low_noise=1.0, highest=40.0)
_EMPHASES = {"canny": _TO_THE_PIXEL}
_IMPORTANCE = {  # of the channels of the code: background and colour, shape, offset and radius, weight
    "canny": (*[0.25] * 6, *[1.0] * 6, *[4.0] * 3, 1.0)
}
_ASTRAY = {"canny": 0.5}  # share of rows whose things are displaced
_WITHOUT_TEXT = 0.5
_AGREEMENT = 2.0
# Layers of the backbone, stem included, that are frozen when weights are trained further: none for
# inpainting, whose masks are drawn anew at each step, so that no outputs can be computed once.
_SETTLED = {"canny": 4}
_FURTHER = 0.5  # factor of the learning rate when weights are trained further
_NORM_BATCHES = 20


def train(
    kind: Kind,
    out: Path,
    model: Path = EMBEDDED["tiny"],
    plan: Plan = PLAN,
    *,
    device: torch.device = CPU,
    batch: int = 24,
    scenes: int = 8_000,
    start: Path | None = None,
) -> None:
    """Train the ControlNet `out`/KIND.safetensors; an interrupted run is resumed.

    With the file `start`, its weights are trained further, except all statistics of the norms and, where the
    input of a scene never changes, the first layers of the backbone. Such a run keeps its own state.
    Raises `CheckpointError` if the file holds no ControlNet of that kind.
    """
    torch.manual_seed(plan.seed)
    course = _Course(kind, model, plan.seed, device=device, batch=batch, scenes=scenes)
    folder = out / kind
    if start is None:
        network = silent(ControlNet(CONFIGS[kind])).to(device)
    else:
        network, folder = started(kind, start).to(device), out / f"{kind}-further"
        course.go_further(network)
        plan = replace(plan, learning_rate=_FURTHER * plan.learning_rate)

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, ControlNet)
        ready = estimate_norms(module, partial(course.draw, plan)) if start is None else module
        save(ready, out / f"{kind}.safetensors")
        return judge(ready, kind, course.stage, course.encoder, model, course.schedule)

    masks = carried(network, course.stage)
    fit(network, course.loss, plan, folder, title=kind, judge=report, trainable=masks)


class _Course:
    """The loss of a ControlNet and its data: scenes, its inputs for them, and the frozen Stage C."""

    def __init__(
        self, kind: Kind, model: Path, seed: int, *, device: torch.device, batch: int, scenes: int
    ) -> None:
        self.kind = kind
        self.stage = cast(StageC, load_network(model / "prior")).to(device).eval().requires_grad_(False)
        self.encoder = cast(EffNetEncoder, load_network(model / "effnet_encoder")).to(device).eval()
        self.schedule = CosineSchedule(SCHEDULE)
        self._device = device
        self._batch = batch
        self._settled = 0  # layers of the backbone whose outputs are stored instead of their inputs
        self._is_further = False
        text = load_text_encoder(model)
        text.model.to(device).float()
        self._tables = make_tables(text, scenes, seed=seed, device=device, extras=cast(Extras, Read(kind)))
        self._texts = {table.size: embed_table(text, table) for table in self._tables}
        self._inputs = {
            table.size: control_inputs(kind, self.encoder, table.codes, table.extras)
            for table in self._tables
        }
        empty = text.encode([""])
        self._no_text = empty.hidden.clone(), empty.pooled.clone()
        importance = _IMPORTANCE.get(kind, (1.0,) * CHANNELS)
        self._importance = torch.tensor(importance, device=device).view(CHANNELS, 1, 1)

    def go_further(self, network: ControlNet) -> None:
        """Prepare to train `network` further: freeze its first layers and compute their outputs once."""
        self._is_further = True
        self._settled = settle(self.kind, network)
        if self._settled:
            layers = network.backbone[: self._settled]
            self._inputs = {
                table.size: made_ready(layers, self._inputs[table.size], len(table), self._device)
                for table in self._tables
            }

    def loss(self, module: nn.Module, _: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Return loss and figures of a batch of one size; every second row also runs without its caption."""
        assert isinstance(module, ControlNet)
        if self._is_further:
            module.eval()  # there is no dropout, and the norms keep their statistics
        table = choose_table(self._tables, rng)
        rows = torch.from_numpy(rng.integers(0, len(table), self._batch)).to(self._device)
        maps = module.project(module.backbone[self._settled :](self._inputs[table.size](rows)))
        noised = self._noised(table, rows, rng)
        some = noised[::2]
        condition = self._told(table, rows, len(some.latents)).controlled(
            [torch.cat([each, each[::2]]) for each in maps], module.injections
        )
        latents = torch.cat([noised.latents, some.latents])
        noise = self.stage(latents, torch.cat([noised.ratio, some.ratio]), condition)
        told, untold = noise[: self._batch], noise[self._batch :]
        error, figures = noised.loss(told, self._importance)
        untold_error = some.loss(untold, self._importance)[0]
        apart = some.disagreement(told[::2], untold, self._importance)
        figures["untold"] = float(untold_error.detach())
        return error + _WITHOUT_TEXT * untold_error + _AGREEMENT * apart, figures

    def draw(self, plan: Plan, step: int) -> Tensor:
        """Draw inputs for the statistics of the norms, with seeds that the run itself does not use."""
        rng = np.random.default_rng((plan.seed, plan.steps + step))
        table = choose_table(self._tables, rng)
        rows = torch.from_numpy(rng.integers(0, len(table), 4 * self._batch)).to(self._device)
        return self._inputs[table.size](rows)

    def _noised(self, table: Table, rows: Tensor, rng: np.random.Generator) -> NoisedBatch:
        """Noise the codes of some rows, a share of them with displaced things."""
        clean = table.codes[rows].cpu()
        shown = None
        if self.kind in _ASTRAY:
            shown = beside(clean, table.extras["astray"][rows].cpu(), _ASTRAY[self.kind], rng)
        emphasis = _EMPHASES.get(self.kind, _EMPHASIS)
        return noise_batch(clean, self.schedule, emphasis, rng, shown).to(self._device)

    def _told(self, table: Table, rows: Tensor, num_untold: int) -> Condition:
        """Return the condition of the captions of some rows, then of `num_untold` empty ones."""
        words = (part[rows] for part in self._texts[table.size])
        hidden, pooled = (
            torch.cat([told, untold.expand(num_untold, -1, -1)])
            for told, untold in zip(words, self._no_text, strict=True)
        )
        width = self.stage.config.clip_image_in_channels
        return self.stage.prepare(hidden, pooled, torch.zeros(len(hidden), 1, width, device=self._device))


def beside(clean: Tensor, moved: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Move a share of the codes (b, 16, h, w) some way towards `moved`, or in the opposite direction."""
    way = rng.uniform(-1, 1, len(clean)) * (rng.random(len(clean)) < share)
    return torch.lerp(clean, moved, torch.from_numpy(way.astype(np.float32)).view(-1, 1, 1, 1))


def started(kind: Kind, path: Path) -> ControlNet:
    """Load the ControlNet of a file that `save` wrote, in fp32.

    Raises:
        CheckpointError: its tensors are not those of a ControlNet of this kind.
    """
    network = ControlNet(CONFIGS[kind])
    weights = {name: stored.read() for name, stored in open_weights(path).items()}
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise CheckpointError(f"{path}: holds no {kind} ControlNet of the embedded checkpoint")
    network.load_state_dict(weights)
    return network.eval()


def settle(kind: Kind, network: ControlNet) -> int:
    """Freeze the first layers of a backbone whose inputs do not change, and return their number."""
    settled = _SETTLED.get(kind, 0)
    network.backbone[:settled].requires_grad_(False)
    return settled


@torch.no_grad()
def made_ready(layers: nn.Module, inputs: Inputs, count: int, device: torch.device) -> Inputs:
    """Compute the outputs of frozen layers for all rows of a table, kept in fp16, as new inputs."""
    parts = [layers(inputs(rows)).half() for rows in torch.split(torch.arange(count, device=device), 100)]
    kept = torch.cat(parts)
    return lambda rows: kept[rows].float()


def silent(network: ControlNet) -> ControlNet:
    """Zero the last layer of each projection, so that the ControlNet adds nothing yet."""
    for projection in network.projections:
        nn.init.zeros_(cast(nn.Conv2d, cast(nn.Sequential, projection)[2]).weight)
    return network


def carried(network: ControlNet, stage: StageC) -> dict[str, Tensor]:
    """Return masks for `fit` that protect the channels that carry the input through the first level."""
    channels = Channels.of(stage.config)
    first = {f"down_blocks.0.{i}" for i in range(100)} | {
        f"up_blocks.{len(stage.up_blocks) - 1}.{i}" for i in range(100)
    }
    blocks = [name for name, block in named_blocks(stage) if isinstance(block, ResBlock)]
    masks = {}
    for index, place in enumerate(network.injections):
        if blocks[place] in first:
            weight = cast(nn.Conv2d, cast(nn.Sequential, network.projections[index])[2]).weight
            mask = torch.ones_like(weight)
            mask[channels.pair + channels.input] = 0
            masks[f"projections.{index}.2.weight"] = mask
    return masks


@torch.no_grad()
def estimate_norms(network: ControlNet, draw: Callable[[int], Tensor]) -> ControlNet:
    """Return a copy with batch norm statistics of its own weights; those gathered in training lag behind."""
    ready = deepcopy(network)
    norms = [module for module in ready.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    ready.train()
    for step in range(_NORM_BATCHES if norms else 0):
        ready(draw(step))
    return ready.eval()


def save(network: ControlNet, path: Path) -> None:
    """Write the official key layout in fp16, statistics of batch norms in fp32, injections in the header."""
    stored = {
        name: StoredTensor.of(tensor.detach().cpu().contiguous())
        for name, tensor in network.state_dict().items()
    }

    def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
        if not dtype.is_floating_point or name.endswith(("running_mean", "running_var")):
            return dtype
        return torch.float16

    metadata = {"injections": ",".join(map(str, network.injections))}
    write_tensors(path, stored, dtype_of, metadata)
