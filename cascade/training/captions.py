"""Captions: many wordings for one scene, and what each of them states.

A new wording is drawn each time a scene is used. The facts of a caption are the labels
that the text tower learns to read, and what a picture is judged by.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.training.scenes import COLOURS, PLACES, SHAPES, SIZE_WORDS, Place, Scene, Thing

# Each attribute that a caption can state, with its possible values. First and second follow the order of
# mention; near is what stands left or on top, far what stands right or below, if the caption says so.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": COLOURS,
    "first_shape": SHAPES,
    "first_colour": COLOURS,
    "first_size": SIZE_WORDS,
    "first_place": PLACES,
    "second_shape": SHAPES,
    "second_colour": COLOURS,
    "second_size": SIZE_WORDS,
    "second_place": PLACES,
    "near_shape": SHAPES,
    "near_colour": COLOURS,
    "far_shape": SHAPES,
    "far_colour": COLOURS,
    "arrangement": ("side by side", "stacked"),
}


@dataclass(frozen=True, slots=True)
class Caption:
    """A wording, and the value of each attribute that it states."""

    text: str
    facts: dict[str, str]

    def labels(self) -> list[int]:
        """Return one class per attribute: 0 where it is not stated, otherwise 1 + the index of its value."""
        return [
            1 + values.index(self.facts[name]) if name in self.facts else 0
            for name, values in ATTRIBUTES.items()
        ]


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """Return a random wording for a scene."""
    facts: dict[str, str] = {}
    words = _one(scene, rng, facts) if len(scene.things) == 1 else _two(scene, rng, facts)
    if rng.random() < 0.12 and not words.startswith(("on ", "at ")):
        words = f"{_pick(rng, _OPENINGS)} {words}"
    text = _with_background(scene, words, rng, facts)
    if rng.random() < 0.12:
        text += "."
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return Caption(text, facts)


def full_caption(scene: Scene) -> str:
    """Return a wording that states everything: sizes, colours, shapes, places and the background."""
    things = scene.in_order()
    names = [
        f"{_article(scene.size_word(thing))} {scene.size_word(thing)} {thing.colour} {thing.shape}"
        for thing in things
    ]
    place = scene.place(things[0])
    where = _PLACE_WORDS[place][0] if len(things) == 1 else f"{_RELATIONS[place][0]} {names[1]}"
    return _PLAIN_BACKGROUND.format(f"{names[0]} {where}", scene.background).replace("a orange", "an orange")


def scene_facts(scene: Scene) -> dict[str, str]:
    """Return all facts of a scene, its things mentioned in the order of their places."""
    facts = {"background": scene.background}
    things = scene.in_order()
    for mention, thing in zip(("first", "second"), things, strict=False):
        facts |= {f"{mention}_shape": thing.shape, f"{mention}_colour": thing.colour}
        facts |= {f"{mention}_size": scene.size_word(thing), f"{mention}_place": scene.place(thing)}
    if len(things) == 2:
        facts["arrangement"] = "stacked" if scene.is_stacked else "side by side"
        state_sides(scene, things, facts)
    return facts


_SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "dot"),
    "ring": ("ring", "ring", "ring", "donut"),
    "cross": ("cross", "cross", "cross", "plus"),
    "gray": ("gray", "grey"),
    "small": ("small", "small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}
_OPENINGS = ("a picture of", "an image of", "a drawing of", "picture of", "there is")

# Words for the place of one thing; a caption continues with the background.
_PLACE_WORDS: dict[Place, tuple[str, ...]] = {
    "centre": ("in the centre", "in the center", "in the middle"),
    "left": ("on the left", "on the left", "on the left side", "at the left", "to the left"),
    "right": ("on the right", "on the right", "on the right side", "at the right", "to the right"),
    "top": ("at the top", "at the top", "on the top"),
    "bottom": ("at the bottom", "at the bottom", "on the bottom"),
}
# Words for the place of the first-mentioned of two things, relative to the second.
_RELATIONS: dict[Place, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "top": ("above", "above", "over", "on top of"),
    "bottom": ("below", "below", "under", "beneath"),
}
_OPPOSITE: dict[Place, Place] = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_BESIDE = ("next to", "beside")
_TOGETHER = ("{} and {}", "{} and {}", "{} with {}", "{}, {}")

# `_PLAIN_BACKGROUND` is by far the commonest wording.
_PLAIN_BACKGROUND = "{} on a {} background"
_BACKGROUNDS = (
    "{} on a {} backdrop",
    "{} on {}",
    "{} against a {} background",
    "{} against a {} backdrop",
    "{} over a {} background",
    "{} with a {} background",
    "{} in front of a {} background",
    "{}, {} background",
    "{}, {} background",
    "{}, on a {} background",
)
_BACKGROUNDS_FIRST = ("{1} background, {0}", "a {1} background with {0}", "on a {1} background, {0}")


def _one(scene: Scene, rng: np.random.Generator, facts: dict[str, str]) -> str:
    (thing,) = scene.things
    words = _name(scene, thing, "first", rng, facts, is_bare=rng.random() < 0.15)
    if rng.random() < 0.5:
        return words
    place = scene.place(thing)
    facts["first_place"] = place
    return f"{words} {_pick(rng, _PLACE_WORDS[place])}"


def _two(scene: Scene, rng: np.random.Generator, facts: dict[str, str]) -> str:
    things = scene.things if rng.random() < 0.5 else scene.things[::-1]
    is_bare = rng.random() < 0.12
    first = _name(scene, things[0], "first", rng, facts, is_bare=is_bare)
    second = _name(scene, things[1], "second", rng, facts, is_bare=is_bare)
    choice = rng.random()
    if choice < 0.2:
        return _pick(rng, _TOGETHER).format(first, second)
    facts["arrangement"] = "stacked" if scene.is_stacked else "side by side"
    if choice < 0.35 and not scene.is_stacked:
        return f"{first} {_pick(rng, _BESIDE)} {second}"
    state_sides(scene, things, facts)
    places = scene.place(things[0]), scene.place(things[1])
    if choice < 0.75:
        return f"{first} {_pick(rng, _RELATIONS[places[0]])} {second}"
    where = [_pick(rng, _PLACE_WORDS[place][:2]) for place in places]
    if choice < 0.92:
        return f"{first} {where[0]}{_pick(rng, (' and', ','))} {second} {where[1]}"
    return f"{where[0]} {first}, {where[1]} {second}"


def state_sides(scene: Scene, things: Sequence[Thing], facts: dict[str, str]) -> None:
    """Add to `facts` where two things, in the order of mention, stand, and which is on which side."""
    near, far = scene.in_order()
    facts |= {"first_place": scene.place(things[0]), "second_place": scene.place(things[1])}
    facts |= {"near_shape": near.shape, "near_colour": near.colour}
    facts |= {"far_shape": far.shape, "far_colour": far.colour}


def _name(
    scene: Scene,
    thing: Thing,
    mention: str,
    rng: np.random.Generator,
    facts: dict[str, str],
    *,
    is_bare: bool,
) -> str:
    """Return a name such as "a small red circle", without the article if `is_bare`; add to `facts`."""
    facts |= {f"{mention}_shape": thing.shape, f"{mention}_colour": thing.colour}
    words = [_pick(rng, _SYNONYMS.get(word, (word,))) for word in (thing.colour, thing.shape)]
    size = scene.size_word(thing)
    if rng.random() < (0.2 if size == "medium" else 0.4):
        facts[f"{mention}_size"] = size
        words.insert(0, _pick(rng, _SYNONYMS.get(size, (size,))))
    if not is_bare:
        words.insert(0, "the" if rng.random() < 0.03 else _article(words[0]))
    return " ".join(words)


def _with_background(scene: Scene, words: str, rng: np.random.Generator, facts: dict[str, str]) -> str:
    choice = rng.random()
    if choice < 0.1:
        return words
    facts["background"] = scene.background
    colour = _pick(rng, _SYNONYMS.get(scene.background, (scene.background,)))
    if choice < 0.5:
        template = _PLAIN_BACKGROUND
    else:
        template = _pick(rng, _BACKGROUNDS if choice < 0.9 else _BACKGROUNDS_FIRST)
    return template.format(words, colour).replace("a orange", "an orange")


def _article(word: str) -> str:
    return "an" if word == "orange" else "a"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
