"""CudaDevice: what it asks of torch to capture, on a stand-in for its CUDA part; and on a GPU what comes of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch
from torch import Tensor

from octavo_engine.runner.cuda_device import CudaDevice

GPU = torch.device("cuda", 1)


class CapturedGraph:
    def pool(self) -> tuple[int, int]:
        return 0, 7


class StandIn(SimpleNamespace):
    """torch.cuda as far as captures go: streams by name, memory that each capture takes from, pools by number."""

    def __init__(self) -> None:
        super().__init__(current="first", pools=[], free=1000, Stream=lambda device: f"own of {device}")
        self.CUDAGraph = CapturedGraph
        self.synchronize = self.empty_cache = lambda: None
        self.mem_get_info = lambda: (self.free, 2000)
        self.current_stream = lambda device: self.current
        self.set_stream = lambda stream: setattr(self, "current", stream)
        self.device = nullcontext

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        """Capture as torch does: an error leaves the stream as it is."""
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream
        self.pools.append(pool)
        yield
        self.free -= 30
        self.current = before


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(torch, "cuda", stand_in)
    return stand_in


def test_work_is_captured_on_a_stream_of_its_gpu_and_says_what_it_took(stand_in: StandIn) -> None:
    seen: list[str] = []

    def work() -> Tensor:
        seen.append(stand_in.current)
        return torch.zeros(2)

    graph = CudaDevice(GPU).capture(work)
    assert (seen, stand_in.current, graph.num_bytes) == (["own of cuda:1"], "first", 30)
    assert torch.equal(graph.output, torch.zeros(2))


def test_graphs_share_the_memory_of_those_that_there_are(stand_in: StandIn) -> None:
    device = CudaDevice(GPU)
    graphs = [device.capture(lambda: torch.zeros(2)) for _ in range(2)]
    assert stand_in.pools == [None, (0, 7)]
    graphs.clear()
    device.capture(lambda: torch.zeros(2))
    assert stand_in.pools[2] is None  # torch would refuse the old one


def test_a_capture_that_fails_leaves_the_stream_where_it_was(stand_in: StandIn) -> None:
    def work() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaDevice(GPU).capture(work)
    assert stand_in.current == "first"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_on_what_lies_in_the_memory_now() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    device, x = CudaDevice(gpu), torch.ones(1000, device=gpu)

    def adding(number: int) -> Callable[[], Tensor]:
        return lambda: (x * 2 + number).cumsum(0)

    def broken() -> Tensor:
        return x * float(x.sum())

    graphs = []
    for number in (0, 1):
        adding(number)()
        graphs.append(device.capture(adding(number)))
    x.fill_(3)
    stream = torch.cuda.current_stream(gpu)
    with pytest.raises(RuntimeError):
        device.capture(broken)
    assert torch.cuda.current_stream(gpu) == stream
    for number, graph in enumerate(graphs):
        graph.replay()
        assert torch.equal(graph.output, adding(number)())
    graphs.clear()
    del graph
    again = device.capture(adding(2))
    again.replay()
    assert torch.equal(again.output, adding(2)())
