"""Free wordings mean what their plain captions say, and the text tower learns them without losing others."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascade.checkpoints.load import EMBEDDED
from cascade.training import free_captions, image_prompts, wordings
from cascade.training.captions import Caption
from cascade.training.free_captions import filler, free_caption, mistyped, settle
from cascade.training.image_prompts import estimate_whitening
from cascade.training.scenes import COLOURS, SHAPES, Scene, Thing, sample_scene
from cascade.training.stage_c import load_text_encoder

TINY = EMBEDDED["tiny"]
WORDS = free_captions._words()
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
        "colour": {colour: (colour, *WORDS["colours"][colour]) for colour in COLOURS},
        "shape": {shape: (shape, *WORDS["shapes"][shape]) for shape in SHAPES},
        "size": WORDS["sizes"],
    }
    for _ in range(1500):
        scene = sample_scene(rng)
        one = free_caption(scene, rng)
        _, plain = settle(scene, one)
        for name, value in one.facts.items():
            what = "colour" if name == "background" else name.split("_")[-1]
            if what in names:
                assert any(
                    re.search(rf"(?<!\w){re.escape(word)}", one.text) for word in names[what][value]
                ), one
                assert value in plain, (one, plain)


def test_filler_names_nothing() -> None:
    rng = np.random.default_rng(2)
    other = [name for what in ("colours", "shapes") for names in WORDS[what].values() for name in names]
    words = "|".join(map(re.escape, (*COLOURS, *SHAPES, *other)))
    for _ in range(1000):
        text = filler(rng).replace("a square image of", "")
        assert re.search(rf"(?<!\w)({words})(?!\w)", text) is None, text


@pytest.mark.parametrize(("place", "word"), [("left", "left"), ("right", "right")])
def test_words_beside_a_thing_tell_the_side(place: str, word: str) -> None:
    other = {"left": "right", "right": "left"}[word]
    for what in ("places", "relations", "sides"):
        assert all(word in phrase and other not in phrase for phrase in WORDS[what][place]), what
    assert all(other in phrase and word not in phrase for phrase in WORDS["following"][place])


@pytest.mark.parametrize(
    ("what", "top"), [("places", "top"), ("relations", "top"), ("sides", "top"), ("following", "bottom")]
)
def test_words_over_a_thing_are_none_of_those_under_it(what: str, top: str) -> None:
    bottom = {"top": "bottom", "bottom": "top"}[top]
    high, low = (
        r"above|over|top|upper|up|higher|high|upon|atop|overhead",
        r"below|under|bottom|lower|beneath|down|low",
    )
    for place, right, wrong in ((top, high, low), (bottom, low, high)):
        for phrase in WORDS[what][place]:
            assert re.search(rf"\b({right})", phrase), phrase
            assert not re.search(rf"\b({wrong})\b", phrase), phrase


def test_a_typing_error_changes_one_or_two_longer_words() -> None:
    rng = np.random.default_rng(6)
    text = "a yellow ring on a red background"
    counts = set()
    for _ in range(200):
        changed = [
            pair for pair in zip(text.split(), mistyped(text, rng).split(), strict=True) if pair[0] != pair[1]
        ]
        counts.add(len(changed))
        for before, after in changed:
            assert before in ("yellow", "ring", "background")
            assert (before[0], before[-1]) == (after[0], after[-1])
            assert set(after) <= set(before)
    assert counts == {0, 1, 2}  # none when equal letters are swapped
    assert mistyped("", rng) == ""


@pytest.mark.parametrize("scene", [ONE, TWO])
def test_a_form_states_what_its_entries_say(scene: Scene) -> None:
    rng = np.random.default_rng(7)
    forms = set()
    for _ in range(200):
        facts: dict[str, str] = {}
        text = free_captions._keyed(scene, rng, facts)
        forms.add(text.startswith("{"))
        assert not text.startswith("{") or json.loads(text), "JSON that can be read"
        _, plain = settle(scene, Caption(text, facts))
        assert all(f"{thing.colour} {thing.shape}" in plain for thing in scene.things)
        has_background = any(key in text for key in WORDS["background_keys"])
        assert has_background == ("background" in facts), text
    assert forms == {True, False}


def test_colours_that_are_told_later_stand_by_their_shapes() -> None:
    for template in WORDS["told_later"]:
        if "respectively" not in template:
            for colour, shape in (("{c}", "{n}"), ("{d}", "{m}")):
                before, after = template.split(colour)
                named = re.match(" ({[nm]})", after) or re.search("({[nm]})[^{]*({r}[^{]*)?$", before)
                assert named is not None, template
                assert named[1] == shape, template


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
    hidden, pooled = wordings.embed(encoder.model, encoder.tokenizer, texts)
    expected = encoder.encode(texts)
    torch.testing.assert_close(hidden, expected.hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooled, atol=1e-5, rtol=0)
    hidden, again = wordings.embed(encoder.model, encoder.tokenizer, texts, fills_window=False)
    assert hidden.shape[1] < encoder.max_tokens
    torch.testing.assert_close(again, pooled, atol=1e-5, rtol=0)


def test_a_few_steps_bring_a_spoilt_tower_nearer_to_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prior", "tokenizer"):
        shutil.copytree(TINY / name, tmp_path / name)
    tower = CLIPTextModelWithProjection.from_pretrained(TINY / "text_encoder").float()
    torch.manual_seed(0)
    for parameter in tower.parameters():
        if parameter.dim() == 2:
            parameter.data += torch.randn_like(parameter) * parameter.std() / 4
    tower.save_pretrained(tmp_path / "text_encoder")
    monkeypatch.setattr(wordings, "load_text_encoder", lambda run: load_text_encoder(TINY))
    monkeypatch.setattr(image_prompts, "_CAPTIONS", 300)
    for name, value in (("_ROWS", 32), ("_DRAWN", 4), ("_POOLED_FIRST", 12), ("_CASES", 2)):
        monkeypatch.setattr(wordings, name, value)
    plan = replace(wordings.PLAN, learning_rate=1e-3, warmup=1, judge_every=0, ema_decay=0.5)
    wordings.train(tmp_path, replace(plan, steps=14))
    before, after = (distance(tmp_path / name) for name in ("text_encoder", "free_text_encoder"))
    assert after < 0.6 * before
    for path in (TINY / "prior").iterdir():
        assert (tmp_path / "prior" / path.name).read_bytes() == path.read_bytes(), "Stage C is frozen"
    wordings.train(tmp_path, replace(plan, steps=15))
    assert distance(tmp_path / "free_text_encoder") != after, "a longer plan goes on"


def distance(tower: Path) -> float:
    """Distance of a tower's pooled embeddings from the embedded checkpoint's, as it is trained."""
    encoder = load_text_encoder(TINY)
    encoder.model.float()
    model = CLIPTextModelWithProjection.from_pretrained(tower).float()
    _, said, plainly = wordings.sample_wordings(np.random.default_rng(4), 64, (256, 256))
    with torch.no_grad():
        _, pooled = wordings.embed(model, encoder.tokenizer, said, fills_window=False)
    apart = (encoder.encode(plainly).pooled - pooled) @ estimate_whitening(encoder)
    return float(apart.square().mean())
