"""The interface of what changes logits before a token is drawn: a rule, its state by row, and its change to a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow


class RowsFailed(Exception):
    """A change could not be made to some rows, whose sequences end; it has been made to the others.

    Args:
        errors: why, by place among the logits.
    """

    def __init__(self, errors: Mapping[int, str]) -> None:
        super().__init__(f"{len(errors)} rows failed")
        self.errors = dict(errors)


class LogitChange(Protocol):
    """What one rule does to some rows of a step's logits."""

    def apply(self, logits: Tensor) -> None:
        """Change logits [draws, vocab_size] fp32 in place, each row as a function of that row alone.

        Raises:
            RowsFailed: when all other rows are done.
        """
        ...


class LogitRule(Protocol):
    """One kind of change to logits, and what it keeps of the running sequences. Only `LogitRules` calls it.

    Everything that a row's change depends on must follow from its NewRow: a preempted sequence enters again by one, and
    draws the same tokens. What does not follow from the tokens travels as the row's `sampler_state`.
    """

    def add(self, new: NewRow) -> bool:
        """Fill a row, whatever it held before; True if the rule has anything to do for it."""
        ...

    def of(
        self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> LogitChange | None:
        """Prepare the next draw of some rows, for each of which `add` was True.

        Args:
            places: [num_rows], where the rows stand among the step's logits.
            rows: [num_rows].
            positions: [num_rows], of the tokens that are drawn.

        Returns:
            The change; None if there is none in this step.
        """
        ...

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Take in one token, drawn or chosen, for each of some different rows, for each of which `add` was True."""
        ...

    def copy(self, row: int, source: int) -> None:
        """Make a row, whatever it held before, what another one is, for which `add` was True."""
        ...


def apply_all(changes: Iterable[LogitChange], logits: Tensor) -> dict[int, str]:
    """Change logits [draws, vocab_size] in place, in order; return why rows failed, by place."""
    errors: dict[int, str] = {}
    for change in changes:
        try:
            change.apply(logits)
        except RowsFailed as failure:
            errors = failure.errors | errors
    return errors
