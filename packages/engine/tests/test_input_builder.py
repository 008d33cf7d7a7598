"""InputBuilder and StepBuffers: any step equals what loops over tokens make of it, in memory that never moves."""

from __future__ import annotations

import random
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import numpy as np
import torch
from torch import Tensor

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch
from octavo_engine.runner.decode_step import DecodeStep
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.model_input import ModelInput
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.step_buffers import StepBuffers
from octavo_engine.runner.step_rows import StepRows
from octavo_engine.types import SamplingParams
from octavo_kvcache import TableUpdate

MAX_NUM_SEQS = 6
MAX_NUM_TOKENS = 40  # of a sequence
BLOCK_SIZE = 4
MAX_NUM_BLOCKS = 10
NUM_GROUPS = 2


def make_builder() -> InputBuilder:
    buffers = StepBuffers(
        max_num_tokens=MAX_NUM_SEQS * MAX_NUM_TOKENS,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_blocks=MAX_NUM_BLOCKS,
        num_groups=NUM_GROUPS,
    )
    return InputBuilder(buffers, (), block_size=BLOCK_SIZE, device=torch.device("cpu"))


def tensors(model_input: ModelInput) -> list[Tensor]:
    own = [model_input.token_ids, model_input.positions, model_input.query_start_loc, model_input.seq_lens]
    return [*own, model_input.logits_indices, *(tensor for group in model_input.groups for tensor in group)]


@dataclass
class Sequence:
    """What the oracle knows of a row."""

    token_ids: list[int]
    block_ids: list[list[int]]  # per group, enough for every token there may be
    num_computed: int = 0


