"""CudaDevice: a GPU as a Device: work goes to the current stream, downloads to a stream of their own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor


class CudaEvent:
    """An `Event` on a GPU."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    @property
    def is_done(self) -> bool:
        """Whether all work before it is over."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Hold up the caller, but no other thread of Python, until it is."""
        self._event.synchronize()


class CudaGraph:
    """A `Graph` of a GPU; its memory lies in a pool that all graphs of a `CudaDevice` share."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor, num_bytes: int) -> None:
        self._graph = graph
        self.output = output
        self.num_bytes = num_bytes

    def replay(self) -> None:
        """Queue the captured kernels on the current stream."""
        self._graph.replay()


class CudaDevice:
    """A `Device` whose work runs on the caller's current stream, beside which results are copied to the host.

    Whatever else the process does on that stream, loading weights or moving blocks to the host, keeps its place in the
    order. None of the calls waits for the GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captures = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # those that somebody still has

    def host_bytes(self, num_bytes: int) -> Tensor:
        """Allocate pinned host memory."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, source: Tensor, destination: Tensor) -> None:
        """Copy host memory to the GPU, in the stream's order."""
        destination.copy_(source, non_blocking=True)

    def launch(self, work: Callable[[], None]) -> None:
        """Queue the kernels that the work launches."""
        work()

    def download(self, source: Tensor, destination: Tensor) -> None:
        """Copy to the host, once the work launched so far is over; later work does not wait for it."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            destination.copy_(source, non_blocking=True)

    def capture(self, work: Callable[[], Tensor]) -> CudaGraph:
        """Capture work on a stream of its own; this alone waits for the GPU.

        Graphs share their memory, since one runs after the other. Other threads may go on using the GPU.
        """
        sharing = next(iter(self._graphs), None)  # torch takes no pool whose graphs are all gone
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), _same_stream_after(self._device), _without_collecting():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            num_free, _ = torch.cuda.mem_get_info()
            with torch.cuda.graph(
                graph,
                pool=None if sharing is None else sharing.pool(),
                stream=self._captures,
                capture_error_mode="thread_local",
            ):
                output = work()
            left, _ = torch.cuda.mem_get_info()
        self._graphs.add(graph)
        return CudaGraph(graph, output, max(0, num_free - left))

    def record(self) -> CudaEvent:
        """Return the point that all work and all copies so far lead to."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._copies)
        return CudaEvent(event)


@contextmanager
def _same_stream_after(device: torch.device) -> Iterator[None]:
    """Return to the current stream, where torch stays on the one that captures if a capture ends in an error."""
    stream = torch.cuda.current_stream(device)
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Keep the collector from freeing what belongs to the GPU, such as a kernel: that would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
