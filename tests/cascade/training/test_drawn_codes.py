from pathlib import Path

import pytest
import torch

import cascade.tiny
from cascade.training import drawn_codes as module
from cascade.training.code import read_code
from cascade.training.drawn_codes import drawn_codes

EMBEDDED = Path(cascade.tiny.__path__[0])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training run whose networks are the embedded ones."""
    monkeypatch.setattr(module, "_AT_ONCE", 4)
    for name in ("prior", "effnet_encoder", "text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    return tmp_path


def test_codes_mean_their_scenes_and_are_made_once(run: Path) -> None:
    codes, scenes = drawn_codes(run, 8)
    assert codes.shape == (len(scenes), 16, 6, 6)
    assert 8 < len(scenes) <= 16  # eight of the encoder and most of Stage C's
    for code, scene in zip(codes, scenes, strict=True):
        read = read_code(code.numpy(), (256, 256))
        assert {thing.shape for thing in read.things} == {thing.shape for thing in scene.things}
    (run / "prior").unlink()
    again, same_scenes = drawn_codes(run, 8)
    assert torch.equal(again, codes)
    assert same_scenes == scenes
