"""InlineExecutor: runs each step in the caller's thread, before submit returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.executor.base import Pending
from octavo_engine.overlap import OverlapStats


class Runner(Protocol):
    """What executes a batch."""

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run one step."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that has run: its output, or what it raised."""

    outcome: ModelOutput | Exception

    def result(self) -> ModelOutput:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class InlineExecutor:
    """Runs batches on a runner in this thread. What a step raises is kept until its result is asked for.

    Args:
        runner: runs them; None until there is one.
    """

    def __init__(self, runner: Runner | None) -> None:
        self._runner = runner

    def use(self, runner: Runner | None) -> None:
        """Run what comes on another runner, which has seen no row yet; None lets go of the one that there is."""
        self._runner = runner

    @property
    def max_in_flight(self) -> int:
        """One: a step is over when submit returns."""
        return 1

    @property
    def overlap(self) -> OverlapStats:
        """Nothing: no step overlaps with another."""
        return OverlapStats()

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Run the step."""
        assert self._runner is not None, "submit without a runner"
        try:
            return Done(self._runner.execute(batch))
        except Exception as error:
            return Done(error)

    def close(self) -> None:
        """Drop the runner and with it the model."""
        self._runner = None
