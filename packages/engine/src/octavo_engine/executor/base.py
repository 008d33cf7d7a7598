"""The contract between the engine loop and whatever runs the model."""

from __future__ import annotations

from typing import Protocol

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.overlap import OverlapStats


class Pending(Protocol):
    """A step that was submitted."""

    def result(self) -> ModelOutput:
        """Wait for the step and return its output; raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs batches in the order of submission, wherever the model lives."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted before the oldest one's result is read; at least 1."""
        ...

    @property
    def overlap(self) -> OverlapStats:
        """Which steps were launched before the one before was read."""
        ...

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Start a step and return at once, or run it inline."""
        ...

    def close(self) -> None:
        """Release what the executor holds; no step may follow."""
        ...
