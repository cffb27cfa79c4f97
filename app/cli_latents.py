"""`cascade encode`, `decode` and `reconstruct`: pictures to latents of Stage C and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app import cli_options as options
from app.cli_generate import load, run_with_bars
from app.cli_inputs import read_picture
from app.cli_pictures import check_folder, check_output, picture_format, write_all

if TYPE_CHECKING:
    from PIL import Image

    from cascade.tasks.autoencode import DecodeSettings

Picture = Annotated[Path, typer.Argument(metavar="PICTURE", help="A picture file.", show_default=False)]
LatentsFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="What `cascade encode` wrote.", show_default=False)
]
LatentsOutput = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File of latents, .safetensors.")
]
Side = Annotated[
    int | None,
    typer.Option(metavar="PIXELS", help="64 to 4096.", show_default="the picture's"),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the noise of Stage B, 0 to 4294967295.")]
Caption = Annotated[
    str, typer.Option("--prompt", metavar="TEXT", help="What the picture shows, for Stage B to know.")
]
OwnPreset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="official or diffusers.", show_default="the one in the file"),
]
AnyModel = Annotated[
    bool, typer.Option("--any-model", help="Decode latents that the encoder of another model made.")
]


def encode(
    picture: Picture,
    output: LatentsOutput = Path("out.safetensors"),
    width: Side = None,
    height: Side = None,
    preset: options.Preset = "official",
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    variant: options.Variant = None,
    offline: options.Offline = False,
) -> None:
    """Write a picture as latents, 42 times smaller along each side.

    1024x1024 pixels become 16 x 24 x 24 values, 37 kB.

    \b
    Examples:
      cascade encode photo.jpg -o photo.safetensors
      cascade encode photo.jpg --width 1024 --height 768 --model DIR
    """
    from cascade.errors import InvalidSetting
    from cascade.tasks.latents import SUFFIX

    if output.suffix.lower() != SUFFIX:
        raise InvalidSetting("output", f"must end in {SUFFIX}, not {output.suffix or output.name!r}")
    check_folder(output)
    source = read_picture(picture, "picture")
    cascade = load(model, device, dtype, revision, variant, is_offline=offline)
    latents = cascade.encode(source, width=width, height=height, preset=preset)
    latents.save(output)
    shape = " x ".join(map(str, latents.values.shape))
    typer.echo(f"{output}  {latents.width}x{latents.height} as {shape}, {output.stat().st_size:,} bytes")


def decode(
    latents: LatentsFile,
    output: options.Output = Path("out.png"),
    width: Side = None,
    height: Side = None,
    seed: Seed = 0,
    prompt: Caption = "",
    decoder_steps: options.DecoderSteps = 10,
    decoder_guidance_scale: options.DecoderGuidanceScale = 0.0,
    preset: OwnPreset = None,
    sampler: options.Sampler = "ddpm",
    any_model: AnyModel = False,
    quality: options.Quality = 90,
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    variant: options.Variant = None,
    offline: options.Offline = False,
) -> None:
    """Draw the picture that latents say, by Stages B and A.

    \b
    Examples:
      cascade decode photo.safetensors -o photo.png
      cascade decode photo.safetensors --seed 7 --decoder-steps 20 --model DIR
    """
    from cascade.tasks.autoencode import DecodeSettings, decode_all
    from cascade.tasks.latents import Latents

    check_output(output)
    stored = Latents.load(latents)
    settings = DecodeSettings(
        width=width,
        height=height,
        seed=seed,
        prompt=prompt,
        decoder_steps=decoder_steps,
        decoder_guidance_scale=decoder_guidance_scale,
        preset=preset,
        sampler=sampler,
        any_model=any_model,
    )
    settings.of(stored)  # before the model is loaded, so that a wrong setting fails at once
    cascade = load(model, device, dtype, revision, variant, is_offline=offline)
    [drawn] = run_with_bars(decode_all(cascade, [stored], [settings]))
    _save(drawn, output, quality, settings)


def reconstruct(
    picture: Picture,
    output: options.Output = Path("out.png"),
    width: Side = None,
    height: Side = None,
    seed: Seed = 0,
    prompt: Caption = "",
    decoder_steps: options.DecoderSteps = 10,
    decoder_guidance_scale: options.DecoderGuidanceScale = 0.0,
    preset: options.Preset = "official",
    sampler: options.Sampler = "ddpm",
    quality: options.Quality = 90,
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    variant: options.Variant = None,
    offline: options.Offline = False,
) -> None:
    """Encode a picture and decode it again: what the model keeps of it.

    \b
    Examples:
      cascade reconstruct photo.jpg -o again.png
      cascade reconstruct photo.jpg -o again.png --width 1024 --height 1024 --model DIR
    """
    from cascade.tasks.autoencode import DecodeSettings, reconstruct_all

    check_output(output)
    settings = DecodeSettings(
        width=width,
        height=height,
        seed=seed,
        prompt=prompt,
        decoder_steps=decoder_steps,
        decoder_guidance_scale=decoder_guidance_scale,
        preset=preset,
        sampler=sampler,
    )
    settings.check()
    source = read_picture(picture, "picture")
    cascade = load(model, device, dtype, revision, variant, is_offline=offline)
    [drawn] = run_with_bars(reconstruct_all(cascade, [source], [settings]))
    _save(drawn, output, quality, settings)


def _save(image: "Image.Image", output: Path, quality: int, settings: "DecodeSettings") -> None:
    from app.storage.encoding import encode as to_file

    write_all({output: to_file(image, picture_format(output), quality)})
    typer.echo(f"{output}  {image.width}x{image.height}  seed {settings.seed}")
