"""Hits within a block, duplicates that give way, and pins: a fake model with paged memory, 0, 1 and 3 steps late."""

import random

import pytest

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Branch, Parent
from octavo_engine.errors import InvalidRequest, PinLimitReached, RequestFailed, UnknownPin
from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.pins import Pin
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.types import CachedTokens, FinishReason

VOCAB_SIZE = 1000
NEXT_TOKEN = hashed_next_token(VOCAB_SIZE)


class PrefixBench(SchedulerBench):
    """A bench whose prompts can be pinned."""

    def pin(self, request_id: str, tokens: list[int], salt: bytes = b"") -> Pin:
        self.add(request_id, tokens, salt=salt, task="embed", pin=True)
        self.run()
        return self.engine.pins.get(request_id)

    def cached(self, request_id: str) -> CachedTokens:
        (cached,) = {u.cached for u in self.updates if u.request_id == request_id}
        return cached

    def copies(self) -> list[tuple[int, int]]:
        return [(copy.src, copy.dst) for batch in self.batches for copy in batch.copies]


@pytest.fixture
def make(num_late: int):
    return lambda **options: PrefixBench.make(NEXT_TOKEN, num_late, **{"max_model_len": 100} | options)


def alone(tokens: list[int], count: int, index: int = 0) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(NEXT_TOKEN(tokens, index))
    return tokens[len(tokens) - count :]


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % VOCAB_SIZE for i in range(length)]


# Hits in part


def test_a_prompt_starts_within_a_block_that_begins_alike(make):
    bench = make()
    bench.add("a", prompt(16), max_tokens=1)
    bench.run()
    bench.add("b", [*prompt(10), 999, 998, 997])
    assert bench.run()["b", 0] == alone([*prompt(10), 999, 998, 997], 4)
    assert bench.cached("b") == CachedTokens(full=8, partial=2)
    assert bench.copies() == [(3, 5)]
    new = next(batch.new[0] for batch in bench.executor.batches[1:] if batch.new)
    assert (new.num_computed_tokens, new.num_scheduled_tokens, new.block_ids) == (10, 3, ((1, 2, 5, 6),))
    assert bench.engine.scheduler.counters.cached_prompt_tokens == CachedTokens(8, 2, 0)
    bench.assert_empty()


def test_the_next_turn_of_a_conversation_computes_what_is_new_alone(make):
    bench = make()
    bench.add("turn 1", prompt(9), max_tokens=6)
    answer = bench.run()["turn 1", 0]
    history = [*prompt(9), *answer]
    bench.add("turn 2", [*history, 1, 2, 3], max_tokens=6)
    assert bench.run()["turn 2", 0] == alone([*history, 1, 2, 3], 6)
    assert bench.cached("turn 2") == CachedTokens(full=12, partial=2)  # the last token drawn was never computed
    bench.assert_empty()


def test_another_salt_is_not_hit_in_part_nor_forked(make):
    bench = make()
    bench.add("a", prompt(16), max_tokens=1, salt=b"one", keep=True)
    bench.run()
    bench.add("b", [*prompt(10), 999], salt=b"two")
    bench.add("c", [*prompt(10), 999], salt=b"two", parent=Parent("a", 0))
    bench.add("d", [*prompt(10), 999], salt=b"one", parent=Parent("a", 0))
    tokens = bench.run()
    assert [bench.cached(name) for name in "bcd"] == [CachedTokens(), CachedTokens(), CachedTokens(fork=10)]
    assert all(tokens[name, 0] == alone([*prompt(10), 999], 4) for name in "bcd")
    with pytest.raises(InvalidRequest, match="neither runs nor is kept"):
        bench.engine.branch_tokens(Branch("a"), b"two")


def test_counters_say_what_was_found_how_and_for_whom(make):
    bench = make(num_blocks=14, max_model_len=48, max_num_seqs=4)
    bench.add("a", prompt(16), max_tokens=1, keep=True)
    bench.run()
    bench.add("full", [*prompt(12), 999], max_tokens=1)
    bench.add("partial", [*prompt(13), 999], max_tokens=1)
    bench.add("fork", [*prompt(14), 999], max_tokens=1, parent=Parent("a", 0))
    bench.run()
    first = bench.cache.stats().lookups
    assert (first.num_lookups, first.num_query_tokens) == (3, 16 + 13 + 14)  # a fork asks nobody
    assert (first.num_full_hit_tokens, first.num_partial_hit_tokens) == (24, 1)
    assert bench.engine.scheduler.counters.cached_prompt_tokens == CachedTokens(full=24, partial=1, fork=14)
    assert bench.cache.stats().resumed_lookups.num_lookups == 0
    bench.engine.release("a")
    for i in range(3):
        bench.add(str(i), prompt(6, start=100 + i), max_tokens=24)
    tokens = bench.run()
    assert all(tokens[str(i), 0] == alone(prompt(6, start=100 + i), 24) for i in range(3))
    stats, counters = bench.cache.stats(), bench.engine.scheduler.counters
    assert counters.num_preemptions > 0
    assert stats.resumed_lookups.num_lookups == counters.num_preemptions
    assert (stats.lookups.num_lookups, stats.lookups.num_query_tokens) == (6, 43 + 18)
    assert counters.cached_prompt_tokens == CachedTokens(full=24, partial=1, fork=14)
    bench.assert_empty()


