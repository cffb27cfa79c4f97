"""In fp32 on a CPU a row of a batch is the same to the last bit as the row alone.

Matrix products of the CPU's library add up a row in the same order in any batch of several; what else is
done in the networks must not depend on the size of the batch either.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cascade.networks.blocks import ResBlock
from cascade.networks.fused import energy, layer_norm
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.networks.unet import Condition
from tests.cascade.networks.reference import noise, randomized
from tests.cascade.small_models import STAGE_B, STAGE_C

ROWS = 7
SIZES = [(3, 3), (6, 6), (6, 9), (12, 5)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def assert_same_alone(
    network: StageB | StageC, latents: Tensor, ratio: Tensor, conditions: list[Condition]
) -> None:
    together = network(latents, ratio, Condition.cat(conditions))
    assert together.std() > 0.01
    for row, condition in enumerate(conditions):
        one = slice(row, row + 1)
        alone = network(latents[one], ratio[one], condition)
        assert torch.equal(together[one], alone), f"row {row}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [2, ROWS])
def test_stage_c(size: tuple[int, int], rows: int) -> None:
    network = randomized(StageC(STAGE_C), seed=1)
    text, pooled = noise(2, rows, 6, 8), noise(3, rows, 1, 8)
    conditions = [
        network.prepare(text[row : row + 1], pooled[row : row + 1], torch.zeros(1, 1, 4))
        for row in range(rows)
    ]
    assert_same_alone(network, noise(4, rows, 16, *size), torch.linspace(0.1, 0.9, rows), conditions)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [2, ROWS])
def test_stage_b(size: tuple[int, int], rows: int) -> None:
    network = randomized(StageB(STAGE_B), seed=1)
    large = (size[0] * 8, size[1] * 8)
    semantic, pooled = noise(2, rows, 16, *size), noise(3, rows, 1, 8)
    conditions = [
        network.prepare(semantic[row : row + 1], pooled[row : row + 1], large) for row in range(rows)
    ]
    assert_same_alone(network, noise(4, rows, 4, *large), torch.linspace(0.1, 0.9, rows), conditions)


@pytest.mark.parametrize("side", [4, 20, 70], ids=["many rows fit", "some rows fit", "a row is too large"])
def test_the_block_with_the_widest_map(side: int) -> None:
    block = randomized(ResBlock(40), seed=5)
    x = noise(6, ROWS, side, side, 40)
    together = block(x)
    for row in range(ROWS):
        assert torch.equal(together[row : row + 1], block(x[row : row + 1]))
        assert torch.equal(energy(x)[row : row + 1], energy(x[row : row + 1]))
        assert torch.equal(layer_norm(x)[row : row + 1], layer_norm(x[row : row + 1]))
