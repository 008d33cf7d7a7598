"""The scheduler on a fake model with a real paged memory, answering 0, 1 and 3 steps late."""

import random
from functools import partial
from types import SimpleNamespace

import pytest

from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.types import FinishReason, Request, TokenSpan

VOCAB_SIZE = 1000
NEXT_TOKEN = hashed_next_token(VOCAB_SIZE)


@pytest.fixture
def make(num_late: int):
    return partial(SchedulerBench.make, NEXT_TOKEN, num_late)


def alone(prompt: list[int], count: int, index: int = 0) -> list[int]:
    """What the fake model says to a prompt, without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(NEXT_TOKEN(tokens, index))
    return tokens[len(prompt) :]


def prompt(length: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % VOCAB_SIZE for i in range(length)]


def test_one_request_gives_the_models_tokens_and_ends_by_length(make):
    bench = make()
    bench.add("a", prompt(9), max_tokens=6)
    assert bench.run() == {("a", 0): alone(prompt(9), 6)}
    assert bench.reasons() == {("a", 0): FinishReason.LENGTH}
    bench.assert_empty()


def test_requests_of_many_lengths_run_at_once_and_do_not_mix(make):
    bench = make(max_num_seqs=5)
    for i in range(12):
        bench.add(str(i), prompt(1 + 3 * i, start=i), max_tokens=1 + i)
    assert bench.run() == {(str(i), 0): alone(prompt(1 + 3 * i, start=i), 1 + i) for i in range(12)}
    assert max(batch.num_rows for batch in bench.batches) == 5
    bench.assert_empty()


def test_long_prompts_are_computed_in_chunks_under_the_budget(make):
    bench = make(budget=8)
    bench.add("long", prompt(50), max_tokens=3)
    bench.add("short", prompt(3, start=5), max_tokens=3)
    assert bench.run() == {("long", 0): alone(prompt(50), 3), ("short", 0): alone(prompt(3, start=5), 3)}
    assert max(batch.num_tokens for batch in bench.batches) == 8
    first = bench.batches[0].new[0]
    assert (first.num_computed_tokens, first.num_scheduled_tokens, first.samples) == (0, 8, False)


def test_decoding_rows_are_served_before_a_prompt_in_chunks(make):
    bench = make(budget=8)
    bench.add("talks", prompt(4), max_tokens=30)
    bench.step(6)
    bench.add("long", prompt(60, start=3), max_tokens=1, priority=-1)
    bench.run()
    chunked = [b for b in bench.batches if any(r.num_scheduled_tokens > 1 for r in b.cached)]
    assert chunked
    assert all(any(r.num_scheduled_tokens == 1 for r in b.cached) for b in chunked)


def test_stop_tokens_end_a_sequence_and_late_tokens_are_dropped(make):
    expected = alone(prompt(5), 10)
    bench = make(eos=[expected[3]])
    bench.add("eos", prompt(5), max_tokens=10)
    bench.add("ignores", prompt(5), max_tokens=10, ignore_eos=True, stop_token_ids=[expected[6]])
    tokens = bench.run()
    assert tokens == {("eos", 0): expected[:4], ("ignores", 0): expected[:7]}
    assert set(bench.reasons().values()) == {FinishReason.STOP}
    bench.assert_empty()


def test_min_tokens_keeps_a_stop_token_from_ending_the_sequence(make):
    expected = alone(prompt(5), 10)
    bench = make(eos=[expected[2]])
    bench.add("a", prompt(5), max_tokens=10, min_tokens=3)
    assert bench.run() == {("a", 0): expected}


def test_the_context_limit_ends_a_sequence(make):
    bench = make(max_model_len=12)
    bench.add("a", prompt(9), max_tokens=None)
    assert bench.run() == {("a", 0): alone(prompt(9), 3)}
    assert bench.reasons() == {("a", 0): FinishReason.LENGTH}


def test_a_second_request_reuses_the_blocks_of_the_same_beginning(make):
    bench = make()
    bench.add("a", prompt(18), max_tokens=1)
    bench.run()
    bench.add("b", [*prompt(12), 999, 998], max_tokens=2)
    assert bench.run()["b", 0] == alone([*prompt(12), 999, 998], 2)
    entered = bench.batches[-2].new[0] if bench.batches[-2].new else bench.batches[-1].new[0]
    assert entered.num_computed_tokens == 12
    assert [u.cached.total for u in bench.updates if u.request_id == "b"] == [12, 12]


def test_another_salt_shares_nothing(make):
    bench = make()
    bench.add("a", prompt(18), max_tokens=1, salt=b"one")
    bench.run()
    bench.add("b", prompt(18), max_tokens=1, salt=b"two")
    bench.run()
    assert bench.cache.stats().lookups.num_hit_tokens == 0


def test_preempted_sequences_resume_with_the_same_tokens(make):
    bench = make(num_blocks=14, max_model_len=48)
    for i in range(5):
        bench.add(str(i), prompt(6, start=i), max_tokens=30)
    assert bench.run() == {(str(i), 0): alone(prompt(6, start=i), 30) for i in range(5)}
    assert bench.engine.scheduler.counters.num_preemptions > 0
    bench.assert_empty()


def test_the_latest_of_the_lowest_priority_is_preempted(make):
    bench = make(num_blocks=9, max_model_len=24, prefix_cache=False)
    bench.add("low", prompt(6, start=1), max_tokens=18, priority=5)
    bench.add("high", prompt(6, start=2), max_tokens=18, priority=0)
    tokens = bench.run()
    assert tokens["low", 0] == alone(prompt(6, start=1), 18)
    times = {u.request_id: u.times for u in bench.updates if u.times}
    assert times["low"].num_preemptions > 0
    assert times["high"].num_preemptions == 0
    ends = [u.request_id for u in bench.updates if u.finish_reason]
    assert ends == ["high", "low"]


def test_lower_priority_value_enters_first(make):
    bench = make(max_num_seqs=1)
    bench.add("now", prompt(3), max_tokens=1)
    bench.step()
    bench.add("later", prompt(4), max_tokens=1, priority=3)
    bench.add("soon", prompt(5), max_tokens=1, priority=1)
    bench.run()
    assert [u.request_id for u in bench.updates if u.finish_reason] == ["now", "soon", "later"]


def test_samples_of_one_prompt_share_its_blocks_and_copy_on_the_first_divergent_write(make):
    bench = make(num_blocks=40, block_size=16, budget=512, max_model_len=400)
    bench.add("a", prompt(300), n=4, max_tokens=3)
    scheduler, cache = bench.engine.scheduler, bench.cache
    bench.step()
    ids = [s.seq_id for s in scheduler.sequences("a")]
    assert [cache.block_ids(i) for i in ids] == [(list(range(1, 20)),)] * 4  # 18 full blocks and the partial one
    assert cache.stats().num_used == 19
    while len(bench.batches) < 2:
        bench.step()
    # The first three writers get a copy of block 19, the last one keeps it.
    assert [(c.src, c.dst) for c in bench.batches[1].copies] == [(19, 20), (19, 21), (19, 22)]
    assert [cache.block_ids(i)[0] for i in ids] == [[*range(1, 19), own] for own in (20, 21, 22, 19)]
    assert cache.stats().num_used == 22
    tokens = bench.run()
    assert tokens == {("a", i): alone(prompt(300), 3, index=i) for i in range(4)}
    bench.assert_empty()


def test_samples_under_preemption_stay_what_they_are(make):
    bench = make(num_blocks=16, max_model_len=40)
    bench.add("a", prompt(10), n=3, max_tokens=24)
    bench.add("b", prompt(7, start=4), n=2, max_tokens=20)
    tokens = bench.run()
    assert tokens == {("a", i): alone(prompt(10), 24, i) for i in range(3)} | {
        ("b", i): alone(prompt(7, start=4), 20, i) for i in range(2)
    }
    assert bench.engine.scheduler.counters.num_preemptions > 0
    bench.assert_empty()


def test_a_request_waits_until_all_its_samples_have_rows(make):
    bench = make(max_num_seqs=4)
    bench.add("a", prompt(5), n=3, max_tokens=5)
    bench.add("b", prompt(6), n=2, max_tokens=2)
    bench.step()
    assert (bench.engine.scheduler.num_running, bench.engine.scheduler.num_waiting) == (3, 1)
    tokens = bench.run()
    assert len(tokens) == 5
    bench.assert_empty()


@pytest.mark.parametrize("steps", [0, 1, 2, 5], ids=lambda n: f"after-{n}-steps")
def test_abort_frees_everything_at_once(make, steps: int):
    bench = make(budget=4)
    bench.add("a", prompt(9), n=2, max_tokens=50)
    bench.add("b", prompt(5, start=9), max_tokens=4)
    bench.step(steps)
    aborted = bench.engine.abort("a")
    assert aborted
    assert {u.finish_reason for u in aborted} == {FinishReason.ABORT}
    assert bench.run()["b", 0] == alone(prompt(5, start=9), 4)
    bench.assert_empty()


def test_abort_of_one_sample_leaves_the_others(make):
    bench = make()
    bench.add("a", prompt(9), n=3, max_tokens=9)
    bench.step(4)
    bench.updates += bench.engine.abort("a", index=1)
    tokens = bench.run()
    assert tokens["a", 0] == alone(prompt(9), 9, 0)
    assert tokens["a", 2] == alone(prompt(9), 9, 2)
    assert bench.reasons()["a", 1] is FinishReason.ABORT
    bench.assert_empty()


def test_blocks_of_an_aborted_sequence_are_free_once_the_steps_in_flight_have_ended(make, num_late: int):
    bench = make(prefix_cache=False)
    bench.add("a", prompt(9), max_tokens=50)
    bench.step(2)
    num_in_flight = min(num_late, len(bench.batches))
    bench.engine.abort("a")
    assert bench.cache.stats().num_parked == (3 if num_in_flight else 0)
    bench.run()
    bench.assert_empty()


def test_an_abort_before_the_fork_gives_the_reserved_rows_back(make):
    bench = make(max_num_seqs=4, budget=4)
    bench.add("a", prompt(20), n=4, max_tokens=2)
    bench.step()
    bench.engine.abort("a")
    bench.add("b", prompt(5), n=4, max_tokens=2)
    assert len(bench.run()) == 4
    bench.assert_empty()


def test_a_preempted_sequence_waits_for_its_tokens_in_flight(make):
    bench = make(num_blocks=9, max_model_len=30, prefix_cache=False)
    bench.add("a", prompt(10, start=1), max_tokens=20)
    bench.add("b", prompt(10, start=2), max_tokens=18)
    while not bench.engine.scheduler.counters.num_preemptions:
        bench.step()
    bench.engine.abort("a")  # there is room for b at once, but its last tokens may not be known yet
    assert bench.run()["b", 0] == alone(prompt(10, start=2), 18)
    bench.assert_empty()


def test_abort_of_an_unknown_request_is_ignored(make):
    assert make().engine.abort("nobody") == []


def test_a_step_that_fails_ends_its_own_sequences_only(make):
    bench = make(max_num_seqs=2, fail=[1])
    for name in "abc":
        bench.add(name, prompt(5, start=ord(name)), max_tokens=5)
    tokens = bench.run()
    errors = {u.request_id for u in bench.updates if u.finish_reason is FinishReason.ERROR}
    assert errors == {"a", "b"}
    assert all("was told to fail" in u.error for u in bench.updates if u.error)
    assert tokens["c", 0] == alone(prompt(5, start=ord("c")), 5)
    bench.assert_empty()


def test_a_prompt_is_embedded_without_drawing_a_token(make):
    bench = make(budget=4)
    bench.engine.add(Request(request_id="e", inputs=(TokenSpan(tuple(prompt(10))),), task="embed"))
    bench.run()
    assert [u.pooled for u in bench.updates] == [(1.0,)]
    assert bench.engine.scheduler.counters.num_generation_tokens == 0
    bench.assert_empty()


def test_mean_pooling_computes_every_token_even_if_they_are_cached(make):
    bench = make()
    bench.add("a", prompt(16), max_tokens=1)
    bench.run()
    request = Request(request_id="e", inputs=(TokenSpan(tuple(prompt(16))),), task="embed", pooling="mean")
    bench.engine.add(request)
    bench.run()
    assert bench.batches[-1].new[0].num_computed_tokens == 0


def test_counters_add_up(make):
    bench = make()
    bench.add("a", prompt(9), max_tokens=6)
    bench.add("b", prompt(9), n=2, max_tokens=3)
    bench.run()
    counters = bench.engine.scheduler.counters
    assert counters.num_prompt_tokens == 18
    assert counters.num_generation_tokens == 6 + 2 * 3
    assert counters.finished == {"length": 3}
    assert counters.num_steps == len(bench.batches)
    assert 0 < counters.mean_waste < 1


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_gives_each_request_its_own_tokens_and_leaks_nothing(make, seed: int):
    rng = random.Random(seed)
    bench = make(
        num_blocks=rng.randint(16, 40), max_num_seqs=rng.randint(3, 8), budget=rng.randint(4, 40), max_model_len=60
    )
    wanted = {}
    aborted = set()
    beginnings = [prompt(rng.randint(1, 20), start=i) for i in range(3)]
    for i in range(25):
        tokens = [*rng.choice(beginnings), *prompt(rng.randint(1, 12), start=rng.randint(0, 5))]
        n, max_tokens = rng.randint(1, 3), rng.randint(1, 25)
        bench.add(str(i), tokens, n=n, max_tokens=max_tokens, priority=rng.randint(0, 2))
        wanted |= {(str(i), j): alone(tokens, max_tokens, j) for j in range(n)}
        bench.step(rng.randint(0, 4))
        if rng.random() < 0.2:
            victim = str(rng.randint(0, i))
            aborted.add(victim)
            bench.updates += bench.engine.abort(victim)
    tokens = bench.run()
    for key, expected in wanted.items():
        got = tokens.get(key, [])
        assert got == (expected[: len(got)] if key[0] in aborted else expected)
    bench.assert_empty()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 14])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("prefix", [True, False])
def test_samples_hold_the_prompts_full_blocks_once_and_what_diverged(make, length: int, n: int, prefix: bool):
    """n samples of a prompt of P tokens: floor(P / block) shared blocks, and of each sample those behind them."""
    bench = make(prefix_cache=prefix, num_blocks=200)
    bench.add("a", prompt(length), n=n, max_tokens=13)
    submit, seen = bench.executor.submit, []

    def watched(batch):
        samples = bench.engine.scheduler.sequences("a")
        num_computed = [sample.num_computed_tokens for sample in samples]
        if len(samples) == n and len(set(num_computed)) == 1 and not bench.cache.stats().num_parked:
            own = -(-num_computed[0] // 4) - length // 4
            num_used = bench.cache.stats().num_used
            if num_computed[0] == length:  # nobody has written yet: the partial last block is shared too
                assert num_used == -(-length // 4)
            else:
                assert num_used == length // 4 + n * own
            seen.append(num_computed[0])
        return submit(batch)

    bench.engine._executor = SimpleNamespace(submit=watched, max_in_flight=bench.executor.max_in_flight)
    tokens = bench.run()
    assert tokens == {("a", index): alone(prompt(length), 13, index) for index in range(n)}
    assert set(seen) == set(range(length, length + 13))
    bench.assert_empty()
