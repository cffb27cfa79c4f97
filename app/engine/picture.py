"""A picture aboard the engine, and the messages about it."""

from dataclasses import dataclass, field

from app.engine.contract import Decoded, Track
from app.engine.protocol import Pixels, Run, Stepped
from app.engine.scheduler import BatchKey, Entry


@dataclass(slots=True, eq=False)
class Picture:
    """A picture aboard: its order, the runner's state of it, and its entry in the scheduler."""

    run: Run
    track: Track
    entry: Entry
    is_in_queue: bool = True  # whether the scheduler has it; else the finisher does
    is_dropped: bool = False  # nobody wants it any more: no message about it is sent
    num_previews: int = 0  # previews that have fallen due so far
    began_stage_at: float | None = None  # None until its first step
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def aboard(cls, run: Run, track: Track, now: float) -> "Picture":
        """Create a picture that just arrived; call `follow` before it is queued."""
        key, rows, _ = track.work[0]
        entry = Entry(
            job=run.job,
            index=run.index,
            tenant=run.tenant,
            priority=run.priority,
            deadline=None if run.deadline is None else now + run.deadline,
            arrived=now - run.waited,
            key=key,
            rows=rows,
            cost_left=0.0,
            is_alone=run.is_alone,
        )
        return cls(run, track, entry)

    @property
    def key(self) -> BatchKey:
        """Batch key of the next step."""
        return self.track.work[0].key

    @property
    def is_drawn(self) -> bool:
        """Whether only Stage A is left."""
        return self.key.stage == "decode"

    @property
    def is_in_place(self) -> bool:
        """Whether its entry in the scheduler matches its next step."""
        key, rows, _ = self.track.work[0]
        return (key, rows) == (self.entry.key, self.entry.rows)

    @property
    def steps(self) -> int:
        """Number of steps of the current stage, done and left."""
        return self.track.step + sum(work.steps for work in self.track.work if work.key == self.key)

    def follow(self, cost_left: float) -> None:
        """Update its entry, which must not be in a queue, to the state of the track."""
        self.entry.key, self.entry.rows, _ = self.track.work[0]
        self.entry.cost_left = cost_left

    def end_stage(self, stage: str, now: float) -> None:
        """Record the seconds spent in a stage, including those between its steps."""
        assert self.began_stage_at is not None
        self.stage_seconds[stage] = now - self.began_stage_at
        self.began_stage_at = now

    def wants_preview(self, count: int) -> bool:
        """Return whether the step just taken is one of the `count`, spread over Stage C, to be shown."""
        if self.key.stage != "prior":
            return False
        due = (count + 1) * self.track.step // self.steps
        is_due = self.num_previews < due <= count
        self.num_previews = max(self.num_previews, due)
        return is_due

    def progress(self) -> Stepped:
        """Return the message about its progress."""
        stage = self.key.stage
        return Stepped(
            job=self.run.job,
            index=self.run.index,
            stage="encode" if stage == "decode" else stage,
            step=self.track.step,
            steps=self.steps,
            remaining=self.entry.cost_left,
        )

    def pixels(self, decoded: Decoded) -> Pixels:
        """Return the message with the finished picture."""
        return Pixels(
            job=self.run.job,
            index=self.run.index,
            width=decoded.width,
            height=decoded.height,
            pixels=decoded.pixels,
            resampled_from=decoded.resampled_from,
            prompt_truncated=decoded.prompt_truncated,
            prompt_tokens=decoded.prompt_tokens,
            prior_seconds=self.stage_seconds.get("prior", 0.0),
            decoder_seconds=self.stage_seconds.get("decoder", 0.0),
            decode_seconds=self.stage_seconds.get("decode", 0.0),
        )
