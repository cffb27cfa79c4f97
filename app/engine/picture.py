"""One picture aboard the engine, and what the engine says of it."""

from dataclasses import dataclass, field

from app.engine.contract import Decoded, Track
from app.engine.protocol import Pixels, Run, Stepped
from app.engine.scheduler import BatchKey, Entry


@dataclass(slots=True, eq=False)
class Picture:
    """What was asked for, where the runner has got with it, and its place in the queue."""

    run: Run
    track: Track
    entry: Entry
    is_in_queue: bool = True  # of the scheduler; else with the finisher
    is_dropped: bool = False  # nobody wants it any more: nothing is said of it
    num_previews: int = 0  # that its steps have called for so far
    began_stage_at: float | None = None  # None until its first step
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def aboard(cls, run: Run, track: Track, now: float) -> "Picture":
        """A picture that just arrived, to be queued after `follow`."""
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
        """What its next step needs."""
        return self.track.work[0].key

    @property
    def is_drawn(self) -> bool:
        """Whether only Stage A is left."""
        return self.key.stage == "decode"

    @property
    def is_in_place(self) -> bool:
        """Whether the scheduler has it where its next step belongs."""
        key, rows, _ = self.track.work[0]
        return (key, rows) == (self.entry.key, self.entry.rows)

    @property
    def steps(self) -> int:
        """Number of all steps of the stage in work."""
        return self.track.step + sum(work.steps for work in self.track.work if work.key == self.key)

    def follow(self, cost_left: float) -> None:
        """Tell its entry, which is in no queue, where it stands."""
        self.entry.key, self.entry.rows, _ = self.track.work[0]
        self.entry.cost_left = cost_left

    def end_stage(self, stage: str, now: float) -> None:
        """Take down how long it spent there, waiting between its steps included."""
        assert self.began_stage_at is not None
        self.stage_seconds[stage] = now - self.began_stage_at
        self.began_stage_at = now

    def wants_preview(self, count: int) -> bool:
        """Whether the step just taken is one of `count` that, spread over Stage C, are to be shown."""
        if self.key.stage != "prior":
            return False
        due = (count + 1) * self.track.step // self.steps
        is_due = self.num_previews < due <= count
        self.num_previews = max(self.num_previews, due)
        return is_due

    def progress(self) -> Stepped:
        """Where it stands."""
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
        """The finished picture."""
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
