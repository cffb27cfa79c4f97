"""The library in a process of its own, which is started as the server starts its engines.

It reads an order per line, draws and encodes the picture, and answers with a line.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO

from app.settings import engine_environment
from app.storage.encoding import encode
from tests.benchmarks.serve.workload import Order
from tests.server_process import ROOT

READY = "ready\n"


class Library:
    """The parent's end."""

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self._orders = orders
        self._answers = answers
        self._wait()

    def draw(self, order: Order) -> None:
        """One picture, as a file."""
        self._orders.write(json.dumps(asdict(order)) + "\n")
        self._orders.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._answers.readline() == READY, "the library's process has ended"


@contextmanager
def library(model: str) -> Iterator[Library]:
    """The library with the weights of `model`, loaded."""
    words = [sys.executable, "-m", __name__, model]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, cwd=ROOT, env=engine_environment(), stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Library(process.stdin, process.stdout)


def main() -> None:
    """The child's end: until there are no more orders."""
    from cascade import Cascade
    from cascade.cpu import keep_freed_memory, suit_threads

    keep_freed_memory()
    cascade = Cascade.from_pretrained(sys.argv[1], device="cpu", dtype="float32")
    suit_threads(cascade)
    sys.stdout.write(READY)
    sys.stdout.flush()
    for line in sys.stdin:
        order = Order(**json.loads(line))
        [made] = cascade.text_to_image(
            order.prompt,
            seed=order.seed,
            width=order.width,
            height=order.height,
            steps=order.steps,
            guidance_scale=4.0,
            decoder_steps=order.decoder_steps,
        )
        encode(made.image, "png", quality=100)
        sys.stdout.write(READY)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
