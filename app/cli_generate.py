"""`cascade generate`: a prompt becomes one or more picture files."""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import rich.progress
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from app import cli_options as options
from app.cli_inputs import optional_picture, read_control, read_image_prompts, read_loras
from app.cli_pictures import check_output, grid_path, numbered, save_pictures, save_preview

if TYPE_CHECKING:
    from cascade import Cascade, GeneratedImage, ImageSettings, Progress

Result = TypeVar("Result")

STAGE_TITLES = {"prior": "Stage C", "decoder": "Stage B", "decode": "Stage A"}


def generate(
    prompt: options.Prompt = None,
    output: options.Output = Path("out.png"),
    num_images: options.NumImages = 1,
    negative_prompt: options.NegativePrompt = "",
    width: options.Side = None,
    height: options.Side = None,
    seed: options.Seed = None,
    steps: options.Steps = 20,
    guidance_scale: options.GuidanceScale = 4.0,
    decoder_steps: options.DecoderSteps = 10,
    decoder_guidance_scale: options.DecoderGuidanceScale = 0.0,
    preset: options.Preset = "official",
    sampler: options.Sampler = "ddpm",
    shares_generator: options.SharesGenerator = True,
    image: options.Image = None,
    strength: options.Strength = None,
    mask: options.Mask = None,
    feather: options.Feather = 0,
    anchor: options.Anchor = None,
    image_prompts: options.ImagePrompts = None,
    control: options.ControlOption = None,
    control_scale: options.ControlScale = 1.0,
    control_interval: options.ControlInterval = (0.0, 1.0),
    preprocess: options.Preprocess = True,
    faithful: options.Faithful = None,
    loras: options.LoRAs = None,
    guidance_interval: options.GuidanceInterval = (0.0, 1.0),
    weighted_prompt: options.WeightedPrompt = False,
    long_prompt: options.LongPrompt = False,
    noise_at_sampling_shift: options.NoiseAtSamplingShift = False,
    grid: options.Grid = None,
    preview: options.Preview = None,
    quality: options.Quality = 90,
    embed_metadata: options.EmbedMetadata = False,
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    variant: options.Variant = None,
    offline: options.Offline = False,
) -> None:
    """Draw pictures of a prompt, or of other pictures.

    \b
    Examples:
      cascade generate "a red circle on a blue background" -o circle.png
      cascade generate "a green star and a pink ring" -n 4 --seed 7 -o stars.webp
      cascade generate "a castle at dusk" --model DIR --width 1536 --height 1024
      cascade generate "a castle at dusk" --model DIR --preview now.png
      cascade generate "a red circle on a green background" --image circle.png --strength 0.8
      cascade generate "a blue star" --image circle.png --mask mask.png --feather 8
      cascade generate "a red circle left of a blue square" --image circle.png --anchor left --width 512
      cascade generate --image-prompt circle.png --image-prompt star.png:0.5
    """
    check_output(output)
    if preview is not None:
        check_output(preview, "preview")
    from cascade import ImageSettings, InvalidSetting

    if prompt is None and image is None and not image_prompts:
        raise InvalidSetting("prompt", "is missing (see cascade generate --help)")
    settings = ImageSettings(  # before the model is loaded, so that a wrong setting fails at once
        prompt=prompt or "",
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_images=num_images,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        decoder_steps=decoder_steps,
        decoder_guidance_scale=decoder_guidance_scale,
        preset=preset,
        sampler=sampler,
        shares_generator=shares_generator,
        image=optional_picture(image, "image"),
        strength=strength,
        mask=optional_picture(mask, "mask"),
        feather=feather,
        anchor=anchor,
        image_prompts=read_image_prompts(image_prompts),
        control=read_control(
            control, control_scale, control_interval, preprocess=preprocess, faithful=faithful
        ),
        loras=read_loras(loras),
        guidance_interval=guidance_interval,
        weighted_prompt=weighted_prompt,
        long_prompt=long_prompt,
        noise_at_sampling_shift=noise_at_sampling_shift,
    )
    if prompt:
        hint_at_vocabulary(model, prompt)
    started = time.monotonic()
    cascade = load(model, device, dtype, revision, variant, is_offline=offline)
    loaded = time.monotonic()
    pictures = draw(cascade, settings, preview)
    drawn = time.monotonic()
    has_grid = num_images > 1 if grid is None else grid
    named_model = cascade.name if embed_metadata else None
    save_pictures(pictures, output, quality=quality, has_grid=has_grid, named_model=named_model)
    report(pictures, output, has_grid=has_grid)
    typer.echo(f"loaded in {loaded - started:.2f} s, drawn in {drawn - loaded:.2f} s", err=True)