class Traffic:
    """Random steps on some rows, and what each of them must come to."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rows = Rows(
            MAX_NUM_SEQS, max_num_tokens=MAX_NUM_TOKENS, max_num_blocks=MAX_NUM_BLOCKS, num_groups=NUM_GROUPS
        )
        self.sequences: dict[int, Sequence] = {}

    def step(self, kind: str) -> tuple[ScheduledBatch, list[tuple[int, int, int]]]:
        """Return a batch, and (row, first position, tokens) of each of its rows."""
        for row in [r for r, s in self.sequences.items() if len(s.token_ids) >= MAX_NUM_TOKENS - 1]:
            del self.sequences[row]
        if not self.sequences:
            kind = "mixed"
        cached = self._cached(kind)
        new = self._new() if kind == "mixed" else []
        spans = [(n.row, n.num_computed_tokens, n.num_scheduled_tokens) for n in new]
        spans += [(c.row, c.num_computed_tokens, c.num_scheduled_tokens) for c in cached]
        return ScheduledBatch(step_id=0, new=tuple(new), cached=tuple(cached)), spans

    def drawn(self, row: int) -> None:
        """Append a token, as the runner does with what it draws."""
        sequence, token_id = self.sequences[row], self.random.randrange(1000)
        self.rows.append(np.array([row]), np.array([len(sequence.token_ids)]), np.array([token_id]))
        sequence.token_ids.append(token_id)

    def _cached(self, kind: str) -> list[CachedRow]:
        rows = self.random.sample(sorted(self.sequences), self.random.randint(0, len(self.sequences)))
        if kind == "decode":
            rows = [r for r in self.sequences if self._left(r) == 1]
        cached = []
        for row in rows:
            sequence = self.sequences[row]
            num_new = 1 if kind == "decode" else self.random.randint(1, self._left(row))
            start, sequence.num_computed = sequence.num_computed, sequence.num_computed + num_new
            updates = ()
            if self.random.random() < 0.5:  # the blocks of the tokens, from an earlier one on
                first = self.random.randint(0, start // BLOCK_SIZE)
                for ids in sequence.block_ids:
                    ids[first:] = self._blocks()[first:]
                updates = tuple(TableUpdate(first, tuple(ids[first:])) for ids in sequence.block_ids)
            cached.append(CachedRow(row, start, num_new, self._left(row) == 0, updates))
        return cached

    def _new(self) -> list[NewRow]:
        free = [row for row in range(MAX_NUM_SEQS) if row not in self.sequences]
        self.random.shuffle(free)
        new: list[NewRow] = []
        for row in free[: self.random.randint(0 if self.sequences else 1, len(free))]:
            token_ids = [self.random.randrange(1000) for _ in range(self.random.randint(1, MAX_NUM_TOKENS - 8))]
            start = self.random.randrange(len(token_ids))
            sequence = Sequence(token_ids, [self._blocks() for _ in range(NUM_GROUPS)])
            num_new = self.random.randint(1, len(token_ids) - start)
            self.sequences[row] = sequence
            parents = [n for n in new if n.samples and n.fork_of is None]
            if parents and self.random.random() < 0.5:
                parent = self.random.choice(parents)
                sequence.token_ids = list(parent.token_ids)
                start, num_new = len(parent.token_ids), 0
                new.append(self._new_row(row, sequence, start, num_new, fork_of=parent.row))
            else:
                new.append(self._new_row(row, sequence, start, num_new))
            sequence.num_computed = start + num_new
        return new

    def _new_row(self, row: int, sequence: Sequence, start: int, num_new: int, fork_of: int | None = None) -> NewRow:
        return NewRow(
            row=row,
            token_ids=tuple(sequence.token_ids),
            num_prompt_tokens=len(sequence.token_ids),
            sampling=SamplingParams(),
            seed=0,
            sequence_index=0,
            stop_token_ids=frozenset(),
            block_ids=tuple(tuple(ids) for ids in sequence.block_ids),
            num_computed_tokens=start,
            num_scheduled_tokens=num_new,
            samples=start + num_new == len(sequence.token_ids),
            fork_of=fork_of,
        )

    def _left(self, row: int) -> int:
        return len(self.sequences[row].token_ids) - self.sequences[row].num_computed

    def _blocks(self) -> list[int]:
        return [self.random.randrange(1, 500) for _ in range(MAX_NUM_BLOCKS)]


def assert_equals_loops(model_input: ModelInput, traffic: Traffic, spans: list[tuple[int, int, int]]) -> None:
    """Compare a ModelInput with what one loop over sequences and tokens says."""
    computing = [(traffic.sequences[row], start, num_new) for row, start, num_new in spans if num_new]
    tokens = [(sequence, start + i) for sequence, start, num_new in computing for i in range(num_new)]
    assert model_input.token_ids.tolist() == [sequence.token_ids[position] for sequence, position in tokens]
    assert model_input.positions.tolist() == [position for _, position in tokens]
    starts = [0]
    for _, _, num_new in computing:
        starts.append(starts[-1] + num_new)
    assert model_input.query_start_loc.tolist() == starts
    assert model_input.seq_lens.tolist() == [start + num_new for _, start, num_new in computing]
    assert model_input.max_query_len == max(num_new for _, _, num_new in computing)
    num_blocks = -(-max(start + num_new for _, start, num_new in computing) // BLOCK_SIZE)
    for index, group in enumerate(model_input.groups):
        assert group.slot_mapping.tolist() == [
            sequence.block_ids[index][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for sequence, position in tokens
        ]
        assert group.block_table.shape == (len(computing), num_blocks)
        for table, (sequence, start, num_new) in zip(group.block_table.tolist(), computing, strict=True):
            own = -(-(start + num_new) // BLOCK_SIZE)  # what comes behind means nothing
            assert table[:own] == sequence.block_ids[index][:own]


@given(seed=st.integers(0, 1 << 32), kinds=st.lists(st.sampled_from(["mixed", "decode", "decode"]), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_step_equals_loops_over_its_tokens(seed: int, kinds: list[str]) -> None:
    traffic, builder = Traffic(seed), make_builder()
    addresses = None
    for kind in ["mixed", *kinds]:
        batch, spans = traffic.step(kind)
        if not batch.num_tokens:
            continue
        for new in batch.new:
            traffic.rows.add(new)
        traffic.rows.update(batch.cached)
        step = StepRows.of(batch)
        decode_step = DecodeStep.of(batch)
        assert (decode_step is None) == (
            bool(batch.new) or not all(r.samples and r.num_scheduled_tokens == 1 for r in batch.cached)
        )
        last = step.last_tokens(np.unique(step.sources[step.samples]))
        if decode_step is None:
            model_input = builder.build(step, traffic.rows, last)
        else:
            model_input = builder.decode(decode_step, traffic.rows)
            assert builder.decoding.rows.tolist() == step.rows.tolist()
            assert builder.decoding.ends.tolist() == step.ends.tolist()
        assert_equals_loops(model_input, traffic, spans)
        assert model_input.logits_indices.tolist() == last.tolist()
        strides = [group.block_table.stride(0) for group in model_input.groups if len(group.block_table) > 1]
        assert set(strides) <= {MAX_NUM_BLOCKS}
        now = [tensor.data_ptr() for tensor in tensors(model_input) if tensor.numel()]
        if len(last):
            assert addresses is None or now == addresses
            addresses = now
        for row, samples in zip(step.rows.tolist(), step.samples.tolist(), strict=True):
            if samples:
                traffic.drawn(row)


def decode_step(position: int, *updates: TableUpdate, row: int = 0) -> DecodeStep:
    return DecodeStep((row,), (position,), (updates,))


def test_a_step_of_the_same_shape_is_the_same_model_input() -> None:
    traffic, builder = Traffic(1), make_builder()
    traffic.rows.append(np.array([0, 0]), np.array([4, 5]), np.array([70, 80]))
    first = builder.decode(decode_step(4), traffic.rows)
    assert first.token_ids.tolist() == [70]
    second = builder.decode(decode_step(5), traffic.rows)
    assert second is first
    assert (second.token_ids.tolist(), second.positions.tolist()) == ([80], [5])


def test_a_row_that_does_not_go_on_where_it_was_is_filled_anew() -> None:
    rows, builder = Traffic(1).rows, make_builder()
    for table in rows.block_tables:
        table[:2, :3] = [[3, 7, 9], [4, 8, 6]]
    for row, position in ((0, 4), (0, 5), (0, 9), (1, 10), (1, 3)):
        model_input = builder.decode(decode_step(position, row=row), rows)
        blocks = rows.block_tables[0][row, : position // BLOCK_SIZE + 1].tolist()
        assert model_input.seq_lens.tolist() == [position + 1]
        assert model_input.groups[0].block_table.tolist() == [blocks]
        assert model_input.groups[0].slot_mapping.tolist() == [blocks[-1] * BLOCK_SIZE + position % BLOCK_SIZE]


def test_another_step_in_between_leaves_nothing_behind() -> None:
    rows, builder = Traffic(1).rows, make_builder()
    rows.token_ids[0, :8] = range(8)
    for table in rows.block_tables:
        table[:2, :2] = [[3, 7], [4, 8]]
    builder.decode(decode_step(4), rows)
    other = ScheduledBatch(step_id=0, cached=(CachedRow(1, 2, 3, False, ()),))  # five tokens then, as row 0 has
    builder.build(StepRows.of(other), rows, np.empty(0, np.int64))
    model_input = builder.decode(decode_step(5), rows)
    assert (model_input.token_ids.tolist(), model_input.positions.tolist()) == ([5], [5])
    assert (model_input.query_start_loc.tolist(), model_input.seq_lens.tolist()) == ([0, 1], [6])
    assert model_input.groups[0].block_table.tolist() == [[3, 7]]
    assert model_input.groups[0].slot_mapping.tolist() == [7 * BLOCK_SIZE + 1]
