import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.checkpoints.stored import StoredTensor, concatenate, open_weights, read_metadata
from cascade.errors import CheckpointError


@pytest.fixture
def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "matrix": torch.randn(6, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(4),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
    }


@pytest.fixture
def file(values: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(values, path, metadata={"origin": "here"})
    return path


def test_tensors_are_read_and_mapped_as_they_were_saved(file: Path, values: dict[str, Tensor]) -> None:
    stored = open_weights(file)
    assert stored.keys() == values.keys()
    for name, value in values.items():
        assert stored[name].shape == tuple(value.shape)
        for tensor in (stored[name].read(), stored[name].map()):
            assert tensor.dtype is value.dtype
            assert torch.equal(tensor, value), name


def test_a_misaligned_tensor_is_read_instead_of_mapped(tmp_path: Path) -> None:
    """The format's own writer aligns; older writers did not."""
    path = tmp_path / "odd.safetensors"
    entries = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "value": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<Bf", 7, 2.5))
    stored = open_weights(path)
    assert stored["value"].map().tolist() == stored["value"].read().tolist() == [2.5]


def test_values_are_converted_on_the_way(values: dict[str, Tensor], file: Path) -> None:
    stored = open_weights(file)
    scratch = torch.empty(16, dtype=torch.uint8)  # many pieces
    assert torch.equal(stored["matrix"].read(torch.bfloat16, scratch), values["matrix"].bfloat16())
    assert torch.equal(stored["half"].read(torch.float32), values["half"].float())
    assert torch.equal(stored["matrix"].transpose().read(torch.float64, scratch), values["matrix"].T.double())


def test_a_changed_map_does_not_change_the_file(file: Path, values: dict[str, Tensor]) -> None:
    open_weights(file)["matrix"].map().zero_()
    assert torch.equal(open_weights(file)["matrix"].read(), values["matrix"])


def test_rows_and_joined_rows_are_the_same_bytes(file: Path, values: dict[str, Tensor]) -> None:
    matrix = open_weights(file)["matrix"]
    upper, lower = matrix.rows(0, 2), matrix.rows(2, 6)
    assert torch.equal(lower.read(), values["matrix"][2:])
    joined = concatenate([lower, upper])
    assert torch.equal(joined.read(), torch.cat([values["matrix"][2:], values["matrix"][:2]]))
    assert torch.equal(joined.rows(3, 5).read(), joined.read()[3:5])
    assert torch.equal(joined.map(), joined.read())


def test_a_transposed_tensor_is_read_transposed(file: Path, values: dict[str, Tensor]) -> None:
    transposed = open_weights(file)["matrix"].transpose()
    assert transposed.shape == (5, 6)
    assert torch.equal(transposed.read(), values["matrix"].T)
    assert torch.equal(transposed.map(), values["matrix"].T)


def test_tensors_in_memory_count_as_stored() -> None:
    value = torch.arange(12.0).view(3, 4).T
    assert torch.equal(StoredTensor.of(value).read(), value)
    assert torch.equal(StoredTensor.of(value).rows(1, 3).read(), value[1:3])


def test_metadata_is_read(file: Path) -> None:
    assert read_metadata(file) == {"origin": "here"}


def test_every_cut_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 3, 8, 40, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: "):
            open_weights(file)


def test_a_header_that_ends_after_the_file_is_told_as_such(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"or cut: its header claims [\d,]+ bytes, the file has 40"):
        open_weights(file)


@pytest.mark.parametrize(
    ("start", "kind"), [(b"\x89PNG\r\n\x1a\n", "picture"), (b"PK\x03\x04\0\0\0\0", "zip archive")]
)
def test_what_is_handed_in_instead_is_named(file: Path, start: bytes, kind: str) -> None:
    file.write_bytes(start + file.read_bytes())
    with pytest.raises(CheckpointError, match=f"not a safetensors file, but a {kind}$"):
        open_weights(file)


def test_bytes_at_the_end_are_noticed(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="4 bytes at its end belong to no tensor"):
        open_weights(file)


def rewrite_header(file: Path, change: Callable[[dict], object]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


LIES: dict[str, tuple[Callable[[dict], object], str]] = {
    "larger shape": (lambda h: h["matrix"].update(shape=[60, 5]), "header lies: matrix is F32"),
    "other dtype": (lambda h: h["half"].update(dtype="F32"), "header lies: half is F32"),
    "unknown dtype": (lambda h: h["half"].update(dtype="Q4"), "dtype 'Q4'; known are"),
    "negative offset": (lambda h: h["half"].update(data_offsets=[-8, 6]), "not a count"),
    "huge shape": (lambda h: h["half"].update(shape=[2**70]), "header lies: half"),
    "fractional shape": (lambda h: h["half"].update(shape=[3.5, 2]), "not a count"),
    "backwards": (lambda h: h["half"].update(data_offsets=[20, 6]), "half"),
    "past the end": (lambda h: h["flags"].update(data_offsets=[2**40, 2**40 + 3]), "should end at byte"),
    "several dtypes": (lambda h: h["half"].update(dtype=["F32"]), r"dtype \['F32'\]; known are"),
    "huge and empty": (
        lambda h: h["empty"].update(shape=[10**15, 0, 1, 1]),
        "lies: empty cannot have the shape",
    ),
    "list of metadata": (lambda h: h.update(__metadata__=[1]), "entry of __metadata__ is malformed"),
    "no shape": (lambda h: h["flags"].pop("shape"), "entry of flags is malformed"),
    "not an entry": (lambda h: h.update(flags=7), "entry of flags is malformed"),
    "text for a shape": (lambda h: h["flags"].update(shape="abc"), "not a count"),
    "overlap": (lambda h: h.update(twin=h["matrix"]), "overlaps another tensor"),
    "hole": (lambda h: h.pop("matrix"), "half leaves a hole before it"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, file: Path) -> None:
    change, message = LIES[lie]
    rewrite_header(file, change)
    with pytest.raises(CheckpointError, match=message) as error:
        open_weights(file)
    assert str(error.value).startswith(f"{file}: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + b"zip archive" * 20,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2_000) + b"[" * 2_000,
    ],
    ids=["zip", "endless header", "not text", "a list", "deep nesting"],
)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors: not a safetensors file"):
        open_weights(path)


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt", "pth", "pkl", "CKPT"])
def test_pickles_are_refused_unopened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    with pytest.raises(CheckpointError, match="pickles, which run code"):
        open_weights(path)  # it does not even exist


def test_a_file_cut_after_opening_is_noticed(file: Path) -> None:
    stored = open_weights(file)
    lengths = {name: tensor.num_bytes for name, tensor in stored.items()}
    file.write_bytes(file.read_bytes()[: -lengths["flags"]])  # the narrowest type lies last
    with pytest.raises(CheckpointError, match="ends early"):
        stored["flags"].read()
