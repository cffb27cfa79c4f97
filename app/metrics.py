"""What Prometheus may know. Labels come from small closed sets: never a prompt, an id or a path as sent."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "cascade_http_requests", "Requests answered", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "cascade_http_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.jobs = Counter("cascade_jobs", "Jobs ended", ["outcome"], registry=registry)
        self.refused = Counter("cascade_jobs_refused", "Jobs not accepted", ["code"], registry=registry)
        self.pictures = Counter("cascade_pictures", "Pictures made", registry=registry)
        self.queued_seconds = Histogram(
            "cascade_job_queued_seconds", "Time in the queue", buckets=SECONDS, registry=registry
        )
        self.running_seconds = Histogram(
            "cascade_job_running_seconds", "Time on the device", buckets=SECONDS, registry=registry
        )
        self.batch_pictures = Histogram(
            "cascade_batch_pictures",
            "Pictures made together",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.steps = Counter("cascade_steps", "Denoising steps done", ["stage"], registry=registry)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(f"cascade_{name}", documentation, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)
