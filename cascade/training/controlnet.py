"""Trains small ControlNets for the tiny Stage C, which stays as it is.

They learn as Stage C did, from noised codes; each row runs with its caption and, with less weight, without,
so that what the control shows has to come from the control. `canny` reads edges, `inpainting` what a mask
left of a picture, `super_resolution` the code that the encoder reads from a picture of half the size.

What decides how well outlines are met is the precision of the last steps, where Stage C goes by the noised
code and its own small errors pile up. So low noise counts much for `canny`, the channels that say where a
thing stands count more than its colours, and many rows show their things a few pixels from where they
belong: the control has to bring them back. Weights that see edges already are trained further at a fraction
of the cost: the first layers of the backbone stay, and what they make of the table is computed once.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast
from zlib import crc32

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.checkpoints.stored import StoredTensor, open_weights
from cascade.checkpoints.writing import write_tensors
from cascade.config import ControlNetConfig, EffNetStage
from cascade.errors import CheckpointError
from cascade.networks.blocks import ResBlock
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import STRIDE, EffNetEncoder
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from cascade.sampling.schedule import CosineSchedule
from cascade.tasks.control import CANNY_THRESHOLDS, find_edges
from cascade.training.code import CHANNELS, grid_size, read_code, scene_code
from cascade.training.denoising import Emphasis, noise_batch
from cascade.training.drawing_codes import conditions, draw_codes, held_out
from cascade.training.loop import Plan, fit
from cascade.training.low_rank import named_blocks
from cascade.training.preconditioning import Channels
from cascade.training.scenes import Scene, Thing, render
from cascade.training.stage_c import SCHEDULE, load_text_encoder
from cascade.training.tables import CPU, Extras, choose_table, embed_table, make_tables

Kind = Literal["canny", "inpainting", "super_resolution"]

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

_EMPHASIS = Emphasis(
    starts=0.25, decoys=0.0, overshot=0.35, wobbly=0.0, rough=0.5, low_noise=0.3, highest=8.0
)
_TO_THE_PIXEL = replace(_EMPHASIS, starts=0.1, low_noise=1.0, highest=40.0)
_EMPHASES = {"canny": _TO_THE_PIXEL}
_IMPORTANCE = {  # of the channels of the code: background and colour, shape, offset and radius, weight
    "canny": (*[0.25] * 6, *[1.0] * 6, *[4.0] * 3, 1.0)
}
_ASTRAY = {"canny": 0.5}  # share of rows that show their things beside their places
_FAR = 5.0  # pixels: how far at most, along each axis, and by how much the radius differs
_WITHOUT_TEXT = 0.5
_AGREEMENT = 2.0
# Layers of the backbone, stem included, that stay when weights are trained further. What inpainting reads is
# never the same, as masks are drawn anew at each step, so nothing of it can be computed once.
_SETTLED = {"canny": 4}
_FURTHER = 0.5  # of the learning rate, where weights are trained further
_NORM_BATCHES = 20
_NEAR = 16.0  # pixels between where a thing should stand and where it does


class Read:
    """What a ControlNet is trained to read of scenes, made in worker processes."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, scenes: list[Scene]) -> Mapping[str, NDArray[np.generic]]:
        """Arrays, one row a scene: of uint8 "edges" (n, 1, h, w) or "pixels" (n, 3, h, w).

        With "edges" also "astray", (n, 16, gh, gw): codes in which the things stand beside their places.
        """
        pictures = [render(scene) for scene in scenes]
        rows, columns = grid_size(scenes[0].width, scenes[0].height)
        size = STRIDE * columns, STRIDE * rows  # width, height
        if self.kind == "canny":
            edges = [canny_edges(picture, size, index % 2 == 0) for index, picture in enumerate(pictures)]
            # The same scenes stray in the same way, whichever process draws them.
            rng = np.random.default_rng(crc32(np.stack(list(map(scene_code, scenes))).tobytes()))
            moved = [scene_code(astray(scene, rng)) for scene in scenes]
            return {"edges": np.stack(edges)[:, None], "astray": np.stack(moved)}
        if self.kind == "super_resolution":
            size = STRIDE * -(-columns // 2), STRIDE * -(-rows // 2)
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, size[::-1], mode="bilinear", align_corners=False, antialias=True)
        return {"pixels": small.round().clamp(0, 255).to(torch.uint8).numpy()}


