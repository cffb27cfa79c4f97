"""What the documents say is so: settings, routes, make targets, and the examples of README."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from PIL import Image
from starlette.routing import Match

from app.api import jobs
from app.api.a1111 import TextToImage
from app.api.bodies import (
    ImageGenerationBody,
    NativeImageBody,
    parse_image_edit,
    parse_image_generation,
    parse_native,
)
from app.api.layers import in_native_members
from app.api.mistakes import validated
from app.api.sources import Source
from app.cli import app as command_line
from app.main import create_app
from app.settings import ONE_DEVICE, Settings, load_settings
from cascade.training.scenes import NATIVE_SIZES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented_as_the_code_describes_it(name: str) -> None:
    field = Settings.model_fields[name]
    [row] = re.findall(rf"^\| `CASCADE_{name.upper()}` \| (.*)\| (.*) \|$", README, re.MULTILINE)
    assert (row[0].strip(), row[1]) == (shown(field.default), field.description)


def shown(default: object) -> str:
    """A default as the table of settings shows it."""
    match default:
        case None | ():
            return ""
        case bool():
            return f"`{str(default).lower()}`"
        case tuple():
            return f"`{','.join(default)}`"
        case dict():
            return ", ".join(f"`{name}` {prior}/{decoder}" for name, (prior, decoder) in default.items())
        case float():
            return f"`{default:g}`"
        case _:
            return f"`{default}`"


def test_no_documented_setting_is_unknown() -> None:
    named = set(re.findall(r"CASCADE_[A-Z0-9_]+", README)) - {ONE_DEVICE}
    assert {name.removeprefix("CASCADE_").lower() for name in named} <= Settings.model_fields.keys()


def test_every_route_is_documented(tmp_path: Path) -> None:
    server = create_app(Settings(data_dir=tmp_path))
    for path, methods in [*server.openapi()["paths"].items(), ("/docs", ["get"]), ("/openapi.json", ["get"])]:
        for method in set(methods) - {"head", "options"}:
            assert f"`{method.upper()} {path}`" in README


def test_every_member_of_a_request_is_documented() -> None:
    for name in ImageGenerationBody.model_fields | NativeImageBody.model_fields:
        assert f"`{name}`" in README


def test_every_member_named_in_the_section_on_requests_is_accepted() -> None:
    [text] = re.findall(r"a request may have (.*?)\. Members without", README, re.DOTALL)
    named = set(re.findall(r"`([a-z_]+)`", text))
    assert len(named) > 10
    assert named <= ImageGenerationBody.model_fields.keys()


@pytest.mark.parametrize(
    ("given", "options"),
    [([], ""), (["PORT=9001"], "--port 9001"), (["HOST=::1", "PORT=0"], "--host ::1 --port 0")],
)
def test_make_serve_has_the_options_given_to_make_and_leaves_the_rest_to_the_settings(
    given: list[str], options: str
) -> None:
    command = ["make", "--dry-run", "--old-file=.venv/.server-ready", "serve", *given]
    environment = {"PATH": os.environ["PATH"], "HOST": "a-shell-sets-this"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    [line] = [line for line in run.stdout.splitlines() if "cascade serve" in line]
    words = shlex.split(line)
    assert words[0] == "exec"  # else a signal for make ends a shell, and the server goes on alone
    assert words[3:] == options.split()


def test_named_make_targets_and_files_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= targets
    assert {line.split()[1] for line in shell_lines() if line.startswith("make ")} <= targets
    for name in re.findall(r"`((?:tests|cascade|app)/[\w./]+|[A-Z]+\.md)`", README):
        assert (ROOT / name).exists(), name


def test_every_command_is_documented() -> None:
    paths = list(command_paths(typer.main.get_command(command_line), "cascade"))
    assert "cascade train tiny" in paths
    assert [path for path in paths if f"`{path}`" not in README] == []


def command_paths(command: Any, path: str) -> Iterator[str]:
    """Every command that does something, as "cascade train tiny"."""
    if not hasattr(command, "commands"):
        yield path
        return
    for name, inner in command.commands.items():
        yield from command_paths(inner, f"{path} {name}")


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("cascade ")])
def test_examples_of_the_command_parse(line: str) -> None:
    parse(shlex.split(line)[1:])


def test_examples_in_the_help_parse() -> None:
    examples = [line for text in help_texts() for line in re.findall(r"^ *(cascade .+)$", text, re.MULTILINE)]
    assert len(examples) > 10
    for line in examples:
        for part in line.split("&&"):
            parse(shlex.split(part)[1:])


def help_texts() -> Iterator[str]:
    ahead = [typer.main.get_command(command_line)]
    while ahead:
        command = ahead.pop()
        yield command.help or ""
        ahead += getattr(command, "commands", {}).values()


def parse(arguments: list[str]) -> None:
    """Parse as the command would, without running it; a mistake raises."""
    command = typer.main.get_command(command_line)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("cascade", list(arguments))


def test_parsing_finds_mistakes() -> None:
    with pytest.raises(Exception, match="--setps"):
        parse(["generate", "a cat", "--setps", "3"])


def form_members(words: list[str]) -> dict[str, object]:
    """The fields of a form, as `curl -F` is given them."""
    fields = [words[i + 1].partition("=") for i, word in enumerate(words) if word == "-F"]
    return {name: Source(b"a file") if value.startswith("@") else value for name, _, value in fields}


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("curl ")])
def test_examples_of_requests_are_valid(line: str) -> None:
    words = shlex.split(line)
    members = json.loads(words[words.index("-d") + 1]) if "-d" in words else form_members(words)
    match words[2].removeprefix("localhost:8000"):
        case "/v1/images/generations":
            assert parse_image_generation(members).ignored == []
        case "/v1/images/edits":
            assert parse_image_edit(members).ignored == []
        case "/sdapi/v1/txt2img":
            validated(TextToImage, members, {})
            assert members.keys() <= TextToImage.model_fields.keys()
        case "/api/v1/images":
            parse_native(members)
        case path:
            method = "POST" if "POST" in words else "GET"
            scope = {"type": "http", "method": method, "path": path, "headers": []}
            assert Match.FULL in [route.matches(scope)[0] for route in jobs.router.routes]


def test_examples_in_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=FakeOpenAI))
    monkeypatch.setattr("huggingface_hub.InferenceClient", FakeInferenceClient)
    examples = blocks("python")
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["circle.png", "green.png", "half-guided.png", "out-7.png", "out-8.png"]


class FakeOpenAI:
    """Takes what OpenAI's client takes, and checks it as this server would."""

    def __init__(self, *, base_url: str, api_key: str) -> None:
        assert base_url.endswith("/v1")
        assert api_key
        self.images = self

    def generate(self, *, extra_body: dict[str, object], **members: object) -> SimpleNamespace:
        assert parse_image_generation(members | extra_body).ignored == []
        return SimpleNamespace(data=[SimpleNamespace(b64_json=base64.b64encode(b"a picture"))])


