"""Image prompts are taught without touching anything that a request without a picture reads."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascade.checkpoints.load import EMBEDDED, load_network
from cascade.errors import CheckpointError
from cascade.networks.stage_c import StageC
from cascade.training import image_prompts, vision
from cascade.training.captions import full_caption, scene_facts
from cascade.training.layouts import Layouts
from cascade.training.scenes import Scene, Thing, sample_scene

PAIR = Scene(
    256, 256, "white", (Thing("circle", "orange", 128, 198, 30.0), Thing("star", "blue", 128, 58, 50.0))
)
TINY = EMBEDDED["tiny"]


def stage_of(folder: Path) -> StageC:
    stage = load_network(folder / "prior")
    assert isinstance(stage, StageC)
    return stage.eval()


def test_a_full_caption_states_everything() -> None:
    assert full_caption(PAIR) == "a medium blue star above a small orange circle on a white background"
    alone = replace(PAIR, background="orange", things=(replace(PAIR.things[1], radius=70.0, y=128),))
    assert full_caption(alone) == "a large blue star in the centre on an orange background"
    rng = np.random.default_rng(3)
    captions: dict[str, dict[str, str]] = {}
    for scene in (sample_scene(rng) for _ in range(400)):
        facts = scene_facts(scene)
        words = full_caption(scene)
        assert all(
            value in words for name, value in facts.items() if name.endswith(("shape", "colour", "size"))
        )
        assert captions.setdefault(words, facts) == facts


def test_layouts_in_fresh_colours_are_what_the_image_processor_makes_of_the_scenes() -> None:
    layouts = Layouts.draw(np.random.default_rng(1), 40, vision.SIDE)
    scenes, pixels, covered = layouts.paint(np.random.default_rng(2), 32)
    apart = (vision.normalised(pixels) - vision.prepare(scenes)).abs().mean((1, 2, 3))
    assert apart.max() < 0.01, "a level of 255 is .015"
    assert len({scene.background for scene in scenes}) > 5
    middle = [
        covered[row][int(thing.y * 64 / scene.height), int(thing.x * 64 / scene.width)]
        for row, scene in enumerate(scenes)
        for thing in scene.things
        if thing.shape != "ring"
    ]
    assert min(middle) > 0.8
    assert covered[:, 0, 0].abs().max() < 0.02


def test_parts_of_patches_are_told_by_what_covers_them() -> None:
    scene = replace(PAIR, things=PAIR.things[1:])
    covered = torch.zeros(1, 64, 64)
    covered[0, 8:10, 16:24] = 1  # the uppermost row of parts of patch (1, 2)
    text, tokenizer = vision_text()
    batch = vision.make_batch([scene], torch.zeros(1, 3, 64, 64), covered, tokenizer, text)
    assert batch.parts.shape == (1, 16, 8, 8)
    assert batch.parts[0, :4, 1, 2].tolist() == [1, 1, 1, 1]
    assert batch.parts.sum() == 4


def vision_text() -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    model = CLIPTextModelWithProjection.from_pretrained(TINY / "text_encoder").eval().float()
    return model, CLIPTokenizer.from_pretrained(TINY / "tokenizer")


def test_two_scenes_mix_to_a_thing_of_each_before_the_background_of_one() -> None:
    rng = np.random.default_rng(5)
    backgrounds = set()
    for _ in range(50):
        pair = image_prompts.sample_pair(rng)
        scene = image_prompts.mixed(pair, rng)
        colours = [scene.background, *(thing.colour for thing in scene.things)]
        assert len(set(colours)) == 3
        for thing, parent in zip(scene.things, pair, strict=True):
            assert (thing.shape, thing.colour) in {(one.shape, one.colour) for one in parent.things}
        backgrounds.add(scene.background == pair[0].background)
    assert backgrounds == {True, False}


def test_only_requests_with_pictures_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_prompts, "_CASES", 1)
    monkeypatch.setattr(image_prompts, "_BATCH", 2)
    for name in ("prior", "text_encoder", "tokenizer", "image_encoder"):
        shutil.copytree(TINY / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="the vision tower is not trained yet"):
        image_prompts.train(tmp_path)
    shutil.copytree(TINY / "feature_extractor", tmp_path / "feature_extractor")
    image_prompts.train(tmp_path, replace(image_prompts.PLAN, steps=4))
    before, after = stage_of(TINY), stage_of(tmp_path)
    changed = [
        name
        for name, tensor in before.state_dict().items()
        if not torch.equal(tensor, after.state_dict()[name])
    ]
    assert changed == ["clip_img_mapper.weight"]
    text, pooled = torch.randn(1, 5, 128), torch.randn(1, 1, 128)

    def tokens(stage: StageC, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return stage.prepare(text, pooled, embedding).keys_values

    nothing, something = torch.zeros(1, 1, 128), torch.randn(1, 1, 128)
    assert all(map(torch.equal, tokens(before, nothing), tokens(after, nothing)))
    assert not any(map(torch.equal, tokens(before, something), tokens(after, something)))
    state = tmp_path / "image_prompts" / "training.safetensors"
    written = state.stat().st_mtime_ns
    image_prompts.train(tmp_path, replace(image_prompts.PLAN, steps=4))
    assert state.stat().st_mtime_ns == written, "a finished run has nothing to do"
