"""RowDeltas, and the rows on the device that they are told to: by chance, against the input that a host makes."""

from __future__ import annotations

import os
import random
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import numpy as np
import torch

from octavo_engine.batch import CachedRow, NewRow, ScheduledBatch
from octavo_engine.runner.device_inputs import DeviceInputs
from octavo_engine.runner.device_rows import DeviceRows
from octavo_engine.runner.graph_plan import GraphShape
from octavo_engine.runner.input_builder import InputBuilder
from octavo_engine.runner.row_deltas import RowDelta, RowDeltas
from octavo_engine.runner.row_state import RowState
from octavo_engine.runner.rows import Rows
from octavo_engine.runner.sampling_rows import SamplingRows
from octavo_engine.runner.step_buffers import StepBuffers
from octavo_engine.runner.step_plan import StepPlan, plan_step
from octavo_engine.runner.step_rows import StepRows
from octavo_engine.types import SamplingParams
from octavo_kvcache import TableUpdate

_SHARED = runpy.run_path(str(Path(__file__).with_name("test_device_rows.py")))
plain, enter, BLOCK_SIZE, VOCAB_SIZE = (_SHARED[name] for name in ("plain", "enter", "BLOCK_SIZE", "VOCAB_SIZE"))
MAX_NUM_ROWS, MAX_LEN, MAX_NUM_BLOCKS = 7, 60, 15
CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # thousands of times slower


