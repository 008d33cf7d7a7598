"""Device: what an overlapped runner asks of that which computes, in a few calls that do not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Event(Protocol):
    """A point in the work that a device was given."""

    @property
    def is_done(self) -> bool:
        """Whether all work before it is over; does not wait."""
        ...

    def wait(self) -> None:
        """Hold up the caller until `is_done`; raises what the work since the event before raised."""
        ...


class Graph(Protocol):
    """Work that a device has captured.

    Attributes:
        output: what the work returned; each replay fills it anew.
        num_bytes: of the device's memory that capturing took.
    """

    output: Tensor
    num_bytes: int

    def replay(self) -> None:
        """Do all that the work did on the device, on the same memory; nothing of it is decided again.

        Part of work that is launched, as capturing is.
        """
        ...


class Device(Protocol):
    """Does the work that it is given in the order of the calls, some time after they return.

    Only downloads may be late for each other and for what is launched after them: memory that one reads or writes must
    be left alone until an event that was recorded behind it is done.
    """

    def host_bytes(self, num_bytes: int) -> Tensor:
        """Allocate host memory [num_bytes] uint8 for uploads and downloads: pinned, where that is what they need."""
        ...

    def upload(self, source: Tensor, destination: Tensor) -> None:
        """Copy host memory that `host_bytes` gave to the device."""
        ...

    def launch(self, work: Callable[[], None]) -> None:
        """Do work on tensors of the device; what it raises comes from here or from the event behind it."""
        ...

    def download(self, source: Tensor, destination: Tensor) -> None:
        """Copy a tensor as the work launched so far leaves it to host memory that `host_bytes` gave."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> Graph:
        """Note what work does on the device without doing it; called by work that is launched.

        What it reads and writes must stay where it is, and the kernels that it launches must have run before. Nothing
        in it may wait for the device or take memory otherwise than as a tensor.

        Raises:
            Exception: what the work raised, or what the device says why it cannot be captured.
        """
        ...

    def record(self) -> Event:
        """Return the point that all work so far leads to."""
        ...
