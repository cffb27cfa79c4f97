"""A runner without a model: its pictures tell which request and seed they were made for."""

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from app.engine.contract import Decoded, Work
from app.engine.protocol import Configure, Ready, Run
from app.engine.scheduler import BatchKey
from app.errors import GenerationFailed, OutOfMemory
from app.schemas import GenerationRequest

NATIVE_SIZE = (64, 64)
WINDOW_CHARACTERS = 300  # longer prompts count as truncated
ROW_SECONDS = 0.01  # what the fake claims for a step of a row
PATIENCE_SECONDS = 10  # a gate that nobody opens

DECODE = "decode"


class FakeTrack:
    """One picture on its way: a list of work, and marks of what happened to it."""

    def __init__(self, run: Run, steps: tuple[int, int]) -> None:
        self.run = run
        self.request = GenerationRequest.model_validate_json(run.request)
        self.work = list(self._plan(steps))
        self.step = 0
        self.latents = run.latents
        self.is_begun = False
        self.is_fp32 = False
        self.past: list[Work] = []

    def _plan(self, steps: tuple[int, int]) -> Iterator[Work]:
        shape = (self.request.height, self.request.width)
        if self.run.latents is None:
            rows = 2 if self.request.prior_guidance_scale > 1 else 1
            yield Work(BatchKey("prior", shape), rows, steps[0])
        yield Work(BatchKey("decoder", shape), 1, steps[1])
        yield Work(BatchKey("decode", shape), 1, 1)

    def advance(self) -> None:
        """Take one step."""
        key, rows, steps = self.work[0]
        self.step += 1
        if steps > 1:
            self.work[0] = Work(key, rows, steps - 1)
            return
        self.past.append(Work(key, rows, self.step))
        self.work.pop(0)
        self.step = 0
        if key.stage == "prior":
            self.latents = digest(self.request, self.run.seed)

    def go_back(self) -> None:
        """Stand at the beginning of the stage that was just ended."""
        self.work.insert(0, self.past.pop())
        self.is_fp32 = True
        self.step = 0


