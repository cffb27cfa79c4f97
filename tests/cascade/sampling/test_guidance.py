"""Guidance: the formula, its limits, and that a row's result does not depend on the other rows."""

import torch

from cascade.sampling.guidance import guide


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def predictions(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, batch, 4, 3, 5, generator=generator, dtype=torch.float64)
    return conditional, unconditional


def test_without_rescale_it_is_the_plain_extrapolation() -> None:
    conditional, unconditional = predictions(3)
    guided = guide(conditional, unconditional, rows(4, 1, 0), rows(0, 0, 0))
    expected = torch.stack(
        [
            unconditional[0] + 4 * (conditional[0] - unconditional[0]),
            conditional[1],
            unconditional[2],
        ]
    )
    torch.testing.assert_close(guided, expected)


def test_rescale_mixes_towards_the_deviation_of_the_conditional_row() -> None:
    conditional, unconditional = predictions(2)
    guided = guide(conditional, unconditional, rows(4, 6), rows(0.7, 1))
    for row, (scale, rho) in enumerate(((4, 0.7), (6, 1))):
        e = unconditional[row] + scale * (conditional[row] - unconditional[row])
        expected = rho * e * conditional[row].std() / (e.std() + 1e-9) + (1 - rho) * e
        torch.testing.assert_close(guided[row], expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(guided[1].std(), conditional[1].std())


def test_a_row_does_not_notice_the_others() -> None:
    conditional, unconditional = predictions(3)
    conditional[2] *= 50
    scale, rescale = rows(4, 2, 8), rows(0.7, 0, 0.7)
    together = guide(conditional, unconditional, scale, rescale)
    for row in range(3):
        one = slice(row, row + 1)
        alone = guide(conditional[one], unconditional[one], scale[one], rescale[one])
        torch.testing.assert_close(together[one], alone)
