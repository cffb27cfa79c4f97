"""Networks that start faster on a GPU: CUDA graphs for usual numbers of rows, and compiled blocks.

A step of many small operators waits for the host to start each of them. A graph is the whole step, recorded
once for a shape and a number of rows, and started as one. Eager is always there: for other devices, and for
rows beyond the largest graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from cascade.networks.unet import Condition, UNet
from cascade.recent import Recent
from cascade.sampling.denoise import Network

Compile = Literal["off", "graphs", "full"]
GRAPH_ROWS = (1, 2, 4, 8, 16)
MAX_GRAPHS = 16  # of a network; the buffers of one hold up to 0.7 GB of keys and values at full size

_KINDS = 64  # of blocks by width, skip and size of the map: more are not compiled

# Records what a function does to the tensors it reads, and returns what does the same again
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Denoiser(Protocol):
    """Stage B or C."""

    def __call__(self, latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Predict the noise."""


def accelerate(network: UNet, mode: Compile, device: torch.device) -> Network[Condition]:
    """The network as fast as `mode` allows on CUDA. On a CPU itself: compiled blocks are slower there."""
    if mode == "off" or device.type != "cuda":
        return network
    if mode == "full":
        torch._dynamo.config.recompile_limit = _KINDS  # noqa: SLF001  # blocks share code, so all count as one
        for block in repeated_blocks(network):
            block.compile(dynamic=True)  # code for any number of rows, not one for each
    return Graphs(network, CudaRecorder(device))


def repeated_blocks(network: UNet) -> list[nn.Module]:
    """The blocks of all levels. Those of one kind and width share their compiled code."""
    levels = [*network.down_blocks, *network.up_blocks]
    return [block for level in levels for block in level.children()]


class CudaRecorder:
    """Records CUDA graphs that use the same memory in between.

    Of its graphs one is replayed at a time, and what it returned is copied before the next one is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A graph of `run`, which is warmed up before: first calls allocate."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # The other thread that decodes and copies meanwhile must not break the recording.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = run()
            except BaseException:
                self.__dict__.pop("_pool", None)  # it may still count as being recorded to
                raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @cached_property
    def _pool(self) -> "torch.cuda._POOL_HANDLE":
        return torch.cuda.graph_pool_handle()


@dataclass(slots=True)
class _Graph:
    """A recorded step and the tensors that it reads."""

    latents: Tensor
    ratio: Tensor
    condition: Condition
    replay: Callable[[], Tensor]
    holds: Condition | None = None  # the condition whose rows were copied in last


class Graphs:
    """A network whose calls of up to 16 rows replay a graph; missing rows are filled with zeros.

    The graph of a shape and a number of tokens is recorded by the first call, so whoever cannot wait calls
    it before. The graphs that were not used for longest are dropped.
    """

    def __init__(self, network: Denoiser, record: Recorder) -> None:
        self._network = network
        self._record = record
        self._graphs: Recent[tuple[torch.Size, int, int], _Graph] = Recent(MAX_GRAPHS)

    def __call__(self, latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Predict the noise, as the network does."""
        size = next((size for size in GRAPH_ROWS if size >= len(latents)), None)
        # What ControlNets and LoRAs add is not recorded.
        if size is None or condition.control is not None or condition.adapters is not None:
            return self._network(latents, ratio, condition)
        key = (latents.shape[1:], condition.num_tokens, size)
        graph = self._graphs.get(key, lambda _: self._recorded(latents, condition, size))
        rows = len(latents)
        graph.latents[:rows] = latents
        graph.ratio[:rows] = ratio
        if graph.holds is not condition:
            _fill(graph.condition, condition)
            graph.holds = condition
        return graph.replay()[:rows].clone()  # the next replay writes where this one wrote

    def _recorded(self, latents: Tensor, condition: Condition, size: int) -> _Graph:
        """A graph for `size` rows, with buffers of its own."""
        still = latents.new_zeros(size, *latents.shape[1:])
        ratio = latents.new_zeros(size, dtype=torch.float32)
        room = Condition(
            keys_values=tuple(_room(each, size) for each in condition.keys_values),
            constants=condition.constants,
            features=None if condition.features is None else _room(condition.features, size),
        )
        replay = self._record(lambda: self._network(still, ratio, room))
        return _Graph(still, ratio, room, replay)


def _room(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros(rows, *like.shape[1:])


def _fill(room: Condition, condition: Condition) -> None:
    for place, rows in zip(room.keys_values, condition.keys_values, strict=True):
        place[: len(rows)] = rows
    if room.features is not None and condition.features is not None:
        room.features[: len(condition.features)] = condition.features