def test_a_sequence_as_long_as_the_cache_is_not_kept_waiting_by_the_block_it_hits(make):
    bench = make(num_blocks=5, max_model_len=16)
    bench.add("a", prompt(12), max_tokens=1)
    bench.run()
    other = [*prompt(10), 999, 998, 997, 996]
    bench.add("b", other, max_tokens=2)
    assert bench.run()["b", 0] == alone(other, 2)
    bench.add("c", other, max_tokens=2)
    assert bench.run()["c", 0] == alone(other, 2)
    bench.assert_empty()


# Duplicates


def test_requests_with_one_prompt_computed_at_once_end_up_with_one_copy_of_it(make):
    bench = make(deduplicate=True)
    for name in "abc":
        bench.add(name, prompt(14), max_tokens=9)
    tokens = bench.run()
    assert tokens == {(name, 0): alone(prompt(14), 9) for name in "abc"}
    # Three blocks of the prompt, and what they answer: the fake model says the same to all three.
    stats = bench.cache.stats()
    assert stats.num_deduplicated >= 6
    assert stats.num_cached == -(-(14 + 9 - 1) // 4)
    bench.assert_empty()


def test_prompts_hold_their_blocks_once_while_they_run(make, num_late: int):
    bench = make(deduplicate=True)
    for name in "ab":
        bench.add(name, prompt(14), max_tokens=20)
    bench.step(2 + num_late)
    while bench.cache.stats().num_parked:
        bench.step()
    first, second = (bench.cache.block_ids(bench.engine.scheduler.sequences(name)[0].seq_id)[0] for name in "ab")
    assert first[:3] == second[:3] == [1, 2, 3]
    tokens = bench.run()
    assert tokens["a", 0] == tokens["b", 0] == alone(prompt(14), 20)
    bench.assert_empty()


def test_blocks_that_gave_way_wait_for_the_steps_in_flight(make, num_late: int):
    bench = make(deduplicate=True)
    for name in "ab":
        bench.add(name, prompt(14), max_tokens=20)
    while not bench.cache.stats().num_deduplicated:
        bench.step()
    assert bench.cache.stats().num_deduplicated == 3
    assert bench.cache.stats().num_parked == (3 if num_late else 0)
    bench.run()
    bench.assert_empty()


def test_samples_and_beams_of_prompts_computed_at_once_stay_what_they_are(make):
    beams = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    expected = []
    for deduplicate in (False, True):
        bench = make(deduplicate=deduplicate, max_num_seqs=16, budget=20)
        for name in "ab":
            bench.add(name, prompt(18), n=3, max_tokens=15)
            bench.add(f"beams of {name}", prompt(18), beams=beams)
        expected.append((bench.run(), {(u.request_id, u.index): u.score for u in bench.updates if u.score}))
        bench.assert_empty()
    assert expected[0] == expected[1]
    assert bench.cache.stats().num_deduplicated > 0
    assert expected[1][0]["b", 2] == alone(prompt(18), 15, 2)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_with_everything_keeps_its_tokens_and_leaks_nothing(make, seed: int):
    rng = random.Random(seed)
    bench = make(
        num_blocks=rng.randint(26, 44),
        max_num_seqs=rng.randint(3, 8),
        budget=rng.randint(4, 40),
        max_model_len=60,
        deduplicate=True,
        max_num_pinned=10,
        min_partial_hit=rng.randint(1, 4),
    )
    wanted, salts = {}, [b"", b"x"]
    beginnings = [prompt(rng.randint(4, 20), start=i % 2) for i in range(3)]
    for i in range(30):
        tokens = [*rng.choice(beginnings)[: rng.randint(3, 20)], *prompt(rng.randint(1, 9), start=rng.randint(0, 2))]
        name, salt = str(i), rng.choice(salts)
        if rng.random() < 0.2:
            try:
                bench.add(name, tokens, salt=salt, task="embed", pin=True)
            except InvalidRequest:
                pin = next(iter(bench.engine.pins.listed()), None)
                if pin is not None:
                    bench.engine.pins.drop(pin.pin_id)
        else:
            n, max_tokens = rng.randint(1, 3), rng.randint(1, 25)
            bench.add(name, tokens, salt=salt, n=n, max_tokens=max_tokens)
            wanted |= {(name, j): alone(tokens, max_tokens, j) for j in range(n)}
        bench.step(rng.randint(0, 4))
    tokens = bench.run()
    assert {key: tokens[key] for key in wanted} == wanted
    bench.assert_empty()
    bench.engine.pins.reset()
    assert bench.cache.stats().num_used == 0


# Pins


def test_a_pin_computes_a_prompt_and_keeps_it_under_pressure(make):
    bench = make(num_blocks=20, max_num_pinned=4, max_model_len=40)
    pin = bench.pin("system", prompt(18))
    assert pin == Pin("system", num_tokens=16, num_blocks=4)
    assert bench.engine.pins.listed() == [pin]
    for i in range(6):
        bench.add(str(i), prompt(10, start=1 + i), max_tokens=28)
    tokens = bench.run()
    assert all(tokens[str(i), 0] == alone(prompt(10, start=1 + i), 28) for i in range(6))
    assert bench.engine.scheduler.counters.num_preemptions > 0
    bench.add("user", [*prompt(16), 999])
    assert bench.run()["user", 0] == alone([*prompt(16), 999], 4)
    assert bench.cached("user") == CachedTokens(full=16)
    bench.assert_empty()


def test_the_longest_sequence_goes_on_beside_all_pins(make):
    """Pins hold what they may, the sequence needs all the rest: it must end, and the pins must be there afterwards."""
    bench = make(num_blocks=1 + 4 + 10, max_num_pinned=4, max_model_len=40)
    bench.pin("one", prompt(8))
    bench.pin("two", prompt(8, start=5))
    bench.add("long", prompt(20, start=9), max_tokens=20)
    bench.add("longer", [*prompt(7), 999], max_tokens=32, n=2)  # begins within a pinned block
    tokens = bench.run()
    assert tokens["long", 0] == alone(prompt(20, start=9), 20)
    assert [tokens["longer", i] for i in range(2)] == [alone([*prompt(7), 999], 32, i) for i in range(2)]
    assert bench.cached("longer") == CachedTokens(full=4, partial=3)
    assert [pin.pin_id for pin in bench.engine.pins.listed()] == ["one", "two"]
    bench.assert_empty()


def test_pins_have_a_limit_that_is_checked_before_anything_is_computed(make):
    bench = make(max_num_pinned=4)
    bench.pin("one", prompt(12))
    with pytest.raises(PinLimitReached, match="takes 2 blocks, pins hold 3 and may hold 4") as caught:
        bench.add("two", prompt(8), task="embed", pin=True)
    assert (caught.value.param, caught.value.code) == ("prompt", "pin_limit_reached")
    with pytest.raises(InvalidRequest, match="3 tokens, and whole blocks of 4"):
        bench.add("three", prompt(3), task="embed", pin=True)
    assert not bench.engine.has_work
    bench.engine.pins.drop("one")
    assert bench.pin("two", prompt(16)).num_blocks == 4


def test_without_a_prefix_cache_there_is_nothing_to_warm(make):
    bench = make(prefix_cache=False, max_num_pinned=4)
    with pytest.raises(InvalidRequest, match="switched off"):
        bench.add("a", prompt(8), task="embed", pin=True)


def test_pins_of_another_salt_are_neither_hit_nor_seen_nor_dropped(make):
    bench = make(max_num_pinned=8)
    pin = bench.pin("one", prompt(12), salt=b"one")
    bench.add("other", [*prompt(12), 999], salt=b"two")
    bench.add("own", [*prompt(12), 999], salt=b"one")
    bench.run()
    assert (bench.cached("other"), bench.cached("own")) == (CachedTokens(), CachedTokens(full=12))
    assert bench.engine.pins.listed(b"two") == []
    assert bench.engine.pins.listed(b"one") == [pin]
    with pytest.raises(UnknownPin, match="no pin has the id 'one'"):
        bench.engine.pins.drop("one", b"two")
    bench.engine.pins.drop("one", b"one")
    assert bench.cache.stats().num_pins == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_pin_that_does_not_come_to_be_leaves_no_trace(make, steps: int):
    bench = make(max_num_pinned=4, budget=4)
    bench.add("a", prompt(16), task="embed", pin=True)
    bench.step(steps)
    bench.engine.abort("a")
    bench.run()
    assert bench.cache.stats().num_pins == 0
    assert bench.pin("b", prompt(16)).num_blocks == 4
    bench.assert_empty()


def test_a_reset_drops_pins_and_those_being_computed(make):
    bench = make(max_num_pinned=8, budget=4)
    bench.pin("a", prompt(16))
    bench.add("b", prompt(16, start=3), task="embed", pin=True)
    bench.step()
    bench.engine.pins.reset()
    bench.run()
    assert bench.engine.pins.listed() == []
    with pytest.raises(RequestFailed, match="was reset while"):
        bench.engine.pins.get("b")
    bench.add("c", [*prompt(16), 999])
    bench.run()
    assert bench.cached("c") == CachedTokens()
    bench.assert_empty()


def test_cancelling_a_pin_is_harmless_wherever_it_stands(make):
    bench = make(max_num_pinned=8)
    bench.engine.pins.cancel("nobody")
    bench.pin("a", prompt(16))
    bench.add("b", prompt(16), task="embed", pin=True)
    bench.engine.pins.cancel("b")
    bench.engine.pins.cancel("a")
    bench.run()
    assert bench.cache.stats().num_pins == 0
    assert FinishReason.ERROR not in {u.finish_reason for u in bench.updates}
