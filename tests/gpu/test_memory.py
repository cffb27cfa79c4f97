"""Pictures one after the other take no more memory of a CUDA device than the first few."""

from collections.abc import Iterator

import pytest
import torch

from cascade.checkpoints.load import load_cascade
from cascade.tasks.drawing import Drawing, Studio
from cascade.tasks.picture import plan_pictures
from cascade.tasks.settings import ImageSettings

pytestmark = pytest.mark.gpu

SEEN_BEFORE = 2  # pictures until every buffer is there
PICTURES = 10


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu: no CUDA device is here", returncode=2)
    yield
    torch.cuda.empty_cache()


def test_stage_a_and_previews_keep_to_the_memory_they_had() -> None:
    models = load_cascade("tiny", device="cuda", dtype="bfloat16")
    studio = Studio(models, {"prior": models.stage_c, "decoder": models.stage_b})
    [picture] = plan_pictures(models, ImageSettings(prompt="a red circle", seed=1, steps=4, decoder_steps=2))
    held: list[int] = []
    for _ in range(PICTURES):
        drawing = Drawing(picture, models)
        studio.begin(drawing)
        while drawing.stage != "decode":
            studio.step([drawing], rows=2)
            studio.preview(drawing)
        [finish] = studio.decode([drawing])
        assert finish().size == (256, 256)
        held.append(torch.cuda.memory_reserved())
    assert held[-1] == held[SEEN_BEFORE], held
