"""The command, run in this process, and a checkpoint of random weights for it."""

import sys
from pathlib import Path

import pytest

from app import cli
from tests.app.cli.running import Outcome, Run
from tests.cascade.diffusers_pipelines import random_pipelines


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("generate", "a cat", ...)` as a shell would run it."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cascade", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_pipelines(0).save(folder)
    return folder
