"""`cascade train` and `cascade evaluate`: how the embedded checkpoint is made and judged."""

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from app import cli_options as options
from app.cli_pictures import check_folder, picture_format

train = typer.Typer(help="Train a checkpoint.", no_args_is_help=True)


class Component(StrEnum):
    """What can be trained alone, in the order in which all of it is trained."""

    TEXT = "text"
    VISION = "vision"
    STAGE_A = "stage_a"
    ENCODER = "encoder"
    STAGE_C = "stage_c"
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

    TEAL = "teal"
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
      cascade train controlnet canny --start runs/extras/canny.safetensors --run runs/further --minutes 60
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
    """Train a LoRA for the embedded checkpoint: the colour [teal], or black backgrounds (night).

    \b
    Examples:
      cascade train lora teal
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


class TrainedStage(StrEnum):
    """What can be finetuned."""

    PRIOR = "prior"
    DECODER = "decoder"


def _finetune_command(stage: TrainedStage, network: str, learns: str) -> None:
    """Add `cascade train prior` or `cascade train decoder`, which differ in little."""

    def command(
        data: Annotated[
            Path,
            typer.Option(
                "--data",
                metavar="DIR",
                help="Folder of pictures with captions (.txt, metadata.jsonl or file names) or .tar shards.",
            ),
        ],
        output: Annotated[
            Path,
            typer.Option(
                "--output",
                "-o",
                metavar="DIR",
                help="New checkpoint; the state of the run lies beside it, in DIR.training.",
            ),
        ],
        model: options.Model = "tiny",
        steps: Annotated[int, typer.Option(metavar="N", help="Updates of the weights.")] = 1000,
        batch: Annotated[int, typer.Option(metavar="N", help="Pictures per update.")] = 16,
        accumulate: Annotated[
            int, typer.Option(metavar="N", help="Passes per update: less memory, the same update.")
        ] = 1,
        learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of AdamW, after warm-up.")] = 1e-4,
        warmup: Annotated[int, typer.Option(metavar="N", help="Updates until the full learning rate.")] = 10,
        weighting: Annotated[
            str, typer.Option(metavar="NAME", help="Of noise levels in the loss: p2 or adaptive.")
        ] = "p2",
        ema_decay: Annotated[
            float, typer.Option(metavar="SHARE", help="Of the averaged weights; 0: none.")
        ] = 0.99,
        image_size: Annotated[
            int | None,
            typer.Option(
                metavar="PIXELS", help="Side of a square as large as all pictures.", show_default="native"
            ),
        ] = None,
        seed: Annotated[int, typer.Option(metavar="N", help="Of order, noise and dropout.")] = 0,
        checkpointing: Annotated[
            bool, typer.Option("--checkpointing", help="Recompute activations: less memory, more time.")
        ] = False,
        bf16: Annotated[
            bool | None, typer.Option("--bf16/--no-bf16", help="Autocast.", show_default="on a GPU")
        ] = None,
        cache: Annotated[
            bool, typer.Option("--cache/--no-cache", help="Keep the latents of Stage C on the disk.")
        ] = True,
        sheet_every: Annotated[
            int, typer.Option(metavar="N", help="Updates between sheets of samples; 0: none.")
        ] = 250,
        save_every: Annotated[int, typer.Option(metavar="N", help="Updates between saved states.")] = 250,
        save_dtype: Annotated[
            str, typer.Option(metavar="DTYPE", help="Of the new checkpoint: float32, bfloat16 or float16.")
        ] = "float32",
        device: options.Device = "auto",
    ) -> None:
        from cascade.training.finetune import FinetuneSettings, finetune

        settings = FinetuneSettings(
            stage=stage.value,
            data=data,
            output=output,
            model=model,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weighting=weighting,  # type: ignore[arg-type]  # checked by the settings themselves
            ema_decay=ema_decay,
            image_size=image_size,
            seed=seed,
            checkpointing=checkpointing,
            bf16=bf16,
            cache=cache,
            sheet_every=sheet_every,
            save_every=save_every,
            save_dtype=save_dtype,
            device=device,
        )
        finetune(settings)

    command.__doc__ = f"""Finetune {network} of a checkpoint on pictures with captions.

    It learns {learns}. An interrupted run goes on where it was when it is called again.

    \b
    Examples:
      cascade train {stage} --data pictures -o mine --steps 200
      cascade train {stage} --data shards --model DIR -o mine --batch 64 --accumulate 8 --checkpointing
      torchrun --nproc-per-node 8 -m cascade.training.finetune {stage} --data shards --model DIR -o mine
    """
    train.command(stage.value)(command)


_finetune_command(TrainedStage.PRIOR, "Stage C", "to draw the semantic latents of a picture from its caption")
_finetune_command(TrainedStage.DECODER, "Stage B", "to draw a picture from its semantic latents")


def evaluate(
    model: options.Model = "tiny",
    prompts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts of scenes that no training saw.")
    ] = 300,
    sheet: Annotated[Path, typer.Option(metavar="FILE", help="Contact sheet of the pictures.")] = Path(
        "sheet.png"
    ),
    card: Annotated[Path, typer.Option(metavar="FILE", help="Model card with the figures.")] = Path(
        "card.md"
    ),
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Score this task instead, or all; may be repeated. reconstruct, image-to-image, variation, "
            "inpainting, control, super-resolution, lora, lcm.",
        ),
    ] = None,
    cases: Annotated[int, typer.Option(metavar="N", min=1, help="Cases of each task.")] = 200,
) -> None:
    """Draw prompts and count what is right.

    The prompts name one or two coloured shapes; a program looks whether the pictures show them. With --tasks
    the other tasks are scored: a table of figures, their targets, and whether they are met.

    \b
    Examples:
      cascade evaluate --model tiny --prompts 300 --sheet sheet.png --card card.md
      cascade evaluate --model runs/tiny/checkpoint --prompts 50
      cascade evaluate --tasks all --cases 30
    """
    if tasks:
        _evaluate_tasks(model, tasks, cases)
        return
    picture_format(sheet)
    for file in (sheet, card):
        check_folder(file)
    from cascade import Cascade
    from cascade.checkpoints.load import EMBEDDED
    from cascade.cpu import suit_threads
    from cascade.evaluation.card import write_card
    from cascade.evaluation.evaluate import ASPECTS
    from cascade.evaluation.evaluate import evaluate as score
    from cascade.evaluation.sheet import save_sheet
    from cascade.training.times import training_time

    cascade = Cascade.from_pretrained(model)
    suit_threads(cascade)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Pictures", total=None)
        report = score(
            cascade, prompts, progress=lambda done, of: progress.update(bar, completed=done, total=of)
        )
    save_sheet(report.judged, sheet)
    write_card(report, cascade, card, training_time(EMBEDDED.get(model, Path(model))))
    for aspect, name in ASPECTS.items():
        scores = (
            f"{what} {report.score(aspect, number)}" for number, what in enumerate(("one", "two"), start=1)
        )
        typer.echo(f"{name:22}  {'  '.join(scores)}")
    typer.echo(f"{sheet}, {card}: {report.seconds_per_picture:.2f} s per picture")


def _evaluate_tasks(model: str, tasks: list[str], cases: int) -> None:
    from cascade import Cascade
    from cascade.cpu import suit_threads
    from cascade.evaluation.tasks import choose_tasks, evaluate_tasks

    names = choose_tasks(tasks)
    cascade = Cascade.from_pretrained(model)
    suit_threads(cascade)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Pictures", total=None)
        scored = evaluate_tasks(
            cascade, names, cases, progress=lambda done, of: progress.update(bar, completed=done, total=of)
        )
    for name, figures in scored.items():
        typer.echo(name if figures else f"{name}: the checkpoint has nothing for it")
        for figure in figures:
            verdict = ("met" if figure.met else "missed") if figure.target else ""
            typer.echo(f"  {figure.name:76}  {figure!s:>10}  {figure.target:15}  {verdict}".rstrip())
