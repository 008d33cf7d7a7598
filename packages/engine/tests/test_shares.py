"""Steps that are computed at the same time: each has its share of the sequences, and all come to the same end."""

from typing import Any

import pytest

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.errors import WorkerLost
from octavo_engine.executor.base import Pending
from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.preemption import PreemptionPolicy, TransferCost
from octavo_engine.scheduler_bench import SchedulerBench

NEXT_TOKEN = hashed_next_token(1000)


def make(num_shares: int, **options: Any) -> SchedulerBench:
    return SchedulerBench.make(NEXT_TOKEN, num_shares - 1, num_shares=num_shares, **options)


def fill(bench: SchedulerBench) -> None:
    """Add requests of every kind: long and short ones that begin alike, samples, beams, a prompt that is pooled."""
    for index in range(4):
        bench.add(f"long {index}", [*range(20), *range(50 * index, 50 * index + 9)], max_tokens=12)
    bench.add("samples", range(7), n=3, max_tokens=9, seed=5)
    bench.add("beams", range(30, 36), BeamSearchParams(beam_width=3, max_tokens=6))
    bench.add("pooled", range(40), task="embed", pooling="mean")


def ends(bench: SchedulerBench) -> tuple[Any, Any]:
    fill(bench)
    tokens = bench.run()
    bench.assert_empty()
    return tokens, bench.reasons()


@pytest.mark.parametrize("num_shares", [2, 3, 5])
@pytest.mark.parametrize("num_blocks", [26, 200])
def test_every_sequence_ends_as_without_shares(num_shares: int, num_blocks: int) -> None:
    """Where there are few blocks sequences are preempted in the course of it."""
    options: dict[str, Any] = {"num_blocks": num_blocks, "budget": 24, "max_num_seqs": 12}
    assert ends(make(num_shares, **options)) == ends(make(1, **options))


def test_a_decoding_sequence_is_in_one_of_the_steps_at_a_time() -> None:
    """Six sequences on three stages: two in each step, in turn, once their prompts are computed."""
    bench = make(3)
    for index in range(6):
        bench.add(str(index), range(100 * index, 100 * index + 5), max_tokens=20)
    bench.run()
    decoding = [[row.row for row in batch.cached] for batch in bench.batches if not batch.new]
    assert decoding[:6] == [[0, 1], [2, 3], [4, 5]] * 2
    for steps in zip(decoding, decoding[1:], decoding[2:], strict=False):
        rows = [row for step in steps for row in step]
        assert len(rows) == len(set(rows))


def test_prompts_are_computed_in_each_step_beside_those_that_decode() -> None:
    bench = make(2, budget=8)
    for index in range(2):
        bench.add(f"short {index}", range(100 * index, 100 * index + 3), max_tokens=12)
    bench.step(4)
    bench.add("long", range(500, 540))
    bench.run()
    with_chunks = [batch for batch in bench.batches if any(row.num_scheduled_tokens > 1 for row in batch.cached)]
    assert len(with_chunks) >= 4
    assert all(batch.num_tokens == 8 for batch in with_chunks[:4])


class LosingPipeline:
    """An executor of three steps at once that loses its memory, and with it all steps on their way."""

    max_in_flight = 3

    def __init__(self, executor: Any, lost: int) -> None:
        self._executor = executor
        self._lost = lost
        self._is_down = False

    def submit(self, batch: ScheduledBatch) -> Pending:
        self._is_down |= batch.step_id == self._lost
        if not self._is_down:
            return self._executor.submit(batch)
        self._executor._release(batch)
        self._executor._memory.clear()
        return Lost(self)

    def read(self) -> ModelOutput:
        """The ranks are replaced before the next step."""
        self._is_down, self._lost = False, -1
        raise WorkerLost("rank 1 is gone")


class Lost:
    """The answer of a step that was lost."""

    def __init__(self, pipeline: LosingPipeline) -> None:
        self._pipeline = pipeline

    def result(self) -> ModelOutput:
        return self._pipeline.read()


@pytest.mark.parametrize("lost", range(0, 20, 4))
@pytest.mark.parametrize("preemption", [None, "swap"])
def test_all_steps_on_their_way_are_lost_at_once(lost: int, preemption: str | None) -> None:
    """Prompts in chunks are in several of them, and have met it once all the same."""
    options: dict[str, Any] = {"num_blocks": 40, "budget": 12, "max_num_seqs": 12}
    if preemption:
        cost = TransferCost(bytes_per_block=1, bytes_per_second=1e9)
        options |= {"num_host_blocks": 40, "preemption": PreemptionPolicy(cost, 4, mode="swap")}
    bench = make(3, **options)
    bench.engine._executor = LosingPipeline(bench.executor, lost)
    found = ends(bench)
    options.pop("preemption", None)
    assert found == ends(make(1, **options))
    assert 1 <= bench.engine.scheduler.counters.num_lost_steps <= 3
