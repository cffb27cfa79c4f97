"""Free captions: what people and programs type who do not know the captions of the training.

Requests, tags, briefs and sentences with synonyms, filler and style words; `free_captions.toml` lists these.
What a wording leaves open is read in a fixed way (`settle`), so that each has one plain caption of the same
meaning, which a network that knows plain captions can be asked about.
"""

import re
import tomllib
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from cascade.training.captions import Caption, state_sides
from cascade.training.scenes import COLOURS, SHAPES, Scene, Thing

_TEMPLATES = (
    "unplaced",
    "related",
    "followed",
    "followed_by_name",
    "one_above",
    "sided",
    "one_of_two",
    "told_later",
    "behind",
    "before",
)
_OTHER_NAMES = ("disc", "disk", "dot", "rhombus", "lozenge", "donut", "doughnut", "hoop", "annulus", "plus")
_PLAIN_PLACES: dict[str, str] = {
    "centre": "in the centre",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def free_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """Return a free wording of a scene; its facts leave out what it does not state.

    Two things without a stated arrangement are mentioned in the order of their places.
    """
    facts: dict[str, str] = {}
    if rng.random() < 0.06:
        return Caption(_keyed(scene, rng, facts), facts)
    words = _one(scene, rng, facts) if len(scene.things) == 1 else _two(scene, rng, facts)
    if rng.random() < 0.85:
        facts["background"] = scene.background
        words = _with_background(scene.background, words, rng)
    if rng.random() < 0.5:
        words = f"{_opening(rng)} {words}"
    if rng.random() < 0.12:
        words = f"{_pick(rng, 'preludes')}{('.', ',', ':')[int(rng.integers(3))]} {words}"
    return Caption(_tidy(_with_ending(words, rng)), facts)


def filler(rng: np.random.Generator) -> str:
    """Return words that name nothing that could be drawn."""
    parts = [
        _pick(rng, "styles"),
        _unknown_word(rng),
        _opening(rng),
        _pick(rng, "sentences"),
        _unknown_word(rng),
    ]
    chosen = [parts[index] for index in rng.permutation(len(parts))[: 1 + int(rng.integers(3))]]
    return _tidy(", ".join(chosen))


def mistyped(text: str, rng: np.random.Generator) -> str:
    """Return a text with letters of one or two words swapped, left out or doubled."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= 4]
    for index in rng.permutation(long)[: 1 + (rng.random() < 0.3)]:
        word = words[index]
        at = 1 + int(rng.integers(len(word) - 3))
        middle = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])[int(rng.integers(3))]
        words[index] = word[:at] + middle + word[at + 2 :]
    return " ".join(words)


def settle(scene: Scene, stated: Caption) -> tuple[Scene, str]:
    """Return the scene that a caption of `scene` is read as, and a plain caption of the same meaning.

    What is not stated is read as follows. The background is white, or the first of black and gray if things
    have that colour; a thing without a colour is black, or white on black; two things stand side by side in
    the order of mention. Sizes, and the place of a single thing, stay open.
    """
    facts = stated.facts
    things = _mentioned(scene, facts)
    if "first_colour" not in facts:
        colour = "white" if facts.get("background") == "black" else "black"
        things = [replace(things[0], colour=colour)]
    if len(things) == 2 and "near_shape" not in facts:
        halves = sorted(thing.x for thing in things) if not scene.is_stacked else _halves(scene)
        things = [replace(thing, x=x, y=scene.height / 2) for thing, x in zip(things, halves, strict=True)]
    taken = {thing.colour for thing in things}
    open_background = next(colour for colour in ("white", "black", "gray") if colour not in taken)
    background = facts.get("background", open_background)
    settled = replace(scene, things=tuple(things), background=background)
    return settled, _plain(settled, facts)


def phrases() -> list[str]:
    """Return all words and phrases that captions are made of, for a tokenizer."""
    texts: list[str] = [*COLOURS, *SHAPES]
    for name, words in _words().items():
        if name not in _TEMPLATES:
            texts += (
                [word for several in words.values() for word in several] if type(words) is dict else words
            )
    return texts


def names_a_shape(text: str) -> bool:
    """Return whether a text has an unmistakable word for one of the shapes, also in the plural."""
    pattern = "|".join((*SHAPES, *_OTHER_NAMES))
    return re.search(rf"\b({pattern})(s|es)?\b", text, re.IGNORECASE) is not None


def _mentioned(scene: Scene, facts: dict[str, str]) -> list[Thing]:
    """Return the things in the order of mention."""
    first = facts.get("first_colour")
    return sorted(scene.things, key=lambda thing: len(scene.things) == 2 and thing.colour != first)


def _halves(scene: Scene) -> list[float]:
    """Return the x of two things that stand side by side, as far apart as these stacked ones."""
    apart = (scene.things[0].y - scene.things[1].y) / scene.height
    return [scene.width * (0.5 - abs(apart) / 2), scene.width * (0.5 + abs(apart) / 2)]


def _plain(scene: Scene, facts: dict[str, str]) -> str:
    names = []
    for mention, thing in zip(("first", "second"), scene.things, strict=False):
        size = facts.get(f"{mention}_size")
        names.append(" ".join(word for word in ("a", size, thing.colour, thing.shape) if word))
    if len(names) == 2:
        near, far = names if scene.in_order() == scene.things else names[::-1]
        words = f"{near} {'above' if scene.is_stacked else 'left of'} {far}"
    else:
        place = facts.get("first_place")
        words = f"{names[0]} {_PLAIN_PLACES[place]}" if place else names[0]
    return re.sub(r"\ba orange", "an orange", f"{words} on a {scene.background} background")


def _one(scene: Scene, rng: np.random.Generator, facts: dict[str, str]) -> str:
    (thing,) = scene.things
    name = _name(scene, thing, "first", rng, facts, names_colour=rng.random() > 0.03)
    if rng.random() < 0.55:
        return name
    place = facts["first_place"] = scene.place(thing)
    where = _pick(rng, "places", place).format(c=_pick(rng, "centres"), p=_pick(rng, "pages"))
    if rng.random() < 0.15:
        return f"{where}{_pick(rng, 'after_a_place')} {name}"
    if rng.random() < 0.3:
        where = f"{_pick(rng, 'standing')} {where}"
    return f"{name}{_pick(rng, 'before_a_place')} {where}"


def _keyed(scene: Scene, rng: np.random.Generator, facts: dict[str, str]) -> str:
    """Return a form such as "shape: star; color: red" or the same as JSON; add to `facts`."""
    entries: list[tuple[str, str]] = []
    if len(scene.things) == 1:
        (thing,) = scene.things
        facts |= {"first_shape": thing.shape, "first_colour": thing.colour}
        entries.append((_pick(rng, "shape_keys"), _shape(thing, rng)))
        entries.append((_pick(rng, "colour_keys"), _colour(thing.colour, rng)))
        if rng.random() < 0.5:
            size = facts["first_size"] = scene.size_word(thing)
            entries.append((_pick(rng, "size_keys"), size))
        if rng.random() < 0.4:
            place = facts["first_place"] = scene.place(thing)
            entries.append((_pick(rng, "place_keys"), "center" if place == "centre" else place))
    else:
        things = scene.in_order()
        for mention, thing in zip(("first", "second"), things, strict=True):
            facts |= {f"{mention}_shape": thing.shape, f"{mention}_colour": thing.colour}
            entries.append((scene.place(thing), f"{_colour(thing.colour, rng)} {_shape(thing, rng)}"))
        state_sides(scene, things, facts)
    if rng.random() < 0.9:
        facts["background"] = scene.background
        entries.append((_pick(rng, "background_keys"), _colour(scene.background, rng)))
    if len(scene.things) == 1 and rng.random() < 0.4:
        entries = [entries[index] for index in rng.permutation(len(entries))]
    if rng.random() < 0.3:
        inner = ", ".join(f'"{key}": "{value}"' for key, value in entries)
        return f"{{{inner}}}"
    link, between = ((": ", ", "), (": ", "; "), (": ", " | "), ("=", " "), ("=", ", "), (" = ", "; "))[
        int(rng.integers(6))
    ]
    return between.join(f"{key}{link}{value}" for key, value in entries)


def _two(scene: Scene, rng: np.random.Generator, facts: dict[str, str]) -> str:
    is_open = not scene.is_stacked and rng.random() < 0.4
    things = scene.in_order() if is_open or rng.random() < 0.6 else scene.in_order()[::-1]
    a, b = (
        _name(scene, thing, mention, rng, facts)
        for thing, mention in zip(things, ("first", "second"), strict=True)
    )
    if is_open:
        return _pick(rng, "unplaced").format(a=a, b=b)
    state_sides(scene, things, facts)
    places = [scene.place(thing) for thing in things]
    index = int(rng.integers(len(_words()["sides"]["left"])))
    s, t = (_words()["sides"][place][index] for place in places)
    if things[0].shape == things[1].shape and rng.random() < 0.4:
        for mention in ("first", "second"):
            facts.pop(f"{mention}_size", None)
        c, d = (_colour(thing.colour, rng) for thing in things)
        return _pick(rng, "one_of_two").format(n=_shape(things[0], rng), c=c, d=d, s=s, t=t)
    r, w = _pick(rng, "relations", places[0]), _pick(rng, "following", places[0])
    choice = rng.random()
    differ = things[0].shape != things[1].shape
    if choice < 0.08 and differ:
        behind = _pick(rng, "relations", places[1])
        return _pick(rng, "followed_by_name").format(a=a, b=b, r=behind, w=w, n=things[0].shape)
    if choice < 0.16 and differ and places[0] == "top":
        return _pick(rng, "one_above").format(a=a, b=b, n=things[0].shape)
    if choice < 0.24 and differ:
        for mention in ("first", "second"):
            facts.pop(f"{mention}_size", None)
        c, d = (_colour(thing.colour, rng) for thing in things)
        n, m = (_shape(thing, rng) for thing in things)
        return _pick(rng, "told_later").format(n=n, m=m, c=c, d=d, r=r)
    if choice < 0.45:
        return _pick(rng, "related").format(a=a, b=b, r=r)
    if choice < 0.68:
        return _pick(rng, "followed").format(a=a, b=b, w=w)
    return _pick(rng, "sided").format(a=a, b=b, s=s, t=t)


def _name(
    scene: Scene,
    thing: Thing,
    mention: str,
    rng: np.random.Generator,
    facts: dict[str, str],
    *,
    names_colour: bool = True,
) -> str:
    """Return a name such as "a bold crimson disc"; add to `facts`."""
    facts[f"{mention}_shape"] = thing.shape
    shape = _shape(thing, rng)
    size = scene.size_word(thing)
    before, after = [], ""
    if rng.random() < 0.35:
        facts[f"{mention}_size"] = size
        if rng.random() < 0.9:
            before.append(_pick(rng, "sizes", size))
        else:
            after = _pick(rng, "size_after").format(size)
    if rng.random() < 0.25:
        word = _pick(rng, "adjectives") if rng.random() < 0.8 else _unknown_word(rng)
        before.insert(int(rng.integers(len(before) + 1)), word)
    article = _pick(rng, "articles")
    if not names_colour:
        return " ".join([article, *before, shape]) + after
    facts[f"{mention}_colour"] = thing.colour
    colour = _colour(thing.colour, rng)
    if rng.random() < 0.85:
        noun = [f"{colour}-{_pick(rng, 'coloured')}" if rng.random() < 0.04 else colour, shape]
        return " ".join([article, *before, *noun]) + after
    return " ".join([article, *before, _pick(rng, "colour_after").format(shape, colour)]) + after


def _shape(thing: Thing, rng: np.random.Generator) -> str:
    return thing.shape if rng.random() < 0.6 else _pick(rng, "shapes", thing.shape)


def _colour(colour: str, rng: np.random.Generator) -> str:
    word = colour if rng.random() < 0.6 else _pick(rng, "colours", colour)
    if rng.random() < 0.2:
        tone = _pick(rng, "tones") if rng.random() < 0.9 else _unknown_word(rng)
        return f"{tone} {word}"
    return word


def _with_background(background: str, words: str, rng: np.random.Generator) -> str:
    colour = _colour(background, rng)
    adjective = [_pick(rng, "grounds")] if rng.random() < 0.25 else []
    ground = " ".join([_pick(rng, "ground_articles"), *adjective, colour, _pick(rng, "surfaces")])
    if rng.random() < 0.75:
        return _pick(rng, "behind").format(x=words, g=ground, c=colour)
    if rng.random() < 0.3:
        words = f"{_opening(rng)} {words}"
    return _pick(rng, "before").format(x=words, g=ground, c=colour)


def _opening(rng: np.random.Generator) -> str:
    opening = _pick(rng, "openings")
    if rng.random() < 0.15:
        word = _unknown_word(rng)
        opening = f"{word} {opening}" if rng.random() < 0.5 else f"{opening} {word}"
    return opening


def _with_ending(words: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        count = 1 + int(rng.integers(4))
        styles = [_pick(rng, "styles") if rng.random() < 0.85 else _unknown_word(rng) for _ in range(count)]
        words = ", ".join([words, *styles])
    if rng.random() < 0.15:
        words = f"{words}{_pick(rng, 'before_a_sentence')} {_pick(rng, 'sentences')}"
    return words + _pick(rng, "full_stops")


def _unknown_word(rng: np.random.Generator) -> str:
    """Return a word that means nothing, so that unknown words are learned to mean nothing."""
    while True:
        word = ""
        for _ in range(1 + int(rng.integers(3))):
            word += _pick(rng, "onsets") + _pick(rng, "vowels")
            word += _pick(rng, "codas") if rng.random() < 0.5 else ""
        word += _pick(rng, "endings") if rng.random() < 0.4 else ""
        if word not in _known_words():
            return word


@cache
def _words() -> dict[str, Any]:
    """Return lists of phrases by name, and tables of such lists."""
    text = files("cascade.training").joinpath("free_captions.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _known_words() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", " ".join(phrases())))


def _tidy(text: str) -> str:
    """Return a text with the right articles and single spaces."""
    text = re.sub(r"\s+", " ", text).strip().replace(" ,", ",").replace(" .", ".")
    text = re.sub(r"\b(a|an) (?=(?:a|an|the|one)\b)", "", text, flags=re.IGNORECASE)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _pick(rng: np.random.Generator, name: str, key: str | None = None) -> str:
    choices = _words()[name] if key is None else _words()[name][key]
    return str(choices[int(rng.integers(len(choices)))])
