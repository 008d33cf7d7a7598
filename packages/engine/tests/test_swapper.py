"""Sequences whose blocks wait on the host, on a fake model with a real paged memory, 0, 1 and 3 steps late."""

import random

import pytest

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.beam_search import BeamSearch
from octavo_engine.branch import Parent
from octavo_engine.executor.fake import hashed_candidates, hashed_next_token
from octavo_engine.preemption import PreemptionPolicy, PreemptionStats, TransferCost
from octavo_engine.scheduler import Scheduler
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.sequence import Sequence
from octavo_engine.stats import collect_stats
from octavo_engine.timeline import WaitReason
from octavo_engine.types import FinishReason

VOCAB_SIZE = 60
NEXT_TOKEN = hashed_next_token(VOCAB_SIZE)
CANDIDATES = hashed_candidates(VOCAB_SIZE)
BLOCK_SIZE = 4


def policy(mode: str = "swap") -> PreemptionPolicy:
    """A policy that swaps; with `auto`, what is longer than two blocks."""
    transfer = TransferCost(bytes_per_block=1, bytes_per_second=1.0, seconds_per_move=BLOCK_SIZE * 2.5 / 2)
    return PreemptionPolicy(transfer, BLOCK_SIZE, mode=mode, seconds_per_token=1.5)


class Alternating(PreemptionPolicy):
    """Swaps or computes again as a coin falls."""

    def __init__(self, seed: int) -> None:
        super().__init__(TransferCost(bytes_per_block=1, bytes_per_second=1.0), BLOCK_SIZE)
        self._coin = random.Random(seed)

    def prefers_swap(self, size) -> bool:
        return self._coin.random() < 0.6


class SwapBench(SchedulerBench):
    """A bench that knows who is on the host."""

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    @property
    def preemption(self) -> PreemptionStats:
        return collect_stats(self.scheduler).preemption

    def swapped(self) -> list[Sequence]:
        sequences = [s for found in self.scheduler._residents.by_request.values() for s in found]
        return [s for s in sequences if s.seq_id in self.cache.host]

    def run_until_swapped(self) -> list[Sequence]:
        """Go on until some sequences are on the host; return them."""
        while not (swapped := self.swapped()):
            assert self.engine.has_work
            self.step()
        return swapped

    def num_computed(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)


@pytest.fixture
def make(num_late: int):
    usual = {"num_blocks": 14, "num_host_blocks": 60, "max_model_len": 52, "candidates": CANDIDATES}
    return lambda **options: SwapBench.make(NEXT_TOKEN, num_late, **usual | {"preemption": policy()} | options)


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % VOCAB_SIZE for i in range(length)]


