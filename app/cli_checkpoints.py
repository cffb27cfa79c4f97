"""`cascade inspect`, `convert` and `download`: checkpoints as files."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app import cli_options as options

if TYPE_CHECKING:
    from cascade.checkpoints.inspect import InspectedComponent, Inspection

WIDTH_OF_FILES = 200  # columns of a table written to a file or a pipe, so that nothing is cut off


class Layout(StrEnum):
    """Layout of a checkpoint on disk."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


def inspect(
    path: Annotated[str, typer.Argument(help="tiny, a folder or a file.", show_default=False)],
) -> None:
    """Show what a checkpoint holds and what is missing.

    Only the headers of the files are read.

    \b
    Examples:
      cascade inspect tiny
      cascade inspect models/stable-cascade
      cascade inspect stage_c_lite_bf16.safetensors
    """
    from cascade.checkpoints.inspect import inspect as look
    from cascade.errors import CheckpointError

    inspection = look(path)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    if inspection.components:
        console.print(_table(inspection))
    for line in _remarks(inspection):
        console.print(Text(line), soft_wrap=True)
    if not inspection.components:
        raise CheckpointError(f"{path}: holds no component of Stable Cascade")


def _table(inspection: "Inspection") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("component", "variant", "layout", "dtype"):
        table.add_column(name)
    table.add_column("parameters", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("files", overflow="fold")
    for component in inspection.components:
        table.add_row(
            str(component.component),
            component.variant,
            str(component.layout),
            ", ".join(component.dtypes),
            f"{component.parameters:,}",
            f"{component.num_bytes / 1e6:,.1f}",
            _files(inspection, component),
        )
    return table


def _files(inspection: "Inspection", component: "InspectedComponent") -> str:
    place = inspection.path if inspection.path.is_dir() else inspection.path.parent
    files = component.files
    is_below = files[0].is_relative_to(place)
    first = str(files[0].relative_to(place)) if is_below else str(files[0])
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"


def _remarks(inspection: "Inspection") -> list[str]:
    """Return what the table does not show: LoRAs, and everything that prevents drawing."""
    remarks = [f"LoRAs: {', '.join(inspection.loras)}"] if inspection.loras else []
    remarks += [f"problem: {component.problem}" for component in inspection.components if component.problem]
    remarks += [f"unknown: {path}" for path in inspection.unknown]
    remarks += [
        f"refused: {path} may run code when loaded; only safetensors are read" for path in inspection.refused
    ]
    if inspection.missing and inspection.components:
        remarks.append(f"missing: {', '.join(inspection.missing)}")
    elif inspection.is_complete and inspection.path.is_dir():
        remarks.append("complete: pictures can be made from it")
    return remarks


def convert(
    source: Annotated[
        Path, typer.Argument(help="tiny, or a file or folder in any layout.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(help="New file or folder.", show_default=False)],
    layout: Annotated[Layout, typer.Option(help="Layout to write.", show_default=False)],
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="auto keeps what is stored; float32, bfloat16, float16."),
    ] = "auto",
) -> None:
    """Write a checkpoint in another layout.

    Original: one file for each network. Diffusers: one folder for each, with a config.json.

    \b
    Examples:
      cascade convert models/stable-cascade stable-cascade-original --layout original
      cascade convert stage_c_lite.safetensors prior --layout diffusers --dtype bfloat16
    """
    from cascade.checkpoints.convert import convert as write

    written = write(source, target, layout=layout.value, dtype=dtype)
    files = [written] if written.is_file() else sorted(path for path in written.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        typer.echo(f"{path}  {_megabytes(size)}")
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    typer.echo(f"wrote {count} to {written}, {_megabytes(sum(sizes))}", err=True)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 50_000 else f"{num_bytes:,} bytes"


def download(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.", show_default=False)],
    revision: options.Revision = None,
    variant: options.Variant = None,
    controlnets: Annotated[
        bool,
        typer.Option("--controlnets", help="Also the ControlNets, which are for the full Stage C; 1.3 GB."),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="For private repositories.", show_default="HF_TOKEN, or the login's"
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the files are kept.", show_default="the hub's cache"),
    ] = None,
) -> None:
    """Fetch a checkpoint from the hub and pin its revision.

    An interrupted download goes on where it stopped. The official weights have a non-commercial licence of
    their own, which is shown before they are fetched.

    \b
    Examples:
      cascade download stabilityai/stable-cascade
      cascade download stabilityai/stable-cascade --controlnets
      cascade download stabilityai/stable-cascade --variant lite
      cascade generate "a castle at dusk" --model stabilityai/stable-cascade --offline
    """
    from cascade.checkpoints.hub import download as fetch

    def notify(message: str) -> None:
        typer.echo(message, err=True)

    folders = fetch(
        repository,
        revision=revision,
        variant=variant,
        controlnets=controlnets,
        token=token,
        cache=cache,
        notify=notify,
    )
    for folder in folders:
        typer.echo(str(folder))
