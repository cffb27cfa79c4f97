"""The gallery: a labelled sheet for every task, drawn from fixed seeds, and an overview of all.

    python -m cascade.evaluation.gallery --out docs

A task whose ControlNet or LoRA the checkpoint lacks is left out, and a line says so.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import Progress

from cascade.errors import CheckpointError, InvalidSetting
from cascade.evaluation.measures import decibels, mean_squared_error
from cascade.evaluation.panels import Panel, Row, draw_sheet, save_png, stack
from cascade.models import Models
from cascade.pipeline import Cascade
from cascade.tasks.autoencode import DecodeSettings
from cascade.tasks.control import find_edges
from cascade.tasks.settings import Control, LoRAUse, Options
from cascade.training.scenes import Scene, Thing, render

Draw = Callable[[Cascade], list[Row]]

_SEED = 11
_OVERVIEW_SIDE = 80  # pixels, of a picture of 256
_OVERVIEW_WIDTH = 500  # pixels, of a column
_OVERVIEW_LETTERS = 0.8


@dataclass(frozen=True, slots=True)
class Task:
    """A sheet: its file, its title, the function that draws it, and what it needs of the checkpoint."""

    name: str
    title: str
    draw: Draw
    controlnet: str | None = None
    loras: tuple[str, ...] = ()

    def missing(self, models: Models) -> str | None:
        """Return what the checkpoint lacks for the sheet, in words; None if it can be drawn."""
        if self.controlnet is not None and self.controlnet not in models.controlnets:
            return f"the ControlNet {self.controlnet} is not installed"
        installed = models.loras.names() if models.loras is not None else []
        for name in self.loras:
            if name not in installed:
                return f"the LoRA {name} is not installed"
        return None


def text_to_image(cascade: Cascade) -> list[Row]:
    """Draw eight prompts."""
    prompts = (
        "a red circle on a blue background",
        "a small green star on the left of a white background",
        "a large purple ring on a yellow background",
        "an orange cross at the bottom of a black background",
        "a yellow ring left of a purple square",
        "a pink triangle above a blue circle on a white background",
        "a white diamond right of a black star on a green background",
        "a gray square below an orange triangle on a pink background",
    )
    panels = [Panel(_drawn(cascade, prompt), prompt) for prompt in prompts]
    return [Row("", tuple(panels[:4])), Row("", tuple(panels[4:]))]


def sizes(cascade: Cascade) -> list[Row]:
    """Draw native sizes, wide and tall, and two sizes that are resampled."""
    words = "a green star on a white background"
    wide = [(512, 256), (384, 256), (200, 136)]
    tall = [(256, 512), (256, 384), (256, 256), (136, 200)]

    def row(chosen: list[tuple[int, int]]) -> tuple[Panel, ...]:
        return tuple(
            Panel(_drawn(cascade, words, width=width, height=height), f"{width} x {height}")
            for width, height in chosen
        )

    return [Row(f'"{words}"', row(wide)), Row("", row(tall))]


def reconstruction(cascade: Cascade) -> list[Row]:
    """Show pictures before and after the 42-fold compression."""
    scenes = (
        _scene(("star", "orange", 0.5, 0.5, 72), background="purple"),
        _scene(
            ("ring", "blue", 0.23, 0.5, 48), ("triangle", "red", 0.77, 0.5, 48), background="white", width=384
        ),
        _scene(("cross", "white", 0.5, 0.77, 48), ("circle", "yellow", 0.5, 0.23, 34), background="green"),
    )
    panels = []
    for scene in scenes:
        image = _picture(scene)
        panels.append(Panel(image, "source"))
        drawn = cascade.reconstruct(image, DecodeSettings(seed=_SEED))
        panels.append(Panel(drawn, f"encoded and decoded, {_decibels(image, drawn):.1f} dB"))
    return [Row("", tuple(panels[:4])), Row("", tuple(panels[4:]))]


def image_to_image(cascade: Cascade) -> list[Row]:
    """Redraw one source at several strengths, with a prompt for another background."""
    scene = _scene(("star", "red", 0.36, 0.5, 48), background="white")
    image, words = _picture(scene), "a red star on a blue background"
    panels = [Panel(image, "source")]
    for strength in (0.0, 0.3, 0.6, 1.0):
        [made] = cascade.image_to_image(image, words, strength=strength, seed=_SEED)
        panels.append(Panel(made.image, f"strength {strength:g}"))
    return [Row(f'"{words}"', tuple(panels))]


def image_prompts(cascade: Cascade) -> list[Row]:
    """Draw variations of a picture, without words and with some, and mix two pictures."""
    first = _picture(_scene(("circle", "red", 0.5, 0.5, 72), background="yellow"))
    second = _picture(_scene(("star", "blue", 0.5, 0.5, 48), background="white"))
    note = "A picture says which things there are and about where they stand; the rest is drawn anew."
    words = "a large blue circle on a yellow background"
    [told] = cascade.image_variation(first, words, seed=_SEED)

    def variations(*images: Image.Image) -> list[Panel]:
        made = cascade.image_variation(images, seed=_SEED, num_images=3)
        return [Panel(one.image, f"seed {one.settings.seed}") for one in made]

    return [
        Row(note, ()),
        Row(
            "Variations of one picture, without words and with some",
            (Panel(first, "image prompt"), *variations(first), Panel(told.image, f'with "{words}"')),
        ),
        Row("Of another", (Panel(second, "image prompt"), *variations(second))),
        Row("The two mixed, without words", tuple(variations(first, second))),
    ]


def inpainting(cascade: Cascade) -> list[Row]:
    """Redraw what a mask marks."""
    rows = []
    scene = _scene(("circle", "red", 0.23, 0.5, 48), ("square", "blue", 0.77, 0.5, 46), background="white")
    image = _picture(scene)
    mask = _box_mask(image.size, (0.5, 0.0, 1.0, 1.0))
    panels = [Panel(image, "source"), Panel(mask, "mask: white is drawn anew")]
    for words in ("green star", "purple ring", "black triangle"):
        prompt = f"a red circle left of a {words} on a white background"
        [made] = cascade.inpaint(image, prompt, mask, seed=_SEED)
        panels.append(Panel(made.image, f'"{prompt}"'))
    rows.append(Row("", tuple(panels)))
    scene = _scene(("diamond", "yellow", 0.5, 0.5, 50), background="green")
    image = _picture(scene)
    mask = _box_mask(image.size, (0.22, 0.22, 0.78, 0.78))
    panels = [Panel(image, "source"), Panel(mask, "mask")]
    for prompt, feather in (
        ("a pink cross on a green background", 0),
        ("a pink cross on a green background", 16),
        ("a white circle on a green background", 0),
    ):
        [made] = cascade.inpaint(image, prompt, mask, feather=feather, seed=_SEED)
        panels.append(Panel(made.image, f'"{prompt}"' + (f", feather {feather}" if feather else "")))
    rows.append(Row("", tuple(panels)))
    return rows


def outpainting(cascade: Cascade) -> list[Row]:
    """Extend pictures beyond their edges."""
    scene = _scene(("circle", "red", 0.5, 0.5, 44), background="white", width=256)
    image = _picture(scene)
    small = image.crop((48, 48, 208, 208))
    wide = "a red circle left of a blue square on a white background"
    around = "a red circle on a white background"
    [first] = cascade.outpaint(image, wide, anchor="left", width=512, height=256, seed=_SEED)
    [second] = cascade.outpaint(small, around, anchor="center", width=256, height=256, seed=_SEED)
    scene = _scene(("star", "yellow", 0.5, 0.5, 46), background="purple", width=256)
    star = _picture(scene)
    tall = "a yellow star above a white ring on a purple background"
    [third] = cascade.outpaint(star, tall, anchor="top", width=256, height=448, seed=_SEED)
    return [
        Row("", (Panel(image, "source"), Panel(first.image, f'"{wide}", anchor left'))),
        Row(
            "",
            (
                Panel(small, "source"),
                Panel(second.image, f'"{around}", anchor center'),
                Panel(star, "source"),
                Panel(third.image, f'"{tall}", anchor top'),
            ),
        ),
    ]


def canny(cascade: Cascade) -> list[Row]:
    """Fill a picture's edges as the prompts say."""
    rows = []
    for things, prompts in (
        (
            (("star", "black", 0.4, 0.45, 58),),
            ("a yellow star on a blue background", "a red star on a white background"),
        ),
        (
            (("ring", "black", 0.23, 0.4, 42), ("triangle", "red", 0.77, 0.6, 42)),
            (
                "a green ring left of a pink triangle on a white background",
                "a white ring left of an orange triangle on a black background",
            ),
        ),
    ):
        image = _picture(_scene(*things, background="gray"))
        edges = Image.fromarray(find_edges(np.asarray(image), *image.size))
        control = Control("canny", image)
        panels = [Panel(image, "control picture"), Panel(edges, "its edges")]
        panels += [Panel(_drawn(cascade, words, control=control), f'"{words}"') for words in prompts]
        panels.append(Panel(_drawn(cascade, prompts[0]), "the first prompt without control"))
        rows.append(Row("", tuple(panels)))
    return rows