def hint_at_vocabulary(model: str, prompt: str) -> None:
    """Say what the embedded checkpoint can draw, if the prompt asks for something else."""
    from cascade.checkpoints.load import EMBEDDED
    from cascade.training.free_captions import names_a_shape
    from cascade.training.scenes import COLOURS, SHAPES

    if model in EMBEDDED and not names_a_shape(prompt):
        typer.echo(
            f"hint: {model} draws only flat shapes ({', '.join(SHAPES)}) in plain colours "
            f"({', '.join(COLOURS)}); other prompts need another --model",
            err=True,
        )


def load(
    model: str, device: str, dtype: str, revision: str | None, variant: str | None, *, is_offline: bool
) -> "Cascade":
    """Load the checkpoint; a terminal shows that it is being loaded."""
    from cascade import Cascade
    from cascade.cpu import suit_threads

    with Console(stderr=True).status(f"Loading {model}"):
        cascade = Cascade.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            variant=variant,
            local_files_only=is_offline,
        )
    suit_threads(cascade)
    return cascade


def draw(cascade: "Cascade", settings: "ImageSettings", preview: Path | None) -> list["GeneratedImage"]:
    """Draw the pictures of one request, with progress bars on a terminal and previews in `preview`."""
    from cascade import InvalidSetting
    from cascade.tasks.generation import generate as make

    previewer = cascade.previewer
    if preview is not None and previewer is None:
        raise InvalidSetting("preview", f"the checkpoint {cascade.name} has no previewer")

    def watch(seen: "Progress") -> None:
        if preview is not None and previewer is not None and seen.latents is not None:
            save_preview(previewer, seen.latents, preview)

    [pictures] = run_with_bars(make(cascade, [settings]), watch)
    return pictures


def report(pictures: list["GeneratedImage"], output: Path, *, has_grid: bool) -> None:
    """Print one line for each saved file, and what the user should know about the pictures."""
    for path, picture in zip(numbered(output, len(pictures)), pictures, strict=True):
        line = f"{path}  {picture.image.width}x{picture.image.height}  seed {picture.settings.seed}"
        if picture.resampled_from is not None:
            line += "  drawn at {}x{} and resampled".format(*picture.resampled_from)
        typer.echo(line)
    if has_grid:
        typer.echo(f"{grid_path(output)}  all of them")
    if pictures[0].prompt_truncated:
        typer.echo("the prompt is longer than the text encoder reads; its end was left out", err=True)


def run_with_bars(
    run: Generator["Progress", None, Result], watch: Callable[["Progress"], None] | None = None
) -> Result:
    """Drive `run` to its end; on a terminal, with one bar for each stage, which appears when it begins.

    `watch` is called after every step.
    """
    from cascade.tasks.generation import run_to_end

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars: dict[str, TaskID] = {}
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as display:

        def show(seen: "Progress") -> None:
            if seen.stage not in bars:
                bars[seen.stage] = display.add_task(STAGE_TITLES[seen.stage], total=seen.steps)
            display.update(bars[seen.stage], completed=seen.step)
            if watch is not None:
                watch(seen)

        return run_to_end(run, show)
