"""Spans: of requests and the phases of their jobs, without a word of a prompt."""

import sys
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest

from app.api.tracing import Tracing, make_tracing
from app.errors import SettingsError
from tests.app.conftest import Serve

pytestmark = pytest.mark.anyio


async def test_a_request_and_the_phases_of_its_job_are_spans(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    memory = export.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr("app.main.make_tracing", lambda endpoint: Tracing(provider))
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with serve() as client:
        await client.post(
            "/api/v1/images",
            json={"prompt": "a very private prompt"},
            headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"},
        )
    spans = {span.name: span for span in memory.get_finished_spans()}
    request = spans["POST /api/v1/images"]
    assert f"{request.context.trace_id:032x}" == trace
    phases = [spans[f"job {phase}"] for phase in ("queued", "prior", "decoder", "encode")]
    for before, after in pairwise(phases):
        assert before.parent.span_id == request.context.span_id
        assert before.end_time == after.start_time
    assert "private" not in str([span.to_json() for span in spans.values()])


async def test_without_an_endpoint_there_are_none(client: httpx2.AsyncClient) -> None:
    assert make_tracing(None) == Tracing()
    assert Tracing().config["tracing"] is False
    assert (await client.post("/api/v1/images", json={"prompt": "x"})).status_code == 200


def test_without_the_extra_the_setting_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match="tracing"):
        make_tracing("http://127.0.0.1:4318/v1/traces")


def test_spans_are_sent_to_the_endpoint(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    tracing = make_tracing("http://127.0.0.1:9/v1/traces")
    assert tracing.config["tracer_provider"] is tracing.provider
    tracing.close()
