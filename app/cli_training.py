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


def _pack(run: Path, destination: Path) -> None:
    from cascade.training.pack import num_bytes, pack

    pack(run, destination)
    typer.echo(f"{destination}: {num_bytes(destination) / 1e6:.1f} MB")


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
) -> None:
    """Draw prompts and count what is right.

    The prompts name one or two coloured shapes; a program looks whether the pictures show them.

    \b
    Examples:
      cascade evaluate --model tiny --prompts 300 --sheet sheet.png --card card.md
      cascade evaluate --model runs/tiny/checkpoint --prompts 50
    """
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
