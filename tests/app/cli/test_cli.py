import subprocess
import sys
from importlib.metadata import version

import pytest

import cascade
from app import cli
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
    ("arguments", "words"),
    [
        (("generate",), "prompt"),
        (("generate", "a cat", "--steps", "many"), "--steps"),
        (("generate", "a cat", "--setps", "3"), "--setps"),
        (("draw", "a cat"), "draw"),
    ],
)
def test_a_mistyped_command_line_names_the_mistake(run: Run, arguments: tuple[str, ...], words: str) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_errors_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_settings: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cascade.Cascade, "from_pretrained", broken)
    monkeypatch.setattr(sys, "argv", ["cascade", "generate", "a cat"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()
