"""StepRows: the rows of a step on the host, as columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch


class StepRows(NamedTuple):
    """The rows of a step in the batch's order, one entry per row in every array; nobody writes to them.

    Attributes:
        rows: int64, the runner's row.
        num_computed_tokens: int64, before the step.
        num_scheduled_tokens: int64; 0 for a fork.
        token_starts: int64, where the row's tokens begin among the step's.
        samples: bool, whether the row reaches the end of its known tokens.
        sources: int64, the place whose last hidden state the row goes by: its own, or its parent's for a fork.
        forks: whether any row is a fork.
    """

    rows: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    num_scheduled_tokens: NDArray[np.int64]
    token_starts: NDArray[np.int64]
    samples: NDArray[np.bool_]
    sources: NDArray[np.int64]
    forks: bool = False

    @classmethod
    def of(cls, batch: ScheduledBatch) -> StepRows:
        """Collect the rows of a batch that has some."""
        every: tuple[NewRow | CachedRow, ...] = (*batch.new, *batch.cached)
        columns = zip(*((r.row, r.num_computed_tokens, r.num_scheduled_tokens, r.samples) for r in every), strict=True)
        rows, num_computed_tokens, num_scheduled_tokens, samples = map(np.array, columns)
        sources = np.arange(len(rows))
        forks = {place: new.fork_of for place, new in enumerate(batch.new) if new.fork_of is not None}
        for place, parent_row in forks.items():
            sources[place] = np.flatnonzero(rows == parent_row)[0]
        return cls(
            rows=rows,
            num_computed_tokens=num_computed_tokens,
            num_scheduled_tokens=num_scheduled_tokens,
            token_starts=np.cumsum(num_scheduled_tokens) - num_scheduled_tokens,
            samples=samples,
            sources=sources,
            forks=bool(forks),
        )

    @property
    def ends(self) -> NDArray[np.int64]:
        """Tokens computed after the step: for a row that samples, the position of the token it draws."""
        return self.num_computed_tokens + self.num_scheduled_tokens

    def last_tokens(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index among the step's tokens of the last token of some places."""
        last: NDArray[np.int64] = self.token_starts[places] + self.num_scheduled_tokens[places] - 1
        return last