def alone(prompt: list[int], count: int, index: int = 0) -> list[int]:
    """What the fake model says to a prompt, without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(NEXT_TOKEN(tokens, index))
    return tokens[len(prompt) :]


def searched(prompt: list[int], params: BeamSearchParams) -> list[list[int]]:
    """What a search finds on the fake model, without any engine."""
    search = BeamSearch(
        params.beam_width, max_num_tokens=params.max_tokens, length_penalty=params.length_penalty, stop_token_ids=()
    )
    beams = [list(prompt)]
    while not search.finished:
        places = search.advance([CANDIDATES(beam, search.num_candidates) for beam in beams])
        beams = [[*beams[place.source], place.token_id] for place in places if place is not None]
    return [list(h.token_ids) for h in search.hypotheses[: params.num_returned]]


@pytest.mark.parametrize("prefix", [True, False])
def test_swapped_sequences_go_on_with_the_same_tokens_and_compute_none_twice(make, prefix: bool):
    bench = make(prefix_cache=prefix)
    for i in range(5):
        bench.add(str(i), prompt(6, start=i), max_tokens=30)
    assert bench.run() == {(str(i), 0): alone(prompt(6, start=i), 30) for i in range(5)}
    stats = bench.preemption
    assert stats.num_swapped > 0
    assert stats.num_recomputed == 0
    assert bench.num_computed() == 5 * (6 + 30 - 1)
    bench.assert_empty()


def test_a_prompt_in_chunks_goes_on_where_it_was(make):
    bench = make(budget=6)
    bench.add("first", prompt(6, start=1), max_tokens=40)
    bench.add("long", prompt(45, start=2), max_tokens=3)
    assert bench.run() == {
        ("first", 0): alone(prompt(6, start=1), 40),
        ("long", 0): alone(prompt(45, start=2), 3),
    }
    assert bench.preemption.num_swapped > 0
    assert bench.num_computed() == 6 + 40 - 1 + 45 + 3 - 1
    bench.assert_empty()


@pytest.mark.parametrize("prefix", [True, False])
def test_samples_under_swapping_stay_what_they_are_and_share_what_they_shared(make, prefix: bool):
    bench = make(num_blocks=16, max_model_len=40, prefix_cache=prefix)
    bench.add("a", prompt(10), n=3, max_tokens=24)
    bench.add("b", prompt(8, start=4), n=2, max_tokens=20)
    while bench.engine.has_work:
        bench.step()
        running = [s for s in bench.scheduler.sequences("a") if s.row is not None]
        if len(running) > 1 and not bench.scheduler._in_flight:
            firsts = {tuple(bench.cache.block_ids(s.seq_id)[0][:2]) for s in running}
            assert len(firsts) == 1  # the prompt's full blocks
    assert bench.tokens() == {("a", i): alone(prompt(10), 24, i) for i in range(3)} | {
        ("b", i): alone(prompt(8, start=4), 20, i) for i in range(2)
    }
    assert bench.preemption.num_swapped > 1
    assert bench.num_computed() == 10 + 3 * 23 + 8 + 2 * 19
    bench.assert_empty()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("num_steps", [3, 9, 10])
def test_a_group_of_beams_is_swapped_as_one(make, prefix: bool, width: int, num_steps: int):
    params = BeamSearchParams(beam_width=width, max_tokens=16)
    bench = make(num_blocks=80, prefix_cache=prefix, max_num_seqs=12)
    bench.add("first", prompt(10), params)
    bench.add("second", prompt(10, start=3), params)
    bench.step(num_steps)
    group = bench.scheduler.sequences("second")
    if group and group[0].row is not None:
        num_used = len({b for s in group for b in bench.cache.block_ids(s.seq_id)[0]})
        group[0].beams.preempt()
        assert bench.cache.stats().host.num_used == num_used  # each block once, however many share it
        assert all(s.row is None for s in group)
    found = bench.run()
    expected = {("first", i): tokens for i, tokens in enumerate(searched(prompt(10), params))}
    expected |= {("second", i): tokens for i, tokens in enumerate(searched(prompt(10, start=3), params))}
    assert found == expected
    assert bench.preemption.num_swapped == 1
    bench.assert_empty()


@pytest.mark.parametrize("prefix", [True, False])
def test_beams_samples_and_single_requests_swap_beside_each_other(make, prefix: bool):
    params = BeamSearchParams(beam_width=3, max_tokens=20)
    bench = make(num_blocks=26, max_num_seqs=12, prefix_cache=prefix)
    bench.add("plain", prompt(9), max_tokens=30)
    bench.add("beams", prompt(13), params)
    bench.add("samples", prompt(5, start=2), n=3, max_tokens=20)
    bench.add("others", prompt(13, start=1), params)
    found = bench.run()
    expected = {("plain", 0): alone(prompt(9), 30)}
    expected |= {("samples", i): alone(prompt(5, start=2), 20, i) for i in range(3)}
    expected |= {("beams", i): tokens for i, tokens in enumerate(searched(prompt(13), params))}
    expected |= {("others", i): tokens for i, tokens in enumerate(searched(prompt(13, start=1), params))}
    assert found == expected
    assert bench.preemption.num_swapped > 1
    bench.assert_empty()


def test_short_sequences_are_computed_again_and_long_ones_swapped(make):
    bench = make(num_blocks=14, preemption=policy("auto"))
    for i in range(5):
        bench.add(str(i), prompt(2, start=i), max_tokens=36)
    swapped, lengths = [], []
    try_out = bench.scheduler._swapper.try_out

    def watched(sequences):
        size = bench.cache.host.size([s.seq_id for s in sequences])
        swapped.append(try_out(sequences))
        lengths.append(size.num_lost)
        return swapped[-1]

    bench.scheduler._swapper.try_out = watched
    assert bench.run() == {(str(i), 0): alone(prompt(2, start=i), 36) for i in range(5)}
    assert {True, False} == set(swapped)
    assert max(n for n, s in zip(lengths, swapped, strict=True) if not s) < min(
        n for n, s in zip(lengths, swapped, strict=True) if s
    )
    stats = bench.preemption
    assert (stats.num_swapped, stats.num_recomputed) == (swapped.count(True), swapped.count(False))
    bench.assert_empty()


def test_what_finds_no_room_on_the_host_is_computed_again(make):
    bench = make(num_host_blocks=6)
    for i in range(5):
        bench.add(str(i), prompt(6, start=i), max_tokens=30)
    assert bench.run() == {(str(i), 0): alone(prompt(6, start=i), 30) for i in range(5)}
    stats = bench.preemption
    assert stats.num_swapped > 0
    assert stats.num_recomputed > 0
    bench.assert_empty()


def test_a_prompt_whose_every_token_is_wanted_is_computed_again(make):
    bench = make(budget=6)
    bench.add("first", prompt(6, start=1), max_tokens=40)
    bench.add("long", prompt(45, start=2), max_tokens=1, prompt_logprobs=1)
    bench.run()
    assert bench.preemption.num_recomputed > 0
    assert bench.preemption.num_swapped == 0


def test_abort_frees_what_is_on_the_host(make):
    bench = make()
    for i in range(5):
        bench.add(str(i), prompt(6, start=i), n=2 if i == 4 else 1, max_tokens=30)
    victim = bench.run_until_swapped()[0]
    before = bench.cache.stats().host.num_used
    bench.updates += bench.engine.abort(victim.request.request_id)
    assert bench.cache.stats().host.num_used < before
    tokens = bench.run()
    assert all(
        tokens[str(i), 0] == alone(prompt(6, start=i), 30) for i in range(5) if str(i) != victim.request.request_id
    )
    bench.assert_empty()


def test_beams_that_come_back_take_the_rows_that_they_had(make):
    bench = make(num_blocks=80, max_num_seqs=6)
    bench.add("a", prompt(10), BeamSearchParams(beam_width=4, max_tokens=16))
    bench.step(6)
    group = bench.scheduler.sequences("a")
    for _ in range(2):
        group[0].beams.preempt()
        assert bench.scheduler._rows.num_available == 6
        while group[0].row is None:
            bench.step()
        assert bench.scheduler._rows.num_available == 6 - 4
    bench.run()
    bench.assert_empty()


def test_abort_of_swapped_beams_frees_what_is_on_the_host(make):
    bench = make(num_blocks=80)
    bench.add("a", prompt(10), BeamSearchParams(beam_width=3, max_tokens=16))
    bench.step(6)
    bench.scheduler.sequences("a")[0].beams.preempt()
    assert bench.cache.stats().host.num_sequences == 3
    bench.engine.abort("a")
    bench.run()
    bench.assert_empty()


def test_a_token_in_flight_may_end_a_sequence_that_is_on_the_host(make, num_late: int):
    bench = make()
    bench.add("a", prompt(6), max_tokens=20)
    bench.step(num_late + 3)
    sequence = bench.scheduler.sequences("a")[0]
    bench.scheduler._residents.preempt(sequence)
    assert sequence.seq_id in bench.cache.host
    assert sequence.num_placeholders == num_late
    sequence.stop_token_ids = frozenset(range(VOCAB_SIZE))
    length = len(sequence.token_ids) - 6
    assert bench.run()["a", 0] == alone(prompt(6), length + 1)
    assert bench.reasons()["a", 0] is FinishReason.STOP
    bench.assert_empty()


@pytest.mark.parametrize("fail", range(8, 40, 5), ids=lambda step: f"step-{step}")
def test_a_failed_step_harms_none_that_it_did_not_compute(make, fail: int):
    """Its copies to and from the host were not made, and later steps may have gone by them."""
    bench = make(fail=[fail])
    for i in range(5):
        bench.add(str(i), prompt(6, start=i), max_tokens=30)
    tokens = bench.run()
    failed = {u.request_id for u in bench.updates if u.finish_reason is FinishReason.ERROR}
    assert len(failed) < 5
    for i in range(5):
        expected = alone(prompt(6, start=i), 30)
        got = tokens.get((str(i), 0), [])
        assert got == (expected[: len(got)] if str(i) in failed else expected)
    bench.assert_empty()


def test_one_that_came_back_after_a_step_whose_copies_failed_is_computed_again(make, num_late: int):
    bench = make(budget=4, num_blocks=30)
    bench.add("talks", prompt(4), max_tokens=12)
    bench.add("long", prompt(40, start=3), max_tokens=2)
    bench.step(4)
    scheduler = bench.scheduler
    scheduler._residents.preempt(scheduler.sequences("long")[0])
    bench.executor.fail_steps = frozenset([scheduler._swapper.step_id])
    admit, scheduler._admit = scheduler._admit, lambda step: WaitReason.BLOCKS
    bench.step()  # copies to the host, which fails; the next brings them back before that is known
    scheduler._admit = admit
    tokens = bench.run()
    assert bench.reasons()["talks", 0] is FinishReason.ERROR
    assert tokens["long", 0] == alone(prompt(40, start=3), 2)
    assert bench.preemption.num_recomputed == (num_late > 0)
    bench.assert_empty()


def test_blocks_that_a_failed_step_was_to_fill_are_shared_with_nobody(make):
    bench = make(prefix_cache=False, num_blocks=30)
    bench.add("a", prompt(9), n=2, max_tokens=12)
    bench.add("other", prompt(5), max_tokens=30)
    bench.step(7)
    scheduler = bench.scheduler
    try_in, allowed = scheduler._swapper.try_in, []
    scheduler._swapper.try_in = lambda sequences, num_spare: sequences == allowed and try_in(sequences, num_spare)
    for sample in scheduler.sequences("a"):
        scheduler._residents.preempt(sample)
    bench.step(6)  # the copies have been made, and the tokens in flight have come
    allowed.append(scheduler.sequences("a")[0])
    bench.executor.fail_steps = frozenset([scheduler._swapper.step_id])
    while ("a", 0) not in bench.reasons():
        bench.step()
    scheduler._swapper.try_in = try_in
    tokens = bench.run()
    assert bench.reasons()["a", 0] is FinishReason.ERROR
    assert tokens["a", 1] == alone(prompt(9), 12, 1)
    bench.assert_empty()


def test_a_prompt_that_is_embedded_goes_on_after_its_answer_was_void(make, num_late: int):
    bench = make(num_blocks=40)
    bench.add("e", prompt(10), task="embed")
    bench.step()
    for sequence in bench.scheduler.sequences("e"):  # unless its only step has been answered
        bench.scheduler._residents.preempt(sequence)
        assert sequence.seq_id in bench.cache.host
    bench.run()
    assert [u.pooled for u in bench.updates] == [(1.0,)]
    assert bench.num_computed() == 10 + (num_late > 0)  # its last token once more
    bench.assert_empty()


def test_one_that_can_not_grow_goes_back_to_the_host_whole(make):
    bench = make(prefix_cache=False)
    bench.add("a", prompt(6), max_tokens=20)
    bench.step(5)
    (sequence,) = bench.scheduler.sequences("a")
    bench.scheduler._residents.preempt(sequence)
    swapper = bench.scheduler._swapper
    swapper.copies.clear()
    assert swapper.try_in([sequence], 0)
    came, swapper.copies[:] = swapper.copies[:], []
    swapper.put_back(sequence)
    assert [copy.dst for copy in came] == [copy.src for copy in swapper.copies] != []
    assert swapper.has(sequence)


def test_nobody_comes_back_to_drive_others_out_at_once(make):
    bench = make()
    for i in range(5):
        bench.add(str(i), prompt(6, start=i), max_tokens=30)
    num_back = num_preemptions = 0
    came_back = False
    while bench.engine.has_work:
        bench.step()
        if came_back:
            num_back += 1
            assert bench.scheduler.counters.num_preemptions == num_preemptions
        num_preemptions = bench.scheduler.counters.num_preemptions
        came_back = any(new.num_computed_tokens > 6 for new in bench.batches[-1].new)
    assert num_back > 2


@pytest.mark.parametrize("prefix", [True, False])
def test_kept_sequences_give_up_blocks_for_one_that_comes_back_and_grows(make, prefix: bool, num_late: int):
    bench = make(num_blocks=9, max_model_len=30, prefix_cache=prefix)
    bench.add("kept", prompt(12, start=1), keep=True, max_tokens=4)
    bench.run()
    assert bench.cache.num_free == 4
    bench.add("a", prompt(6), max_tokens=20)
    (sequence,) = bench.scheduler.sequences("a")
    while sequence.num_computed_tokens < 16:
        bench.step()
    bench.scheduler._residents.preempt(sequence)
    assert bench.cache.num_free == 4  # as many as it had; the next token takes one more
    assert bench.run()["a", 0] == alone(prompt(6), 20)
    assert bench.scheduler._residents.kept.blocks(Parent("kept", 0)) is None
    assert bench.preemption.num_swapped == 1
    bench.assert_empty()


def test_copies_wait_for_a_step_that_computes_something(make):
    bench = make()
    bench.add("a", prompt(6), max_tokens=9)
    bench.step(4)
    sequence = bench.scheduler.sequences("a")[0]
    bench.scheduler._residents.preempt(sequence)
    copies = list(bench.scheduler._swapper.copies)
    assert len(copies) == len(bench.cache.host._sequences[sequence.seq_id].held())
    assert bench.run()["a", 0] == alone(prompt(6), 9)
    assert next(batch.copies[: len(copies)] for batch in bench.batches if batch.copies) == tuple(copies)
    bench.assert_empty()


@pytest.mark.parametrize("seed", [*range(8), 15, *(pytest.param(s, marks=pytest.mark.slow) for s in range(16, 100))])
def test_random_traffic_gives_each_request_its_own_tokens_and_leaks_nothing(make, seed: int):
    rng = random.Random(seed)
    bench = make(
        num_blocks=rng.randint(24, 44),
        num_host_blocks=rng.randint(4, 50),
        max_num_seqs=rng.randint(4, 9),
        budget=rng.randint(4, 40),
        max_model_len=60,
        prefix_cache=rng.random() < 0.7,
        fail=rng.sample(range(120), 2) if seed % 2 else (),
        preemption=Alternating(seed),
    )
    put_back = bench.scheduler._swapper.put_back

    def put_back_if_alone(sequence) -> None:
        assert not bench.scheduler._running, "copied in and out again in vain"
        put_back(sequence)

    bench.scheduler._swapper.put_back = put_back_if_alone
    wanted, spoiled = {}, set()
    beginnings = [prompt(rng.randint(1, 20), start=i) for i in range(3)]
    for i in range(25):
        tokens = [*rng.choice(beginnings), *prompt(rng.randint(1, 12), start=rng.randint(0, 5))]
        n, max_tokens = rng.randint(1, 3), rng.randint(1, 25)
        if rng.random() < 0.25:
            params = BeamSearchParams(beam_width=n, max_tokens=min(max_tokens, 12))
            bench.add(str(i), tokens, params)
            wanted |= {(str(i), j): found for j, found in enumerate(searched(tokens, params))}
        else:
            bench.add(str(i), tokens, n=1 if seed % 2 else n, max_tokens=max_tokens)
            wanted |= {(str(i), j): alone(tokens, max_tokens, j) for j in range(1 if seed % 2 else n)}
        bench.step(rng.randint(0, 4))
        if rng.random() < 0.2:
            victim = str(rng.randint(0, i))
            spoiled.add(victim)
            bench.updates += bench.engine.abort(victim)
    tokens = bench.run()
    spoiled |= {u.request_id for u in bench.updates if u.finish_reason is FinishReason.ERROR}
    for key, expected in wanted.items():
        got = tokens.get(key, [])
        assert got == (expected[: len(got)] if key[0] in spoiled else expected)
    bench.assert_empty()
