"""Beams in the scheduler, on a fake model with a real paged memory, answering 0, 1 and 3 steps late."""

import math
import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from types import SimpleNamespace

import pytest

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.beam_search import BeamSearch
from octavo_engine.executor.fake import hashed_candidates, hashed_next_token
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.sequence import Sequence
from octavo_engine.types import FinishReason

VOCAB_SIZE = 40
CANDIDATES = hashed_candidates(VOCAB_SIZE)
NEXT_TOKEN = hashed_next_token(VOCAB_SIZE)


class BeamBench(SchedulerBench):
    """A bench that looks at every step: groups decode whole or not at all."""

    def __post_init__(self) -> None:
        self.watch(self.check_groups)

    def watch(self, look: Callable[[], None]) -> None:
        """Look at every step that has been scheduled, before it runs."""
        submit = self.engine._executor.submit

        def watched(batch):
            self.scheduled = batch
            look()
            return submit(batch)

        self.engine._executor = SimpleNamespace(submit=watched, max_in_flight=self.executor.max_in_flight)

    def check_groups(self) -> None:
        sampling = {row.row for row in (*self.scheduled.new, *self.scheduled.cached) if row.samples}
        for sequence in self.engine.scheduler._running:
            if sequence.beams is not None and sequence.row in sampling:
                assert all(member.row in sampling for member in sequence.beams.members)

    def run(self) -> dict[tuple[str, int], list[int]]:
        """Run everything to its end; return the hypotheses."""
        super().run()
        return {(u.request_id, u.index): list(u.token_ids) for u in self.updates if u.score is not None}

    def members(self, request_id: str) -> list[list[int]]:
        return [s.token_ids for s in self.engine.scheduler.sequences(request_id)]


@pytest.fixture
def make(num_late: int):
    usual = {"num_blocks": 200, "max_num_seqs": 16, "max_model_len": 100, "candidates": CANDIDATES}
    return lambda **options: BeamBench.make(NEXT_TOKEN, num_late, **usual | options)


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % VOCAB_SIZE for i in range(length)]


def alone(prompt: SequenceABC[int], params: BeamSearchParams, eos: SequenceABC[int] = ()) -> list[list[int]]:
    """What the search finds on the fake model, without any engine."""
    assert params.max_tokens is not None
    search = BeamSearch(
        params.beam_width,
        max_num_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        stop_token_ids={*params.stop_token_ids, *([] if params.ignore_eos else eos)},
    )
    beams = [list(prompt)]
    while not search.finished:
        places = search.advance([CANDIDATES(beam, search.num_candidates) for beam in beams])
        beams = [[*beams[place.source], place.token_id] for place in places if place is not None]
    return [list(h.token_ids) for h in search.hypotheses[: params.num_returned]]


def as_updates(request_id: str, found: list[list[int]]) -> dict[tuple[str, int], list[int]]:
    return {(request_id, index): tokens for index, tokens in enumerate(found)}


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("early", [True, False, "never"])
def test_a_group_finds_what_the_search_alone_finds(make, width: int, early):
    params = BeamSearchParams(beam_width=width, max_tokens=14, early_stopping=early, length_penalty=0.5)
    bench = make(eos=[3, 9])
    bench.add("a", prompt(10), params)
    assert bench.run() == as_updates("a", alone(prompt(10), params, eos=[3, 9]))
    bench.assert_empty()


def test_hypotheses_come_best_first_with_scores_reasons_and_counters(make):
    params = BeamSearchParams(beam_width=4, max_tokens=20, early_stopping=True, num_return_sequences=3)
    bench = make(eos=[3])
    bench.add("a", prompt(6), params)
    bench.run()
    scores = [update.score for update in bench.updates]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    for update in bench.updates:
        stopped = update.token_ids[-1] == 3
        assert update.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert update.stop_token_id == (3 if stopped else None)
        assert update.times is not None
    counters = bench.engine.scheduler.counters
    assert counters.num_generation_tokens == sum(len(u.token_ids) for u in bench.updates)
    assert sum(counters.finished.values()) == 3


def num_blocks_in_common(sequences: SequenceABC[Sequence], block_size: int = 4) -> int:
    """How many blocks hold the computed tokens of some sequences if what begins alike is held once."""
    num_computed = sequences[0].num_computed_tokens
    ends = [min(end, num_computed) for end in range(block_size, num_computed + block_size, block_size)]
    return len({tuple(sequence.token_ids[:end]) for sequence in sequences for end in ends})


@pytest.mark.parametrize("length", [1, 7, 8, 9])
@pytest.mark.parametrize("prefix", [True, False])
def test_beams_hold_each_block_that_they_have_in_common_once(make, length: int, prefix: bool):
    bench = make(prefix_cache=prefix)
    bench.add("a", prompt(length), BeamSearchParams(beam_width=5, max_tokens=25))
    num_checked = 0

    def check() -> None:
        nonlocal num_checked
        num_checked += 1
        assert bench.cache.stats().num_used == num_blocks_in_common(bench.engine.scheduler.sequences("a"))

    bench.watch(check)
    bench.run()
    assert num_checked == 25
    bench.assert_empty()


