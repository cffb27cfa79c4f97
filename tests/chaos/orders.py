"""What the clients of a chaos run ask for: few distinct requests, so that each has a reference."""

from dataclasses import dataclass, replace
from typing import Any

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "blue", "green", "yellow", "white", "purple")
SIZES = ((256, 256), (256, 256), (384, 256), (128, 128))  # the last is resampled by the embedded checkpoint
NUM_ORDERS = 24
NUM_QUICK_ORDERS = 9  # the first that have every size, guidance on and off, one picture and two


@dataclass(frozen=True, slots=True)
class Order:
    """One request; `number` names its reference."""

    number: int
    prompt: str
    width: int
    height: int
    seed: int
    steps: int
    decoder_steps: int
    guidance_scale: float
    num_images: int

    def body(self, ticket: str) -> dict[str, Any]:
        """For the native API. The ticket travels as metadata, so that a job can be told from its copy."""
        return {
            "prompt": self.prompt,
            "width": self.width,
            "height": self.height,
            "seed": self.seed,
            "num_images_per_prompt": self.num_images,
            "prior_num_inference_steps": self.steps,
            "prior_guidance_scale": self.guidance_scale,
            "decoder_num_inference_steps": self.decoder_steps,
            "metadata": {"ticket": ticket},
        }


def all_orders() -> list[Order]:
    """Every distinct request: sizes, steps, guidance on and off, one picture and two."""
    return [_order(number) for number in range(NUM_ORDERS)]


def long_order() -> Order:
    """One that is aboard for a while: the longest that may be asked for."""
    return replace(all_orders()[1], number=-1, steps=100, decoder_steps=60)


def small_orders() -> list[Order]:
    """Those that take least: thousands of them are done in minutes."""
    return [
        replace(one, number=100 + one.number, width=64, height=64, steps=1, decoder_steps=1, num_images=1)
        for one in all_orders()[:8]
    ]


def _order(number: int) -> Order:
    width, height = SIZES[number % len(SIZES)]
    colour, ground = COLOURS[number % 6], COLOURS[(number + 1 + number // 6) % 6]
    return Order(
        number=number,
        prompt=f"a {colour} {SHAPES[number % 4]} on a {ground} background",
        width=width,
        height=height,
        seed=1000 + number,
        steps=4 + number % 5,
        decoder_steps=2 + number % 3,
        guidance_scale=1.0 if number % 7 == 0 else 4.0,
        num_images=2 if number % 9 == 8 else 1,
    )
