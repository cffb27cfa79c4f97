"""What ships the server agrees with the server: settings, metrics, routes, exit statuses, time to drain."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from prometheus_client import CollectorRegistry

from app.metrics import Metrics
from app.settings import Settings, load_settings
from tests.dockerfile import Rehearsal, read_steps
from tests.server_process import free_port

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
UNIT = (ROOT / "deploy/systemd/cascade.service").read_text()
DEPLOYMENT = (ROOT / "deploy/kubernetes/base/deployment.yaml").read_text()
CONFIGURED = [ROOT / "Dockerfile", ROOT / "docker-compose.yml", *sorted((ROOT / "deploy").rglob("*.*"))]


def found(pattern: str, text: str) -> str:
    [match] = re.findall(pattern, text, re.MULTILINE)
    return str(match)


@pytest.mark.parametrize("path", CONFIGURED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_is_named_exists(path: Path) -> None:
    named = {name.lower() for name in re.findall(r"CASCADE_([A-Z0-9_]+[A-Z0-9])", path.read_text())}
    assert named <= Settings.model_fields.keys()


def known_figures(registry: CollectorRegistry) -> set[str]:
    """Names of all time series of the server, whether they have values already or not."""
    names = set()
    for family in registry.collect():
        for suffix in ("", "_total", "_sum", "_count", "_bucket"):
            names.add(f"{family.name}{suffix}")
    return names


@pytest.mark.parametrize(
    "path",
    ["deploy/prometheus/cascade.rules.yml", "deploy/grafana/dashboards/cascade.json"],
)
def test_every_figure_that_is_watched_exists(path: str) -> None:
    text = (ROOT / path).read_text()
    figures = set(re.findall(r"\bcascade_[a-z0-9_]+|\bprocess_[a-z_]+", text))
    assert len(figures) > 5
    assert figures <= known_figures(Metrics().registry)


def test_the_dashboard_uses_rules_that_exist() -> None:
    rules = set(re.findall(r"record: (\S+)", (ROOT / "deploy/prometheus/cascade.rules.yml").read_text()))
    dashboard = (ROOT / "deploy/grafana/dashboards/cascade.json").read_text()
    assert set(re.findall(r"\bcascade:[a-z0-9_:]+", dashboard)) <= rules
    panels = json.loads(dashboard)["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_everybody_waits_longer_than_the_server_drains() -> None:
    grace = Settings().grace_seconds
    assert int(found(r"stop_grace_period: (\d+)s", COMPOSE)) > grace
    assert int(found(r"^TimeoutStopSec=(\d+)$", UNIT)) > grace
    in_pods = int(
        found(
            r"CASCADE_GRACE_SECONDS=(\d+)", (ROOT / "deploy/kubernetes/base/kustomization.yaml").read_text()
        )
    )
    pause = int(found(r"seconds: (\d+) # until", DEPLOYMENT))
    assert int(found(r"terminationGracePeriodSeconds: (\d+)", DEPLOYMENT)) > pause + in_pods


def test_nobody_runs_as_root_and_all_agree_on_the_user() -> None:
    user = found(r"^USER (\d+):\d+$", DOCKERFILE)
    assert int(user) > 0
    assert found(r"runAsUser: (\d+)", DEPLOYMENT) == found(r"fsGroup: (\d+)", DEPLOYMENT) == user
    assert "readOnlyRootFilesystem: true" in DEPLOYMENT
    assert "read_only: true" in COMPOSE


def test_probes_ask_what_they_are_meant_to() -> None:
    probes = dict(re.findall(r"(\w+)Probe:\n +httpGet:\n +path: (\S+)", DEPLOYMENT))
    assert probes == {"startup": "/healthz", "readiness": "/readyz", "liveness": "/healthz"}


def test_make_check_includes_the_deployment() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "deployment" in found(r"^check: (.*?)  ##", makefile).split()
    assert ".ci/check-deployment" in makefile


@pytest.mark.slow
def test_the_steps_of_the_image_make_a_server_that_writes_to_its_data_only(tmp_path: Path) -> None:
    """In an empty folder, from the Dockerfile itself; users and packages of the base system are left out."""
    image = Rehearsal(ROOT, tmp_path, {"ACCELERATOR": "cpu", "TORCH_CPU_INDEX": ""})
    image.carry_out(read_steps(DOCKERFILE))
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)  # WORKDIR has made it
    built = contents(tmp_path, data)
    port = free_port()
    environment = {**image.environment, "CASCADE_PORT": str(port), "CASCADE_API_KEYS": "secret"}

    def health(*options: str) -> int:
        return subprocess.run([*image.health, *options], cwd=data, env=environment, check=False).returncode

    server = subprocess.Popen(image.command, cwd=data, env=environment, start_new_session=True)
    try:
        until(lambda: health("--ready") == 0)
        answer = httpx2.post(
            f"http://127.0.0.1:{port}/v1/images/generations",
            headers={"Authorization": "Bearer secret", "Accept": "image/png"},
            json={"prompt": "a red circle on a blue background"},
            timeout=60,
        )
        assert answer.content.startswith(b"\x89PNG")
        assert health() == 0
    finally:
        server.terminate()
        status = server.wait(60)
    assert status == 0
    assert health() == 1
    assert (data / "jobs.db").exists()
    assert contents(tmp_path, data) == built


def contents(root: Path, data: Path) -> dict[Path, int]:
    """Every file below `root` but not in `data`, and when it was changed."""
    paths = (path for path in root.rglob("*") if path.is_file() and data not in path.parents)
    return {path: path.stat().st_mtime_ns for path in paths}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_composes_settings_are_valid_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    given = re.findall(r"^ {4}(CASCADE_\w+): (\$\{CASCADE_\w+:-(.*?)\}|\S+)", COMPOSE, re.MULTILINE)
    assert len(given) >= 5
    for name, whole, default in given:
        monkeypatch.setenv(name, default if whole.startswith("$") else whole)
    settings = load_settings()
    assert (settings.public_base_url, settings.api_keys, settings.model) == (None, (), "tiny")
