"""ModelInput: what the InputBuilder makes of rows and a batch, tensor by tensor."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_buffers import StepBuffers
from octavo_engine.runner.step_rows import StepRows
from octavo_engine.types import SamplingParams
from octavo_kvcache import TableUpdate

BLOCK_SIZE = 4


def new_row(row: int, token_ids: tuple[int, ...], block_ids: tuple[tuple[int, ...], ...], **changes: int) -> NewRow:
    values = {"num_computed_tokens": 0, "num_scheduled_tokens": len(token_ids), **changes}
    return NewRow(
        row=row,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(),
        seed=0,
        sequence_index=0,
        stop_token_ids=frozenset(),
        block_ids=block_ids,
        samples=values["num_computed_tokens"] + values["num_scheduled_tokens"] == len(token_ids),
        num_computed_tokens=values["num_computed_tokens"],
        num_scheduled_tokens=values["num_scheduled_tokens"],
        fork_of=changes.get("fork_of"),
    )


def make_rows(max_num_rows: int, num_groups: int = 1, *, max_num_tokens: int = 64) -> Rows:
    max_num_blocks = -(-max_num_tokens // BLOCK_SIZE)
    return Rows(max_num_rows, max_num_tokens=max_num_tokens, max_num_blocks=max_num_blocks, num_groups=num_groups)


def make_builder(rows: Rows) -> InputBuilder:
    max_num_seqs, max_num_blocks = rows.block_tables[0].shape
    buffers = StepBuffers(
        max_num_tokens=256,
        max_num_seqs=max_num_seqs,
        max_num_blocks=max_num_blocks,
        num_groups=len(rows.block_tables),
    )
    return InputBuilder(buffers, (), block_size=BLOCK_SIZE, device=torch.device("cpu"))


def built(rows: Rows, batch: ScheduledBatch) -> tuple[StepRows, ModelInput]:
    for new in batch.new:
        rows.add(new)
    rows.update(batch.cached)
    step = StepRows.of(batch)
    last = step.last_tokens(np.unique(step.sources[step.samples]))
    return step, make_builder(rows).build(step, rows, last)


def test_prefill_and_decode_stand_side_by_side() -> None:
    rows = make_rows(8)
    built(rows, ScheduledBatch(step_id=0, new=(new_row(5, (50, 51, 52, 53), ((9,),)),)))
    rows.append(np.array([5]), np.array([4]), np.array([54]))
    batch = ScheduledBatch(
        step_id=1,
        new=(new_row(2, (20, 21, 22, 23, 24, 25), ((3, 7),), num_computed_tokens=2, num_scheduled_tokens=4),),
        cached=(CachedRow(5, 4, 1, True, (TableUpdate(1, (6,)),)),),
    )
    _, model_input = built(rows, batch)
    assert model_input.token_ids.tolist() == [22, 23, 24, 25, 54]
    assert model_input.positions.tolist() == [2, 3, 4, 5, 4]
    assert model_input.query_start_loc.tolist() == [0, 4, 5]
    assert model_input.seq_lens.tolist() == [6, 5]
    assert model_input.max_query_len == 4
    assert model_input.logits_indices.tolist() == [3, 4]
    (group,) = model_input.groups
    assert group.block_table.tolist() == [[3, 7], [9, 6]]
    assert group.slot_mapping.tolist() == [3 * 4 + 2, 3 * 4 + 3, 7 * 4, 7 * 4 + 1, 6 * 4]
    assert [t.dtype for t in (model_input.token_ids, model_input.positions, group.slot_mapping)] == [torch.int64] * 3
    assert [t.dtype for t in (model_input.query_start_loc, model_input.seq_lens, group.block_table)] == [
        torch.int32
    ] * 3


def test_chunk_that_does_not_reach_the_end_asks_for_no_logits() -> None:
    row = new_row(0, (1, 2, 3, 4, 5), ((1, 2),), num_scheduled_tokens=3)
    step, model_input = built(make_rows(2), ScheduledBatch(step_id=0, new=(row,)))
    assert step.samples.tolist() == [False]
    assert model_input.logits_indices.tolist() == []
    assert model_input.groups[0].block_table.tolist() == [[1]]


def test_fork_computes_nothing_and_goes_by_its_parents_token() -> None:
    parent = new_row(3, (7, 8), ((5,),))
    child = new_row(1, (7, 8), ((5,),), num_computed_tokens=2, num_scheduled_tokens=0, fork_of=3)
    other = new_row(0, (9,), ((6,),))
    step, model_input = built(make_rows(4), ScheduledBatch(step_id=0, new=(other, parent, child)))
    assert step.sources.tolist() == [0, 1, 1]
    assert model_input.seq_lens.tolist() == [1, 2]
    assert model_input.logits_indices.tolist() == [0, 2]


def test_every_kv_group_has_its_own_blocks() -> None:
    rows = make_rows(2, 2)
    built(rows, ScheduledBatch(step_id=0, new=(new_row(0, (1, 2, 3), ((4,), (8,))),)))
    rows.append(np.array([0]), np.array([3]), np.array([5]))
    update = (TableUpdate(0, (3,)), TableUpdate(0, (9,)))
    _, model_input = built(rows, ScheduledBatch(step_id=1, cached=(CachedRow(0, 3, 1, True, update),)))
    assert [group.block_table.tolist() for group in model_input.groups] == [[[3]], [[9]]]
    assert [group.slot_mapping.tolist() for group in model_input.groups] == [[15], [39]]


def test_rows_hold_the_longest_sequence_and_the_token_behind_it() -> None:
    rows = make_rows(2, max_num_tokens=1000)
    rows.add(new_row(0, (7,), ((1,),)))
    rows.add(new_row(1, tuple(range(1000)), (tuple(range(1, 251)),)))
    assert rows.token_ids[1, :1000].tolist() == list(range(1000))
    assert rows.token_ids[0, 0] == 7
    assert rows.block_tables[0][1, 249] == 250
    rows.append(np.array([1, 0]), np.array([1000, 1]), np.array([5, 6]))
    assert [rows.token_ids[0, 1], rows.token_ids[1, 1000]] == [6, 5]


def test_row_that_is_taken_again_starts_anew() -> None:
    rows = make_rows(1)
    rows.add(new_row(0, (1, 2, 3), ((1,),)))
    _, model_input = built(rows, ScheduledBatch(step_id=1, new=(new_row(0, (4,), ((2,),)),), finished=(0,)))
    assert model_input.token_ids.tolist() == [4]
    assert model_input.groups[0].slot_mapping.tolist() == [8]
