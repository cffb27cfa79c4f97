"""Files of Stage C's latents: a picture reduced 42 times per side, with all that is needed to decode it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.stored import StoredTensor, open_weights, read_metadata
from cascade.checkpoints.writing import write_tensors
from cascade.errors import CheckpointError, InvalidSetting
from cascade.models import Models
from cascade.networks.effnet import EffNetEncoder
from cascade.sampling.presets import PRESETS
from cascade.sizes import check_size

FORMAT = "stable-cascade-latents"
VERSION = 1
SUFFIX = ".safetensors"
CHANNELS = 16

_NAME = "latents"
_FIELDS = ("format_version", "shape", "width", "height", "model", "encoder_sha256", "preset")
_MAX_SIDE = 256  # cells: more than any allowed picture size gives


@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """The semantic latents of one picture."""

    values: Tensor = field(repr=False)  # (16, h, w) fp32 on the CPU
    width: int  # of the encoded picture, and by default of the decoded one
    height: int
    model: str  # name of the checkpoint; `check_model` compares it only if there is no encoder
    encoder_sha256: str  # of the encoder's weights: checkpoints with the same ones understand the latents
    preset: str = "official"  # determines the constant by which Stage A's latents are scaled

    def save(self, path: Path) -> None:
        """Write a safetensors file.

        Raises:
            InvalidSetting: the name does not end in .safetensors.
            CheckpointError: the file cannot be written.
        """
        if path.suffix.lower() != SUFFIX:
            raise InvalidSetting("output", f"must end in {SUFFIX}, not {path.suffix or path.name!r}")
        metadata = {
            "format": FORMAT,
            "format_version": str(VERSION),
            "shape": json.dumps(list(self.values.shape)),
            "width": str(self.width),
            "height": str(self.height),
            "model": self.model,
            "encoder_sha256": self.encoder_sha256,
            "preset": self.preset,
        }
        values = self.values.to("cpu", torch.float32).contiguous()
        write_tensors(path, {_NAME: StoredTensor.of(values)}, lambda _, dtype: dtype, metadata)

    @classmethod
    def load(cls, path: Path) -> "Latents":
        """Read a file that `save` has written.

        Raises:
            CheckpointError: the file is missing, damaged, of another format version or of another kind.
        """
        tensors, stated = open_weights(path), read_metadata(path)
        if stated.get("format") != FORMAT:
            raise CheckpointError(f"{path}: holds no latents: `cascade encode` writes such files")
        if missing := [name for name in _FIELDS if name not in stated]:
            raise CheckpointError(f"{path}: its header lacks {', '.join(missing)}")
        if stated["format_version"] != str(VERSION):
            raise CheckpointError(
                f"{path}: latents of format {stated['format_version']!r}; this version reads {VERSION}"
            )
        if list(tensors) != [_NAME]:
            raise CheckpointError(f"{path}: must hold one tensor, {_NAME}, but holds {', '.join(tensors)}")
        stored = tensors[_NAME]
        _check_tensor(path, stored, stated["shape"])
        width, height = (_count(path, name, stated[name]) for name in ("width", "height"))
        try:
            check_size(width, height)
        except InvalidSetting as error:
            raise CheckpointError(f"{path}: the picture's {error.field} {error.message}") from error
        if stated["preset"] not in PRESETS:
            raise CheckpointError(f"{path}: preset {stated['preset']!r} is none of {', '.join(PRESETS)}")
        values = stored.read()
        if not values.isfinite().all():
            raise CheckpointError(f"{path}: {_NAME} has values that are not finite")
        return cls(values, width, height, stated["model"], stated["encoder_sha256"], stated["preset"])

    def check_model(self, models: Models) -> None:
        """Raise `InvalidSetting` unless `models` is known to understand these latents.

        Models with the same encoder do. If a checkpoint has no encoder, its name must be the same.
        """
        if models.effnet is None:
            if models.name != self.model:
                raise InvalidSetting(
                    "model",
                    f"{models.name} has no encoder to compare with that of {self.model}, which made the "
                    "latents; decode them all the same with any_model",
                )
        elif encoder_sha256(models.effnet) != self.encoder_sha256:
            raise InvalidSetting(
                "model",
                f"the latents were made by the encoder of {self.model}, and that of {models.name} is "
                "another; decode them all the same with any_model",
            )


def encoder_sha256(encoder: EffNetEncoder) -> str:
    """Return the checksum of the encoder's weights: names, shapes and fp32 values, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if name.endswith("num_batches_tracked"):  # a training counter, which some layouts leave out
            continue
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False))
    return digest.hexdigest()


def _check_tensor(path: Path, stored: StoredTensor, stated_shape: str) -> None:
    """Raise `CheckpointError` unless the tensor matches the header and can be latents."""
    shape = list(stored.shape)
    if stated_shape != json.dumps(shape):
        raise CheckpointError(f"{path}: {_NAME} has the shape {shape}, but the header states {stated_shape}")
    if stored.dtype is not torch.float32 or len(shape) != 3 or shape[0] != CHANNELS:
        raise CheckpointError(
            f"{path}: {_NAME} must be float32 ({CHANNELS}, h, w), but is {stored.dtype} {shape}"
        )
    if not all(1 <= side <= _MAX_SIDE for side in shape[1:]):
        raise CheckpointError(f"{path}: {_NAME} must have sides from 1 to {_MAX_SIDE}, but is {shape}")


def _count(path: Path, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise CheckpointError(f"{path}: {name} must be a whole number, but is {text[:20]!r}")
    return int(text)