def super_resolution(cascade: Cascade) -> list[Row]:
    """Enlarge a small and a very small picture by a filter and by the model."""
    true = _picture(_scene(("star", "red", 0.5, 0.5, 72), background="white"))
    words = "a large red star on a white background"
    rows = []
    for side in (64, 32):
        small = true.resize((side, side), Image.Resampling.BOX)
        bicubic = small.resize(true.size, Image.Resampling.BICUBIC)
        made = _drawn(
            cascade,
            words,
            control=Control("super_resolution", small),
            guidance_scale=1.0,
            width=true.width,
            height=true.height,
        )
        rows.append(
            Row(
                f'{side} x {side} to {true.width} x {true.height}, "{words}"',
                (
                    Panel(small.resize(true.size, Image.Resampling.NEAREST), f"input, {side} x {side}"),
                    Panel(bicubic, f"bicubic, {_decibels(true, bicubic):.1f} dB"),
                    Panel(made, f"super-resolution, {_decibels(true, made):.1f} dB"),
                    Panel(true, "what the input was made from"),
                ),
            )
        )
    return rows


def loras(cascade: Cascade) -> list[Row]:
    """Show a learned colour and a style, each with and without its LoRA, and both together."""
    star, ring = "an [azure] star on a white background", "a pink ring on a white background"
    circle = "an [azure] circle on a white background"
    azure, night = LoRAUse("azure"), LoRAUse("night")

    def row(words: str, heading: str, guidance: float, *uses: tuple[LoRAUse, ...]) -> Row:
        panels = []
        for some in uses:
            drawn = _drawn(cascade, words, loras=some, guidance_scale=guidance)
            panels.append(Panel(drawn, " and ".join(one.name for one in some) or "without"))
        return Row(f'{heading}: "{words}"', tuple(panels))

    return [
        row(star, "azure, a colour by a learned word, guidance 1.5", 1.5, (), (azure,)),
        row(ring, "night, a style: the background is black", 4.0, (), (night,)),
        row(circle, "Both, guidance 1.5", 1.5, (azure,), (azure, night)),
    ]


