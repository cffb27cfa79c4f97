"""LoRAs by name from folders whose files come, change and go."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cascade.checkpoints.load import EMBEDDED, load_cascade
from cascade.errors import CheckpointError, InvalidSetting
from cascade.lora import LoRALibrary
from cascade.models import Models
from tests.cascade.lora.files import attention_factors, official, save
from tests.cascade.small_models import small_cascade


@pytest.fixture(scope="module")
def models() -> Models:
    return small_cascade()


def put(folder: Path, name: str, models: Models, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    return save(folder / f"{name}.safetensors", official(attention_factors(models.stage_c, seed)))


def test_it_lists_what_is_there(models: Models, tmp_path: Path) -> None:
    put(tmp_path / "a", "one", models, 1)
    (tmp_path / "a" / "notes.txt").write_text("no LoRA")
    library = LoRALibrary([tmp_path / "a", tmp_path / "b"])
    assert library.names() == ["one"]
    put(tmp_path / "b", "two", models, 2)
    assert library.names() == ["one", "two"]


def test_the_same_uses_are_the_same_adapter(models: Models, tmp_path: Path) -> None:
    put(tmp_path, "one", models, 1)
    library = LoRALibrary([tmp_path])
    adapter = library.adapter(models, [("one", 1)])
    assert adapter is not None
    assert library.adapter(models, [("one", 1.0)]) is adapter
    assert library.adapter(models, [("one", 0.5)]) is not adapter
    assert library.adapter(small_cascade(), [("one", 1.0)]) is not adapter
    assert library.adapter(models, []) is None


def test_changed_files_are_read_again_and_deleted_ones_forgotten(models: Models, tmp_path: Path) -> None:
    path = put(tmp_path, "one", models, 1)
    library = LoRALibrary([tmp_path])
    before = library.adapter(models, [("one", 1.0)])
    put(tmp_path, "one", models, 2)
    os.utime(path, ns=(1, 1))
    after = library.adapter(models, [("one", 1.0)])
    assert before is not None
    assert after is not None
    place = "attention.attn.in_proj"
    block = "down_blocks.0.2"
    assert not before.blocks[block][place].up.equal(after.blocks[block][place].up)
    path.unlink()
    put(tmp_path, "other", models, 1)
    with pytest.raises(InvalidSetting, match="loras: 'one' is not installed; installed are: other"):
        library.adapter(models, [("one", 1.0)])


@pytest.mark.parametrize("name", ["", "nothing", "../one", "one.safetensors", "/etc/passwd"])
def test_only_names_of_files_in_the_folders_are_known(models: Models, tmp_path: Path, name: str) -> None:
    put(tmp_path, "one", models, 1)
    (tmp_path / "inner").mkdir()
    library = LoRALibrary([tmp_path / "inner"])
    with pytest.raises(InvalidSetting, match="installed are: none"):
        library.adapter(models, [(name, 1.0)])


def test_threads_may_share_it(models: Models, tmp_path: Path) -> None:
    for seed in range(4):
        put(tmp_path, f"n{seed}", models, seed)
    library = LoRALibrary([tmp_path])
    asked = [[(f"n{number % 4}", 1.0)] for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        adapters = list(pool.map(lambda uses: library.adapter(models, uses), asked))
    assert len({id(adapter) for adapter in adapters}) == 4


def test_a_checkpoint_brings_those_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(EMBEDDED["tiny"], folder)
    (folder / "SHA256SUMS").unlink()
    (folder / "loras").mkdir(exist_ok=True)
    (folder / "loras" / "damaged.safetensors").write_bytes(b"no such thing")
    models = load_cascade(folder, device="cpu")
    assert models.loras is not None
    save(
        folder / "loras" / "good.safetensors",
        official(attention_factors(models.stage_c, 1)),
    )
    assert {"damaged", "good"} <= set(models.loras.names())
    assert models.loras.adapter(models, [("good", 1.0)]) is not None
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: not a safetensors file"):
        models.loras.adapter(models, [("damaged", 1.0)])


def test_every_lora_that_is_shipped_fits_the_embedded_checkpoint() -> None:
    models = load_cascade("tiny", device="cpu")
    assert models.loras is not None
    assert models.loras.names() == ["azure", "lcm", "night"]
    for name in models.loras.names():
        adapter = models.loras.adapter(models, [(name, 1.0)])
        assert adapter is not None
        assert set(adapter.words) == ({"[azure]"} if name == "azure" else set())
