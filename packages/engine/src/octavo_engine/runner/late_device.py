"""LateDevice: a Device for tests that computes on the CPU, late, and hands results over in another order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

POISON = 0xFF
"""Each byte of host memory that a download has still to fill: -1 as an integer, NaN as a float."""


@dataclass(slots=True)
class _Work:
    """Something to do: the number it has among everything, and up to which number launched work must be over first."""

    number: int
    after: int
    tick: int
    run: Callable[[], None]


@dataclass(slots=True)
class LateGraph:
    """A `Graph` of a LateDevice: the work is called anew, so that what it decides in Python is decided again."""

    work: Callable[[], Tensor]
    output: Tensor
    num_bytes: int
    num_replays: int = 0

    def replay(self) -> None:
        """Do the work."""
        self.num_replays += 1
        self.output.copy_(self.work())


class LateEvent:
    """An `Event` of a LateDevice."""

    def __init__(self, device: LateDevice, number: int) -> None:
        self._device = device
        self._number = number

    @property
    def is_done(self) -> bool:
        """Whether everything asked for before it has been done."""
        return self._device.is_over(self._number)

    def wait(self) -> None:
        """Let the device work until then."""
        self._device.run_until(self._number)


@dataclass(slots=True)
class LateDevice:
    """Does what it is asked for when `num_late` more events were recorded, or when somebody waits for it.

    Work and uploads keep their order. A download is done at any time after the work before it, also after downloads
    and work that were asked for later: by chance, drawn from `seed`. Until then its host memory is poisoned. An upload
    of host memory that was written to after the call fails.

    Attributes:
        num_late: events between a call and its work; 0 does it with the next event.
        seed: of the order of downloads.
        num_unfinished_launches: launches made while the work of an event before was not over.
        num_reordered: downloads that were done after another one that was asked for later.
        graph_bytes: what a captured graph says that it took.
        capture_error: what capturing raises; None lets it succeed.
        graphs: those that were captured, in order.
    """

    num_late: int = 0
    seed: int = 0
    num_unfinished_launches: int = 0
    num_reordered: int = 0
    graph_bytes: int = 0
    capture_error: Exception | None = None
    graphs: list[LateGraph] = field(default_factory=list)
    _random: random.Random = field(init=False)
    _stream: deque[_Work] = field(default_factory=deque)  # work and uploads, in order
    _downloads: list[_Work] = field(default_factory=list)
    _errors: dict[int, Exception] = field(default_factory=dict)  # by the number of the event that reports it
    _number: int = 0
    _tick: int = 0
    _last_event: int = 0
    _last_download: int = 0  # the highest number of those that were done
    _events: list[int] = field(default_factory=list)  # that are not over, or not known to be

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def host_bytes(self, num_bytes: int) -> Tensor:
        """Allocate host memory."""
        return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def upload(self, source: Tensor, destination: Tensor) -> None:
        """Copy later what is there now."""
        then = source.clone()

        def copy() -> None:
            if not torch.equal(source, then):
                raise AssertionError("host memory was written to while its copy to the device was under way")
            destination.copy_(source)

        self._stream.append(self._work(copy))

    def launch(self, work: Callable[[], None]) -> None:
        """Work later."""
        self.num_unfinished_launches += not self.is_over(self._last_event)
        self._stream.append(self._work(work))

    def download(self, source: Tensor, destination: Tensor) -> None:
        """Copy later what is there once the work launched so far is over, or later still."""
        destination.view(torch.uint8).fill_(POISON)

        def copy() -> None:
            destination.copy_(source)

        self._downloads.append(self._work(copy))

    def capture(self, work: Callable[[], Tensor]) -> LateGraph:
        """Keep work for later; its output is poison until it is replayed."""
        if self.capture_error is not None:
            raise self.capture_error
        self.graphs.append(LateGraph(work, torch.full_like(work(), float("nan")), self.graph_bytes))
        return self.graphs[-1]

    def record(self) -> LateEvent:
        """Return the present point, and do what was to wait for it."""
        self._number += 1
        self._last_event = self._number
        self._events.append(self._number)
        self._tick += 1
        while due := [work for work in self._runnable() if work.tick + self.num_late < self._tick]:
            self._run(self._random.choice(due))
        return LateEvent(self, self._number)

    def is_over(self, number: int) -> bool:
        """Return whether everything up to a number has been done."""
        unfinished = [work.number for work in (*list(self._stream)[:1], *self._downloads)]
        return not unfinished or min(unfinished) > number

    def run_until(self, number: int) -> None:
        """Work, on whatever comes first by chance, until everything up to a number has been done."""
        while not self.is_over(number):
            self._run(self._random.choice(self._runnable()))
        if number in self._errors:
            raise self._errors.pop(number)

    def _work(self, run: Callable[[], None]) -> _Work:
        self._number += 1
        return _Work(self._number, self._number - 1, self._tick, run)

    def _runnable(self) -> list[_Work]:
        """Return what may be done next: the oldest of the work, and downloads of work that is over."""
        first = list(self._stream)[:1]
        return first + [work for work in self._downloads if not first or work.after < first[0].number]

    def _run(self, work: _Work) -> None:
        if self._stream and work is self._stream[0]:
            self._stream.popleft()
        else:
            self._downloads.remove(work)
            self.num_reordered += work.number < self._last_download
            self._last_download = max(work.number, self._last_download)
        try:
            work.run()
        except Exception as error:
            reported_by = next((event for event in self._events if event > work.number), self._number + 1)
            self._errors.setdefault(reported_by, error)
