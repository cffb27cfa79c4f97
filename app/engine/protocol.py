"""What the API process and an engine process say to each other, over one local stream socket.

A message is a tagged msgspec structure in MessagePack behind its length, four bytes, big endian. Pixels and
latents are plain bytes in it. No message can carry code.
"""

import struct
from typing import Literal

import msgspec

MAX_MESSAGE_BYTES = 256 * 1024**2  # pixels of the largest picture are 12.6 MB

_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, tag=True, array_like=False, omit_defaults=True):
    """The root of all messages."""


class ToEngine(Message, frozen=True):
    """From the API process."""


class Configure(ToEngine, frozen=True, tag="configure"):
    """The first message: which model to load, and how to work."""

    model: str
    device: str
    dtype: str
    compile: Literal["off", "graphs", "full"] = "off"
    is_strict: bool = False  # one row per network call: equal to the last bit in any company
    max_rows: int | None = None  # bound on the rows of a batch; None: as profiled
    cache_dir: str | None = None  # remembers profiles
    lora_dir: str | None = None  # holds LoRAs beside those of the model
    controlnet_dir: str | None = None  # the same of ControlNets
    weights: dict[str, float] = {}  # of tenants, 1 when absent
    faults: tuple[str, ...] = ()  # armed fault points; tests only


class Expect(ToEngine, frozen=True, tag="expect"):
    """A job is just being accepted: who has nothing to do may encode its texts meanwhile."""

    request: bytes  # GenerationRequest as JSON, without pictures


class Run(ToEngine, frozen=True, tag="run"):
    """Make one picture of a job."""

    job: str
    index: int  # of the picture in the job
    seed: int
    tenant: str
    priority: int
    deadline: float | None  # seconds from now
    waited: float  # seconds since the job was accepted
    request: bytes  # GenerationRequest as JSON
    inputs: dict[str, bytes] = {}  # PNG files that the request refers to, by sha256
    latents: bytes | None = None  # of Stage C, fp32, from before a crash; None: begin at the beginning
    is_alone: bool = False  # quarantined: nothing else may be in work beside it


class Cancel(ToEngine, frozen=True, tag="cancel"):
    """Stop the work on a job; no more is said of it."""

    job: str


class WantPreviews(ToEngine, frozen=True, tag="previews"):
    """Somebody watches a picture: send so many previews of it, spread over Stage C."""

    job: str
    count: int


class Drain(ToEngine, frozen=True, tag="drain"):
    """Finish what is aboard, then exit with 0."""


class FromEngine(Message, frozen=True):
    """To the API process."""


class Ready(FromEngine, frozen=True, tag="ready"):
    """The model is loaded, profiled and warm."""

    device: str
    dtype: str
    native_width: int
    native_height: int
    max_samples: int  # pictures that fit into memory together
    step_seconds: dict[str, float]  # per row, by "stage:HxW" of profiled shapes; see cost.py
    full_rows: int = 1  # of a batch, beyond which more are not worth it in any stage
    reads_pictures: bool = False  # image-to-image: there is an encoder of pictures
    reads_image_prompts: bool = False  # there is a vision tower
    controls: tuple[str, ...] = ()  # kinds of ControlNets, by the names of the API
    lora_dirs: tuple[str, ...] = ()  # where LoRAs are looked for


class Unusable(FromEngine, frozen=True, tag="unusable"):
    """The model cannot be loaded; the engine exits with 2, and starting it again would not help."""

    reason: str


class Stepped(msgspec.Struct, frozen=True, array_like=True):
    """Where a picture stands."""

    job: str
    index: int
    stage: Literal["prior", "decoder", "encode"]
    step: int
    steps: int
    remaining: float  # seconds that its work is predicted to take from here, alone


class Progressed(FromEngine, frozen=True, tag="progressed"):
    """How far the pictures are that moved, of all jobs that are due: at most ten times a second per job."""

    steps: tuple[Stepped, ...]


class Previewed(FromEngine, frozen=True, tag="previewed"):
    """A small picture of what Stage C has in mind."""

    job: str
    index: int
    preview: int
    width: int
    height: int
    pixels: bytes  # RGB, 8 bits, rows from the top


class Latents(FromEngine, frozen=True, tag="latents"):
    """Stage C is done; with these, Stage B can be repeated alone."""

    job: str
    index: int
    latents: bytes


class Pixels(FromEngine, frozen=True, tag="pixels"):
    """A finished picture."""

    job: str
    index: int
    width: int
    height: int
    pixels: bytes  # RGB, 8 bits, rows from the top
    resampled_from: tuple[int, int] | None
    prompt_truncated: bool
    prompt_tokens: int
    prior_seconds: float
    decoder_seconds: float
    decode_seconds: float


class Failed(FromEngine, frozen=True, tag="failed"):
    """A picture cannot be made; the others of its job are dropped too."""

    job: str
    index: int
    code: str  # of an AppError
    message: str


class Observation(msgspec.Struct, frozen=True):
    """One tick, for metrics and the cost model of the API process."""

    stage: str
    shape: str  # "HxW" of the latents
    rows: int
    samples: int
    seconds: float
    cap: int
    is_backlogged: bool  # whether the batch left rows of its own kind behind


class Heartbeat(FromEngine, frozen=True, tag="heartbeat"):
    """The engine lives. Sent every second by a thread of its own, with what the loop is busy with."""

    busy_seconds: float  # since the step in work began; 0 when idle
    predicted_seconds: float  # of that step
    num_samples: int  # aboard
    memory_bytes: int  # resident
    device_memory_bytes: int
    ticks: tuple[Observation, ...] = ()  # since the last heartbeat
    events: dict[str, int] = {}  # halvings, bisections, cache hits and misses since the last heartbeat


class DeviceLost(FromEngine, frozen=True, tag="device_lost"):
    """The device answers nothing but errors; the engine exits with 3, to be replaced."""

    reason: str


AnyToEngine = Configure | Expect | Run | Cancel | WantPreviews | Drain
AnyFromEngine = Ready | Unusable | Progressed | Previewed | Latents | Pixels | Failed | Heartbeat | DeviceLost

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[AnyToEngine] = msgspec.msgpack.Decoder(AnyToEngine)
_from_engine: msgspec.msgpack.Decoder[AnyFromEngine] = msgspec.msgpack.Decoder(AnyFromEngine)


def pack(message: Message) -> bytes:
    """A frame: length and body."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """Bytes of the body that follow a frame's first four; raises ValueError beyond MAX_MESSAGE_BYTES."""
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return int(length)


def to_engine(body: bytes) -> AnyToEngine:
    """Decode a message to an engine; raises msgspec.DecodeError for anything else."""
    return _to_engine.decode(body)


def from_engine(body: bytes) -> AnyFromEngine:
    """Decode a message from an engine; raises msgspec.DecodeError for anything else."""
    return _from_engine.decode(body)
