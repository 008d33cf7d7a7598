"""BrokenRows: rows of a step that failed, which later steps that were scheduled with them must leave out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from octavo_engine.batch import ModelOutput, ScheduledBatch

_REASON = "an earlier step of this sequence failed"
_T = TypeVar("_T")


class Kept(NamedTuple):
    """A batch without its broken rows, and where the others stand in the whole one; None if nothing was left out."""

    batch: ScheduledBatch
    places: tuple[int, ...] | None
    num_rows: int

    def widen(self, output: ModelOutput) -> ModelOutput:
        """Turn the answer to the batch into that to the whole one, in which broken rows have errors."""
        if self.places is None:
            return output
        places = self.places
        token_ids: list[tuple[int, ...]] = [()] * self.num_rows
        for place, drawn in zip(places, output.token_ids, strict=True):
            token_ids[place] = drawn
        logprobs = None
        if output.logprobs is not None:
            at = dict(zip(places, output.logprobs, strict=True))
            logprobs = tuple(at.get(place) for place in range(self.num_rows))
        errors = dict.fromkeys(set(range(self.num_rows)).difference(places), _REASON)
        return ModelOutput(
            token_ids=tuple(token_ids),
            logprobs=logprobs,
            pooled=_moved(output.pooled, places),
            sampler_states=_moved(output.sampler_states, places),
            prompt_logprobs=_moved(output.prompt_logprobs, places),
            candidates=_moved(output.candidates, places),
            errors=errors | (_moved(output.errors, places) or {}),
        )


class BrokenRows:
    """Rows that nothing is known of any more until the sequences in them are gone: their tables may be another's."""

    def __init__(self) -> None:
        self._rows: set[int] = set()

    def add(self, rows: Iterable[int]) -> None:
        """Take note that rows are broken."""
        self._rows.update(rows)

    def leave_out(self, batch: ScheduledBatch) -> Kept:
        """Forget rows that the batch releases, and take those that are broken out of it, with what comes of them."""
        self._rows.difference_update(batch.finished)
        if not self._rows:
            return Kept(batch, None, batch.num_rows)
        self._rows.update(new.row for new in batch.new if new.fork_of in self._rows)
        self._rows.update(move.row for move in batch.moves if move.source in self._rows)
        return Kept(
            replace(
                batch,
                new=tuple(new for new in batch.new if new.row not in self._rows),
                cached=tuple(cached for cached in batch.cached if cached.row not in self._rows),
                moves=tuple(move for move in batch.moves if move.row not in self._rows),
            ),
            tuple(place for place, row in enumerate(batch.rows) if row not in self._rows),
            batch.num_rows,
        )


def _moved(entries: Mapping[int, _T] | None, places: tuple[int, ...]) -> dict[int, _T] | None:
    """Return entries by place of a batch, by that of the whole one."""
    return None if entries is None else {places[place]: entry for place, entry in entries.items()}
