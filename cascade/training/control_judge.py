"""Judges a ControlNet of the embedded Stage C: held-out scenes are redrawn from their controls."""

from pathlib import Path

import numpy as np
import torch

from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training.code import grid_size, read_code
from cascade.training.control_inputs import Kind, Read, control_inputs
from cascade.training.drawing_codes import conditions, draw_codes, held_out
from cascade.training.scenes import Scene
from cascade.training.stage_c import load_text_encoder

_NEAR = 16.0  # pixels within which a thing counts as standing in its place


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
    """Return the shares of held-out scenes that are redrawn correctly, with a caption and without.

    "placed": with a caption, all things have their shapes, colours and places; "untold": without a caption,
    their shapes and places; "colours": without a caption, their colours and the background, too. "pixels" is
    the mean error of an outline drawn with a caption.
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
            guided.controlled(maps, network.injections),
            unguided.controlled(maps, network.injections),
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
    """Return the mean error in pixels of the outlines asked for, by the nearest drawn; at most `_NEAR`."""
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
    """Return whether all things have their shapes (and colours) and stand within `_NEAR` of their places."""
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
