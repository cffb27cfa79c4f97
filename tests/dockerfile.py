"""Carries out a Dockerfile without a container engine: its steps run on this machine, in a folder for a root.

Absolute paths of the image are moved below the folder. What belongs to the base image's system (packages,
users) is left out, and said to be.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MOVED = ("/opt/cascade", "/source", "/data")  # paths of the image that are moved below the folder
OF_THE_SYSTEM = ("apt-get", "groupadd")  # steps with one of these are left out


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction."""

    word: str
    rest: str


def read_steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, with continued lines joined and comments gone."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [Step(*line.strip().split(None, 1)) for line in whole if line.strip()]


@dataclass(slots=True)
class Rehearsal:
    """An image as it comes to be in `root`."""

    context: Path
    root: Path
    arguments: Mapping[str, str]
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": os.environ["PATH"]})
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    user: int | None = None
    left_out: list[str] = field(default_factory=list)
    _folder: Path = Path("/")

    def carry_out(self, steps: list[Step]) -> None:
        """All instructions in turn."""
        for step in steps:
            match step.word:
                case "ARG":
                    name, _, default = step.rest.partition("=")
                    self.environment.setdefault(name, self.arguments.get(name, default))
                case "ENV":
                    self.environment.update(self._pairs(step.rest))
                case "WORKDIR":
                    self._folder = Path(self._moved(step.rest))
                    self._folder.mkdir(parents=True, exist_ok=True)
                case "COPY" if not step.rest.startswith("--from"):  # both stages have one root here
                    self._copy(*step.rest.split())
                case "RUN":
                    self._run(step.rest)
                case "USER":
                    self.user = int(step.rest.partition(":")[0])
                case "HEALTHCHECK":
                    self.health = _words(step.rest[step.rest.index("CMD") + 3 :])
                case "ENTRYPOINT" | "CMD":
                    self.command += _words(step.rest)

    def _run(self, command: str) -> None:
        if any(word in command for word in OF_THE_SYSTEM):
            self.left_out.append(command)
            return
        script = self._moved(command).replace("python -m venv", f"{sys.executable} -m venv")
        subprocess.run(["/bin/sh", "-ec", script], cwd=self._folder, env=self.environment, check=True)

    def _copy(self, *names: str) -> None:
        *sources, target = names
        for source in sources:
            place = self._folder / target
            if (self.context / source).is_dir():
                shutil.copytree(self.context / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(self.context / source, place / source if target.endswith("/") else place)

    def _pairs(self, text: str) -> Iterator[tuple[str, str]]:
        for pair in text.split():
            name, _, value = pair.partition("=")
            yield name, self._moved(value.replace("${PATH}", self.environment["PATH"]))

    def _moved(self, text: str) -> str:
        return re.sub(f"(?<![\\w.])({'|'.join(MOVED)})", lambda found: f"{self.root}{found[1]}", text)


def _words(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)
