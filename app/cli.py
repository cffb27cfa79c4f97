"""The `cascade` command. Each command imports what it needs when it runs, so that help is instant.

Errors that a user can cause end here as lines on stderr and exit status 2, never as a traceback.
"""

import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from app import (
    cli_checkpoints,
    cli_evaluate,
    cli_generate,
    cli_health,
    cli_keys,
    cli_latents,
    cli_serve,
    cli_training,
)
from app.cli_errors import problems, usage_problem

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended, by convention of shells
RESUMABLE = (["train"], ["download"])

app = typer.Typer(
    name="cascade",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's frames cut off long option names on a usual terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(cli_generate.generate)
app.command("serve")(cli_serve.serve)
app.command("health")(cli_health.health)
app.add_typer(cli_keys.keys, name="keys")
app.command("encode")(cli_latents.encode)
app.command("decode")(cli_latents.decode)
app.command("reconstruct")(cli_latents.reconstruct)
app.command("inspect")(cli_checkpoints.inspect)
app.command("convert")(cli_checkpoints.convert)
app.command("download")(cli_checkpoints.download)
app.add_typer(cli_training.train, name="train")
app.command("evaluate")(cli_evaluate.evaluate)


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
    """Run the command and exit; mistakes that the user can fix become one line each."""
    words, options = _command(sys.argv[1:])
    try:
        status = app(prog_name="cascade", standalone_mode=False)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            _complain([error.message], prefix="")
        _complain([f"{usage_problem(error)} (see {words} --help)"])
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        lines = problems(error, options)
        if lines is None:
            raise
        _complain(lines)
    if status == INTERRUPTED:
        goes_on = "; run it again to go on" if words.split()[1:2] in RESUMABLE else ""
        _complain([f"interrupted{goes_on}"], status=INTERRUPTED)
    sys.exit(status)


def _complain(lines: list[str], *, prefix: str = "cascade: ", status: int = 2) -> NoReturn:
    for line in lines:
        typer.echo(f"{prefix}{line}", err=True)
    sys.exit(status)


def _command(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """Return the command that was called, such as "cascade train tiny", and its option of each setting."""
    command, words = typer.main.get_command(app), ["cascade"]
    for argument in arguments:
        inner = getattr(command, "commands", {}).get(argument)
        if inner is None:
            break
        command = inner
        words.append(argument)
    names = {str(parameter.name): max(parameter.opts, key=len) for parameter in command.params}
    return " ".join(words), names


if __name__ == "__main__":
    main()
