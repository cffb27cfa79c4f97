"""`cascade evaluate`: how many pictures of a checkpoint are right, and its scores on every task."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from app import cli_options as options
from app.cli_pictures import check_folder, check_output

if TYPE_CHECKING:
    from cascade import Cascade


def evaluate(
    model: options.Model = "tiny",
    prompts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts of scenes that no training saw.")
    ] = 300,
    free: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=370, help="Prompts in free wordings: the first N of 370."),
    ] = 370,
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

    The prompts name one or two coloured shapes; a program looks whether the pictures show them. Some have the
    wordings of the training, others are in free wordings. With --tasks
    the other tasks are scored: a table of figures, their targets, and whether they are met.

    \b
    Examples:
      cascade evaluate --model tiny --prompts 300 --sheet sheet.png --card card.md
      cascade evaluate --model runs/tiny/checkpoint --prompts 50
      cascade evaluate --tasks all --cases 30
    """
    if tasks:
        _evaluate_tasks(model, tasks, cases)
    else:
        _evaluate_prompts(model, prompts, free, sheet, card)


def _evaluate_prompts(model: str, prompts: int, free: int, sheet: Path, card: Path) -> None:
    check_output(sheet)
    check_folder(card)
    from cascade.checkpoints.load import EMBEDDED
    from cascade.evaluation.card import write_card
    from cascade.evaluation.evaluate import ASPECTS
    from cascade.evaluation.evaluate import evaluate as score
    from cascade.evaluation.sheet import save_sheet
    from cascade.training.times import training_time

    cascade = _load(model)
    with _bar() as progress:
        report = score(cascade, prompts, num_free=free, progress=progress)
    save_sheet((*report.judged[:50], *report.free[:50]), sheet)
    write_card(report, cascade, card, training_time(EMBEDDED.get(model, Path(model))))
    for title, is_free in (("held-out prompts", False), ("free prompts", True)):
        if is_free and not report.free:
            continue
        typer.echo(title)
        for aspect, name in ASPECTS.items():
            one, two = (report.score(aspect, number, free=is_free) for number in (1, 2))
            typer.echo(f"  {name:20}  one {one}  two {two}")
    typer.echo(f"{sheet}, {card}: {report.seconds_per_picture:.2f} s per picture")


def _evaluate_tasks(model: str, tasks: list[str], cases: int) -> None:
    from cascade.evaluation.tasks import choose_tasks, evaluate_tasks

    names = choose_tasks(tasks)
    cascade = _load(model)
    with _bar() as progress:
        scored = evaluate_tasks(cascade, names, cases, progress=progress)
    for name, figures in scored.items():
        typer.echo(name if figures else f"{name}: the checkpoint has nothing for it")
        for figure in figures:
            verdict = ("met" if figure.met else "missed") if figure.target else ""
            typer.echo(f"  {figure.name:76}  {figure!s:>10}  {figure.target:15}  {verdict}".rstrip())


def _load(model: str) -> "Cascade":
    from cascade import Cascade
    from cascade.cpu import suit_threads

    cascade = Cascade.from_pretrained(model)
    suit_threads(cascade)
    return cascade


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for how many pictures of how many are drawn; a bar shows it on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Pictures", total=None)
        yield lambda done, of: progress.update(bar, completed=done, total=of)