class FakeRunner:
    """Makes one-coloured pictures, and goes wrong where told to.

    `gate` holds it before every step, `loading` before the model is there, `decoding` before Stage A. Prompts
    in `broken` raise that error in a step, in `deadly` end the engine without a word; `nan` counts how many
    checks of a prompt fail. More rows than `memory_rows` are out of memory. `on_step` and `on_decode` see
    what is about to be done, and may raise.
    """

    def __init__(self, *, steps: int | tuple[int, int] = 2, cap: int = 16) -> None:
        self.steps = (steps, steps) if isinstance(steps, int) else steps
        self.caps: dict[BatchKey, int] = {}
        self.first_cap = cap
        self.gate, self.loading, self.decoding = _open_gate(), _open_gate(), _open_gate()
        self.load_error: Exception | None = None
        self.broken: dict[str, Exception] = {}
        self.deadly: set[str] = set()
        self.nan: Counter[str] = Counter()
        self.memory_rows = 10**9
        self.max_samples = 1000
        self.has_previewer = True
        self.reads_pictures = True
        self.controls: tuple[str, ...] = ("canny", "super_resolution")
        self.lora_dirs: tuple[str, ...] = ()
        self.on_step: Callable[[Sequence[FakeTrack]], None] = lambda tracks: None
        self.on_decode: Callable[[Sequence[FakeTrack]], None] = lambda tracks: None
        self.dropped: list[FakeTrack] = []
        self.on_finish: Callable[[FakeTrack], None] = lambda track: None
        self.counts: Counter[str] = Counter()
        self.configure: Configure | None = None
        self.expected: list[GenerationRequest] = []
        self.started: list[FakeTrack] = []
        self.batches: list[list[FakeTrack]] = []  # of every step that came to pass
        self.halved: list[BatchKey] = []

    @property
    def steps_done(self) -> int:
        """Steps of any batch."""
        return len(self.batches)

    def load(self, configure: Configure) -> Ready:
        self.configure = configure
        self.loading.wait(PATIENCE_SECONDS)
        if self.load_error is not None:
            raise self.load_error
        width, height = NATIVE_SIZE
        shape = f"{height}x{width}"
        return Ready(
            device="cpu",
            dtype="float32",
            native_width=width,
            native_height=height,
            max_samples=self.max_samples,
            step_seconds={f"{stage}:{shape}": ROW_SECONDS for stage in ("prior", "decoder", DECODE)},
            reads_pictures=self.reads_pictures,
            reads_image_prompts=self.reads_pictures,
            controls=self.controls,
            lora_dirs=self.lora_dirs,
        )

    def expect(self, request: bytes) -> None:
        self.expected.append(GenerationRequest.model_validate_json(request))

    def start(self, run: Run) -> FakeTrack:
        track = FakeTrack(run, self.steps)
        self.started.append(track)
        return track

    def begin(self, track: FakeTrack) -> None:
        assert not track.is_begun
        track.is_begun = True
        self.counts["cache_misses"] += 1

    def step(self, tracks: Sequence[FakeTrack]) -> None:
        assert len({track.work[0].key for track in tracks}) == 1
        assert all(track.is_begun and track.work[0].key.stage != DECODE for track in tracks)
        self.gate.wait(PATIENCE_SECONDS)
        self.on_step(tracks)
        rows = sum(track.work[0].rows for track in tracks)
        if min(rows, self.cap(tracks[0].work[0].key)) > self.memory_rows:
            raise OutOfMemory("too many rows")
        for track in tracks:
            if track.request.prompt in self.deadly:
                raise SystemExit(1)
            if track.request.prompt in self.broken:
                raise self.broken[track.request.prompt]
        for track in tracks:
            track.advance()
        self.batches.append(list(tracks))

    def check(self, track: FakeTrack) -> None:
        if self.nan[track.request.prompt]:
            self.nan[track.request.prompt] -= 1
            raise GenerationFailed("the latents are not finite")

    def retry_in_fp32(self, track: FakeTrack) -> bool:
        if track.is_fp32:
            return False
        track.go_back()
        return True

    def decode(self, tracks: Sequence[FakeTrack]) -> list[Callable[[], Decoded]]:
        self.decoding.wait(PATIENCE_SECONDS)
        self.on_decode(tracks)
        return [partial(self._finished, track) for track in tracks]

    def _finished(self, track: FakeTrack) -> Decoded:
        self.on_finish(track)
        return decoded(track.request, track.run.seed)

    def preview(self, track: FakeTrack) -> tuple[int, int, bytes] | None:
        return (1, 1, bytes(colour(track.request, track.run.seed))) if self.has_previewer else None

    def drop(self, track: FakeTrack) -> None:
        self.dropped.append(track)

    def cap(self, key: BatchKey) -> int:
        return self.caps.get(key, self.first_cap)

    def halve(self, key: BatchKey) -> None:
        self.caps[key] = max(1, self.cap(key) // 2)
        self.halved.append(key)

    def device_memory_bytes(self) -> int:
        return 0


def decoded(request: GenerationRequest, seed: int) -> Decoded:
    size = (request.width, request.height)
    return Decoded(
        width=request.width,
        height=request.height,
        pixels=bytes(colour(request, seed)) * (request.width * request.height),
        resampled_from=None if size == NATIVE_SIZE else NATIVE_SIZE,
        prompt_truncated=len(request.prompt) > WINDOW_CHARACTERS,
        prompt_tokens=len(request.prompt.split()),
    )


def colour(request: GenerationRequest, seed: int) -> tuple[int, int, int]:
    red, green, blue, *_ = digest(request, seed)
    return red, green, blue


def digest(request: GenerationRequest, seed: int) -> bytes:
    """Tells apart requests that must give different pictures."""
    settings = request.model_dump(
        exclude={"seeds", "output_format", "output_quality", "embed_metadata", "previews"}, mode="json"
    )
    return hashlib.sha256(f"{settings} {seed}".encode()).digest()


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


@contextmanager
def closed(gate: threading.Event) -> Iterator[None]:
    """Hold a runner at a gate for a while."""
    gate.clear()
    try:
        yield
    finally:
        gate.set()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread does."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)