def test_dropped_beams_free_their_blocks_at_once(make):
    bench = make(block_size=4)
    bench.add("a", prompt(8), BeamSearchParams(beam_width=4, max_tokens=40))
    while bench.engine.has_work:
        bench.step()
        members = bench.engine.scheduler.sequences("a")
        held = {block for m in members for block in bench.cache.block_ids(m.seq_id)[0]}
        assert bench.cache.stats().num_used - bench.cache.stats().num_parked == len(held)


def test_beams_samples_and_single_requests_run_beside_each_other(make):
    params = BeamSearchParams(beam_width=3, max_tokens=12)
    bench = make(max_num_seqs=12)
    bench.add("plain", prompt(9), max_tokens=20)
    bench.add("beams", prompt(13), params)
    bench.add("samples", prompt(5, start=2), n=3, max_tokens=9)
    bench.add("others", prompt(13, start=1), params)
    found = bench.run()
    assert found == as_updates("beams", alone(prompt(13), params)) | as_updates(
        "others", alone(prompt(13, start=1), params)
    )
    plain = [t for u in bench.updates if u.request_id == "plain" for t in u.token_ids]
    tokens = list(prompt(9))
    for _ in range(20):
        tokens.append(NEXT_TOKEN(tokens, 0))
    assert plain == tokens[9:]
    bench.assert_empty()


def test_long_prompts_are_computed_in_chunks_and_groups_wait_for_budget(make):
    params = BeamSearchParams(beam_width=4, max_tokens=30)
    bench = make(budget=6)
    for place in range(3):
        bench.add(str(place), prompt(20 + place, start=place), params)
    found = bench.run()
    for place in range(3):
        assert [found[str(place), i] for i in range(4)] == alone(prompt(20 + place, start=place), params)
    assert max(batch.num_tokens for batch in bench.executor.batches) <= 6


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_preempted_group_resumes_with_the_same_beams(make, prefix: bool, width: int):
    params = BeamSearchParams(beam_width=width, max_tokens=24)
    bench = make(num_blocks=38 + 8 * (width > 2), block_size=4, prefix_cache=prefix)
    bench.add("first", prompt(10), params)
    bench.add("second", prompt(10, start=3), params)
    bench.add("third", prompt(10, start=5), params)
    bench.step(8)
    for request_id in ("second", "third"):
        group = bench.engine.scheduler.sequences(request_id)
        if group and group[0].row is not None:
            group[0].beams.preempt()
            break
    found = bench.run()
    expected = {}
    for request_id, start in (("first", 0), ("second", 3), ("third", 5)):
        expected |= as_updates(request_id, alone(prompt(10, start=start), params))
    assert found == expected
    assert bench.engine.scheduler.counters.num_preemptions > 0
    bench.assert_empty()


def test_a_resumed_group_shares_as_before(make):
    bench = make(block_size=4, prefix_cache=False)
    bench.add("a", prompt(11), BeamSearchParams(beam_width=4, max_tokens=30))
    bench.step(15)
    while (group := bench.engine.scheduler.sequences("a")[0].beams).awaits_answer:
        bench.step()
    group.preempt()
    tokens = sorted(bench.members("a"))
    bench.cache.step_done(10**6)
    assert bench.cache.stats().num_used == 0
    checked = []

    def check() -> None:
        if group.awaits_answer and not checked:
            assert sorted(bench.members("a")) == tokens
            assert bench.cache.stats().num_used == num_blocks_in_common(group.members)
            checked.append(True)

    bench.watch(check)
    bench.run()
    assert checked


def test_the_pool_that_a_group_needs_at_most_is_enough(make):
    params = BeamSearchParams(beam_width=3, max_tokens=17)
    most = 10 // 4 + 3 * (-(-(10 + 16) // 4) - 10 // 4)
    bench = make(num_blocks=1 + most, block_size=4)
    bench.add("a", prompt(10), params)
    bench.add("b", prompt(10, start=1), params)
    found = bench.run()
    assert found == as_updates("a", alone(prompt(10), params)) | as_updates("b", alone(prompt(10, start=1), params))
    bench.assert_empty()


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6, 11])
def test_an_aborted_group_leaves_nothing(make, num_steps: int):
    bench = make()
    bench.add("a", prompt(30), BeamSearchParams(beam_width=4, max_tokens=20))
    bench.add("b", prompt(5), BeamSearchParams(beam_width=2, max_tokens=5))
    bench.step(num_steps)
    updates = bench.engine.abort("a")
    assert [(u.index, u.finish_reason) for u in updates] == [(0, FinishReason.ABORT)]
    assert bench.engine.abort("a") == []
    assert set(bench.run()) == {("b", 0), ("b", 1)}
    bench.assert_empty()


