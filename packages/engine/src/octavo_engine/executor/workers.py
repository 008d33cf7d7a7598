"""WorkersExecutor: runs each step on a runner in this process and, through its model, on the other ranks of a team."""

from __future__ import annotations

from typing import Protocol

from octavo_engine.errors import WorkerLost
from octavo_engine.executor.inline import InlineExecutor, Runner


class Team(Protocol):
    """The other ranks, which the runner's model calls in every step."""

    @property
    def is_lost(self) -> bool:
        """Whether they must be replaced before the next step."""
        ...

    @property
    def trouble(self) -> WorkerLost | None:
        """Why they must be; None if they need not be."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often they were replaced."""
        ...

    def are_ready(self) -> bool:
        """Replace them; False if that takes longer, and is to be asked again. Raises WorkerLost if it cannot be."""
        ...

    def check(self) -> None:
        """Return if they work, or will be replaced; raise WorkerLost if neither."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class WorkersExecutor(InlineExecutor):
    """Runs batches in this thread. A step in which a rank is lost, or before which one was, raises WorkerLost.

    Args:
        runner: of rank 0.
        team: the other ranks.
    """

    def __init__(self, runner: Runner, team: Team) -> None:
        super().__init__(runner)
        self._team = team

    def close(self) -> None:
        """Drop the runner and end the other ranks."""
        super().close()
        self._team.close()
