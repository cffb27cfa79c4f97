"""Scores of tasks that start from a picture: reconstruct, image-to-image, variation, in- and outpainting."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from cascade.evaluation.figures import Easel, Figure, are_right, share, told
from cascade.evaluation.measures import decibels, distance, mean_squared_error, seam_ratio
from cascade.evaluation.verifier import read_picture, shows
from cascade.tasks.autoencode import DecodeSettings, reconstruct_all
from cascade.tasks.generation import run_to_end
from cascade.tasks.settings import ImagePrompt, ImageSettings
from cascade.training.scenes import COLOURS, SHAPES, SQUARE_SIZE, Picture, Scene, Thing, render, sample_scene

ASPECTS = ((256, 256), (384, 256), (512, 256), (256, 384), (256, 512))
STRENGTHS = (0.0, 0.3, 0.6, 1.0)
BACKGROUND_STRENGTH = 0.8  # at which a prompt changes the background but keeps the things
WIDE_SIZE = (384, 256)
FEATHER = 8  # pixels, of inpainting and outpainting
_MARGIN = 10  # pixels of room around a masked thing
_DIFFERENT = 2.0  # distance above which two pictures are not the same


def reconstruction(easel: Easel) -> list[Figure]:
    """Score pictures passed through the encoder, Stage B and Stage A, at five aspect ratios."""
    figures = []
    rng = easel.generator
    for width, height in ASPECTS:
        scenes = easel.scenes(rng, (width, height))
        sources = [render(scene) for scene in scenes]
        images = []
        for row, source in enumerate(sources):
            settings = DecodeSettings(seed=easel.seed + row)
            images += run_to_end(reconstruct_all(easel.models, [Image.fromarray(source)], [settings]))
            easel.report(1)
        name = f"{width}x{height}"
        drawn = easel.show(f"reconstructed {name}", images)
        noise = decibels(map(mean_squared_error, sources, drawn))
        figures += [
            Figure(f"{name}: peak signal to noise", noise, least=28, unit="dB"),
            share(f"{name}: verified", list(map(shows, scenes, drawn)), least=0.9),
        ]
    return figures


def image_to_image(easel: Easel) -> list[Figure]:
    """Score the effect of strength, and a change of the background by prompt."""
    rng = easel.generator
    scenes = easel.scenes(rng)
    others = [told(sample_scene(rng), rng).text for _ in scenes]
    sources = [render(scene) for scene in scenes]
    distances = []
    for strength in STRENGTHS:
        requests = [
            ImageSettings(prompt=text, image=Image.fromarray(source), strength=strength)
            for text, source in zip(others, sources, strict=True)
        ]
        drawn = easel.draw(f"strength {strength:g}", requests)
        distances.append(float(np.mean(list(map(distance, sources, drawn)))))
    figures = [
        Figure(f"strength {strength:g}: distance to the source", value)
        for strength, value in zip(STRENGTHS, distances, strict=True)
    ]
    growth = min(np.diff(distances))
    figures.append(Figure("least growth of the distance from strength to strength", float(growth), least=0.1))
    return figures + _background_change(easel, rng)


def variation(easel: Easel) -> list[Figure]:
    """Score image prompts without words: one picture, and two that are mixed."""
    rng = easel.generator
    scenes = easel.scenes(rng)
    sources = [render(scene) for scene in scenes]
    drawn = easel.draw("variation", [_guided_by([source]) for source in sources])
    seen = list(map(read_picture, drawn))
    differ = [distance(source, picture) > _DIFFERENT for source, picture in zip(sources, drawn, strict=True)]
    pairs = [_pair_without_common_traits(rng) for _ in scenes]
    parents = [(render(first), render(second)) for first, second in pairs]
    mixed = list(map(read_picture, easel.draw("two image prompts", list(map(_guided_by, parents)))))
    alone = list(map(read_picture, easel.draw("the first alone", [_guided_by(both[:1]) for both in parents])))
    return [
        share("the same things", list(map(same_things, scenes, seen)), least=0.85),
        share("verified", list(map(shows, scenes, drawn))),
        share("the pixels differ", differ, least=1),
        share("two image prompts: traits of both", list(map(has_both, pairs, mixed)), least=0.5),
        share("the first of them alone: traits of both", list(map(has_both, pairs, alone)), most=0.1),
    ]


def inpainting(easel: Easel) -> list[Figure]:
    """Score the replacement of a masked thing by one that the prompt names; then outpainting."""
    rng = easel.generator
    scenes = easel.scenes(rng)
    wanted = [_with_another_thing(scene, rng) for scene in scenes]
    sources = [render(scene) for scene in scenes]
    masks = [box_mask(scene, scene.things[-1]) for scene in scenes]
    captions = [told(scene, rng) for scene in wanted]
    requests = [
        ImageSettings(
            prompt=one.text, image=Image.fromarray(source), mask=Image.fromarray(mask), feather=FEATHER
        )
        for one, source, mask in zip(captions, sources, masks, strict=True)
    ]
    figures = []
    models = easel.models
    kinds = ["without a ControlNet"] + ["with the ControlNet"] * ("inpainting" in models.controlnets)
    for kind in kinds:
        networks = models.controlnets if kind == kinds[-1] and len(kinds) == 2 else {}
        equipped = replace(easel, models=replace(models, controlnets=networks))
        drawn = equipped.draw(f"inpainting {kind}", requests)
        kept = [
            bool((picture == source)[mask == 0].all())
            for picture, source, mask in zip(drawn, sources, masks, strict=True)
        ]
        seen = list(map(read_picture, drawn))
        there = [
            stands_there(scene.things[-1], mask, picture)
            for scene, mask, picture in zip(wanted, masks, seen, strict=True)
        ]
        figures += [
            share(f"{kind}: pixels that are kept are the same", kept, least=1),
            share(f"{kind}: the masked thing is what the prompt says", there, least=0.85),
            share(f"{kind}: the whole picture is", are_right(captions, drawn)),
        ]
    return figures + outpainting(easel)


def outpainting(easel: Easel) -> list[Figure]:
    """Score wide pictures of which the middle is given and the sides are drawn."""
    rng = easel.generator
    across = (WIDE_SIZE[0] - SQUARE_SIZE[0]) // 2
    scenes = [_moved(scene, across) for scene in easel.scenes(rng)]
    inner = slice(across, across + SQUARE_SIZE[0])
    sources = [np.ascontiguousarray(render(scene)[:, inner]) for scene in scenes]
    captions = [told(scene, rng) for scene in scenes]
    requests = [
        ImageSettings(
            prompt=one.text,
            image=Image.fromarray(source),
            anchor="center",
            width=WIDE_SIZE[0],
            height=WIDE_SIZE[1],
            feather=FEATHER,
        )
        for one, source in zip(captions, sources, strict=True)
    ]
    drawn = easel.draw("outpainting", requests)
    kept = [bool((picture[:, inner] == source).all()) for picture, source in zip(drawn, sources, strict=True)]
    ratios = [seam_ratio(picture, (inner.start, inner.stop)) for picture in drawn]
    return [
        share("outpainting: pixels that are kept are the same", kept, least=1),
        Figure("outpainting: step across the seam, of that elsewhere", float(np.mean(ratios)), most=1),
        share("outpainting: verified", are_right(captions, drawn)),
    ]


def same_things(scene: Scene, seen: Scene) -> bool:
    """Return whether `seen` has the same shapes in the same colours, wherever they stand."""
    asked, found = (sorted((thing.shape, thing.colour) for thing in each.things) for each in (scene, seen))
    return asked == found


def has_both(pair: tuple[Scene, Scene], seen: Scene) -> bool:
    """Return whether `seen` has a background, colour or shape of each of two scenes that share none."""
    return all(_traits(scene) & _traits(seen) for scene in pair)


def stands_there(wanted: Thing, mask: Picture, seen: Scene) -> bool:
    """Return whether a thing of the wanted shape and colour, and no other, is in the white of the mask."""
    height, width = mask.shape
    inside = [thing for thing in seen.things if mask[_within(thing.y, height), _within(thing.x, width)]]
    return [(thing.shape, thing.colour) for thing in inside] == [(wanted.shape, wanted.colour)]


def box_mask(scene: Scene, thing: Thing) -> Picture:
    """Return a mask (h, w), white around a thing, with some room for another."""
    mask = np.zeros((scene.height, scene.width), np.uint8)
    reach = 1.1 * thing.radius + _MARGIN
    top, left = max(0, int(thing.y - reach)), max(0, int(thing.x - reach))
    mask[top : int(thing.y + reach), left : int(thing.x + reach)] = 255
    return mask


def _background_change(easel: Easel, rng: np.random.Generator) -> list[Figure]:
    scenes = easel.scenes(rng)
    changed = [replace(scene, background=_another(rng, COLOURS, _colours(scene))) for scene in scenes]
    captions = [told(scene, rng, background=True) for scene in changed]
    requests = [
        ImageSettings(prompt=one.text, image=Image.fromarray(render(scene)), strength=BACKGROUND_STRENGTH)
        for one, scene in zip(captions, scenes, strict=True)
    ]
    drawn = easel.draw("another background", requests)
    near = [stand_alike(scene, read_picture(one)) for scene, one in zip(changed, drawn, strict=True)]
    name = f"another background by prompt, strength {BACKGROUND_STRENGTH:g}"
    return [
        share(f"{name}: verified", are_right(captions, drawn), least=0.9),
        share(f"{name}: where they stood", near),
    ]


def stand_alike(scene: Scene, seen: Scene, pixels: float = 16) -> bool:
    """Return whether all things are there, each within `pixels` of its place along both axes."""
    return same_things(scene, seen) and all(
        any(
            other.colour == one.colour and max(abs(one.x - other.x), abs(one.y - other.y)) <= pixels
            for other in seen.things
        )
        for one in scene.things
    )


def _guided_by(pictures: Sequence[Picture]) -> ImageSettings:
    return ImageSettings(image_prompts=tuple(ImagePrompt(Image.fromarray(picture)) for picture in pictures))


def _pair_without_common_traits(rng: np.random.Generator) -> tuple[Scene, Scene]:
    while True:
        first, second = sample_scene(rng), sample_scene(rng)
        if not _traits(first) & _traits(second):
            return first, second


def _traits(scene: Scene) -> set[str]:
    """Return the background of a scene, and the colours and shapes of its things."""
    return {f"{scene.background} background"} | {
        word for thing in scene.things for word in (thing.colour, thing.shape)
    }


def _colours(scene: Scene) -> list[str]:
    return [scene.background, *(thing.colour for thing in scene.things)]


def _with_another_thing(scene: Scene, rng: np.random.Generator) -> Scene:
    """Give the last thing another shape, and a colour that nothing else in the scene has."""
    old = scene.things[-1]
    shape, colour = _another(rng, SHAPES, [old.shape]), _another(rng, COLOURS, _colours(scene))
    return replace(scene, things=(*scene.things[:-1], replace(old, shape=shape, colour=colour)))


def _another(rng: np.random.Generator, words: tuple[str, ...], but: list[str]) -> str:
    choices = [word for word in words if word not in but]
    return choices[int(rng.integers(len(choices)))]


def _moved(scene: Scene, across: int) -> Scene:
    """Return the scene in a picture that is wider by `across` pixels on both sides."""
    things = tuple(replace(thing, x=thing.x + across) for thing in scene.things)
    return replace(scene, width=scene.width + 2 * across, things=things)


def _within(value: float, length: int) -> int:
    return min(max(int(value), 0), length - 1)
