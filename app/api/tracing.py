"""Optional OpenTelemetry: FastAPI makes a span for each request, and this module adds its job's phases.

The packages that export spans come with the extra `tracing`. Spans hold ids and figures, never prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi.telemetry import TelemetryConfig

from app.errors import SettingsError
from app.jobs.job import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Tracing:
    """Exports spans through a provider; without one it does nothing."""

    provider: "TracerProvider | None" = None

    @property
    def config(self) -> TelemetryConfig:
        """FastAPI's telemetry settings: request spans only, since metrics and logs are the server's own."""
        config = TelemetryConfig(
            tracing=self.provider is not None,
            metrics=False,
            logs=False,
            operation_spans=False,
            auto_configure=False,
        )
        if self.provider is not None:
            config["tracer_provider"] = self.provider
        return config

    def ended(self, job: Job) -> None:
        """Add the phases of a job to the span of the request that waited for it."""
        if self.provider is None:
            return
        tracer = self.provider.get_tracer("cascade")
        for phase, start, end in _phases(job):
            span = tracer.start_span(
                f"job {phase}",
                start_time=int(start * NANOSECONDS),
                attributes={"cascade.job": job.id, "cascade.images": job.num_images},
            )
            span.end(int(end * NANOSECONDS))

    def close(self) -> None:
        """Export the remaining spans and shut the provider down."""
        if self.provider is not None:
            self.provider.shutdown()


def _phases(job: Job) -> Iterator[tuple[str, float, float]]:
    """Yield the name, start and end of each phase of a job, in order."""
    start = job.created_at
    for phase in ("queued", "prior", "decoder", "encode"):
        end = start + getattr(job.timings, phase)
        yield phase, start, end
        start = end


def make_tracing(endpoint: str | None) -> Tracing:
    """Make tracing that sends to `endpoint`, in batches by a thread. Raises SettingsError if unavailable."""
    if endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"CASCADE_TRACE_ENDPOINT needs the extra: pip install 'stable-cascade-server[tracing]' ({error})"
        ) from None
    name = "stable-cascade-server"
    provider = TracerProvider(
        resource=Resource({"service.name": name, "service.version": version(name)}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)
