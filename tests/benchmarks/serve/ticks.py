"""What our server's /metrics says of the engine's ticks: how many rows each had, and against which cap."""

from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.serve.contestants import OURS

ROWS = "cascade_tick_rows"
FILL = "cascade_tick_fill_ratio"


@dataclass(frozen=True, slots=True)
class Ticks:
    """Sums and counts by stage since the server started, or since another reading."""

    rows: dict[str, float] = field(default_factory=dict)
    ticks: dict[str, float] = field(default_factory=dict)
    fill: float = 0.0  # rows by cap, summed over the ticks that left rows of their kind waiting
    full_ticks: float = 0.0

    def mean_rows(self, stage: str) -> float:
        """Rows of a tick of `stage` on average."""
        return self.rows.get(stage, 0.0) / max(self.ticks.get(stage, 0.0), 1.0)

    @property
    def mean_fill(self) -> float | None:
        """Rows by cap on average while rows were waiting; None when none ever were."""
        return self.fill / self.full_ticks if self.full_ticks else None

    def since(self, before: "Ticks") -> "Ticks":
        """What happened after `before` was read."""
        return Ticks(
            {stage: rows - before.rows.get(stage, 0.0) for stage, rows in self.rows.items()},
            {stage: ticks - before.ticks.get(stage, 0.0) for stage, ticks in self.ticks.items()},
            self.fill - before.fill,
            self.full_ticks - before.full_ticks,
        )


async def read_ticks(client: aiohttp.ClientSession, server: str, before: Ticks | None = None) -> Ticks | None:
    """The ticks of our server, of all time or since `before`; the peer has none."""
    if server != OURS:
        return None
    async with client.get("/metrics", raise_for_status=True) as answer:
        text = await answer.text()
    return parse_ticks(text).since(before or Ticks())


def parse_ticks(text: str) -> Ticks:
    """From Prometheus' text format; a figure that the server does not know is a KeyError."""
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    rows: dict[str, float] = {}
    ticks: dict[str, float] = {}
    for sample in families[ROWS]:
        stage = sample.labels.get("stage", "")
        if sample.name == f"{ROWS}_sum":
            rows[stage] = rows.get(stage, 0.0) + sample.value
        elif sample.name == f"{ROWS}_count":
            ticks[stage] = ticks.get(stage, 0.0) + sample.value
    fills = families[FILL]
    return Ticks(
        rows,
        ticks,
        sum(sample.value for sample in fills if sample.name == f"{FILL}_sum"),
        sum(sample.value for sample in fills if sample.name == f"{FILL}_count"),
    )
