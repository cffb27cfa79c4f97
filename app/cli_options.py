"""Options of the commands, defined once because several commands share them."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

Prompt = Annotated[
    str | None,
    typer.Argument(help="What the picture shows; pictures may say it instead.", show_default=False),
]
Output = Annotated[
    Path,
    Option("--output", "-o", metavar="FILE", help="Picture file; .png, .jpg or .webp chooses the format."),
]
NumImages = Annotated[
    int,
    Option(
        "--num-images",
        "-n",
        metavar="N",
        help="Pictures to draw, 1 to 10: out-0.png, out-1.png, ... and out-grid.png.",
    ),
]
NegativePrompt = Annotated[str, Option(metavar="TEXT", help="What the picture must not show.")]
Side = Annotated[
    int | None,
    Option(metavar="PIXELS", help="64 to 4096.", show_default="native"),
]
Seed = Annotated[
    int | None,
    Option(metavar="N", help="0 to 4294967295; picture i uses seed + i.", show_default="random"),
]
Steps = Annotated[int, Option(metavar="N", help="Steps of Stage C, 1 to 100.")]
GuidanceScale = Annotated[
    float, Option(metavar="SCALE", help="Guidance of Stage C, 0 to 20; 1 or less is off.")
]
DecoderSteps = Annotated[int, Option(metavar="N", help="Steps of Stage B, 1 to 60.")]
DecoderGuidanceScale = Annotated[
    float, Option(metavar="SCALE", help="Guidance of Stage B, 0 to 10; 1 or less is off.")
]
Preset = Annotated[
    str, Option(metavar="NAME", help="official, or diffusers: compute what that library does.")
]
Sampler = Annotated[str, Option(metavar="NAME", help="ddpm, ddim or lcm.")]
SharesGenerator = Annotated[
    bool,
    Option(
        "--one-generator/--two-generators",
        help="Preset diffusers: the script hands one torch.Generator to both pipelines, or each a new one.",
    ),
]
Grid = Annotated[
    bool | None,
    Option("--grid/--no-grid", help="Also save all pictures as one, NAME-grid.", show_default="if n > 1"),
]
Quality = Annotated[int, Option(metavar="N", min=1, max=100, help="Of JPEG and WebP.")]
EmbedMetadata = Annotated[
    bool, Option("--embed-metadata", help="Write prompt, seed and settings into the file.")
]
Preview = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Picture file, replaced after every step of Stage C by what it is drawing.",
        show_default="none",
    ),
]

Image = Annotated[
    Path | None,
    Option(metavar="FILE", help="Picture to start from.", show_default="none"),
]
Strength = Annotated[
    float | None,
    Option(
        metavar="SHARE",
        help="How freely the picture is redrawn: 0 keeps it, 1 does not look at it.",
        show_default="0.75; 1 with a mask or an anchor",
    ),
]
Mask = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Picture of the size of --image: white is drawn anew, black is kept.",
        show_default="where --image is transparent",
    ),
]
Feather = Annotated[int, Option(metavar="PIXELS", help="Over which the new part fades into the old one.")]
Anchor = Annotated[
    str | None,
    Option(
        metavar="PLACE",
        help="Draw around --image, which stands there on the canvas: center, top-left, bottom, ...",
        show_default="none",
    ),
]
ImagePrompts = Annotated[
    list[str] | None,
    Option(
        "--image-prompt",
        metavar="FILE[:WEIGHT]",
        help="Picture that is a prompt; up to 15.",
        show_default="none",
    ),
]
ControlOption = Annotated[
    str | None,
    Option(
        "--control",
        metavar="KIND:FILE",
        help="Follow a picture by a ControlNet: canny, inpainting, super_resolution, identity.",
        show_default="none",
    ),
]
ControlScale = Annotated[float, Option(metavar="SCALE", help="How closely, 0 to 2.")]
ControlInterval = Annotated[
    tuple[float, float], Option(metavar="START END", help="Share of Stage C's run in which it is followed.")
]
Preprocess = Annotated[
    bool,
    Option(
        "--preprocess/--no-preprocess", help="Find what the ControlNet reads, or the picture is that already."
    ),
]
Faithful = Annotated[
    bool | None,
    Option(
        "--faithful/--no-faithful",
        help="A picture enlarged by super_resolution, reduced again, is the small one; or as it was drawn.",
        show_default="at scale 1 over the whole run",
    ),
]
LoRAs = Annotated[
    list[str] | None,
    Option("--lora", metavar="NAME[:SCALE]", help="LoRA by name; up to 4.", show_default="none"),
]
GuidanceInterval = Annotated[
    tuple[float, float], Option(metavar="START END", help="Share of Stage C's run in which guidance is on.")
]
WeightedPrompt = Annotated[
    bool, Option("--weighted-prompt", help='Read "(word:1.3)" in the texts as a weight.')
]
LongPrompt = Annotated[bool, Option("--long-prompt", help="Read texts beyond the text encoder's window.")]
NoiseAtSamplingShift = Annotated[
    bool,
    Option("--noise-at-sampling-shift", help="Noise --image at the schedule's shift; officially at shift 1."),
]

Model = Annotated[str, Option("--model", "-m", metavar="MODEL", help="tiny, a folder, or a repository name.")]
Device = Annotated[str, Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, Option(metavar="DTYPE", help="auto, float32 or bfloat16.")]
Revision = Annotated[
    str | None,
    Option(metavar="NAME", help="Commit, branch or tag.", show_default="the pinned one, at first main"),
]
Variant = Annotated[
    str | None,
    Option(metavar="NAME", help="bf16, fp32, lite or lite.bf16.", show_default="bf16 where there is one"),
]
Offline = Annotated[bool, Option("--offline", help="Use only files that are already here.")]