class FakeInferenceClient:
    """Takes what Hugging Face's client takes, and sends it nowhere."""

    def __init__(self, *, model: str) -> None:
        self.task = model.rpartition("/hf/")[2]

    def text_to_image(self, prompt: str, *, seed: int) -> Image.Image:
        assert self.task == "text-to-image"
        in_native_members({"prompt": prompt, "seed": seed}, {})
        return Image.new("RGB", (8, 8))

    def image_to_image(self, image: str, *, prompt: str, strength: float) -> Image.Image:
        assert self.task == "image-to-image"
        picture = Source(Path(image).read_bytes())
        in_native_members({"image": picture, "prompt": prompt, "strength": strength}, {})
        return Image.new("RGB", (8, 8))


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("CASCADE_")])
def test_examples_of_settings_are_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    start = words.index("cascade")
    for assignment in words[:start]:
        monkeypatch.setenv(*assignment.split("=", 1))
    parse(words[start + 1 :])
    load_settings()


def test_the_sizes_of_the_embedded_checkpoint_are_documented() -> None:
    [text] = re.findall(r"It draws at (.*?) and the same upright", README)
    named = [tuple(map(int, size)) for size in re.findall(r"(\d+)x(\d+)", text)]
    assert [*named, *((height, width) for width, height in named[1:])] == list(NATIVE_SIZES)


def test_the_map_shows_what_is_there() -> None:
    """What the map names under a package is there, and what stands in a package directly is named."""
    [tree] = re.findall(r"^## The map\n+```\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    parts = dict(re.findall(r"^(app|cascade)/(.*?)(?=^\S|\Z)", tree, re.MULTILINE | re.DOTALL))
    assert list(parts) == ["app", "cascade"]
    for package, text in parts.items():
        folder = ROOT / package
        named = set(re.findall(r"\b\w+\.py\b", text))
        assert named <= {path.name for path in folder.rglob("*.py")}, package
        folders = {path.name for path in folder.iterdir() if path.is_dir()} - {"__pycache__"}
        assert folders == set(re.findall(r"^  (\w+)/", text, re.MULTILINE)), package
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert {name for name in modules if not name.startswith("cli_")} <= named, package
