"""The model card of the tiny checkpoint: what it is, how it was made, and the figures of an evaluation."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from cascade.evaluation.evaluate import ASPECTS, Report
from cascade.models import Models
from cascade.training.scenes import COLOURS, NATIVE_SIZES, SHAPES

# Part, objective and component: `cascade train tiny --component COMPONENT` trains the part again.
_RECIPE = (
    ("tokenizer, text tower", "facts of captions read by linear layers", "text"),
    (
        "vision tower",
        "nearness and contrast to the frozen text tower's embedding; linear layers read what there is to see",
        "vision",
    ),
    ("Stage A", "error on crops with edges, codebook; at last the decoder alone, by contrast", "stage_a"),
    ("semantic encoder, previewer", "squared error to the code, to small pictures", "encoder"),
    ("Stage C", "text to code, noise prediction", "stage_c"),
    (
        "Stage C's mapper of image embeddings, all else frozen",
        "its own prediction with the words, from the picture alone",
        "image_prompts",
    ),
    (
        "text tower again, all else frozen",
        "Stage C's own prediction with a plain caption, from a free wording",
        "wordings",
    ),
    ("Stage B", "code to Stage A latents, noise prediction", "stage_b"),
)


def write_card(report: Report, models: Models, path: Path, training_time: str = "") -> None:
    """Write the model card of `models` as Markdown.

    Args:
        training_time: a sentence on how long the training took.
    """
    paragraphs = (
        f"# {report.model}: a small Stable Cascade",
        _SUMMARY,
        "## What it can draw",
        _vocabulary(),
        "## Data",
        _DATA,
        "## Recipe",
        "\n".join(_recipe()),
        f"Each part is repeated by `cascade train tiny --component NAME`. {training_time}".rstrip(),
        *([_LCM] if models.loras is not None and "lcm" in models.loras.names() else []),
        "## Parameters",
        "\n".join(_parameters(models)),
        "## Figures",
        "\n".join(_figures(report, free=False)),
        _measured(report),
        *([_FREE, "\n".join(_figures(report, free=True))] if report.free else []),
        "## Limits",
        _LIMITS,
        "## Licence",
        _LICENCE,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


_SUMMARY = """\
The networks, samplers and file layout are those of Stable Cascade; only the dimensions are small. It exists
so that text to image works at once on a CPU, and so that tests can judge whole pictures. It is no general
image model."""

_DATA = """\
Drawn by a program, with captions written from the same scene descriptions, new ones at every step: nothing
collected, no people, no works of others. Evaluation scenes come from seeds that training cannot reach.
Stage C's latent is a code defined from the scene (background, and for each thing colour, shape, place and
size), not a learned one, so that every network is trained on its own."""

_LCM = """\
The LoRA `lcm`, for four steps of the sampler "lcm" without guidance, is repeated by `cascade train lcm`: on
the latents of its own runs of four steps, towards the codes of the scenes to which the guided Stage C goes
from there."""

_LIMITS = """\
It knows English words for what it can draw, ignores most others, and guesses where a prompt asks for more: no
objects of the world, no styles, no third shape, no two shapes of one colour, no large shapes in pairs. A
background that is not named is white (black behind white shapes), and two shapes without a stated arrangement
stand side by side in the order of mention. Prompts are cut after 64 tokens. The verifier
accepts what looks right by palette and outline; it measures neither beauty nor the likeness of colours finer
than the palette."""

_FREE = """\
In free wordings: prompts that a language model composed one by one, knowing the task but no wording of the
training, drawn with the same settings:"""

_LICENCE = """\
Apache-2.0, like the code that trained it. Nothing of the published Stable Cascade weights is in it."""


def _vocabulary() -> str:
    sizes = ", ".join(f"{width}x{height}" for width, height in NATIVE_SIZES)
    return (
        f"One or two flat shapes on a plain background. Shapes: {', '.join(SHAPES)}. Colours: "
        f"{', '.join(COLOURS)}. One shape may be small, medium or large and stand in the centre, left, "
        "right, top or bottom; two are small or medium, have different colours, and stand side by side or "
        f"one above the other. Sizes: {sizes}; other sizes are scaled from these."
    )


def _recipe() -> Iterator[str]:
    yield "| part | trained on | component |"
    yield "|---|---|---|"
    for part, objective, component in _RECIPE:
        yield f"| {part} | {objective} | `{component}` |"


def _parameters(models: Models) -> Iterator[str]:
    parts: dict[str, nn.Module | None] = {
        "Stage A": models.stage_a,
        "Stage B": models.stage_b,
        "Stage C": models.stage_c,
        "text tower": models.text_encoder.model,
        "vision tower": models.image_encoder.model if models.image_encoder else None,
        "semantic encoder": models.effnet,
        "previewer": models.previewer,
    }
    yield "| part | parameters |"
    yield "|---|---|"
    for name, module in parts.items():
        if module is not None:
            yield f"| {name} | {sum(parameter.numel() for parameter in module.parameters()):,} |"


def _figures(report: Report, *, free: bool) -> Iterator[str]:
    yield "| right in | one shape | two shapes | all prompts |"
    yield "|---|---|---|---|"
    for aspect, name in ASPECTS.items():
        scores = [report.score(aspect, number, free=free) for number in (1, 2, None)]
        yield f"| {name} | {' | '.join(map(str, scores))} |"


def _measured(report: Report) -> str:
    settings = report.settings
    width, height = report.judged[0].image.size
    pictures = (
        f"{len(report.judged)} held-out prompts, seeds from {settings.seed}, {width}x{height}, "
        f"{settings.steps} + {settings.decoder_steps} steps, guidance {settings.guidance_scale:g}; "
        f"{report.seconds_per_picture:.2f} s per picture, made one by one."
    )
    if report.reconstruction is None:
        return pictures
    again = report.reconstruction
    return (
        f"{pictures} Pictures drawn again by encoder, Stage B and Stage A: {again.decibels:.1f} dB, "
        f"{again.verified} of {again.count} verified."
    )
