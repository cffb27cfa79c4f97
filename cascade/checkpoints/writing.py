"""Atomic writing of safetensors files and folders: they appear whole or not at all.

Tensors are streamed one by one, so a file larger than memory can be rewritten.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from cascade.checkpoints.stored import DTYPES, StoredTensor
from cascade.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64  # of the first byte of data, so that maps of the file suit vector instructions


def write_tensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    dtype_of: Callable[[str, torch.dtype], torch.dtype],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file; `dtype_of` gives each tensor's new type from its name and present one.

    Raises:
        CheckpointError: no space, no permission, or a value too large for the new type; `path` is untouched.
    """
    # Widest types first keeps every tensor aligned, as in the format's own writer.
    names = sorted(tensors, key=lambda name: (-dtype_of(name, tensors[name].dtype).itemsize, name))
    dtypes = {name: dtype_of(name, tensors[name].dtype) for name in names}
    with atomic_file(path) as file:
        file.write(_header(tensors, dtypes, metadata))
        for name, dtype in dtypes.items():
            values = tensors[name].read()
            converted = values.to(dtype)
            if dtype is torch.float16 and not torch.equal(values.isfinite(), converted.isfinite()):
                raise CheckpointError(f"{path}: {name} has values beyond the range of float16; use bfloat16")
            file.write(converted.reshape(-1).view(torch.uint8).numpy().data)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object, indented."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends, and leaves nothing behind if it fails."""
    with _clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(path)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a folder that becomes `path` when the block ends, and leaves nothing behind if it fails.

    Raises `CheckpointError` if something other than an empty folder is there already.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path}: exists already; name a new folder")
    with _clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_name(path)
        try:
            partial.mkdir()
            yield partial
            partial.replace(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _header(
    tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> bytes:
    """Return length and JSON of the header, padded with spaces as the format allows."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, dtype in dtypes.items():
        shape = tensors[name].shape
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be written: {reason}; nothing was left behind") from error


def _partial_name(path: Path) -> Path:
    """Return a hidden name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
