"""The `cascade` command. Each command imports what it needs when it runs, so that help is instant.

Everything that a user can cause ends here as one line on stderr and exit status 2, never as a traceback.
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from app import cli_checkpoints, cli_generate, cli_health, cli_serve, cli_training

app = typer.Typer(
    name="cascade",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its frames cut the names of long options on a usual terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(cli_generate.generate)
app.command("serve")(cli_serve.serve)
app.command("health")(cli_health.health)
app.command("inspect")(cli_checkpoints.inspect)
app.command("convert")(cli_checkpoints.convert)
app.command("download")(cli_checkpoints.download)
app.add_typer(cli_training.train, name="train")
app.command("evaluate")(cli_training.evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cascade {version('stable-cascade-server')}")
        raise typer.Exit


@app.callback()
def describe(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Stable Cascade: from prompt to picture, on the command line and over HTTP.

    \b
    Examples:
      cascade generate "a red circle on a blue background" -o circle.png
      cascade serve
      cascade inspect tiny
    """


def main() -> None:
    """Run the command; the errors that a user can mend become one line."""
    try:
        app()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = _in_one_line(error)
        if message is None:
            raise
        typer.echo(f"cascade: {message}", err=True)
        sys.exit(2)


def _in_one_line(error: Exception) -> str | None:
    """What to tell the user, or None for an error that is ours and needs its traceback."""
    from app.settings import SettingsError
    from cascade.errors import CheckpointError, InvalidSetting

    if isinstance(error, InvalidSetting | CheckpointError | SettingsError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, on any device
        return "out of memory: ask for fewer or smaller pictures, or use --dtype bfloat16"
    return None


if __name__ == "__main__":
    main()
