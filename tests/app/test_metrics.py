"""The figures: labels from closed sets, whatever is told."""

from app.metrics import MAX_SHAPES, Metrics


def ticked(metrics: Metrics, **told: object) -> None:
    tick = {"stage": "prior", "shape": "24x24", "rows": 8, "samples": 4, "seconds": 0.1, "cap": 16}
    metrics.ticked(**{**tick, "is_backlogged": False, **told})  # type: ignore[arg-type]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_tick_counts_steps_rows_and_time() -> None:
    metrics = Metrics()
    ticked(metrics)
    ticked(metrics, is_backlogged=True)
    assert value(metrics, "cascade_steps_total", stage="prior") == 8
    assert value(metrics, "cascade_tick_rows_sum", stage="prior", shape="24x24") == 16
    assert value(metrics, "cascade_step_seconds_count", stage="prior") == 2
    assert value(metrics, "cascade_tick_fill_ratio_count", stage="prior") == 1
    assert value(metrics, "cascade_tick_fill_ratio_sum", stage="prior") == 0.5


def test_odd_shapes_share_a_label() -> None:
    metrics = Metrics()
    for side in range(MAX_SHAPES + 5):
        ticked(metrics, shape=f"{side}x1")
    assert value(metrics, "cascade_tick_rows_count", stage="prior", shape="other") == 5
    ticked(metrics, shape="0x1")
    assert value(metrics, "cascade_tick_rows_count", stage="prior", shape="0x1") == 2


def test_unknown_words_are_other() -> None:
    metrics = Metrics()
    metrics.happened("halvings", 3)
    metrics.happened("a secret prompt")
    metrics.restarted("cpu", "hang")
    metrics.restarted("cpu", "why ever")
    metrics.ended("failed", "out_of_memory", {})
    metrics.ended("failed", "job_123", {})
    metrics.ended("succeeded", None, {"queued": 1.5, "prior": 2.0})
    assert value(metrics, "cascade_engine_events_total", event="halvings") == 3
    assert value(metrics, "cascade_engine_events_total", event="other") == 1
    assert value(metrics, "cascade_engine_restarts_total", device="cpu", reason="other") == 1
    assert value(metrics, "cascade_jobs_total", outcome="failed", reason="out_of_memory") == 1
    assert value(metrics, "cascade_jobs_total", outcome="failed", reason="other") == 1
    assert value(metrics, "cascade_job_phase_seconds_sum", phase="queued") == 1.5
    assert b"secret" not in metrics.text()


def test_what_an_engine_holds_and_how_far_predictions_were_off() -> None:
    metrics = Metrics()
    metrics.beat("cuda:0", num_samples=3, memory_bytes=10, device_memory_bytes=20)
    metrics.predicted(3.0, 2.0)
    assert value(metrics, "cascade_engine_samples", device="cuda:0") == 3
    assert value(metrics, "cascade_engine_memory_bytes", device="cuda:0") == 10
    assert value(metrics, "cascade_device_memory_bytes", device="cuda:0") == 20
    assert value(metrics, "cascade_eta_error_ratio_sum") == 0.5
