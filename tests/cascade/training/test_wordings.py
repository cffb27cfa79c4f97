"""Free wordings mean what their plain captions say, and the text tower learns them without losing others."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascade.checkpoints.load import EMBEDDED
from cascade.training import free_captions, wordings
from cascade.training.captions import Caption, caption
from cascade.training.free_captions import filler, free_caption, mistyped, settle
from cascade.training.scenes import COLOURS, SHAPES, Scene, Thing, sample_scene
from cascade.training.stage_c import load_text_encoder

TINY = EMBEDDED["tiny"]
ONE = Scene(256, 256, "red", (Thing("circle", "blue", 64, 128, 30.0),))
TWO = Scene(256, 256, "red", (Thing("star", "white", 128, 197, 30.0), Thing("ring", "green", 128, 59, 48.0)))
NAMED = {"first_shape": "circle", "first_colour": "blue"}
BOTH = {
    "first_shape": "star", "first_colour": "white", "second_shape": "ring", "second_colour": "green"
}  # fmt: skip
SIDES = {"near_shape": "ring", "near_colour": "green", "far_shape": "star", "far_colour": "white"}


@pytest.mark.parametrize(
    ("scene", "facts", "plain"),
    [
        (ONE, NAMED, "a blue circle on a white background"),
        (ONE, NAMED | {"background": "orange"}, "a blue circle on an orange background"),
        (ONE, NAMED | {"first_place": "left"}, "a blue circle on the left on a white background"),
        (ONE, NAMED | {"first_size": "small"}, "a small blue circle on a white background"),
        (ONE, {"first_shape": "circle"}, "a black circle on a white background"),
        (ONE, {"first_shape": "circle", "background": "black"}, "a white circle on a black background"),
        (TWO, BOTH, "a white star left of a green ring on a black background"),
        (TWO, BOTH | SIDES, "a green ring above a white star on a black background"),
        (
            TWO,
            BOTH | SIDES | {"background": "gray", "second_size": "medium"},
            "a medium green ring above a white star on a gray background",
        ),
    ],
)
def test_what_is_left_open_is_read_in_a_fixed_way(scene: Scene, facts: dict[str, str], plain: str) -> None:
    settled, words = settle(scene, Caption("", facts))
    assert words == plain
    order = settled.in_order()
    assert [words.index(f"{thing.colour} {thing.shape}") for thing in order] == sorted(
        words.index(f"{thing.colour} {thing.shape}") for thing in order
    )
    assert words.endswith(f"{settled.background} background")
    assert settled.background not in {thing.colour for thing in settled.things}


def test_a_background_behind_black_and_white_is_gray() -> None:
    things = (TWO.things[0], replace(TWO.things[1], colour="black"))
    _, words = settle(replace(TWO, things=things), Caption("", BOTH | {"second_colour": "black"}))
    assert words == "a white star left of a black ring on a gray background"


def test_everything_that_a_free_caption_states_is_named_and_kept() -> None:
    rng = np.random.default_rng(1)
    names = {
        "colour": {colour: (colour, *free_captions._WORDS["colours"][colour]) for colour in COLOURS},
        "shape": {shape: (shape, *free_captions._WORDS["shapes"][shape]) for shape in SHAPES},
        "size": free_captions._WORDS["sizes"],
    }
    for _ in range(1500):
        scene = sample_scene(rng)
        one = free_caption(scene, rng)
        settled, plain = settle(scene, one)
        for name, value in one.facts.items():
            what = "colour" if name == "background" else name.split("_")[-1]
            if what in names:
                assert any(
                    re.search(rf"(?<!\w){re.escape(word)}", one.text) for word in names[what][value]
                ), one
                assert value in plain, (one, plain)
        if "first_place" in one.facts:
            assert settled.place(settled.things[0]) == one.facts["first_place"]
        if "near_shape" in one.facts:
            assert [(thing.shape, thing.colour) for thing in settled.in_order()] == [
                (one.facts["near_shape"], one.facts["near_colour"]),
                (one.facts["far_shape"], one.facts["far_colour"]),
            ]


def test_filler_names_nothing() -> None:
    rng = np.random.default_rng(2)
    words = "|".join((*COLOURS, *(shape for shape in SHAPES if shape != "square")))
    for _ in range(500):
        assert re.search(rf"\b({words})\b", filler(rng)) is None


def test_a_typing_error_changes_one_long_word() -> None:
    rng = np.random.default_rng(6)
    text = "a yellow ring on a red background"
    for _ in range(200):
        changed = [
            pair for pair in zip(text.split(), mistyped(text, rng).split(), strict=True) if pair[0] != pair[1]
        ]
        assert len(changed) <= 1
        for before, after in changed:
            assert before in ("yellow", "background")
            assert (before[0], before[-1]) == (after[0], after[-1])
            assert set(after) <= set(before)
    assert mistyped("", rng) == ""


def test_nearly_all_wordings_fit_into_the_window() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    _, said, plainly = wordings.sample_wordings(np.random.default_rng(3), 512, (256, 256))
    lengths = [len(ids) for ids in tokenizer(said, verbose=False).input_ids]
    assert np.mean([length > tokenizer.model_max_length for length in lengths]) < 0.02
    assert said.count("") == 16
    assert plainly.count("") == 32


def test_embeddings_are_those_of_the_encoder() -> None:
    encoder = load_text_encoder(TINY)
    encoder.model.float()
    texts = ["", "draw me a crimson disc, please", "a blue star on a white background"]
    hidden, pooled = wordings.embed(encoder.model, encoder, texts)
    expected = encoder.encode(texts)
    torch.testing.assert_close(hidden, expected.hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooled, atol=1e-5, rtol=0)


def test_a_few_steps_bring_a_spoilt_tower_nearer_to_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prior", "text_encoder", "tokenizer"):
        shutil.copytree(TINY / name, tmp_path / name)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY / name, tmp_path / "plain_text" / name)
    tower = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder").float()
    torch.manual_seed(0)
    noise = {name: torch.randn_like(p) * p.std() / 4 for name, p in tower.named_parameters() if p.dim() == 2}
    for name, parameter in tower.named_parameters():
        parameter.data += noise.get(name, torch.zeros(()))
    tower.save_pretrained(tmp_path / "text_encoder")
    for name, value in (("_ROWS", 32), ("_DRAWN", 4), ("_POOLED_FIRST", 3), ("_CASES", 2)):
        monkeypatch.setattr(wordings, name, value)
    before = distance(tmp_path)
    wordings.train(
        tmp_path, replace(wordings.PLAN, steps=12, learning_rate=2e-4, warmup=1, judge_every=0, ema_decay=0.5)
    )
    assert distance(tmp_path) < 0.8 * before
    for path in (TINY / "prior").iterdir():
        assert (tmp_path / "prior" / path.name).read_bytes() == path.read_bytes(), "Stage C is frozen"


def distance(run: Path) -> float:
    """Distance of pooled embeddings from the embedded checkpoint's, on captions of the training."""
    teacher, student = load_text_encoder(TINY), load_text_encoder(run)
    rng = np.random.default_rng(4)
    texts = [caption(sample_scene(rng), rng).text for _ in range(32)]
    apart = teacher.encode(texts).pooled.float() - student.encode(texts).pooled.float()
    return float(apart.square().mean())
