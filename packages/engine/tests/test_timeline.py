"""Timelines on a fake model and a clock that a test sets: every step takes a second."""

from collections.abc import Callable

import pytest

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.preemption import PreemptionPolicy, TransferCost
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.timeline import Preemption, WaitReason
from octavo_engine.types import FinishReason


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TimedExecutor:
    """Takes a second for every step."""

    def __init__(self, inner, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self.max_in_flight = inner.max_in_flight

    def submit(self, batch):
        self._clock.now += 1
        return self._inner.submit(batch)


@pytest.fixture
def make(clock: Clock) -> Callable[..., SchedulerBench]:
    def make(num_late: int = 0, **options) -> SchedulerBench:
        options = {"max_num_timelines": 4, "max_num_seqs": 2, "budget": 8, "clock": clock, **options}
        bench = SchedulerBench.make(hashed_next_token(64), num_late, **options)
        bench.engine._executor = TimedExecutor(bench.executor, clock)
        return bench

    return make


def add(bench: SchedulerBench, clock: Clock, request_id: str, num_tokens: int, first: int = 1, **options) -> None:
    bench.num_arrivals = clock.now - 1  # the bench numbers arrivals
    bench.add(request_id, range(first, first + num_tokens), **options)


def timeline(bench: SchedulerBench, request_id: str):
    found = bench.engine.scheduler.timeline(request_id)
    assert found is not None
    return found


def test_a_prompt_in_chunks_has_each_with_its_tokens_and_time(make, clock):
    bench = make()
    add(bench, clock, "a", 20, max_tokens=3)
    bench.run()
    found = timeline(bench, "a")
    assert (found.state, found.num_prompt_tokens, found.num_waiting_before) == ("finished", 20, 0)
    assert [(c.start, c.seconds, c.num_tokens, c.resumes) for c in found.chunks] == [
        (0, 1, 8, False),
        (1, 1, 8, False),
        (2, 1, 4, False),
    ]
    assert [(w.start, w.seconds, dict(w.reasons)) for w in found.waits] == [(0, 0, {})]
    (choice,) = found.choices
    assert (choice.first_token, choice.finished, choice.num_tokens) == (3, 5, 3)
    assert (choice.finish_reason, found.preemptions) == (FinishReason.LENGTH, ())


def test_steps_that_decode_alone_leave_nothing(make, clock):
    bench = make()
    add(bench, clock, "a", 4, max_tokens=20)
    bench.run()
    assert len(timeline(bench, "a").chunks) == 1
    assert not bench.engine.scheduler._timelines.steps


@pytest.mark.parametrize(
    ("options", "others", "reason"),
    [
        ({"max_num_seqs": 1}, [4], WaitReason.ROWS),
        ({"num_blocks": 4}, [8], WaitReason.BLOCKS),
        ({"budget": 4}, [40], WaitReason.TOKEN_BUDGET),
    ],
    ids=["rows", "blocks", "token budget"],
)
def test_waiting_has_its_reason(make, clock, options, others, reason):
    bench = make(**options)
    for place, num_tokens in enumerate(others):
        add(bench, clock, f"other-{place}", num_tokens, max_tokens=3)
    bench.step()
    add(bench, clock, "late", 4, first=40, max_tokens=2)
    bench.step()
    (wait,) = timeline(bench, "late").waits
    assert (timeline(bench, "late").state, wait.ended, dict(wait.reasons)) == ("waiting", False, {reason: 1})
    bench.run()
    (wait,) = timeline(bench, "late").waits
    assert wait.ended
    assert wait.seconds >= 2
    assert dict(wait.reasons) == {reason: wait.seconds}


def test_reasons_add_up_where_they_change(make, clock):
    bench = make(max_num_seqs=1)
    add(bench, clock, "first", 20, max_tokens=2)
    bench.step()
    add(bench, clock, "second", 4, first=40)
    clock.now += 0.5  # nobody has looked at it yet
    bench.step()
    bench.run()
    (wait,) = timeline(bench, "second").waits
    assert wait.reasons[WaitReason.STEP] == 0.5
    assert sum(wait.reasons.values()) == wait.seconds


def test_cached_tokens_and_forks_are_told(make, clock):
    bench = make()
    add(bench, clock, "a", 9, n=2)
    bench.run()
    add(bench, clock, "b", 9)
    bench.run()
    assert timeline(bench, "b").cached.full == 8
    assert [choice.index for choice in timeline(bench, "a").choices] == [0, 1]
    assert sum(chunk.num_tokens for chunk in timeline(bench, "b").chunks) == 1


@pytest.mark.parametrize("kind", ["recompute", "swap"])
def test_preemptions_say_what_became_of_the_blocks(make, clock, kind):
    policy = PreemptionPolicy(TransferCost(bytes_per_block=1, bytes_per_second=1e9), 4, mode=kind)
    bench = make(num_blocks=8, num_host_blocks=20, preemption=policy)
    for request_id, first in (("a", 1), ("b", 40)):
        add(bench, clock, request_id, 8, first=first, max_tokens=12)
    bench.run()
    found = timeline(bench, "b")
    assert [type(p) for p in found.preemptions] == [Preemption] * len(found.preemptions)
    assert {p.kind for p in found.preemptions} == {kind}
    assert len(found.waits) == 1 + len(found.preemptions)
    assert [chunk.resumes for chunk in found.chunks][0 :: len(found.chunks) - 1] == [False, True]
    assert found.waits[1].reasons.keys() <= {WaitReason.BLOCKS, WaitReason.STEP}


def test_a_search_has_its_hypotheses_as_choices(make, clock):
    bench = make()
    bench.num_arrivals = clock.now - 1
    bench.add("beams", [1, 2, 3], BeamSearchParams(beam_width=2, max_tokens=3))
    bench.run()
    assert [(c.index, c.num_tokens) for c in timeline(bench, "beams").choices] == [(0, 3), (1, 3)]


def test_aborted_requests_end_where_they_stand(make, clock):
    bench = make(max_num_seqs=1)
    add(bench, clock, "a", 4)
    add(bench, clock, "b", 4, first=40)
    bench.step()
    bench.engine.abort("b")
    found = timeline(bench, "b")
    assert (found.state, found.choices[0].finish_reason, found.choices[0].first_token) == (
        "finished",
        FinishReason.ABORT,
        None,
    )
    assert found.waits[0].ended


@pytest.mark.parametrize("max_num_timelines", [0, 3])
def test_the_last_ended_requests_are_remembered_and_no_more(make, clock, max_num_timelines):
    bench = make(max_num_timelines=max_num_timelines)
    for place in range(5):
        add(bench, clock, str(place), 4, first=10 * place)
        bench.run()
    known = [place for place in range(5) if bench.engine.scheduler.timeline(str(place))]
    assert known == list(range(5))[5 - max_num_timelines :]
    assert bench.engine.scheduler.timeline("unknown") is None
    assert not bench.engine.scheduler._timelines._live


def test_events_of_one_request_are_bounded(make, clock):
    bench = make(budget=1, num_blocks=200, max_model_len=700)
    add(bench, clock, "a", 300, max_tokens=1)
    bench.run()
    found = timeline(bench, "a")
    assert (len(found.chunks), found.num_omitted) == (256, 43)  # the last token is like one that decodes


@pytest.mark.parametrize("num_late", [1, 3])
def test_steps_in_flight_are_told_apart(make, clock, num_late):
    bench = make(num_late)
    add(bench, clock, "a", 20, max_tokens=3)
    bench.step()
    assert timeline(bench, "a").chunks[0].seconds is None
    bench.run()
    assert [chunk.num_tokens for chunk in timeline(bench, "a").chunks] == [8, 8, 4]
    assert all(chunk.seconds for chunk in timeline(bench, "a").chunks)


def test_a_grammar_that_was_compiled_before_is_told(make, clock):
    bench = make()
    add(bench, clock, "a", 4, grammar_seconds=0.25)
    bench.run()
    assert timeline(bench, "a").grammar_seconds == 0.25
