"""Error messages of the command line: one line for each mistake, which names the option."""

import difflib
from collections.abc import Mapping
from typing import Any

import typer

# Pydantic's type of a mistake -> what the value must be. Braces hold the bound that was exceeded.
_EXPECTED = {
    "int_parsing": "must be a whole number, but is {input!r}",
    "float_parsing": "must be a number, but is {input!r}",
    "greater_than_equal": "must be at least {ge}, but is {input}",
    "less_than_equal": "must be at most {le}, but is {input}",
}


def usage_problem(error: typer.TyperException) -> str:
    """Return what is wrong with a command line that could not be parsed."""
    if isinstance(error, typer.BadParameter):
        return _wrong_value(error)
    name = getattr(error, "option_name", None)
    if name is not None:
        return f"{name}: {_wrong_option(name, error)}"
    context: Any = getattr(error, "ctx", None)
    commands = getattr(context and context.command, "commands", None)
    if not commands:
        return f"{_lowered(error).removeprefix('got ')}; a text of several words needs quotes"
    named = _lowered(error).replace(". Did", "; did")
    return named if named.endswith("?") else f"{named}; known are {', '.join(commands)}"


def problems(error: Exception, options: Mapping[str, str]) -> list[str] | None:
    """Return the lines to show the user, or None for a bug of ours, which needs its traceback.

    Args:
        options: the command's option of each setting, as "decoder_steps": "--decoder-steps".
    """
    from app.errors import SettingsError
    from cascade.errors import CheckpointError, FlawedResult, InvalidSetting

    if isinstance(error, InvalidSetting):
        return [f"{options.get(error.field, error.field)}: {error.message}"]
    if isinstance(error, CheckpointError | SettingsError):
        return str(error).splitlines()
    if isinstance(error, FlawedResult):
        return [f"{error}; another seed may do better"]
    if isinstance(error, OSError):
        return [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, on any device
        return ["out of memory: ask for fewer or smaller pictures, or use --dtype bfloat16"]
    return None


def _wrong_value(error: typer.BadParameter) -> str:
    name = max(error.param.opts, key=len) if error.param else "the command line"
    if not error.message:
        _, _, choices = error.format_message().partition("Choose from:")
        return f"{name}: is missing" + (f"; allowed are {' '.join(choices.split())}" if choices else "")
    found = getattr(error.__cause__, "errors", None)  # from pydantic, which checks the values
    if found is None:
        return f"{name}: {error.message}"
    problem = found()[0]
    message = _EXPECTED.get(problem["type"])
    if message is None:
        return f"{name}: {problem['msg'].removeprefix('Value error, ').rstrip('.')}"
    return f"{name}: {message.format(input=problem['input'], **problem.get('ctx', {}))}"


def _wrong_option(name: str, error: typer.TyperException) -> str:
    if not hasattr(error, "possibilities"):  # the option exists: "Option '--steps' requires an argument."
        return error.message.removeprefix(f"Option {name!r} ").rstrip(".")
    nearest = difflib.get_close_matches(name, error.possibilities or (), n=1)
    return f"no such option; did you mean {nearest[0]}?" if nearest else "no such option"


def _lowered(error: typer.TyperException) -> str:
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:]
