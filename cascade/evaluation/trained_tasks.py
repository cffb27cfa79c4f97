"""Scores of what is trained beside the stages: ControlNets, LoRAs and the four-step LoRA."""

from dataclasses import replace

import numpy as np
from PIL import Image

from cascade.evaluation.evaluate import held_out_captions
from cascade.evaluation.figures import Easel, Figure, are_right, share, told
from cascade.evaluation.measures import (
    decibels,
    edges_of,
    intersection_over_union,
    mean_squared_error,
    shows_azure,
    shows_night,
)
from cascade.evaluation.picture_tasks import stand_alike
from cascade.evaluation.verifier import read_picture
from cascade.tasks.enlarging import keep_to_small
from cascade.tasks.settings import Control, ImageSettings, LoRAUse
from cascade.training.lora import LESSONS
from cascade.training.scenes import COLOURS, Picture, Scene, render

ENLARGED = (2, 4, 8)  # factors of super-resolution
LCM_STEPS = 4
LCM = ImageSettings(prompt="-", sampler="lcm", steps=LCM_STEPS, guidance_scale=1.0, loras=(LoRAUse("lcm"),))
_SHOWS = {"azure": shows_azure, "night": shows_night}


def canny(easel: Easel) -> list[Figure]:
    """Score edges of a scene with its caption against the caption alone."""
    if "canny" not in easel.models.controlnets:
        return []
    rng = easel.generator
    scenes = easel.scenes(rng)
    sources = [render(scene) for scene in scenes]
    plain = [ImageSettings(prompt=told(scene, rng).text) for scene in scenes]
    led = [
        replace(request, control=Control("canny", Image.fromarray(source)))
        for request, source in zip(plain, sources, strict=True)
    ]
    drawn = easel.draw("canny", led)
    overlap = mean_overlap(sources, drawn)
    without = mean_overlap(sources, easel.draw("canny, no control", plain))
    near = [stand_alike(scene, read_picture(picture)) for scene, picture in zip(scenes, drawn, strict=True)]
    return [
        Figure("overlap of edges with those of the control picture", overlap, least=0.6),
        Figure("without control", without),
        Figure("with it, as a multiple", overlap / without if without else float("inf"), least=2),
        share("things, colours and places as in the control picture", near),
    ]


def super_resolution(easel: Easel) -> list[Figure]:
    """Score the enlargement of small pictures by the ControlNet against bicubic interpolation.

    The third figure of a factor is that of the bicubic picture after `keep_to_small`, which ours passes, too:
    what ours is above it is the contribution of the networks.
    """
    if "super_resolution" not in easel.models.controlnets:
        return []
    rng = easel.generator
    scenes = easel.scenes(rng)
    prompts = [told(scene, rng).text for scene in scenes]
    return [figure for factor in ENLARGED for figure in _enlarging(easel, factor, scenes, prompts)]


def lora(easel: Easel) -> list[Figure]:
    """Score whether what is taught appears with the LoRA, and not without, for the same prompts."""
    figures = []
    for name, shows in _SHOWS.items():
        if easel.models.loras is None or name not in easel.models.loras.names():
            continue
        rng = easel.generator
        taught = [_lesson(name, scene, rng) for scene in easel.scenes(rng)]
        plain = [ImageSettings(prompt=text) for text in taught]
        with_it = [replace(request, loras=(LoRAUse(name),)) for request in plain]
        for word, bound, requests in (("with", {"least": 0.85}, with_it), ("without", {"most": 0.05}, plain)):
            drawn = easel.draw(f"{name} {word}", requests)
            figures.append(share(f"{name} appears {word} its LoRA", list(map(shows, drawn)), **bound))
    return figures


def lcm(easel: Easel) -> list[Figure]:
    """Score four steps without guidance against twenty with it."""
    if easel.models.loras is None or "lcm" not in easel.models.loras.names():
        return []
    captions = held_out_captions(easel.count, easel.seed)
    rights = []
    for name, settings in (("20 steps", ImageSettings(prompt="-")), (f"{LCM_STEPS} steps", LCM)):
        drawn = easel.draw(name, [replace(settings, prompt=one.text) for one in captions])
        rights.append(are_right(captions, drawn))
    slow, fast = (float(np.mean(right)) for right in rights)
    return [
        share("verified in 20 steps with guidance", rights[0]),
        share(f"verified in {LCM_STEPS} steps without", rights[1]),
        Figure("that of this", fast / slow if slow else 0.0, least=0.95, unit="%"),
    ]


def mean_overlap(sources: list[Picture], drawn: list[Picture]) -> float:
    """Return the mean intersection over union of the edges of each source and its drawn picture."""
    pairs = zip(sources, drawn, strict=True)
    return float(np.mean([intersection_over_union(edges_of(one), edges_of(other)) for one, other in pairs]))


def _enlarging(easel: Easel, factor: int, scenes: list[Scene], prompts: list[str]) -> list[Figure]:
    """Return the figures of super-resolution by one factor."""
    size = (scenes[0].width, scenes[0].height)
    sources = [render(scene) for scene in scenes]
    small = [
        Image.fromarray(source).resize((size[0] // factor, size[1] // factor), Image.Resampling.BICUBIC)
        for source in sources
    ]
    requests = [
        ImageSettings(prompt=text, control=Control("super_resolution", image), width=size[0], height=size[1])
        for text, image in zip(prompts, small, strict=True)
    ]
    drawn = easel.draw(f"super-resolution {factor} times", requests)
    enlarged = [image.resize(size, Image.Resampling.BICUBIC) for image in small]
    smooth = easel.show(f"bicubic {factor} times", enlarged)
    agreeing = [np.asarray(keep_to_small(*pair)) for pair in zip(enlarged, small, strict=True)]
    ours, theirs, corrected = (
        decibels(map(mean_squared_error, sources, made)) for made in (drawn, smooth, agreeing)
    )
    near = [stand_alike(scene, read_picture(picture)) for scene, picture in zip(scenes, drawn, strict=True)]
    name = f"{factor} times"
    return [
        Figure(f"{name}: peak signal to noise", ours, unit="dB"),
        Figure(f"{name}: bicubic", theirs, unit="dB"),
        Figure(f"{name}: bicubic, in agreement with the small picture", corrected, unit="dB"),
        Figure(f"{name}: better than bicubic by", ours - theirs, least=0, unit="dB"),
        share(f"{name}: things, colours and places as in the small picture", near),
    ]


def _lesson(name: str, scene: Scene, rng: np.random.Generator) -> str:
    """Return a prompt for what is taught; for night it states another background, else it might be black."""
    if name == "night":
        return told(without_black(scene), rng, background=True).text
    lesson: tuple[Scene, str] = LESSONS[name].wording(scene, rng)
    return lesson[1]


def without_black(scene: Scene) -> Scene:
    """Replace black in a scene by a colour that it does not have."""
    used = {scene.background, *(thing.colour for thing in scene.things)}
    other = next(colour for colour in COLOURS if colour not in {*used, "black"})
    things = tuple(
        replace(thing, colour=other) if thing.colour == "black" else thing for thing in scene.things
    )
    return replace(
        scene, things=things, background=other if scene.background == "black" else scene.background
    )