def lcm(cascade: Cascade) -> list[Row]:
    """Compare four steps with twenty."""
    plain = Options(sampler="lcm", steps=4, guidance_scale=1.0)
    distilled = Options(sampler="lcm", steps=4, guidance_scale=1.0, loras=(LoRAUse("lcm"),))

    def row(words: str) -> Row:
        panels = (
            Panel(_drawn(cascade, words), "20 steps with guidance"),
            Panel(_drawn(cascade, words, **distilled), "4 steps without guidance, sampler and LoRA lcm"),
            Panel(_drawn(cascade, words, **plain), "the same without the LoRA"),
        )
        return Row(f'"{words}"', panels)

    return [
        row("a green star on a white background"),
        row("a yellow ring left of a purple square on a blue background"),
    ]


def prompt_weights(cascade: Cascade) -> list[Row]:
    """Weight one word, and then a whole prompt, less and more."""
    note = (
        "Weights act on the words, not on the summary of the whole prompt, and that is what the embedded "
        "checkpoint follows: they change little here."
    )
    rows = [Row(note, ())]
    for words in ("a (red:{}) circle on a white background", "(a red circle on a white background:{})"):
        panels = [
            Panel(_drawn(cascade, words.format(weight), weighted_prompt=True), f"weight {weight:g}")
            for weight in (0, 0.5, 1, 2, 5)
        ]
        rows.append(Row(f'"{words.format("WEIGHT")}"', tuple(panels)))
    return rows


def guidance_interval(cascade: Cascade) -> list[Row]:
    """Apply guidance in a part of the run."""
    words = "a pink triangle above a blue circle on a white background"
    intervals = ((0.0, 1.0), (0.0, 0.5), (0.2, 0.8), (0.5, 1.0))
    panels = [
        Panel(_drawn(cascade, words, guidance_interval=(start, end)), f"from {start:g} to {end:g} of the run")
        for start, end in intervals
    ]
    panels.append(Panel(_drawn(cascade, words, guidance_scale=1.0), "no guidance"))
    return [Row(f'"{words}"', tuple(panels))]


TASKS = (
    Task("text-to-image", "Text to image", text_to_image),
    Task("sizes", "Sizes", sizes),
    Task("reconstruction", "Encode and decode", reconstruction),
    Task("image-to-image", "Image to image", image_to_image),
    Task("image-prompts", "Image prompts", image_prompts),
    Task("inpainting", "Inpainting", inpainting),
    Task("outpainting", "Outpainting", outpainting),
    Task("canny", "ControlNet: canny", canny, controlnet="canny"),
    Task(
        "super-resolution",
        "ControlNet: super-resolution",
        super_resolution,
        controlnet="super_resolution",
    ),
    Task("loras", "LoRA", loras, loras=("azure", "night")),
    Task("lcm", "Few steps", lcm, loras=("lcm",)),
    Task("prompt-weights", "Prompt weights", prompt_weights),
    Task("guidance-interval", "Guidance in a part of the run", guidance_interval),
)


