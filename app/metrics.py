"""Metrics for Prometheus. Labels come from small closed sets: never a prompt, an id or a path as sent.

Most events are recorded by a method named after them; all names and labels are defined here.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)

WebhookOutcome = Literal["delivered", "failed", "gone", "given_up"]

MAX_SHAPES = 24  # further ones, which only odd sizes cause, share the label "other"

# Why a job did not succeed; a code that is not listed counts as "other".
REASONS = frozenset(
    {
        "out_of_memory",
        "generation_failed",
        "internal_error",
        "insufficient_storage",
        "invalid_value",
        "overloaded",
        "timeout",
    }
)
# Events that engines report with every heartbeat.
EVENTS = frozenset({"halvings", "bisections", "fp32_retries", "memory_waits", "cache_hits", "cache_misses"})
# Why an engine process was replaced.
RESTARTS = frozenset({"exit", "hang", "device_lost"})


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._shapes: set[str] = set()
        ProcessCollector(registry=self.registry)
        self._describe_http()
        self._describe_jobs()
        self._describe_engines()

    def _describe_http(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "cascade_http_requests", "Requests answered", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "cascade_http_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.streams = Gauge("cascade_http_streams", "Event streams that are open", registry=registry)

        self.watch("tasks", "Tasks of the server's event loop", _num_tasks)

    def _describe_jobs(self) -> None:
        registry = self.registry
        self.queue_jobs = Gauge("cascade_queue_jobs", "Jobs waiting", registry=registry)
        self.running_jobs = Gauge("cascade_running_jobs", "Jobs in the hands of engines", registry=registry)
        self.queue_age_seconds = Gauge(
            "cascade_queue_age_seconds", "Age of the job that waits longest", registry=registry
        )
        self.queue_cost_seconds = Gauge(
            "cascade_queue_cost_seconds", "Predicted device time of the jobs that wait", registry=registry
        )
        self.jobs = Counter("cascade_jobs", "Jobs ended", ["outcome", "reason"], registry=registry)
        self.refused = Counter("cascade_jobs_refused", "Jobs not accepted", ["code"], registry=registry)
        self.out_of_room = Gauge(
            "cascade_out_of_room", "1 while there is no room to keep more jobs", registry=registry
        )
        self.certificate_expiry = Gauge(
            "cascade_c2pa_certificate_expiry_timestamp_seconds",
            "When the certificate that signs pictures expires; 0 without one",
            registry=registry,
        )
        self.webhooks = Counter(
            "cascade_webhook_attempts", "Attempts to call webhooks", ["outcome"], registry=registry
        )
        for outcome in get_args(WebhookOutcome):  # starts at zero, or an alert would miss the first one
            self.webhooks.labels(outcome)
        self.pictures = Counter("cascade_pictures", "Pictures made", registry=registry)
        self.phase_seconds = Histogram(
            "cascade_job_phase_seconds",
            "Time of a job in the queue, in Stage C, in Stage B, in Stage A and encoding, and in all",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self.replays = Counter(
            "cascade_jobs_replayed", "Jobs begun again after a crash", ["begun_at"], registry=registry
        )
        self.eta_error = Histogram(
            "cascade_eta_error_ratio",
            "How far the time predicted when a job was accepted was from the time it took, as a share of it",
            buckets=ERRORS,
            registry=registry,
        )
        self.cost_error = Gauge(
            "cascade_cost_error_ratio", "Mean error of predicted device time, as a share", registry=registry
        )

    def _describe_engines(self) -> None:
        registry, device = self.registry, ["device"]
        self.model_loaded = Gauge(
            "cascade_model_loaded", "1 when an engine has the model loaded", registry=registry
        )
        self.engine_up = Gauge("cascade_engine_up", "1 when it works", device, registry=registry)
        self.engine_samples = Gauge("cascade_engine_samples", "Pictures in work", device, registry=registry)
        self.engine_memory_bytes = Gauge(
            "cascade_engine_memory_bytes", "Memory of the process", device, registry=registry
        )
        self.device_memory_bytes = Gauge(
            "cascade_device_memory_bytes", "Memory taken of the device", device, registry=registry
        )
        self.restarts = Counter(
            "cascade_engine_restarts", "Engine processes replaced", ["device", "reason"], registry=registry
        )
        self.engine_events = Counter(
            "cascade_engine_events", "What engines did beside plain steps", ["event"], registry=registry
        )
        self.steps = Counter("cascade_steps", "Denoising steps of pictures", ["stage"], registry=registry)
        self.step_seconds = Histogram(
            "cascade_step_seconds", "Time of a tick", ["stage"], buckets=STEP_SECONDS, registry=registry
        )
        self.rows = Histogram(
            "cascade_tick_rows", "Rows of a tick", ["stage", "shape"], buckets=ROWS, registry=registry
        )
        self.fill = Histogram(
            "cascade_tick_fill_ratio",
            "Rows of a tick against the cap, of ticks that left rows of their kind waiting",
            ["stage"],
            buckets=RATIOS,
            registry=registry,
        )

    def ticked(
        self,
        *,
        stage: str,
        shape: str,
        rows: int,
        samples: int,
        seconds: float,
        cap: int,
        is_backlogged: bool,
    ) -> None:
        """Record a tick: an engine stepped `samples` pictures, which are `rows` rows, together."""
        self.steps.labels(stage).inc(samples)
        self.step_seconds.labels(stage).observe(seconds)
        self.rows.labels(stage, self._bounded_shape(shape)).observe(rows)
        if is_backlogged:
            self.fill.labels(stage).observe(rows / max(cap, 1))

    def streaming(self) -> AbstractContextManager[object]:
        """Count an event stream as open during the block."""
        return self.streams.track_inprogress()

    def happened(self, event: str, times: int = 1) -> None:
        """Count an event that an engine reported with its heartbeat."""
        self.engine_events.labels(event if event in EVENTS else "other").inc(times)

    def beat(self, device: str, *, num_samples: int, memory_bytes: int, device_memory_bytes: int) -> None:
        """Record the heartbeat of an engine, and what it holds."""
        self.engine_samples.labels(device).set(num_samples)
        self.engine_memory_bytes.labels(device).set(memory_bytes)
        self.device_memory_bytes.labels(device).set(device_memory_bytes)

    def restarted(self, device: str, reason: str) -> None:
        """Count an engine process that was replaced by another."""
        self.restarts.labels(device, reason if reason in RESTARTS else "other").inc()

    def ended(self, outcome: str, reason: str | None, phases: dict[str, float]) -> None:
        """Count a job that reached its final status; `phases` are its seconds in each."""
        bounded = "" if reason is None else reason if reason in REASONS else "other"
        self.jobs.labels(outcome, bounded).inc()
        for phase, seconds in phases.items():
            self.phase_seconds.labels(phase).observe(seconds)

    def predicted(self, seconds: float, actual_seconds: float) -> None:
        """Record that a job predicted to take `seconds` took `actual_seconds`."""
        self.eta_error.observe(abs(seconds - actual_seconds) / max(actual_seconds, 0.001))

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read at each scrape."""
        Gauge(f"cascade_{name}", documentation, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Return the metrics in Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def _bounded_shape(self, shape: str) -> str:
        if shape not in self._shapes and len(self._shapes) < MAX_SHAPES:
            self._shapes.add(shape)
        return shape if shape in self._shapes else "other"


def _num_tasks() -> float:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no event loop is running
        return 0
