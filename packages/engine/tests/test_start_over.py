"""Steps in which all keys and values are lost: every sequence comes to the same end, and none holds up the others."""

from typing import Any

import pytest

from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Parent
from octavo_engine.errors import RankUnreachable, RequestFailed, RequestLost, WorkerLost, request_error
from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.preemption import PreemptionPolicy, TransferCost
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.types import FinishReason

NEXT_TOKEN = hashed_next_token(1000)


class Lost:
    """The answer of a step that was lost."""

    def result(self) -> ModelOutput:
        raise WorkerLost("rank 1 is gone")


class OutOfReach:
    """The answer of a step whose machine went out of reach."""

    def result(self) -> ModelOutput:
        raise RankUnreachable("rank 1 is out of reach")


class LosingExecutor:
    """An executor that loses its memory in some steps, with whatever these bring."""

    max_in_flight = 1

    def __init__(self, executor: Any, lost: set[int], answer: type = Lost) -> None:
        self._executor = executor
        self._lost = lost
        self._answer = answer

    def submit(self, batch: ScheduledBatch) -> Any:
        if batch.step_id not in self._lost:
            return self._executor.submit(batch)
        self._executor._release(batch)
        self._executor._memory.clear()
        return self._answer()


def make(lost: set[int], **options: Any) -> SchedulerBench:
    bench = SchedulerBench.make(NEXT_TOKEN, 0, **options)
    bench.engine._executor = LosingExecutor(bench.executor, lost)
    return bench


def fill(bench: SchedulerBench) -> None:
    """Add requests of every kind: long and short ones that begin alike, samples, beams, a prompt that is pooled."""
    for index in range(4):
        bench.add(f"long {index}", [*range(20), *range(50 * index, 50 * index + 9)], max_tokens=12)
    bench.add("samples", range(7), n=3, max_tokens=9, seed=5)
    bench.add("beams", range(30, 36), BeamSearchParams(beam_width=3, max_tokens=6))
    bench.add("pooled", range(40), task="embed", pooling="mean")


@pytest.mark.parametrize("step", range(0, 18, 3))
@pytest.mark.parametrize("preemption", [None, "swap"])
def test_sequences_end_as_if_nothing_had_been_lost(step: int, preemption: str | None) -> None:
    options: dict[str, Any] = {"num_blocks": 26, "budget": 24}
    if preemption:
        cost = TransferCost(bytes_per_block=1, bytes_per_second=1e9)
        options |= {"num_host_blocks": 40, "preemption": PreemptionPolicy(cost, 4, mode="swap")}
    benches = make(set(), **options), make({step}, **options)
    ends = []
    for bench in benches:
        fill(bench)
        tokens = bench.run()
        ends.append((tokens, bench.reasons()))
        bench.assert_empty()
    assert ends[0] == ends[1]
    assert benches[1].engine.scheduler.counters.num_lost_steps == 1


def test_what_meets_it_twice_ends_with_the_reason_and_what_waits_is_served() -> None:
    bench = make({1, 4}, max_num_seqs=1)
    for name in ("first", "second"):
        bench.add(name, range(5), max_tokens=6)
    expected = make(set()), make(set())
    expected[0].add("second", range(5), max_tokens=6)
    assert bench.run()["second", 0] == expected[0].run()["second", 0]
    assert bench.reasons() == {("first", 0): FinishReason.ERROR, ("second", 0): FinishReason.LENGTH}
    assert [update.error for update in bench.updates if update.error] == ["WorkerLost: rank 1 is gone"]
    bench.assert_empty()


def test_what_runs_when_a_machine_goes_out_of_reach_ends_and_what_waits_is_served() -> None:
    bench = SchedulerBench.make(NEXT_TOKEN, 0, max_num_seqs=1)
    bench.engine._executor = LosingExecutor(bench.executor, {2}, OutOfReach)
    for name in ("runs", "waits"):
        bench.add(name, range(5), max_tokens=6)
    bench.run()
    assert bench.reasons() == {("runs", 0): FinishReason.ERROR, ("waits", 0): FinishReason.LENGTH}
    assert [update.error for update in bench.updates if update.error] == ["RankUnreachable: rank 1 is out of reach"]
    bench.assert_empty()


def test_an_error_says_whether_the_request_may_be_sent_again() -> None:
    assert type(request_error("RankUnreachable: rank 1", "")) is RequestLost
    assert type(request_error("WorkerLost: rank 1", "")) is RequestLost
    assert type(request_error("MemoryError: no room", "")) is RequestFailed
    assert str(request_error(None, "it failed")) == "it failed"


def test_nothing_that_was_cached_kept_or_pinned_is_hit_afterwards() -> None:
    bench = make({8}, max_num_pinned=10)
    bench.add("kept", range(12), max_tokens=2, keep=True)
    bench.add("pinned", range(100, 112), task="embed", pin=True)
    bench.run()
    assert bench.engine.pins.listed()
    bench.add("lost", range(200, 220), max_tokens=9)
    bench.run()
    assert bench.engine.pins.listed() == []
    bench.add("fork", [*range(12), 5], max_tokens=2, parent=Parent("kept", 0))
    bench.add("again", range(100, 112), max_tokens=2)
    bench.run()
    cached = {update.request_id: update.cached.total for update in bench.updates if update.finish_reason}
    assert (cached["fork"], cached["again"]) == (0, 0)
    bench.assert_empty()
