"""StepPlan: what a step is, beside what the device knows of its rows."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from octavo_engine.runner.row_state import RowState
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_rows import StepRows

_T = TypeVar("_T")


class StepPlan(NamedTuple, Generic[_T]):
    """A step: arrays on the host, then tensors on the device.

    A decode step is its rows alone: each computes its last token and draws the next.

    Attributes:
        rows: [num_seqs] int32, those that compute tokens; None if they are those of the step before.
        query_start_loc: [num_seqs + 1] int32; this and what follows is None in a decode step.
        token_ids: [num_tokens] int32; -1 for a last token that only the device knows.
        logits_seqs: [num_logits_rows] int32, the sequences whose last tokens' logits are wanted.
        drawing_rows: [num_draws] int32.
        shared: [num_draws] int64, which of the logits each draw goes by; None if each has its own.
    """

    rows: _T | None = None
    query_start_loc: _T | None = None
    token_ids: _T | None = None
    logits_seqs: _T | None = None
    drawing_rows: _T | None = None
    shared: _T | None = None


class StepSize(NamedTuple):
    """How large a step is: tokens and sequences, the most tokens of one, and those of the longest with its past."""

    num_tokens: int
    num_seqs: int
    max_query_len: int
    max_seq_len: int


class Draws(NamedTuple):
    """What a step draws: places in its batch, rows, positions; one entry each."""

    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]


class Planned(NamedTuple):
    """A step on the host.

    Attributes:
        plan: what the device is sent.
        size: of the step.
        draws: what it draws.
        rows: [num_seqs] int64, those that compute tokens.
        needs_token: [rows of the batch] bool, whose last token the device must be told beside.
    """

    plan: StepPlan[NDArray[np.generic]]
    size: StepSize
    draws: Draws
    rows: NDArray[np.int64]
    needs_token: NDArray[np.bool_]


def plan_step(step: StepRows, rows: Rows, state: RowState) -> Planned:
    """Plan a step that runs without the host; `rows` is up to date with it."""
    if step.samples.all() and (step.num_scheduled_tokens == 1).all():
        size = StepSize(len(step.rows), len(step.rows), 1, int(step.ends.max()))
        draws = Draws(np.arange(len(step.rows)), step.rows, step.ends)
        needs_token = ~state.on_device(step.rows, step.num_computed_tokens)
        return Planned(StepPlan(rows=step.rows.astype(np.int32)), size, draws, step.rows, needs_token)
    computing = np.flatnonzero(step.num_scheduled_tokens)
    row_ids, query_lens, ends = step.rows[computing], step.num_scheduled_tokens[computing], step.ends[computing]
    starts = step.token_starts[computing]
    positions = np.repeat(step.num_computed_tokens[computing] - starts, query_lens)
    positions += np.arange(len(positions))
    token_ids = rows.token_ids[np.repeat(row_ids, query_lens), positions]
    token_ids[(starts + query_lens - 1)[state.on_device(row_ids, ends - 1)]] = -1
    places = np.flatnonzero(step.samples)
    sources, shared = step.sources[places], None
    if step.forks:  # one row of logits serves a parent and its forks
        sources, shared = np.unique(sources, return_inverse=True)
    plan: StepPlan[NDArray[np.generic]] = StepPlan(
        rows=row_ids.astype(np.int32),
        query_start_loc=np.append(starts, len(positions)).astype(np.int32),
        token_ids=token_ids,
        logits_seqs=np.searchsorted(computing, sources).astype(np.int32),
        drawing_rows=step.rows[places].astype(np.int32),
        shared=shared,
    )
    size = StepSize(len(positions), len(row_ids), int(query_lens.max()), int(ends.max()))
    draws = Draws(places, step.rows[places], step.ends[places])
    return Planned(plan, size, draws, row_ids, np.zeros(len(step.rows), np.bool_))
