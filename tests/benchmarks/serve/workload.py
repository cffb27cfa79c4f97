"""Mixed requests, the same sequence for every server."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

# (width, height) and how often: native sizes, of which diffusers can draw multiples of 128 only.
SIZES = {(256, 256): 6, (384, 256): 2, (256, 384): 2}
STEPS = {(20, 10): 6, (12, 6): 3, (30, 15): 1}  # of Stage C and of Stage B
COUNTS = {1: 8, 2: 1, 4: 1}  # pictures of one request
SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")

Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Order:
    """One request of a client."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    decoder_steps: int
    seed: int
    num_images: int

    @property
    def body(self) -> dict[str, Any]:
        """As both servers understand it."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "size": f"{self.width}x{self.height}",
            "n": self.num_images,
            "seed": self.seed,
            "prior_num_inference_steps": self.steps,
            "prior_guidance_scale": 4.0,
            "decoder_num_inference_steps": self.decoder_steps,
            "response_format": "b64_json",
        }


USUAL = Order("a red circle on a blue background", "", 256, 256, 20, 10, 7, 1)


def usual_orders() -> Iterator[Order]:
    """`USUAL` with one prompt after the other."""
    for colour, shape, ground in product(COLOURS, SHAPES, COLOURS):
        yield replace(USUAL, prompt=f"a {colour} {shape} on a {ground} background")


def orders(seed: int) -> Iterator[Order]:
    """An endless mixed sequence."""
    chance = random.Random(seed)
    while True:
        (width, height), (steps, decoder_steps) = _draw(chance, SIZES), _draw(chance, STEPS)
        shape, colour, ground = (chance.choice(words) for words in (SHAPES, COLOURS, COLOURS))
        yield Order(
            prompt=f"a {colour} {shape} on a {ground} background",
            negative_prompt=chance.choice(("", "", f"a {chance.choice(COLOURS)} square")),
            width=width,
            height=height,
            steps=steps,
            decoder_steps=decoder_steps,
            seed=chance.randrange(2**32),
            num_images=_draw(chance, COUNTS),
        )


def mean_images() -> float:
    """Pictures of a request on average."""
    return sum(count * weight for count, weight in COUNTS.items()) / sum(COUNTS.values())


def _draw(chance: random.Random, weights: dict[Kind, int]) -> Kind:
    return chance.choices(list(weights), list(weights.values()))[0]
