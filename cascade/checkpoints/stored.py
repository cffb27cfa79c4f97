"""Lazy tensors: names, shapes and byte ranges of safetensors files, read only on demand.

A `StoredTensor` is a list of byte ranges that follow one another along the first axis. So renaming, fusing
query, key and value, and splitting them again moves no data; the one read goes straight to its destination.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from cascade.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_SCRATCH_BYTES = 1 << 20  # fits a cache, and is a multiple of every item size
# Below this size, torch converts in the calling thread. Waiting for other threads costs more than they save,
# tenfold on a busy machine.
_SERIAL_ELEMENTS = 1 << 14
_SIGNATURES = {  # first bytes of other formats that users pass by mistake
    b"\x89PNG": "picture",
    b"\xff\xd8\xff": "picture",
    b"RIFF": "picture",
    b"PK\x03\x04": "zip archive",
}
REFUSED_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")


@dataclass(slots=True)
class WeightsFile:
    """A file of tensors, mapped into memory once, when the first tensor asks for it."""

    path: Path
    num_bytes: int
    _mapped: Tensor | None = None

    @property
    def mapped(self) -> Tensor:
        """The whole file as (bytes,) uint8: a private map, so writing to it would not change the file."""
        if self._mapped is None:
            self._mapped = torch.from_file(
                str(self.path), shared=False, size=self.num_bytes, dtype=torch.uint8
            )
        return self._mapped


@dataclass(frozen=True, slots=True)
class FileRange:
    """Range of `size` bytes of a file, starting at `offset`."""

    file: WeightsFile
    offset: int
    size: int

    def part(self, start: int, size: int) -> "FileRange":
        """Return `size` bytes of the range, starting at `start`."""
        return FileRange(self.file, self.offset + start, size)

    def read_into(self, out: Tensor) -> None:
        """Fill `out`, flat uint8 of `size` bytes, without mapping the file, as maps count as memory."""
        view = out.numpy().data
        done = 0
        with self.file.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while done < self.size:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.file.path}: ends early; it was cut while it was read")
                done += count


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """The bytes of a tensor that is already in memory."""

    flat: Tensor  # uint8, (size,)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.flat.numel()

    def part(self, start: int, size: int) -> "MemoryRange":
        """Return `size` bytes of the range, starting at `start`."""
        return MemoryRange(self.flat[start : start + size])

    def read_into(self, out: Tensor) -> None:
        """Fill `out`, a flat uint8 tensor of `size` bytes."""
        out.copy_(self.flat)


Range: TypeAlias = FileRange | MemoryRange


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose data lie elsewhere: `ranges` hold its rows in order, `transposed` swaps its two axes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: tuple[Range, ...]
    transposed: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        """Wrap a tensor in memory, so that it can be translated and written like a stored one."""
        tensor = tensor.detach().cpu().contiguous()
        flat = tensor.reshape(-1).view(torch.uint8)
        return cls(tuple(tensor.shape), tensor.dtype, (MemoryRange(flat),))

    @property
    def num_bytes(self) -> int:
        """Size in bytes in the stored dtype."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Return rows `start` to `stop` of the first axis."""
        assert not self.transposed
        row_bytes = self.num_bytes // self.shape[0]
        return StoredTensor(
            (stop - start, *self.shape[1:]),
            self.dtype,
            _cut(self.ranges, start * row_bytes, stop * row_bytes),
        )

    def transpose(self) -> "StoredTensor":
        """Return the matrix with its two axes swapped."""
        rows, columns = self.shape
        return StoredTensor((columns, rows), self.dtype, self.ranges, not self.transposed)

    def read(self, dtype: torch.dtype | None = None, scratch: Tensor | None = None) -> Tensor:
        """Read the data into new memory, in the stored type or another.

        To convert, stored values pass through `scratch` (flat uint8, a multiple of 8 bytes). Callers use one
        for many tensors: short-lived blocks between the tensors would fragment memory.
        """
        shape = self.shape[::-1] if self.transposed else self.shape
        out = torch.empty(shape, dtype=dtype or self.dtype)
        if out.dtype is self.dtype:
            self._copy(out.view(-1).view(torch.uint8))
        else:
            self._convert(out.view(-1), new_scratch() if scratch is None else scratch)
        return out.T.contiguous() if self.transposed else out

    def _copy(self, out: Tensor) -> None:
        start = 0
        for piece in self.ranges:
            piece.read_into(out[start : start + piece.size])
            start += piece.size

    def _convert(self, out: Tensor, scratch: Tensor) -> None:
        start = 0
        for piece in _chunks(self.ranges, scratch.numel()):
            piece.read_into(scratch[: piece.size])
            values = scratch[: piece.size].view(self.dtype)
            part = out[start : start + values.numel()]
            for first in range(0, values.numel(), _SERIAL_ELEMENTS):
                some = slice(first, first + _SERIAL_ELEMENTS)
                part[some] = values[some]
            start += values.numel()

    def map(self) -> Tensor:
        """Return a private, copy-on-write map of the file if one aligned range has all data, else `read()`.

        The file must not be changed in place while the tensor lives; replacing it by rename is harmless.
        """
        piece = self.ranges[0]
        if len(self.ranges) > 1 or self.transposed or not isinstance(piece, FileRange) or not piece.size:
            return self.read()
        if piece.offset % self.dtype.itemsize:
            return self.read()
        whole = piece.file.mapped
        return whole[piece.offset : piece.offset + piece.size].view(self.dtype).view(self.shape)


