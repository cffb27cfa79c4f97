"""What ships the server agrees with the server: settings, metrics, routes, exit statuses, time to drain."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from prometheus_client import CollectorRegistry

from app.metrics import Metrics
from app.settings import Settings
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
    named = {name.lower() for name in re.findall(r"CASCADE_([A-Z_]+[A-Z])", path.read_text())}
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
    figures = set(re.findall(r"\bcascade_[a-z_]+|\bprocess_[a-z_]+", text))
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
def test_the_steps_of_the_image_make_a_server_that_runs_as_its_user(tmp_path: Path) -> None:
    """In an empty folder, from the Dockerfile itself; users and packages of the base system are left out."""
    image = Rehearsal(ROOT, tmp_path, {"ACCELERATOR": "cpu", "TORCH_CPU_INDEX": ""})
    image.carry_out(read_steps(DOCKERFILE))
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    assert image.user is not None
    is_root = os.getuid() == 0
    if is_root:
        tmp_path.chmod(0o755)
        for folder in tmp_path.parents[:3]:
            folder.chmod(folder.stat().st_mode | 0o011)
        shutil.chown(data, image.user)
    port = free_port()
    settings = {"CASCADE_PORT": str(port), "CASCADE_API_KEYS": "secret", "TMPDIR": str(data)}
    environment = {**image.environment, **settings}
    user = image.user if is_root else None
    server = subprocess.Popen(image.command, cwd=data, env=environment, user=user, start_new_session=True)
    try:
        until(
            lambda: subprocess.run([*image.health, "--ready"], env=environment, check=False).returncode == 0
        )
        answer = httpx2.post(
            f"http://127.0.0.1:{port}/v1/images/generations",
            headers={"Authorization": "Bearer secret", "Accept": "image/png"},
            json={"prompt": "a red circle on a blue background"},
            timeout=60,
        )
        assert answer.content.startswith(b"\x89PNG")
        assert subprocess.run(image.health, env=environment, check=False).returncode == 0
    finally:
        server.terminate()
        assert server.wait(40) == 0
    assert subprocess.run(image.health, env=environment, check=False).returncode == 1
    changed = [path for path in (tmp_path / "opt").rglob("*") if path.stat().st_uid == image.user]
    assert changed == []


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
