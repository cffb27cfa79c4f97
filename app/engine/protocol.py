"""Messages between the API process and an engine process, over one local stream socket.

A message is a tagged msgspec structure in MessagePack, after its length in four bytes, big endian. Pixels and
latents are plain bytes in it. No message can carry code.
"""

import struct
from typing import Literal

import msgspec

MAX_MESSAGE_BYTES = 256 * 1024**2  # the largest picture has 12.6 MB of pixels

_LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, tag=True, array_like=False, omit_defaults=True):
    """Base class of all messages."""


class ToEngine(Message, frozen=True):
    """Base class of messages from the API process to an engine."""


class Configure(ToEngine, frozen=True, tag="configure"):
    """The first message: the model to load and how to run it."""

    model: str
    device: str
    dtype: str
    compile: Literal["off", "graphs", "full"] = "off"
    is_strict: bool = False  # one row per network call: results are bit-identical in any batch
    max_rows: int | None = None  # upper bound on the rows of a batch; None: as profiled
    cache_dir: str | None = None  # where profiles are kept
    lora_dir: str | None = None  # LoRAs in addition to the model's own
    controlnet_dir: str | None = None  # ControlNets in addition to the model's own
    weights: dict[str, float] = {}  # shares of the device by tenant, 1 when absent
    faults: tuple[str, ...] = ()  # armed fault points; tests only


class Expect(ToEngine, frozen=True, tag="expect"):
    """A job is just being accepted: an idle engine may encode its texts meanwhile."""

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
    latents: bytes | None = None  # result of Stage C, fp32, from before a crash; None: start with Stage C
    is_alone: bool = False  # quarantined: the engine works on nothing else meanwhile


class Cancel(ToEngine, frozen=True, tag="cancel"):
    """Stop the work on a job and send nothing more about it."""

    job: str


class WantPreviews(ToEngine, frozen=True, tag="previews"):
    """Somebody watches a job: send `count` previews of each of its pictures, spread over Stage C."""

    job: str
    count: int


class Drain(ToEngine, frozen=True, tag="drain"):
    """Finish the pictures aboard, then exit with 0."""


class FromEngine(Message, frozen=True):
    """Base class of messages from an engine to the API process."""


class Ready(FromEngine, frozen=True, tag="ready"):
    """The model is loaded, profiled and warm."""

    device: str
    dtype: str
    native_width: int
    native_height: int
    max_samples: int  # pictures that fit into memory together
    step_seconds: dict[str, float]  # per row, by "stage:HxW" of profiled shapes; see cost.py
    full_rows: int = 1  # rows of a batch beyond which more are not worth it in any stage
    reads_pictures: bool = False  # image-to-image: the model has an encoder of pictures
    reads_image_prompts: bool = False  # the model has a vision tower
    controls: tuple[str, ...] = ()  # kinds of ControlNets, by their names in the API
    lora_dirs: tuple[str, ...] = ()  # folders that are searched for LoRAs


class Unusable(FromEngine, frozen=True, tag="unusable"):
    """The model cannot be loaded; the engine exits with 2, and starting it again would not help."""

    reason: str


class Stepped(msgspec.Struct, frozen=True, array_like=True):
    """The progress of a picture."""

    job: str
    index: int
    stage: Literal["prior", "decoder", "encode"]
    step: int
    steps: int
    remaining: float  # predicted seconds of its remaining work, with the device to itself


class Progressed(FromEngine, frozen=True, tag="progressed"):
    """Progress of the pictures that have stepped, at most ten times a second per job."""

    steps: tuple[Stepped, ...]


class Previewed(FromEngine, frozen=True, tag="previewed"):
    """A small picture of Stage C's current estimate."""

    job: str
    index: int
    preview: int
    width: int
    height: int
    pixels: bytes  # RGB, 8 bits, rows from the top


class Latents(FromEngine, frozen=True, tag="latents"):
    """The result of Stage C, from which Stage B can be repeated alone."""

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
    is_backlogged: bool  # whether rows of the same key had to wait for a later batch


class Heartbeat(FromEngine, frozen=True, tag="heartbeat"):
    """A sign of life, sent every second by a thread of its own, with what the engine is busy with."""

    busy_seconds: float  # since the current step began; 0 when idle
    predicted_seconds: float  # of that step
    num_samples: int  # aboard
    memory_bytes: int  # resident
    device_memory_bytes: int
    ticks: tuple[Observation, ...] = ()  # since the last heartbeat
    events: dict[str, int] = {}  # halvings, bisections, cache hits and misses since the last heartbeat


class DeviceLost(FromEngine, frozen=True, tag="device_lost"):
    """The device only returns errors; the engine exits with 3, to be replaced."""

    reason: str


AnyToEngine = Configure | Expect | Run | Cancel | WantPreviews | Drain
AnyFromEngine = Ready | Unusable | Progressed | Previewed | Latents | Pixels | Failed | Heartbeat | DeviceLost

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[AnyToEngine] = msgspec.msgpack.Decoder(AnyToEngine)
_from_engine: msgspec.msgpack.Decoder[AnyFromEngine] = msgspec.msgpack.Decoder(AnyFromEngine)


def pack(message: Message) -> bytes:
    """Encode a message as a frame: length and body."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """Return the length of a body from a frame's first bytes; raise ValueError beyond MAX_MESSAGE_BYTES."""
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