def new_scratch() -> Tensor:
    """Allocate the `scratch` of `StoredTensor.read`."""
    return torch.empty(_SCRATCH_BYTES, dtype=torch.uint8)


def concatenate(parts: Iterable[StoredTensor]) -> StoredTensor:
    """Join `parts` along the first axis; they must agree in dtype and other axes."""
    parts = list(parts)
    assert not any(part.transposed for part in parts)
    assert len({(part.dtype, part.shape[1:]) for part in parts}) == 1
    rows = sum(part.shape[0] for part in parts)
    ranges = tuple(piece for part in parts for piece in part.ranges)
    return StoredTensor((rows, *parts[0].shape[1:]), parts[0].dtype, ranges)


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file. Checks the whole header against the file, reads no data.

    Raises `CheckpointError` for pickles, and for truncated, foreign or inconsistent files.
    """
    refuse_pickles(path)
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    file = WeightsFile(path, path.stat().st_size)
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    _check_layout(file, tensors, start)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free text entries of a safetensors header."""
    metadata = _read_header(path)[0].get("__metadata__", {})
    return {str(key): str(value) for key, value in metadata.items()}


def refuse_pickles(path: Path) -> None:
    """Raise `CheckpointError` for formats that can carry code."""
    if path.suffix.lower() in REFUSED_SUFFIXES:
        raise CheckpointError(
            f"{path}: {path.suffix} files are pickles, which run code when opened, and are never read; "
            "use the .safetensors file of the same model"
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header as a dictionary, and the position where the data begin."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: not a safetensors file: it has only {len(prefix)} bytes")
            for signature, kind in _SIGNATURES.items():
                if prefix.startswith(signature):
                    raise CheckpointError(f"{path}: not a safetensors file, but a {kind}")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut: its header claims {length:,} bytes, "
                    f"the file has {size:,}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    if not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(f"{path}: the header entry of __metadata__ is malformed")
    return header, 8 + length


def _tensor(file: WeightsFile, name: str, entry: Any, start: int) -> StoredTensor:
    """Check one header entry and return its tensor; `start` is where the data begin."""
    path = file.path
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} is malformed") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: the header entry of {name} has a shape or offset that is not a count")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{path}: {name} has the dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    if max(shape, default=0) > file.num_bytes:  # even of an empty tensor
        raise CheckpointError(f"{path}: its header lies: {name} cannot have the shape {shape}")
    if not begin <= end <= file.num_bytes - start:
        raise CheckpointError(
            f"{path}: cut, or its header lies: {name} should end at byte {start + end:,}, "
            f"the file has {file.num_bytes:,}"
        )
    tensor = StoredTensor(tuple(shape), DTYPES[dtype_name], (FileRange(file, start + begin, end - begin),))
    if tensor.num_bytes != end - begin:
        raise CheckpointError(
            f"{path}: its header lies: {name} is {dtype_name} {shape}, {tensor.num_bytes:,} bytes, "
            f"but {end - begin:,} are set aside for it"
        )
    return tensor


def _check_layout(file: WeightsFile, tensors: Mapping[str, StoredTensor], start: int) -> None:
    """Raise unless every byte belongs to one tensor, as the format demands: no overlap, hole or rest."""
    position = start
    ranges = {name: cast(FileRange, tensor.ranges[0]) for name, tensor in tensors.items()}
    for name, piece in sorted(ranges.items(), key=lambda item: (item[1].offset, item[1].size)):
        if piece.offset != position:
            fault = "overlaps another tensor" if piece.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{file.path}: its header lies: {name} {fault}")
        position += piece.size
    if position != file.num_bytes:
        rest = file.num_bytes - position
        raise CheckpointError(f"{file.path}: {rest:,} bytes at its end belong to no tensor")


def _chunks(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """Yield the same bytes in pieces of at most `size`."""
    for piece in ranges:
        for start in range(0, piece.size, size):
            yield piece.part(start, min(size, piece.size - start))


def _cut(ranges: Iterable[Range], start: int, stop: int) -> tuple[Range, ...]:
    """Return bytes `start` to `stop` of the joined `ranges`."""
    cut = []
    position = 0
    for piece in ranges:
        begin, end = max(start - position, 0), min(stop - position, piece.size)
        if begin < end:
            cut.append(piece.part(begin, end - begin))
        position += piece.size
    return tuple(cut)
