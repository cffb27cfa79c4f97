"""Captions say what their facts claim, and the facts are true of the scene."""

import re
from collections import Counter

import numpy as np
import pytest

from cascade.training.captions import ATTRIBUTES, Caption, caption, scene_facts
from cascade.training.free_captions import names_a_shape
from cascade.training.scenes import Scene, Thing, sample_scene

SYNONYMS = {
    "circle": "circle|disc|dot",
    "ring": "ring|donut",
    "cross": "cross|plus",
    "gray": "gray|grey",
    "small": "small|tiny|little",
    "large": "large|big|huge",
    "centre": "centre|center|middle",
    "top": "top|above|over|below|under|beneath",
    "bottom": "bottom|above|over|on top of|below|under|beneath",
    "left": "left|right",
    "right": "left|right",
}


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Scene, Caption]]:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(1500)]
    return [(scene, caption(scene, rng)) for scene in scenes]


def test_every_fact_stands_in_the_words(captioned: list[tuple[Scene, Caption]]) -> None:
    for _, one in captioned:
        for name, value in one.facts.items():
            if name != "arrangement":
                assert re.search(rf"\b({SYNONYMS.get(value, value)})\b", one.text.lower()), (one, name)


def test_every_fact_is_true(captioned: list[tuple[Scene, Caption]]) -> None:
    for scene, one in captioned:
        truth = scene_facts(scene)
        facts = one.facts
        if len(scene.things) == 2 and (facts["first_shape"], facts["first_colour"]) != (
            truth["first_shape"],
            truth["first_colour"],
        ):
            truth = {re.sub("first|second", _other, name): value for name, value in truth.items()}
        assert facts.items() <= truth.items(), one


def _other(mention: re.Match[str]) -> str:
    return "second" if mention[0] == "first" else "first"


def test_relations_are_said_in_the_right_direction() -> None:
    red, blue = Thing("square", "red", 60, 128, 40), Thing("circle", "blue", 196, 128, 40)
    rng = np.random.default_rng(0)
    texts = [caption(Scene(256, 256, "white", (red, blue)), rng).text.lower() for _ in range(500)]
    said = [text for text in texts if re.search(r"(left|right) of", text)]
    assert len(said) > 100
    for text in said:
        red_is_first = text.index("red") < re.search("blue", text).start()  # type: ignore[union-attr]
        assert ("left of" in text) == red_is_first, text


def test_relations_of_stacked_things_are_said_in_the_right_direction() -> None:
    red, blue = Thing("square", "red", 128, 60, 40), Thing("circle", "blue", 128, 196, 40)
    rng = np.random.default_rng(0)
    texts = [caption(Scene(256, 256, "white", (red, blue)), rng).text.lower() for _ in range(500)]
    said = [
        (text, match[1])
        for text in texts
        if (match := re.search(r"(?:square|circle|disc|dot) (above|on top of|below|under|beneath) ", text))
    ]
    assert len(said) > 100
    for text, relation in said:
        assert (relation in ("above", "on top of")) == (text.index("red") < text.index("blue")), text


def test_articles_fit(captioned: list[tuple[Scene, Caption]]) -> None:
    for _, one in captioned:
        assert not re.search(r"\ba orange\b|\ban (?!orange|image)", one.text.lower()), one.text


def test_shares_of_what_is_stated(captioned: list[tuple[Scene, Caption]]) -> None:
    facts = [one.facts for _, one in captioned]
    singles = [one for one in facts if "second_shape" not in one]
    pairs = [one for one in facts if "second_shape" in one]
    assert np.mean(["background" in one for one in facts]) == pytest.approx(0.9, abs=0.03)
    assert np.mean(["first_place" in one for one in singles]) == pytest.approx(0.5, abs=0.05)
    assert np.mean(["near_shape" in one for one in pairs]) == pytest.approx(0.73, abs=0.06)
    assert not any("near_shape" in one for one in singles)


def test_the_plain_form_is_the_commonest() -> None:
    scene = Scene(256, 256, "blue", (Thing("circle", "red", 128, 128, 50),))
    rng = np.random.default_rng(0)
    counts = Counter(caption(scene, rng).text for _ in range(3000))
    assert counts.most_common(1)[0][0] == "a red circle on a blue background"
    assert "red circle, blue background" in counts
    assert len(counts) > 300


def test_labels_are_classes_with_zero_for_not_stated() -> None:
    one = Caption("a red circle", {"first_shape": "circle", "first_colour": "red"})
    expected = dict.fromkeys(ATTRIBUTES, 0) | {"first_shape": 1, "first_colour": 1}
    assert one.labels() == list(expected.values())
    assert Caption("", {"arrangement": "stacked"}).labels()[-1] == 2


def test_a_caption_names_a_shape_and_other_prompts_do_not(captioned: list[tuple[Scene, Caption]]) -> None:
    assert all(names_a_shape(stated.text) for _, stated in captioned)
    assert names_a_shape("Two RINGS, please")
    assert names_a_shape("a crimson rhombus")
    for prompt in ("a castle at dusk", "a starling on the crossroads", "a red one on blue", ""):
        assert not names_a_shape(prompt)
