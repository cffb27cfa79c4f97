"""Settings of a finetuning run."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cascade.errors import InvalidSetting

Stage: TypeAlias = Literal["prior", "decoder"]
Weighting: TypeAlias = Literal["p2", "adaptive"]
STAGES: tuple[str, ...] = get_args(Stage)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

_AT_LEAST = {
    "steps": 1,
    "batch": 1,
    "accumulate": 1,
    "warmup": 0,
    "save_every": 1,
    "sheet_every": 0,
    "seed": 0,
    "clip_norm": 0.0,
    "learning_rate": 0.0,
}
_SHARES = ("ema_decay", "caption_dropout", "image_dropout", "effnet_dropout", "effnet_noise")
# Settings that may change when a run is resumed.
_FREE = (
    "data",
    "output",
    "steps",
    "save_every",
    "sheet_every",
    "device",
    "cache",
    "checkpointing",
    "sharded",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """Settings of a run of Stage C ("prior") or Stage B ("decoder"), checked on construction.

    The dropout shares are those of the official training code. Raises `InvalidSetting`.
    """

    stage: Stage
    data: Path
    output: Path  # the new checkpoint; state, sheets and cached latents lie beside it, in OUTPUT.training
    model: str = "tiny"
    steps: int = 1000
    batch: int = 16  # pictures per update, over all processes
    accumulate: int = 1  # forward passes per update: each process holds batch / accumulate / processes rows
    learning_rate: float = 1e-4
    warmup: int = 10  # updates
    weighting: Weighting = "p2"
    ema_decay: float = 0.99  # 0: the last weights are the result
    clip_norm: float = 1.0
    image_size: int | None = None  # side of the square with the buckets' area; None: the checkpoint's own
    caption_dropout: float = 0.05
    image_dropout: float = 0.9  # Stage C: share of rows without the picture's CLIP embedding
    effnet_dropout: float = 0.1  # Stage B: share of rows without the semantic latents
    effnet_noise: float = 0.0  # Stage B: largest deviation of noise on the semantic latents
    seed: int = 0
    device: str = "auto"
    bf16: bool | None = None  # autocast; None: only on a GPU
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    sharded: bool = True  # several processes: FSDP2 shares out gradients, moments and averages; else DDP
    cache: bool = True  # Stage C: cache the latents on disk, of pictures cut centrally
    save_every: int = 250
    sheet_every: int = 250  # 0: none
    save_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, allowed in (("stage", STAGES), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in allowed:
                raise InvalidSetting(name, f"must be {' or '.join(allowed)}, but is {getattr(self, name)!r}")
        if self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise InvalidSetting("save_dtype", f"must be float32, bfloat16 or float16, not {self.save_dtype}")
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:  # so that nan is refused, too
                raise InvalidSetting(name, f"must be at least {least}, but is {getattr(self, name)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidSetting(name, f"must be from 0 to 1, but is {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise InvalidSetting("batch", f"{self.batch} is no multiple of accumulate = {self.accumulate}")
        if self.image_size is not None and not 64 <= self.image_size <= 4096:
            raise InvalidSetting("image_size", f"must be from 64 to 4096, but is {self.image_size}")

    @property
    def work(self) -> Path:
        """Folder of everything but the result: state, sheets and cached latents."""
        return self.output.with_name(f"{self.output.name}.training")

    def identity(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed."""
        return {field.name: asdict(self)[field.name] for field in fields(self) if field.name not in _FREE}
