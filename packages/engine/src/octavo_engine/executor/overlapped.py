"""OverlappedExecutor: launches a step before the results of the one before are read."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.executor.base import Pending
from octavo_engine.executor.inline import InlineExecutor, Runner
from octavo_engine.overlap import OverlapStats


@runtime_checkable
class Launcher(Protocol):
    """A runner that need not wait for the device."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be launched before the oldest one's result is read."""
        ...

    @property
    def overlap(self) -> OverlapStats:
        """Which steps did not wait for the one before."""
        ...

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """Run one step."""
        ...

    def launch(self, batch: ScheduledBatch) -> Pending:
        """Start a step; what it raises is kept until its result is asked for."""
        ...


class OverlappedExecutor(InlineExecutor):
    """Runs batches on a runner that launches them, in this thread.

    Args:
        runner: a `Launcher`; None until there is one.
    """

    def __init__(self, runner: Runner | None) -> None:
        super().__init__(None)
        self._launcher: Launcher | None = None
        self._max_in_flight = 1
        self._past = OverlapStats()  # of the runners before
        self.use(runner)

    def use(self, runner: Runner | None) -> None:
        """Run what comes on another runner, which has seen no row yet; None lets go of the one that there is."""
        self._past = self.overlap
        super().use(runner)
        self._launcher = None
        if runner is not None:
            assert isinstance(runner, Launcher), f"{type(runner).__name__} cannot launch a step"
            self._launcher, self._max_in_flight = runner, runner.max_in_flight

    @property
    def max_in_flight(self) -> int:
        """As many steps as the runner takes."""
        return self._max_in_flight

    @property
    def overlap(self) -> OverlapStats:
        """Which steps did not wait for the one before, since the start."""
        if self._launcher is None:
            return self._past
        return self._past + self._launcher.overlap

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Start the step."""
        assert self._launcher is not None, "submit without a runner"
        return self._launcher.launch(batch)

    def close(self) -> None:
        """Drop the runner and with it the model."""
        self.use(None)