def canny_edges(
    picture: NDArray[np.uint8], size: tuple[int, int], at_official_size: bool = True
) -> NDArray[np.uint8]:
    """Edges of a picture (h, w, 3) as the task finds them, of a size (width, height).

    Otherwise they are looked for at that size itself, where lines come out thinner: both are trained on.
    """
    if at_official_size:
        return find_edges(picture, *size)
    return np.asarray(cv2.Canny(cv2.resize(picture, size), *CANNY_THRESHOLDS), np.uint8)


def astray(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with each thing a few pixels larger or smaller and beside its place."""

    def moved(thing: Thing) -> Thing:
        right, down, wider = rng.uniform(-_FAR, _FAR, 3).tolist()
        return replace(thing, x=thing.x + right, y=thing.y + down, radius=thing.radius + wider)

    return replace(scene, things=tuple(map(moved, scene.things)))


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
    """Train the ControlNet `out`/KIND.safetensors; an interrupted run goes on where it was.

    With the file `start`, its weights are trained further but for all statistics of the norms and, where the
    input of a scene stays as it is, the first layers of the backbone. Such a run keeps its own state.
    Raises `CheckpointError` if they are none of that kind.
    """
    torch.manual_seed(plan.seed)
    stage = cast(StageC, load_network(model / "prior")).to(device).eval().requires_grad_(False)
    encoder = cast(EffNetEncoder, load_network(model / "effnet_encoder")).to(device).eval()
    text = load_text_encoder(model)
    text.model.to(device).float()
    schedule = CosineSchedule(SCHEDULE)
    tables = make_tables(text, scenes, seed=plan.seed, device=device, extras=cast(Extras, Read(kind)))
    embedded = {table.size: embed_table(text, table) for table in tables}
    inputs = {table.size: control_inputs(kind, encoder, table.codes, table.extras) for table in tables}
    empty = text.encode([""])
    no_text = empty.hidden.clone(), empty.pooled.clone()
    num_untold = -(-batch // 2)
    image = torch.zeros(batch + num_untold, 1, stage.config.clip_image_in_channels, device=device)
    network = silent(ControlNet(CONFIGS[kind])) if start is None else started(kind, start)
    network.to(device)
    settled = settle(kind, network) if start is not None else 0
    if start is not None:
        plan = replace(plan, learning_rate=_FURTHER * plan.learning_rate)
    if settled:
        inputs = {
            table.size: made_ready(network.backbone[:settled], inputs[table.size], len(table), device)
            for table in tables
        }
    importance = torch.tensor(_IMPORTANCE.get(kind, (1.0,) * CHANNELS), device=device).view(CHANNELS, 1, 1)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(module, ControlNet)
        if start is not None:
            module.eval()  # no dropout to lose, and the norms keep their statistics
        table = choose_table(tables, rng)
        rows = torch.from_numpy(rng.integers(0, len(table), batch)).to(device)
        words = (part[rows] for part in embedded[table.size])
        hidden, pooled = (
            torch.cat([told, untold.expand(num_untold, -1, -1)])
            for told, untold in zip(words, no_text, strict=True)
        )
        maps = module.project(module.backbone[settled:](inputs[table.size](rows)))
        clean = table.codes[rows].cpu()
        shown = beside(clean, table.extras["astray"][rows].cpu(), kind, rng) if kind in _ASTRAY else None
        noised = noise_batch(clean, schedule, _EMPHASES.get(kind, _EMPHASIS), rng, shown).to(device)
        some = noised[::2]  # rows that run without a caption, too
        condition = stage.prepare(hidden, pooled, image).controlled(
            [torch.cat([each, each[::2]]) for each in maps], module.injections
        )
        noise = stage(
            torch.cat([noised.latents, some.latents]), torch.cat([noised.ratio, some.ratio]), condition
        )
        told, untold = noise[:batch], noise[batch:]
        error, figures = noised.loss(told, importance)
        untold_error = some.loss(untold, importance)[0]
        apart = some.disagreement(told[::2], untold, importance)
        return error + _WITHOUT_TEXT * untold_error + _AGREEMENT * apart, figures | {
            "untold": float(untold_error.detach())
        }

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, ControlNet)
        ready = estimate_norms(module, loss_inputs) if start is None else module
        save(ready, out / f"{kind}.safetensors")
        return judge(ready, kind, stage, encoder, model, schedule)

    def loss_inputs(step: int) -> Tensor:
        rng = np.random.default_rng((plan.seed, plan.steps + step))
        table = choose_table(tables, rng)
        rows = torch.from_numpy(rng.integers(0, len(table), 4 * batch)).to(device)
        return inputs[table.size](rows)

    fit(
        network,
        loss,
        plan,
        out / (kind if start is None else f"{kind}-further"),
        title=kind,
        judge=report,
        trainable=carried(network, stage),
    )


Inputs = Callable[[Tensor], Tensor]


def started(kind: Kind, path: Path) -> ControlNet:
    """The ControlNet of a file that `save` wrote, in fp32.

    Raises:
        CheckpointError: its tensors are those of another kind.
    """
    network = ControlNet(CONFIGS[kind])
    weights = {name: stored.read() for name, stored in open_weights(path).items()}
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise CheckpointError(f"{path}: holds no {kind} ControlNet of the embedded checkpoint")
    network.load_state_dict(weights)
    return network.eval()


def settle(kind: Kind, network: ControlNet) -> int:
    """Freeze the first layers of a backbone whose inputs do not change; how many they are."""
    settled = _SETTLED.get(kind, 0)
    network.backbone[:settled].requires_grad_(False)
    return settled


@torch.no_grad()
def made_ready(layers: nn.Module, inputs: "Inputs", count: int, device: torch.device) -> "Inputs":
    """What some layers, which do not change, make of all rows of a table: kept in fp16, read by row."""
    parts = [layers(inputs(rows)).half() for rows in torch.split(torch.arange(count, device=device), 100)]
    kept = torch.cat(parts)
    return lambda rows: kept[rows].float()


def beside(clean: Tensor, moved: Tensor, kind: Kind, rng: np.random.Generator) -> Tensor:
    """Codes (b, 16, h, w) of which a share has gone some way towards `moved`, or to the other side."""
    way = rng.uniform(-1, 1, len(clean)) * (rng.random(len(clean)) < _ASTRAY[kind])
    return torch.lerp(clean, moved, torch.from_numpy(way.astype(np.float32)).view(-1, 1, 1, 1))


def control_inputs(kind: Kind, encoder: EffNetEncoder, codes: Tensor, extras: Mapping[str, Tensor]) -> Inputs:
    """What the ControlNet reads for some rows of a table, (b, c, h, w)."""
    if kind == "canny":
        return lambda rows: extras["edges"][rows].float() / 255
    pixels = extras["pixels"]
    if kind == "inpainting":
        return lambda rows: masked(pixels[rows].float() / 255, random_masks(rows, pixels))
    with torch.no_grad():
        parts = [encoder(part.float() / 255) for part in torch.split(pixels, 500)]
    latents = F.interpolate(torch.cat(parts), tuple(2 * side for side in parts[0].shape[-2:]), mode="nearest")
    height, width = codes.shape[-2:]
    latents = latents[..., :height, :width].contiguous()
    return lambda rows: latents[rows]


def masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (b, 3, h, w), white where `mask` (b, 1, h, w) is 1, and the mask."""
    return torch.cat([torch.where(mask > 0.5, 1.0, pixels), mask], dim=1)


def random_masks(rows: Tensor, pixels: Tensor) -> Tensor:
    """Rectangles, ellipses and whole sides of a picture, (b, 1, h, w): 1 is to be painted."""
    count, (height, width) = len(rows), pixels.shape[-2:]
    device = rows.device

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, device=device)

    y = torch.linspace(0, 1, height, device=device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=device).view(1, 1, 1, -1)
    dx, dy = (x - draw(0.1, 0.9)).abs() / draw(0.15, 0.5), (y - draw(0.1, 0.9)).abs() / draw(0.15, 0.5)
    kind = draw(0, 1)
    box, blob = torch.maximum(dx, dy) < 1, dx.square() + dy.square() < 1
    along = torch.where(draw(0, 1) < 0.5, x, y)
    flipped = torch.where(draw(0, 1) < 0.5, along, 1 - along)
    side = flipped < draw(0.3, 0.7)
    mask = torch.where(kind < 0.4, box, torch.where(kind < 0.65, blob, side)) | (kind > 0.95)
    outside = draw(0, 1) < 0.15  # as for a picture that is to be extended
    return (mask ^ (outside & (kind < 0.65))).float()


