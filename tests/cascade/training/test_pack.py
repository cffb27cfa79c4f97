import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade import Cascade, CheckpointError
from cascade.checkpoints.save import save_component
from cascade.config import EffNetConfig, EffNetStage, PreviewerConfig
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.previewer import Previewer
from cascade.training.loop import STATE_FILE
from cascade.training.pack import num_bytes, pack
from cascade.training.scenes import NATIVE_SIZES
from cascade.training.stage_b import SCHEDULE as DECODER_SCHEDULE
from cascade.training.stage_c import SCHEDULE as PRIOR_SCHEDULE
from cascade.training.times import training_time
from tests.cascade.diffusers_pipelines import random_pipelines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose components are all there, with random weights, beside the state of a training."""
    run = tmp_path_factory.mktemp("run")
    random_pipelines(0).save(run)
    for name in ("model_index.json", "scheduler"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    encoder = EffNetEncoder(EffNetConfig(8, (EffNetStage("fused", 1, 2, 8, 1),), 16))
    save_component(encoder, run / "effnet_encoder")
    save_component(Previewer(PreviewerConfig(hidden_channels=8)), run / "previewer")
    (run / "text_encoder").rename(run / "free_text_encoder")
    (run / "stage_c").mkdir()
    save_file({"module.clf.1.weight": torch.zeros(3)}, run / "stage_c" / "training.safetensors")
    return run


def test_a_packed_run_is_an_ordinary_checkpoint_in_half_precision(trained: Path, tmp_path: Path) -> None:
    pack(trained, tmp_path / "tiny")
    packed = Cascade.from_pretrained(tmp_path / "tiny")
    assert packed.native.resamples
    assert packed.native.sizes == NATIVE_SIZES
    assert (packed.prior_schedule, packed.decoder_schedule) == (PRIOR_SCHEDULE, DECODER_SCHEDULE)
    assert packed.effnet is not None
    assert packed.previewer is not None
    weights = load_file(tmp_path / "tiny" / "prior" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert num_bytes(tmp_path / "tiny") < 0.6 * num_bytes(trained)


def test_the_times_of_the_training_go_into_the_checkpoint_and_its_checksums(
    trained: Path, tmp_path: Path
) -> None:
    pack(trained, tmp_path / "untimed")
    assert training_time(tmp_path / "untimed") == ""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for name, seconds in (("stage_b", 7230.5), ("text_training", 600.0)):
        (run / name).mkdir()
        progress = json.dumps({"step": 3, "seconds": seconds})
        save_file({"x": torch.zeros(1)}, run / name / STATE_FILE, metadata={"progress": progress})
    pack(run, tmp_path / "timed")
    sentence = training_time(tmp_path / "timed")
    assert sentence == "The training took, by the clock: `stage_b` 121 min, `text` 10 min."
    assert "  training.json\n" in (tmp_path / "timed" / "SHA256SUMS").read_text()
    assert Cascade.from_pretrained(tmp_path / "timed").previewer is not None
    recorded = json.loads((tmp_path / "timed" / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(recorded | {"note": "In two parts."}))
    assert training_time(tmp_path) == f"{sentence} In two parts."


def test_packing_again_replaces_the_old_checkpoint(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "old.txt").touch()
    pack(trained, tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "old.txt").exists()
    assert json.loads((tmp_path / "tiny" / "model_index.json").read_text())["native_sizes"][0] == [256, 256]
    assert "old.txt" not in {path.name for path in trained.rglob("*")}


def test_an_unfinished_run_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    with pytest.raises(CheckpointError, match="not trained yet: decoder, vqgan"):
        pack(tmp_path, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
