"""Codes as Stage B gets them in use, from Stage C and from the encoder, with the scenes that they mean.

Their errors are not plain noise: those of neighbouring nodes are alike. A decoder trained on them draws
straight outlines where one trained on true codes alone draws crooked ones.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.checkpoints.load import load_network
from cascade.conditioning import TextEncoder
from cascade.networks.effnet import EffNetEncoder, resize_for_encoder
from cascade.networks.stage_c import StageC
from cascade.sampling.schedule import CosineSchedule
from cascade.training import stage_c
from cascade.training.captions import caption
from cascade.training.code import read_code
from cascade.training.scenes import SQUARE_SIZE, Scene, Thing, sample_scene
from cascade.training.tensors import picture_tensor

COUNT = 4096  # scenes asked of Stage C, and as many of the encoder

_FILE = "drawn_codes.safetensors"
_AT_ONCE = 64


def drawn_codes(run: Path, count: int = COUNT) -> tuple[Tensor, list[Scene]]:
    """Return codes (n, 16, 6, 6) of square pictures and their scenes; made once and kept in `run`."""
    path = run / _FILE
    if not path.exists():
        codes, scenes = _make(run, count)
        text = json.dumps([asdict(scene) for scene in scenes])
        save_file({"codes": codes}, path, metadata={"scenes": text})
    with safe_open(path, framework="pt") as file:
        scenes = [_scene(members) for members in json.loads(file.metadata()["scenes"])]
        return file.get_tensor("codes"), scenes


def _make(run: Path, count: int) -> tuple[Tensor, list[Scene]]:
    prior = cast(StageC, load_network(run / "prior")).eval()
    encoder = cast(EffNetEncoder, load_network(run / "effnet_encoder")).eval()
    text = stage_c.load_text_encoder(run)
    codes: list[Tensor] = []
    scenes: list[Scene] = []
    for batch in track(range(count // _AT_ONCE), description="Codes of Stage C and the encoder"):
        rng = np.random.default_rng((83, batch))
        asked = [sample_scene(rng) for _ in range(_AT_ONCE)]
        for code, scene in zip(_of_stage_c(prior, text, asked, rng), asked, strict=True):
            meant = read_code(code.numpy(), SQUARE_SIZE)
            if _names(meant) == _names(scene):
                codes.append(code)
                scenes.append(meant)
        codes += _of_encoder(encoder, asked)
        scenes += asked
    return torch.stack(codes), scenes


def _of_stage_c(
    stage: StageC, text: TextEncoder, scenes: list[Scene], rng: np.random.Generator
) -> list[Tensor]:
    """Draw codes for captions of scenes, at one of the common guidance scales."""
    prompts = [caption(scene, rng).text for scene in scenes]
    scale = float(rng.choice([1.0, 3.0, 4.0, 4.0, 5.0]))
    first_seed = int(rng.integers(2**31))
    return stage_c.sample_codes(stage, text, CosineSchedule(stage_c.SCHEDULE), prompts, scale, first_seed)


@torch.no_grad()
def _of_encoder(encoder: EffNetEncoder, scenes: list[Scene]) -> list[Tensor]:
    return list(encoder(resize_for_encoder(picture_tensor(scenes))))


def _names(scene: Scene) -> tuple[str, list[tuple[str, str]]]:
    return scene.background, sorted((thing.shape, thing.colour) for thing in scene.things)


def _scene(members: dict[str, Any]) -> Scene:
    things = [Thing(**{**thing, "tint": tuple(thing["tint"])}) for thing in members["things"]]
    return Scene(**{**members, "things": tuple(things), "tint": tuple(members["tint"])})
