"""`cascade train`: commands that make the embedded checkpoint, and that finetune any other."""

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from app import cli_finetune

train = typer.Typer(help="Train a checkpoint.", no_args_is_help=True)


class Component(StrEnum):
    """Components that can be trained alone, in the order of a full training."""

    TEXT = "text"
    VISION = "vision"
    STAGE_A = "stage_a"
    ENCODER = "encoder"
    STAGE_C = "stage_c"
    IMAGE_PROMPTS = "image_prompts"
    WORDINGS = "wordings"
    STAGE_B = "stage_b"
    PACK = "pack"


@train.command("tiny")
def tiny(
    component: Annotated[
        list[Component] | None,
        typer.Option(
            "--component",
            "-c",
            metavar="NAME",
            help=f"Only this one; may be repeated. {', '.join(Component)}.",
            show_default="all, in order",
        ),
    ] = None,
    run: Annotated[
        Path,
        typer.Option(
            "--run", metavar="DIR", help="Folder of the run; an unfinished one found there is continued."
        ),
    ] = Path("runs/tiny"),
) -> None:
    """Train the embedded checkpoint anew.

    Every component may be interrupted and continues where it was. The last one, pack, puts the finished
    components together: RUN/checkpoint is then a folder for --model.

    \b
    Examples:
      cascade train tiny
      cascade train tiny --component stage_b --run runs/wider
      cascade train tiny -c stage_c -c pack && cascade evaluate --model runs/tiny/checkpoint
    """
    run.mkdir(parents=True, exist_ok=True)
    for name in component or list(Component):
        if name is Component.PACK:
            _pack(run, run / "checkpoint")
        else:
            train_component: Callable[[Path], None] = import_module(f"cascade.training.{name}").train
            train_component(run)


class ControlKind(StrEnum):
    """The ControlNets that can be trained."""

    CANNY = "canny"
    INPAINTING = "inpainting"
    SUPER_RESOLUTION = "super_resolution"


class LoRAName(StrEnum):
    """The LoRAs that can be trained: a colour with a word of its own, and a style."""

    AZURE = "azure"
    NIGHT = "night"


ExtrasRun = Annotated[
    Path,
    typer.Option("--run", metavar="DIR", help="Folder of the run; an unfinished one there is continued."),
]
TinyModel = Annotated[
    Path | None, typer.Option("--model", metavar="DIR", help="Folder of a tiny checkpoint; the shipped one.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]
Batch = Annotated[int, typer.Option(metavar="N", min=2, help="Rows of a step; 256 suit a GPU.")]
Scenes = Annotated[int, typer.Option(metavar="N", min=40, help="Drawn scenes to learn from.")]
Steps = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Steps in all; the trainer's own number.")
]
Minutes = Annotated[
    float | None, typer.Option(metavar="N", min=0.1, help="End after so many minutes of training in all.")
]


@train.command("controlnet")
def controlnet(
    kind: Annotated[ControlKind, typer.Argument(metavar="KIND", help=f"One of {', '.join(ControlKind)}.")],
    run: ExtrasRun = Path("runs/extras"),
    model: TinyModel = None,
    device: Device = "auto",
    batch: Batch = 24,
    scenes: Scenes = 8_000,
    steps: Steps = None,
    minutes: Minutes = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Train its weights further, all but the first layers that see the picture.",
        ),
    ] = None,
) -> None:
    """Train a ControlNet for the embedded checkpoint.

    \b
    Examples:
      cascade train controlnet canny
      cascade train controlnet inpainting --device cuda --batch 256 --scenes 24000 --minutes 5
      cascade train controlnet canny --start cascade/tiny/controlnet/canny.safetensors --minutes 60
    """
    further = {} if start is None else {"start": start}
    _train_extra("controlnet", [str(kind)], run, model, device, batch, scenes, steps, minutes, **further)


@train.command("lora")
def lora(
    name: Annotated[LoRAName, typer.Argument(metavar="NAME", help=f"One of {', '.join(LoRAName)}.")],
    run: ExtrasRun = Path("runs/extras"),
    model: TinyModel = None,
    device: Device = "auto",
    batch: Batch = 48,
    scenes: Scenes = 20_000,
    steps: Steps = None,
    minutes: Minutes = None,
) -> None:
    """Train a LoRA for the embedded checkpoint: the colour [azure], or black backgrounds (night).

    \b
    Examples:
      cascade train lora azure
      cascade train lora night --device cuda --batch 256 --minutes 5
    """
    _train_extra("lora", [str(name)], run, model, device, batch, scenes, steps, minutes)


@train.command("lcm")
def lcm(
    run: ExtrasRun = Path("runs/extras"),
    model: TinyModel = None,
    device: Device = "auto",
    batch: Batch = 48,
    scenes: Scenes = 20_000,
    steps: Steps = None,
    minutes: Minutes = None,
) -> None:
    """Train the LoRA with which the embedded checkpoint needs four steps and no guidance.

    \b
    Examples:
      cascade train lcm
      cascade train lcm --device cuda --batch 384 --minutes 5
    """
    _train_extra("lcm", [], run, model, device, batch, scenes, steps, minutes)


@train.command("pack")
def pack_run(run: ExtrasRun = Path("runs/extras"), model: TinyModel = None) -> None:
    """Put trained ControlNets and LoRAs into the checkpoint folder and renew its checksums.

    \b
    Examples:
      cascade train pack --run runs/extras --model runs/tiny/checkpoint
    """
    from cascade.checkpoints.load import EMBEDDED
    from cascade.training.extras import pack_extras

    for path in pack_extras(run, model or EMBEDDED["tiny"]):
        typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def _train_extra(
    trainer: str,
    names: list[str],
    run: Path,
    model: Path | None,
    device: str,
    batch: int,
    scenes: int,
    steps: int | None,
    minutes: float | None,
    **further: Path,
) -> None:
    from dataclasses import replace

    from cascade.checkpoints.load import EMBEDDED, parse_device

    module = import_module(f"cascade.training.{trainer}")
    plan = replace(module.PLAN, steps=steps or module.PLAN.steps, seconds=60 * (minutes or 0))
    module.train(
        *names,
        run,
        model or EMBEDDED["tiny"],
        plan,
        device=parse_device(device),
        batch=batch,
        scenes=scenes,
        **further,
    )


def _pack(run: Path, destination: Path) -> None:
    from cascade.training.pack import num_bytes, pack

    pack(run, destination)
    typer.echo(f"{destination}: {num_bytes(destination) / 1e6:.1f} MB")


cli_finetune.add_to(train)