def controlled(
    condition: Condition, network: ControlNet, maps: tuple[Tensor, ...], repeats: int
) -> Condition:
    """The condition with what the ControlNet adds, for so many times its rows."""
    return condition.controlled([each.repeat(repeats, 1, 1, 1) for each in maps], network.injections)


def silent(network: ControlNet) -> ControlNet:
    """A ControlNet that adds nothing yet."""
    for projection in network.projections:
        nn.init.zeros_(cast(nn.Conv2d, cast(nn.Sequential, projection)[2]).weight)
    return network


def carried(network: ControlNet, stage: StageC) -> dict[str, Tensor]:
    """Masks for `fit`: nothing is added to the channels that carry the input through the first level."""
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
    """A copy with batch norm statistics of its own weights; those gathered in training lag behind."""
    ready = deepcopy(network)
    norms = [module for module in ready.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    ready.train()
    for step in range(_NORM_BATCHES if norms else 0):
        ready(draw(step))
    return ready.eval()


@torch.no_grad()
def judge(
    network: ControlNet,
    kind: Kind,
    stage: StageC,
    encoder: EffNetEncoder,
    model: Path,
    schedule: CosineSchedule,
    count: int = 100,
) -> dict[str, float]:
    """Shares of held-out scenes drawn again from control and caption, and from control alone.

    "placed": all things are there and stand where they should; "untold": without a caption, their shapes and
    places; "colours": without a caption, their colours, too, and the background. "pixels" is by how much, in
    the mean, an outline drawn from control and caption misses its place.
    """
    text = load_text_encoder(model)
    text.model.to(stage.device).float()
    scenes, captions = held_out(count, 6)
    extras = {name: torch.from_numpy(array).to(stage.device) for name, array in Read(kind)(scenes).items()}
    codes = torch.zeros(count, 16, *grid_size(scenes[0].width, scenes[0].height))
    torch.manual_seed(0)
    x = control_inputs(kind, encoder, codes, extras)(torch.arange(count, device=stage.device))
    maps = network(x)
    shares = {}
    for title, words in (("placed", [one.text for one in captions]), ("untold", [""] * count)):
        embedded = text.encode(words)
        guided, unguided = conditions(stage, embedded.hidden.clone(), embedded.pooled.clone(), text)
        unguided = unguided[[0] * count]
        drawn = draw_codes(
            stage,
            schedule,
            controlled(guided, network, maps, 1),
            controlled(unguided, network, maps, 1),
            guidance_scale=4.0 if title == "placed" else 1.0,
            count=count,
        )
        read = [read_code(code.numpy(), (256, 256)) for code in drawn]
        pairs = list(zip(read, scenes, strict=True))
        shares[title] = float(np.mean([stands_alike(*pair, colours=title == "placed") for pair in pairs]))
        if title == "placed":
            shares["pixels"] = float(np.mean([miss(*pair) for pair in pairs]))
        else:
            alike = [stands_alike(*pair) and pair[0].background == pair[1].background for pair in pairs]
            shares["colours"] = float(np.mean(alike))
    return shares


def miss(read: Scene, asked: Scene) -> float:
    """Pixels between the outlines of what is asked for and of what is nearest to it; at most `_NEAR`."""
    return float(
        np.mean(
            [
                min(
                    (
                        abs(seen.radius - thing.radius) + float(np.hypot(seen.x - thing.x, seen.y - thing.y))
                        for seen in read.things
                    ),
                    default=_NEAR,
                )
                for thing in asked.things
            ]
        ).clip(0, _NEAR)
    )


def stands_alike(read: Scene, asked: Scene, colours: bool = True) -> bool:
    """Whether all things have their shapes (and colours) and stand within some pixels of their places."""
    if len(read.things) != len(asked.things):
        return False
    return all(
        any(
            thing.shape == seen.shape
            and (not colours or thing.colour == seen.colour)
            and max(abs(thing.x - seen.x), abs(thing.y - seen.y)) < _NEAR
            for seen in read.things
        )
        for thing in asked.things
    )


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
