"""ProcessorsRule: functions of a request's own that change its logits; what they raise ends that request alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo_engine.batch import NewRow
from octavo_engine.runner.rules.base import RowsFailed
from octavo_engine.sampling_params import LogitsProcessor


@dataclass(frozen=True, slots=True)
class _Call:
    """The functions of one row, its place among the logits, and its tokens."""

    place: int
    processors: Sequence[LogitsProcessor]
    token_ids: list[int]

    def changed(self, logits: Tensor) -> Tensor:
        """Return what becomes of logits [vocab_size], which are not modified."""
        logits = logits.clone()
        for processor in self.processors:
            returned = processor(self.token_ids.copy(), logits)
            if returned is None:
                continue
            if not isinstance(returned, Tensor) or returned.shape != logits.shape:
                shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
                raise ValueError(f"expected a tensor of shape {tuple(logits.shape)} or None, it returned {shape}")
            logits = returned.to(logits)
        if bool((logits.isnan() | logits.isposinf()).any()):
            raise ValueError("expected finite numbers or minus infinity, it returned NaN or infinity")
        return logits


@dataclass(frozen=True, slots=True)
class _Calls:
    """The functions of some rows of a step's logits."""

    calls: list[_Call]

    def apply(self, logits: Tensor) -> None:
        """Call them all; raise RowsFailed for those that raised."""
        errors: dict[int, str] = {}
        for call in self.calls:
            try:
                logits[call.place] = call.changed(logits[call.place])
            except Exception as error:  # whatever a user's function raises is that user's to hear
                errors[call.place] = f"a logits processor of this request failed: {type(error).__name__}: {error}"
        if errors:
            raise RowsFailed(errors)


class ProcessorsRule:
    """The functions of each row that has some; they are held until the row is taken by another sequence.

    Args:
        token_ids: [max_num_rows, max_num_tokens + 1] int32, the known tokens of every row; not modified.
    """

    def __init__(self, token_ids: NDArray[np.int32]) -> None:
        self._token_ids = token_ids
        self._processors: dict[int, Sequence[LogitsProcessor]] = {}

    def add(self, new: NewRow) -> bool:
        """Fill a row; True if it has functions."""
        processors = new.sampling.logits_processors
        self._processors.pop(new.row, None)
        if processors:
            self._processors[new.row] = processors
        return bool(processors)

    def of(self, places: NDArray[np.int64], rows: NDArray[np.int64], positions: NDArray[np.int64]) -> _Calls:
        """Collect the functions of some rows, and what they are given."""
        return _Calls(
            [
                _Call(place, self._processors[row], self._token_ids[row, :position].tolist())
                for place, row, position in zip(places.tolist(), rows.tolist(), positions.tolist(), strict=True)
            ]
        )

    def append(self, rows: NDArray[np.int64], token_ids: NDArray[np.int64]) -> None:
        """Nothing to count: the known tokens are somebody else's."""

    def copy(self, row: int, source: int) -> None:
        """Make a row what another one is."""
        self._processors[row] = self._processors[source]
