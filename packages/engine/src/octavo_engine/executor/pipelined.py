"""PipelinedExecutor: runs steps on a team whose stages compute several of them at once."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from octavo_engine.batch import ScheduledBatch
from octavo_engine.errors import WorkerLost
from octavo_engine.executor.base import Pending
from octavo_engine.executor.inline import Runner
from octavo_engine.executor.overlapped import Launcher
from octavo_engine.executor.workers import Team, WorkersExecutor
from octavo_engine.overlap import OverlapStats


@runtime_checkable
class StagedRunner(Launcher, Protocol):
    """A runner whose steps are on other ranks until their results are read."""

    def forget_steps(self, error: WorkerLost) -> None:
        """Let all steps on their way fail."""
        ...


class PipelinedExecutor(WorkersExecutor):
    """Begins steps in this thread, as many as there are stages; each is finished when its result is read.

    Args:
        runner: of rank 0, a `StagedRunner`.
        team: the other ranks.
    """

    def __init__(self, runner: Runner, team: Team) -> None:
        super().__init__(runner, team)
        assert isinstance(runner, StagedRunner), f"{type(runner).__name__} knows no stages"
        self._staged: StagedRunner | None = runner
        self._max_in_flight = runner.max_in_flight
        self._num_restarts = team.num_restarts

    @property
    def max_in_flight(self) -> int:
        """As many steps as the runner takes."""
        return self._max_in_flight

    @property
    def overlap(self) -> OverlapStats:
        """Which steps began beside others."""
        return OverlapStats() if self._staged is None else self._staged.overlap

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Begin the step.

        Raises:
            WorkerLost: lost ranks cannot be replaced; what a step itself raises comes with its result.
        """
        assert self._staged is not None, "submit without a runner"
        if self._team.num_restarts != self._num_restarts:
            self._staged.forget_steps(WorkerLost("the ranks that had begun this step were replaced"))
            self._num_restarts = self._team.num_restarts
        return self._staged.launch(batch)

    def close(self) -> None:
        """Drop the runner and end the other ranks."""
        self._staged = None
        super().close()
