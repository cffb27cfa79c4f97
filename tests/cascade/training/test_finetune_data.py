"""Finetuning: which pictures are found, how they are grouped, cut and kept."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.errors import InvalidSetting
from cascade.sizes import NativeSizes
from cascade.training.finetune.buckets import BatchOrder, bucket_sizes, nearest_bucket
from cascade.training.finetune.dataset import read_dataset
from cascade.training.finetune.pictures import LatentCache, Pictures, cut, encoded


def picture(width: int = 40, height: int = 30, colour: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_captions_come_from_metadata_text_or_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "an_old-hat.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "b.txt").write_text("  from the\ntext ")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from the list"}))

    captions = {example.name: example.caption for example in read_dataset(tmp_path).examples}

    assert captions == {"a.png": "from the list", "an_old-hat.png": "an old hat", "b.png": "from the text"}


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    shard(
        tmp_path / "0.tar",
        {
            "x/1.png": picture(50, 20, "blue"),
            "x/1.txt": b"a blue bar",
            "x/2.jpg": picture(20, 20, kind="JPEG"),
            "x/2.json": b'{"caption": "a square"}',
            "../../3.png": picture(),
        },
    )

    found = {example.name: example for example in read_dataset(tmp_path).examples}

    assert {name: (e.caption, e.width, e.height) for name, e in found.items()} == {
        "0.tar/x/1": ("a blue bar", 50, 20),
        "0.tar/x/2": ("a square", 20, 20),
        "0.tar/../../3": ("3", 40, 30),
    }
    assert found["0.tar/x/1"].open().getpixel((0, 0)) == (0, 0, 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"]


def test_unusable_files_are_named_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture())
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "long.png").write_bytes(picture())
    (tmp_path / "long.txt").write_text("word " * 3000)

    dataset = read_dataset(tmp_path)

    assert [example.name for example in dataset.examples] == ["good.png"]
    assert [line.partition(":")[0] for line in dataset.skipped] == ["bad.png", "long.png"]
    assert "14,999 characters" in dataset.skipped[1]


def test_an_empty_folder_and_a_malformed_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="holds no picture"):
        read_dataset(tmp_path)
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text('{"text": "no name"}')
    with pytest.raises(InvalidSetting, match=r"metadata.jsonl, line 1: must be"):
        read_dataset(tmp_path)


def test_a_picture_on_its_side_is_turned_and_a_transparent_one_gets_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "side.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")

    clear, side = read_dataset(tmp_path).examples

    assert (side.width, side.height) == side.open().size == (30, 40)
    assert clear.open().getpixel((0, 0)) == (255, 255, 255)


def test_buckets_have_about_one_area_and_sides_of_whole_cells() -> None:
    sizes = bucket_sizes(NativeSizes())

    assert sizes[0] == (1024, 1024)
    assert len(sizes) == 23
    assert all(side % 32 == 0 for size in sizes for side in size)
    assert all(abs(width * height / 1024**2 - 1) < 0.06 for width, height in sizes)
    assert sizes[nearest_bucket(1600, 900, sizes)] == (1376, 768)


def test_an_epoch_shows_every_picture_and_batches_have_one_bucket() -> None:
    buckets = [0] * 7 + [1] * 3
    order = BatchOrder(buckets, 4, seed=1)

    epochs = [[order[epoch * order.per_epoch + i] for i in range(order.per_epoch)] for epoch in (0, 1)]

    assert order.per_epoch == 3
    for epoch in epochs:
        assert {index for _, indices in epoch for index in indices} == set(range(10))
        assert all(buckets[i] == bucket for bucket, indices in epoch for i in indices)
        assert all(len(indices) == 4 for _, indices in epoch)
    assert epochs[0] != epochs[1]
    assert BatchOrder(buckets, 4, seed=1)[4] == order[4]


def test_cutting_keeps_proportions_and_the_middle() -> None:
    image = Image.new("RGB", (90, 30), "white")
    image.paste("red", (30, 0, 60, 30))

    middle = np.array(cut(image, (60, 60), None))
    assert (middle[:, 1:-1] == (255, 0, 0)).all()
    places = {cut(image, (60, 60), np.random.default_rng(seed)).tobytes() for seed in range(4)}
    assert len(places) == 4


def test_latents_are_encoded_once_and_a_damaged_picture_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(32, 32, "red"))
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("RGB").save(file, "PNG")
    (tmp_path / "b.png").write_bytes(file.getvalue()[:700])  # the header is whole, the picture is not
    said: list[str] = []
    seen: list[int] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.mean((2, 3), keepdim=True)

    pictures = Pictures(read_dataset(tmp_path), {0: [0, 1]}, said.append)
    cache = LatentCache(tmp_path / "latents", "weights")
    rngs = [np.random.default_rng(i) for i in range(2)]
    results = [encoded(pictures, [0, 1], 0, (32, 32), encode, cache=cache, rngs=rngs) for _ in range(2)]

    assert [example.name for example in results[0][0]] == ["a.png", "a.png"]
    assert results[0][1].flatten(1).tolist() == results[1][1].flatten(1).tolist() == [[1, 0, 0]] * 2
    assert len(said) == 1
    assert said[0].startswith("skipped b.png")
    assert seen == [2, 1]  # the replaced one has no entry of its own
