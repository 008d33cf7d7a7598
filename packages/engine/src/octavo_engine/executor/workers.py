"""WorkersExecutor: runs each step on a runner in this process and, through its model, on the other ranks of a team."""

from __future__ import annotations

from typing import Protocol

from octavo_engine.batch import ScheduledBatch
from octavo_engine.executor.base import Pending
from octavo_engine.executor.inline import InlineExecutor, Runner


class Team(Protocol):
    """The other ranks, which the runner's model calls in every step."""

    @property
    def is_lost(self) -> bool:
        """Whether they must be replaced before the next step."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often they were replaced."""
        ...

    def restart(self) -> None:
        """Replace them; raises WorkerLost if that cannot be."""
        ...

    def are_ready(self) -> bool:
        """Whether a step may run; if not, they are about to be replaced, and this waits a moment for it."""
        ...

    def check(self) -> None:
        """Return if they work, or will be replaced; raise WorkerLost if neither."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class WorkersExecutor(InlineExecutor):
    """Runs batches in this thread. A step in which a rank is lost raises WorkerLost, and the next one replaces it.

    Args:
        runner: of rank 0.
        team: the other ranks.
    """

    def __init__(self, runner: Runner, team: Team) -> None:
        super().__init__(runner)
        self._team = team

    def submit(self, batch: ScheduledBatch) -> Pending:
        """Run the step.

        Raises:
            WorkerLost: lost ranks cannot be replaced; what a step itself raises comes with its result.
        """
        if self._team.is_lost:
            self._team.restart()
        return super().submit(batch)

    def close(self) -> None:
        """Drop the runner and end the other ranks."""
        super().close()
        self._team.close()