def draw_gallery(
    cascade: Cascade,
    out: Path,
    tasks: Sequence[Task] = TASKS,
    progress: Callable[[str], None] | None = None,
    *,
    with_overview: bool = True,
) -> dict[str, str]:
    """Write `out`/gallery/NAME.png for each task and, if `with_overview`, `out`/gallery.png of all of them.

    Returns the reason for each task left out, by its name. `progress` gets the title of each task before it.
    """
    drawn: dict[Task, list[Row]] = {}
    left_out = {}
    for task in tasks:
        if progress is not None:
            progress(task.title)
        reason = task.missing(cascade)
        if reason is not None:
            left_out[task.name] = reason
            continue
        drawn[task] = task.draw(cascade)
        save_png(draw_sheet(task.title, drawn[task]), out / "gallery" / f"{task.name}.png")
    if drawn and with_overview:
        save_png(draw_overview(drawn), out / "gallery.png")
    return left_out


def draw_overview(drawn: Mapping[Task, Sequence[Row]]) -> Image.Image:
    """Draw all sheets, small, in two columns of about the same height."""
    blocks = [
        draw_sheet(task.title, rows, _OVERVIEW_SIDE, _OVERVIEW_WIDTH, margin=0, letters=_OVERVIEW_LETTERS)
        for task, rows in drawn.items()
    ]
    columns: list[list[Image.Image]] = [[], []]
    half = sum(block.height for block in blocks) / 2
    height = 0.0
    for block in blocks:
        columns[height + block.height / 2 > half].append(block)
        height += block.height
    stacks = [stack(column, 24) for column in columns if column]
    whole = Image.new(
        "RGB", (sum(one.width for one in stacks), max(one.height for one in stacks)), (255, 255, 255)
    )
    left = 0
    for one in stacks:
        whole.paste(one, (left, 0))
        left += one.width
    return whole


def _drawn(cascade: Cascade, prompt: str, **options: Unpack[Options]) -> Image.Image:
    """Return the first picture of a prompt."""
    options.setdefault("seed", _SEED)
    return cascade.text_to_image(prompt, **options)[0].image


def _scene(
    *things: tuple[str, str, float, float, float], background: str, width: int = 256, height: int = 256
) -> Scene:
    """Build a scene; a thing is a shape, a colour, x and y as shares of the size, and a radius in pixels."""
    placed = (
        Thing(shape, colour, across * width, down * height, radius)
        for shape, colour, across, down, radius in things
    )
    return Scene(width, height, background, tuple(placed))


def _picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


def _box_mask(size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """Return a mask, white in `box`: left, top, right and bottom as shares of the size."""
    mask = Image.new("L", size, 0)
    width, height = size
    left, top, right, bottom = box
    ImageDraw.Draw(mask).rectangle(
        (left * width, top * height, right * width - 1, bottom * height - 1), fill=255
    )
    return mask


def _decibels(true: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio."""
    return decibels([mean_squared_error(np.asarray(true), np.asarray(other))])


def main() -> int:
    """Draw the gallery of a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m cascade.evaluation.gallery", description="Draw a sheet of every task."
    )
    parser.add_argument("--model", default="tiny", help="checkpoint: tiny or a folder (default tiny)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to (default docs)")
    names = [task.name for task in TASKS]
    parser.add_argument(
        "--only", nargs="+", metavar="TASK", choices=names, help=f"without the overview: {', '.join(names)}"
    )
    given = parser.parse_args()
    tasks = [task for task in TASKS if given.only is None or task.name in given.only]
    console = Console(stderr=True)
    try:
        cascade = Cascade.from_pretrained(given.model)
        with Progress(console=console) as progress:
            bar = progress.add_task("Gallery", total=len(tasks) + 1)

            def begin(title: str) -> None:
                progress.update(bar, advance=1, description=title)

            left_out = draw_gallery(cascade, given.out, tasks, begin, with_overview=given.only is None)
            progress.update(bar, advance=1, description="Gallery")
    except (CheckpointError, InvalidSetting) as error:
        console.print(f"gallery: {error}", style="red", markup=False)
        return 2
    for name, reason in left_out.items():
        console.print(f"left out {name}: {reason}", highlight=False)
    console.print(f"wrote into {given.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
