"""Faster networks on a GPU: CUDA graphs for the usual numbers of rows, and compiled blocks.

A step of many small operators waits for the host to launch each of them. A graph is a whole step, recorded
once per shape and number of rows, and launched at once. Eager mode serves other devices and calls with more
rows than the largest graph.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
MAX_GRAPHS = 4  # per network, beside those kept; the buffers of one take up to 0.7 GB at full size
CALLS_BEFORE_GRAPH = 24  # eager ones: more than the steps of a usual picture
MAX_COUNTED = 1000  # keys whose calls are counted

_KINDS = 64  # of blocks, by width, skip and size of the feature map: further ones are not compiled

# Shape of the latents without rows, tokens of the condition, rows of the graph
GraphKey = tuple[torch.Size, int, int]

# Records what a function does to the tensors that it reads, and returns a function that replays it
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Denoiser(Protocol):
    """A network that predicts noise: Stage B or C."""

    def __call__(self, latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Predict the noise."""


def accelerate(network: UNet, mode: Compile, device: torch.device) -> Network[Condition]:
    """Accelerate a network on CUDA as `mode` allows; not on a CPU, where compiled blocks are slower."""
    if mode == "off" or device.type != "cuda":
        return network
    if mode == "full":
        torch._dynamo.config.recompile_limit = _KINDS  # noqa: SLF001  # blocks share code, and so this limit
        for block in repeated_blocks(network):
            block.compile(dynamic=True)  # one version for all numbers of rows
    return Graphs(network, CudaRecorder(device))


def repeated_blocks(network: UNet) -> list[nn.Module]:
    """Return the blocks of all levels. Blocks of one kind and width share their compiled code."""
    levels = [*network.down_blocks, *network.up_blocks]
    return [block for level in levels for block in level.children()]


@contextmanager
def keeping_graphs(networks: Iterable[Network[Condition]]) -> Iterator[None]:
    """Within, the networks record all their graphs at once and keep them for good."""
    graphs = [network for network in networks if isinstance(network, Graphs)]
    for each in graphs:
        each.keeps_all = True
    yield
    for each in graphs:
        each.keeps_all = False


class CudaRecorder:
    """Recorder of CUDA graphs that share the memory of their intermediate results.

    Only one of its graphs may be replayed at a time, and its result must be copied before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a graph of `run`, after warm-up calls: the first calls allocate memory."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Another thread, which decodes and copies meanwhile, must not break the recording.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = run()
            except BaseException:
                self.__dict__.pop("_pool", None)  # PyTorch may still consider it in use by a recording
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
    holds: Condition | None = None  # the condition last copied into `condition`


class Graphs:
    """A network whose calls of up to 16 rows replay a graph; what the missing rows hold does not matter.

    A graph serves one shape, number of tokens and number of rows. To record it takes as long as several
    calls, so it is recorded when these come often, or at once while `keeps_all` is set: before requests come.
    """

    def __init__(self, network: Denoiser, record: Recorder, *, keeps_all: bool = False) -> None:
        self.keeps_all = keeps_all
        self._network = network
        self._record = record
        self._kept: dict[GraphKey, _Graph] = {}
        self._recent: Recent[GraphKey, _Graph] = Recent(MAX_GRAPHS)
        self._num_calls: Counter[GraphKey] = Counter()  # without a graph

    def __call__(self, latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Predict the noise, as the network does."""
        size = next((size for size in GRAPH_ROWS if size >= len(latents)), None)
        # What ControlNets and LoRAs add is not recorded.
        if size is None or condition.control is not None or condition.adapters is not None:
            return self._network(latents, ratio, condition)
        key = (latents.shape[1:], condition.num_tokens, size)
        if not (key in self._kept or key in self._recent or self.keeps_all or self._comes_often(key)):
            return self._network(latents, ratio, condition)
        graph, rows = self._graph(key, latents, condition), len(latents)
        graph.latents[:rows] = latents
        graph.ratio[:rows] = ratio
        if graph.holds is not condition:
            _fill(graph.condition, condition)
            graph.holds = condition
        return graph.replay()[:rows].clone()  # the next replay writes where this one wrote

    def drop(self) -> None:
        """Free the buffers of the graphs that were recorded for requests."""
        self._recent.clear()

    def _comes_often(self, key: GraphKey) -> bool:
        """Count a call; return whether there were so many since the graph, if any, was dropped."""
        if len(self._num_calls) > MAX_COUNTED:
            self._num_calls.clear()
        self._num_calls[key] += 1
        if self._num_calls[key] <= CALLS_BEFORE_GRAPH:
            return False
        del self._num_calls[key]
        return True

    def _graph(self, key: GraphKey, latents: Tensor, condition: Condition) -> _Graph:
        if key not in self._kept and not self.keeps_all:
            return self._recent.get(key, lambda key: self._recorded(latents, condition, key[-1]))
        if key not in self._kept:
            self._kept[key] = self._recorded(latents, condition, key[-1])
        return self._kept[key]

    def _recorded(self, latents: Tensor, condition: Condition, size: int) -> _Graph:
        """Record a graph for `size` rows, with input buffers of its own."""
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
