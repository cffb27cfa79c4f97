import subprocess
import sys
from importlib.metadata import version

import pytest

import cascade
from app import cli
from app.cli_errors import problems
from cascade.errors import FlawedResult
from tests.app.cli.running import Run


def test_help_teaches_by_examples(run: Run) -> None:
    for command in ("generate", "serve", "inspect", "convert", "download", "evaluate"):
        outcome = run(command, "--help")
        assert outcome.status == 0
        assert f"cascade {command}" in outcome.out.split("Examples:")[1].split("Options")[0]
    assert "cascade train tiny" in run("train", "tiny", "--help").out.split("Examples:")[1]


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; import app.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "numpy", "fastapi", "pydantic", "PIL", "huggingface_hub"]
    seen = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


def test_version(run: Run) -> None:
    assert run("--version").out == f"cascade {version('stable-cascade-server')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate", "prompt: is missing (see cascade generate --help)"),
        (
            "generate cat --steps many",
            "--steps: must be a whole number, but is 'many' (see cascade generate ",
        ),
        ("generate cat --guidance-scale x", "--guidance-scale: must be a number, but is 'x' (see "),
        ("generate cat --quality 0", "--quality: must be at least 1, but is 0 (see "),
        ("generate cat --quality 101", "--quality: must be at most 100, but is 101 (see "),
        ("generate cat --setps 3", "--setps: no such option; did you mean --steps? (see "),
        ("generate cat --xyz", "--xyz: no such option (see "),
        ("generate cat --steps", "--steps: requires an argument (see cascade generate --help)"),
        ("generate cat --offline=1", "--offline: does not take a value (see "),
        ("generate a cat", "unexpected extra argument(s) (cat); a text of several words needs quotes (see "),
        ("convert tiny new", "--layout: is missing; allowed are original, diffusers (see cascade convert "),
        ("convert tiny new --layout x", "--layout: 'x' is not one of 'original', 'diffusers' (see "),
        ("train tiny -c d", "--component: 'd' is not one of 'text', "),
        ("draw cat", "no such command 'draw'; known are generate, serve, "),
        ("generat cat", "no such command 'generat'; did you mean 'generate'? (see cascade --help)"),
        ("train tony", "no such command 'tony'; did you mean 'tiny'? (see cascade train --help)"),
    ],
)
def test_a_mistyped_command_line_is_one_line_that_names_the_mistake(
    run: Run, arguments: str, message: str
) -> None:
    outcome = run(*arguments.split())
    assert outcome.status == 2
    [line] = outcome.err.splitlines()
    assert line.startswith(f"cascade: {message}")
    assert line.endswith("--help)")


@pytest.mark.parametrize("arguments", [(), ("train",)])
def test_without_a_command_there_is_help(run: Run, arguments: tuple[str, ...]) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("Usage: cascade")
    assert "cascade: " not in outcome.err


def test_a_result_that_is_no_picture_is_told_in_a_line() -> None:
    told = problems(FlawedResult("the latents of Stage C are not finite"), {})
    assert told == ["the latents of Stage C are not finite; another seed may do better"]


def test_errors_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_settings: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cascade.Cascade, "from_pretrained", broken)
    monkeypatch.setattr(sys, "argv", ["cascade", "generate", "a cat"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()