def test_a_failed_step_ends_the_groups_in_it_and_no_others(make):
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    bench = make(fail=[1])
    bench.add("a", prompt(9), params)
    bench.step(6)
    bench.add("b", prompt(9, start=2), params)
    found = bench.run()
    assert [u.finish_reason for u in bench.updates if u.request_id == "a"] == [FinishReason.ERROR]
    assert found == as_updates("b", alone(prompt(9, start=2), params))
    bench.assert_empty()


def test_fewer_tokens_than_beams_leave_places_empty_at_first(make):
    params = BeamSearchParams(beam_width=6, max_tokens=5)
    bench = make()
    bench.executor.candidates = few = hashed_candidates(4)
    bench.add("a", prompt(5), params)
    found = bench.run()
    search, beams = BeamSearch(6, max_num_tokens=5), [prompt(5)]
    while not search.finished:
        places = search.advance([few(beam, 6) for beam in beams])
        beams = [[*beams[place.source], place.token_id] for place in places if place is not None]
    assert [found["a", i] for i in range(6)] == [list(h.token_ids) for h in search.hypotheses]
    bench.assert_empty()


def test_fewer_texts_than_are_asked_for_are_returned(make):
    bench = make()
    bench.executor.candidates = hashed_candidates(3)
    bench.add("a", prompt(5), BeamSearchParams(beam_width=6, max_tokens=1))
    found = bench.run()
    assert sorted(found.values()) == [[0], [1], [2]]
    assert {(u.index, u.num_choices, u.finish_reason) for u in bench.updates} == {
        (index, 3, FinishReason.LENGTH) for index in range(3)
    }
    assert bench.engine.scheduler.counters.finished[FinishReason.LENGTH.value] == 3
    bench.assert_empty()


def test_a_search_without_any_text_ends_with_an_error(make):
    bench = make()
    bench.executor.candidates = lambda token_ids, count: ([1, 2], [-math.inf, -math.inf])
    bench.add("a", prompt(5), BeamSearchParams(beam_width=2, max_tokens=4))
    bench.run()
    assert [u.finish_reason for u in bench.updates] == [FinishReason.ERROR]
    bench.assert_empty()


def test_beams_without_any_way_on_leave_and_keep_their_rows_for_others(make):
    """A model that knows no other token than the end for most texts, as a grammar may."""
    params = BeamSearchParams(beam_width=3, max_tokens=9, length_penalty=2.0, early_stopping="never")

    def candidates(token_ids, count):
        best, logprobs = CANDIDATES(token_ids, count)
        keep = 1 if sum(token_ids) % 3 else 3
        return best[:keep], logprobs[:keep]

    bench = make(eos=range(20))
    bench.executor.candidates = candidates
    bench.add("a", prompt(5), params)
    bench.run()
    bench.assert_empty()


@pytest.mark.parametrize("seed", range(10))
def test_random_traffic_with_beams_gives_each_its_own_and_leaks_nothing(make, seed: int):
    rng = random.Random(seed)
    bench = make(
        num_blocks=rng.randint(40, 80),
        max_num_seqs=rng.randint(6, 14),
        budget=rng.randint(6, 40),
        max_model_len=60,
        prefix_cache=rng.random() < 0.7,
        eos=[1],
    )
    beginnings = [prompt(rng.randint(1, 20), start=i) for i in range(3)]
    wanted: dict[str, list[list[int]]] = {}
    aborted = set()
    for i in range(18):
        tokens = [*rng.choice(beginnings), *prompt(rng.randint(1, 12), start=rng.randint(0, 5))]
        if rng.random() < 0.6:
            params = BeamSearchParams(
                beam_width=rng.randint(1, 5),
                max_tokens=rng.randint(1, 16),
                early_stopping=rng.choice([True, False, "never"]),
                length_penalty=rng.choice([0.0, 1.0, 2.0]),
            )
            bench.add(str(i), tokens, params, priority=rng.randint(0, 2))
            wanted[str(i)] = alone(tokens, params, eos=[1])
        else:
            bench.add(str(i), tokens, n=rng.randint(1, 3), max_tokens=rng.randint(1, 25), priority=rng.randint(0, 2))
        bench.step(rng.randint(0, 4))
        if rng.random() < 0.2:
            victim = str(rng.randint(0, i))
            aborted.add(victim)
            bench.engine.abort(victim)
    found = bench.run()
    for request_id, expected in wanted.items():
        own = [tokens for (owner, _), tokens in sorted(found.items()) if owner == request_id]
        assert own == expected or (request_id in aborted and not own)
    bench.assert_empty()