class Tables:
    """Block tables of two KV groups, as batches change them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._next_block = 1
        self._counts = dict[int, int]()  # blocks of a row, in each group

    def new(self, row: int, end: int) -> tuple[tuple[int, ...], ...]:
        self._counts[row] = -(-end // BLOCK_SIZE)
        return tuple(self._blocks(self._counts[row]) for _ in range(2))

    def updates(self, row: int, end: int) -> tuple[TableUpdate, ...]:
        before = self._counts[row]
        count = max(before, min(MAX_NUM_BLOCKS, -(-end // BLOCK_SIZE) + self._rng.choice((0, 0, 1))))
        first = before - self._rng.choice((0, 0, 0, 1))  # copy-on-write
        if first == count:
            return ()
        self._counts[row] = count
        full, windowed = self._blocks(count - first), self._blocks(count - first)
        if first > 2 and self._rng.random() < 0.5:  # blocks behind a window become null blocks
            return TableUpdate(first, full), TableUpdate(first - 2, (0, 0, *windowed))
        return TableUpdate(first, full), TableUpdate(first, windowed)

    def _blocks(self, count: int) -> tuple[int, ...]:
        self._next_block += count
        return tuple(range(self._next_block - count, self._next_block))


class Rng(random.Random):
    """Chance, with the sampling parameters of a row."""

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.choice((0.0, 0.5, 1.0)),
            top_p=self.choice((1.0, 0.9)),
            min_p=self.choice((0.0, 0.1)),
            top_k=self.choice((0, 9)),
        )


class Bench:
    """Two runners' states: one on the device, whose host learns tokens late, and the plain one on the host."""

    def __init__(self, rng: Rng) -> None:
        self.rng, self.tables = rng, Tables(rng)
        sizes: dict[str, Any] = {"max_num_blocks": MAX_NUM_BLOCKS, "num_groups": 2}
        self.rows, self.truth = (Rows(MAX_NUM_ROWS, max_num_tokens=MAX_LEN, **sizes) for _ in range(2))
        self.sampling = SamplingRows(self.rows.token_ids, VOCAB_SIZE, CPU)
        self.device = DeviceRows(MAX_NUM_ROWS, block_size=BLOCK_SIZE, device=CPU, **sizes)
        self.inputs = DeviceInputs(
            max_num_tokens=200, max_num_seqs=MAX_NUM_ROWS, block_size=BLOCK_SIZE, kv_layers=(), device=CPU, **sizes
        )
        buffers = StepBuffers(max_num_tokens=200, max_num_seqs=MAX_NUM_ROWS, **sizes)
        self.plain = InputBuilder(buffers, (), block_size=BLOCK_SIZE, device=CPU)
        self.deltas, self.state = RowDeltas(MAX_NUM_ROWS), RowState(MAX_NUM_ROWS)
        self.computed, self.known = dict[int, int](), dict[int, int]()  # tokens of the rows in use
        self.unread = list[tuple[Any, Any, Any]]()

    def batch(self, step_id: int) -> ScheduledBatch:
        """Let rows leave, enter, in chunks and as forks, and go on."""
        rng, used = self.rng, sorted(self.computed)
        finished = tuple(row for row in used if self.known[row] > MAX_LEN - 3 or rng.random() < 0.1)
        for row in finished:
            del self.computed[row], self.known[row]
        cached, new = [], []
        for row in rng.sample(sorted(self.computed), len(self.computed)):
            most = self.known[row] - self.computed[row]
            if rng.random() < 0.9:
                count = rng.randint(1, most)
                end = self.computed[row] + count
                cached.append(CachedRow(row, self.computed[row], count, count == most, self.tables.updates(row, end)))
        for row in range(MAX_NUM_ROWS):
            if row not in self.computed and rng.random() < 0.3:
                new.append(self.enter(row))
                if new[-1].samples and row + 1 < MAX_NUM_ROWS and row + 1 not in self.computed and rng.random() < 0.7:
                    new.append(self.fork(new[-1], row + 1))
        return ScheduledBatch(step_id=step_id, new=tuple(new), cached=tuple(cached), finished=finished)

    def enter(self, row: int) -> NewRow:
        tokens = tuple(self.rng.randrange(VOCAB_SIZE) for _ in range(self.rng.randint(1, 30)))
        hit = self.rng.choice((0, 0, (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE))
        count = self.rng.choice((len(tokens) - hit, self.rng.randint(1, len(tokens) - hit)))
        self.computed[row], self.known[row] = hit, len(tokens)
        options = {"num_computed_tokens": hit, "num_scheduled_tokens": count, "samples": hit + count == len(tokens)}
        one = enter(row, tokens, (), self.rng.sampling())
        return replace(one, block_ids=self.tables.new(row, hit + count), seed=self.rng.getrandbits(40), **options)

    def fork(self, parent: NewRow, row: int) -> NewRow:
        num_tokens = len(parent.token_ids)
        self.computed[row] = self.known[row] = num_tokens
        self.tables._counts[row] = self.tables._counts[parent.row]
        options: dict[str, Any] = {"num_computed_tokens": num_tokens, "num_scheduled_tokens": 0}
        return replace(parent, row=row, fork_of=parent.row, sequence_index=row, **options)

    def read(self, num_left: int) -> None:
        while len(self.unread) > num_left:
            self.rows.append(*self.unread.pop(0))

    def take_in(self, batch: ScheduledBatch) -> None:
        changing_hands = *batch.finished, *(new.row for new in batch.new)
        self.unread = [(rows[keep], at[keep], ids[keep]) for rows, at, ids in self.unread
                       for keep in [~np.isin(rows, changing_hands)]]  # fmt: skip
        self.state.hand_over(changing_hands)
        self.deltas.hand_over(changing_hands)
        for rows in (self.rows, self.truth):
            rows.release(batch.finished)
            for new in batch.new:
                rows.add(new)
            rows.update(batch.cached)
        self.sampling.release(batch.finished)
        for new in batch.new:
            self.sampling.add(new)
        self.deltas.note(batch)

    def expanded(self, step: StepRows) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """Return a step's input and parameters as the device has them, and let its rows go on."""
        planned = plan_step(step, self.rows, self.state)
        delta = self.deltas.take(step, self.rows, self.sampling, planned.needs_token)
        if delta is not None:
            self.device.update(RowDelta(*map(torch.from_numpy, delta)))
        plan = StepPlan(*(None if array is None else torch.from_numpy(array) for array in planned.plan))
        shape = GraphShape(planned.size.num_tokens + 3, planned.size.num_seqs, planned.size.max_query_len)
        out = self.inputs.tensors(shape)
        self.device.expand(plan, planned.size, out)
        parameters = self.device.sampling(plan, planned.size, out.seq_lens)
        rows, positions = planned.draws.rows, planned.draws.positions
        drawn = np.array([self.rng.randrange(VOCAB_SIZE) for _ in rows], np.int64)
        self.device.advance(plan, planned.size, out.seq_lens, torch.from_numpy(drawn))
        self.state.positions[rows] = positions
        self.unread.append((rows, positions, drawn))
        self.truth.append(rows, positions, drawn)
        num_logits_rows = planned.size.num_seqs if plan.logits_seqs is None else len(plan.logits_seqs)
        found = plain(self.inputs.of_graph(shape)) | {"logits": out.logits_indices[:num_logits_rows].tolist()}
        return found, {name: tensor.tolist() for name, tensor in parameters.items()}, planned

    def expected(self, step: StepRows) -> dict[str, Any]:
        """Return a step's input as the host makes it, which knows every token at once."""
        places = np.flatnonzero(step.samples)
        made = self.plain.build(step, self.truth, step.last_tokens(np.unique(step.sources[places])))
        return plain(made) | {"logits": made.logits_indices.tolist()}

    def compute_here(self, step: StepRows) -> None:
        """Do a step on the host, of which the device hears nothing."""
        self.read(0)
        rows, positions = step.rows[step.samples], step.ends[step.samples]
        drawn = np.array([self.rng.randrange(VOCAB_SIZE) for _ in rows], np.int64)
        for there in (self.rows, self.truth):
            there.append(rows, positions, drawn)

    def go_on(self, step: StepRows) -> None:
        for row, end, samples in zip(step.rows.tolist(), step.ends.tolist(), step.samples.tolist(), strict=True):
            self.computed[row] = end
            self.known[row] += samples


@pytest.mark.parametrize("seed", range(1 if INTERPRETED else 4))
def test_two_groups_of_block_tables_and_tokens_that_are_read_late(seed: int) -> None:
    rng = Rng(seed)
    bench = Bench(rng)
    kinds = Counter[str]()
    for step_id in range(40 if INTERPRETED else 150):
        batch = bench.batch(step_id)
        bench.take_in(batch)
        if not batch.num_rows:
            continue
        step = StepRows.of(batch)
        if rng.random() < 0.2:
            kinds["here"] += 1
            bench.compute_here(step)
        else:
            expected = bench.expected(step)
            found, parameters, planned = bench.expanded(step)
            kinds["decode" if planned.plan.token_ids is None else "mixed"] += 1
            kinds["forks"] += planned.plan.shared is not None
            assert found == expected
            wanted = bench.sampling.batch(planned.draws.rows, planned.draws.positions)
            if wanted is not None:
                assert parameters == {name: getattr(wanted, name).tolist() for name in parameters}
                kinds["sampled"] += 1
        bench.go_on(step)
        bench.read(rng.randint(0, 2))
    assert all(kinds[name] > 3 for name in ("here", "decode", "mixed", "sampled")), kinds
    assert kinds["forks"]
