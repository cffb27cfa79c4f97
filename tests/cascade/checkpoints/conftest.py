"""Small random pipelines as diffusers writes them, saved once for all tests of checkpoints."""

import shutil
from pathlib import Path

import pytest

from tests.cascade.diffusers_pipelines import Pipelines, random_pipelines


@pytest.fixture(scope="session")
def pipelines() -> Pipelines:
    return random_pipelines(seed=5)


@pytest.fixture(scope="session")
def saved_folder(pipelines: Pipelines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both pipelines in one folder; tests only read it."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipelines.save(folder)
    return folder


@pytest.fixture
def folder(saved_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved_folder, tmp_path / "pipeline"))
