"""Forks of running and of ended requests, on a fake model with a real paged memory, 0, 1 and 3 steps late."""

import random

import pytest

from octavo_engine.branch import Branch, Parent
from octavo_engine.errors import InvalidRequest
from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.scheduler_bench import SchedulerBench

VOCAB_SIZE = 1000
NEXT_TOKEN = hashed_next_token(VOCAB_SIZE)


class BranchBench(SchedulerBench):
    """A bench whose requests can be forked."""

    def branch(self, request_id, branch: Branch, more=(), **options) -> list[int]:
        tokens = [*self.engine.branch_tokens(branch), *more]
        self.add(request_id, tokens, parent=Parent(branch.request_id, branch.index), **options)
        return tokens

    def output(self, request_id: str, index: int = 0) -> list[int]:
        return self.tokens().get((request_id, index), [])

    def num_cached(self, request_id: str) -> int:
        return next(u.cached.total for u in self.updates if u.request_id == request_id)

    @property
    def num_used(self) -> int:
        return self.cache.stats().num_used


@pytest.fixture
def make(num_late: int):
    usual = {"prefix_cache": False, "max_num_kept": 8, "max_model_len": 100}
    return lambda **options: BranchBench.make(NEXT_TOKEN, num_late, **usual | options)


def alone(tokens: list[int], count: int, index: int = 0) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(NEXT_TOKEN(tokens, index))
    return tokens[len(tokens) - count :]


PROMPT = list(range(10, 20))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 7, 8, None])
def test_a_branch_of_an_ended_request_shares_all_blocks_before_it(make, at: int | None):
    bench = make()
    bench.add("parent", PROMPT, keep=True, max_tokens=8)
    bench.run()
    output = bench.output("parent")
    held = bench.num_used
    assert held == -(-(len(PROMPT) + 7) // 4)  # its last token was never computed
    tokens = bench.branch("child", Branch("parent", branch_at=at), more=[5], max_tokens=6)
    assert tokens == [*PROMPT, *output[:at], 5]
    bench.step(1)
    num_shared = min(len(tokens) - 1, len(PROMPT) + 7)
    num_own = -(-len(tokens) // 4) - num_shared // 4
    assert bench.num_used == held + num_own
    bench.run()
    assert bench.output("child") == alone(tokens, 6)
    assert bench.num_cached("child") == num_shared
    assert bench.num_used == held
    bench.engine.release("parent")
    assert bench.num_used == 0


@pytest.mark.parametrize("num_steps", [1, 3, 6, 9])
def test_a_running_request_can_be_forked_and_goes_on_as_before(make, num_steps: int):
    bench = make()
    bench.add("parent", PROMPT, max_tokens=20)
    bench.step(num_steps)
    tokens = bench.branch("child", Branch("parent"), max_tokens=5)
    other = bench.branch("other", Branch("parent", branch_at=0), more=[1, 2, 3], n=2, max_tokens=5)
    bench.run()
    assert bench.output("parent") == alone(PROMPT, 20)
    assert bench.output("child") == alone(tokens, 5)
    assert [bench.output("other", i) for i in range(2)] == [alone(other, 5, i) for i in range(2)]
    assert bench.num_cached("other") >= (8 if num_steps > 4 else 0)
    assert bench.num_used == 0


def test_children_of_any_sample_have_children_of_their_own(make):
    bench = make()
    bench.add("a", PROMPT, keep=True, n=3, max_tokens=6)
    bench.run()
    first = bench.branch("b", Branch("a", 2, 4), keep=True, max_tokens=6)
    assert first == [*PROMPT, *bench.output("a", 2)[:4]]
    bench.run()
    second = bench.branch("c", Branch("b", 0, 3), max_tokens=6)
    bench.run()
    assert bench.output("c") == alone(second, 6)
    for request_id in "ab":
        bench.engine.release(request_id)
    assert bench.num_used == 0


def test_pruning_frees_blocks_at_once(make, num_late: int):
    bench = make()
    bench.add("parent", PROMPT, keep=True, max_tokens=8)
    bench.run()
    before = bench.num_used
    for name in "abc":
        bench.branch(name, Branch("parent"), max_tokens=30)
    bench.step(12)
    assert bench.num_used > before
    for name in "abc":
        bench.engine.abort(name)
    held = bench.num_used - bench.cache.stats().num_parked
    assert held == before  # the rest goes when the steps in flight end
    bench.run()
    assert bench.num_used == before


def test_kept_blocks_go_before_anything_is_preempted_and_forks_are_computed_again(make):
    bench = make(num_blocks=21)
    for name in "abc":
        bench.add(name, [ord(name), *PROMPT], keep=True, max_tokens=8)
        bench.run()
    assert bench.num_used == 15
    bench.add("big", PROMPT[:6], max_tokens=60)
    bench.run()
    assert bench.output("big") == alone(PROMPT[:6], 60)
    scheduler = bench.engine.scheduler
    assert scheduler.counters.num_preemptions == 0
    tokens = bench.branch("child", Branch("a", branch_at=5), max_tokens=4)
    bench.run()
    assert bench.num_cached("child") == 0
    assert bench.output("child") == alone(tokens, 4)


def test_what_waits_gets_kept_blocks_when_nothing_runs(make):
    bench = make(num_blocks=8)
    bench.add("a", PROMPT, keep=True, max_tokens=8)
    bench.run()
    bench.add("b", PROMPT[::-1], max_tokens=8)
    bench.run()
    assert bench.output("b") == alone(PROMPT[::-1], 8)


def test_what_ends_while_it_is_preempted_is_kept_all_the_same(make):
    """A stop string is seen by the front end, steps after the token that made it."""
    bench = make()
    bench.add("parent", PROMPT, keep=True, max_tokens=20)
    bench.step(6)
    (sequence,) = bench.engine.scheduler.sequences("parent")
    bench.engine.scheduler._residents.preempt(sequence)
    bench.engine.abort("parent", 0)
    tokens = bench.branch("child", Branch("parent"), max_tokens=5)
    assert tokens == PROMPT + alone(PROMPT, len(tokens) - len(PROMPT))
    bench.run()
    assert bench.output("child") == alone(tokens, 5)
    bench.engine.release("parent")
    assert bench.num_used == 0


def test_no_more_than_the_limit_are_kept_and_the_least_used_goes_first(make):
    bench = make(max_num_kept=2)
    for name in "ab":
        bench.add(name, PROMPT, keep=True, max_tokens=3)
        bench.run()
    bench.branch("child", Branch("a"), max_tokens=2)
    bench.run()
    bench.add("c", PROMPT, keep=True, max_tokens=3)
    bench.run()
    assert len(bench.engine.branch_tokens(Branch("a"))) == len(bench.engine.branch_tokens(Branch("c"))) == 13
    with pytest.raises(InvalidRequest, match="neither runs nor is kept") as caught:
        bench.engine.branch_tokens(Branch("b"))
    assert (caught.value.param, caught.value.code) == ("parent_id", "parent_not_found")


def test_wrong_branches_are_refused(make):
    bench = make()
    bench.add("a", PROMPT, keep=True, max_tokens=3, salt=b"mine")
    bench.add("gone", PROMPT, max_tokens=3)
    bench.run()
    assert len(bench.engine.branch_tokens(Branch("a", branch_at=3), salt=b"mine")) == 13
    for branch, salt, param in [
        (Branch("a", branch_at=4), b"mine", "branch_at"),
        (Branch("a", branch_at=-1), b"mine", "branch_at"),
        (Branch("a", index=1), b"mine", "parent_id"),
        (Branch("a"), b"others", "parent_id"),
        (Branch("gone"), b"", "parent_id"),
        (Branch("never"), b"", "parent_id"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            bench.engine.branch_tokens(branch, salt=salt)
        assert caught.value.param == param


@pytest.mark.parametrize("seed", range(8))
def test_random_trees_give_each_branch_its_own_tokens_and_leak_nothing(make, seed: int):
    rng = random.Random(seed)
    bench = make(num_blocks=rng.randint(30, 70), prefix_cache=rng.random() < 0.5, max_num_kept=rng.randint(1, 12))
    names, wanted, pruned = [], {}, set()
    for number in range(25):
        name = str(number)
        n, count, keep = rng.randint(1, 3), rng.randint(1, 14), rng.random() < 0.7
        try:
            parent = rng.choice(names)
            branch = Branch(parent, rng.randint(0, 1), rng.choice([None, 0, 2, 5]))
            more = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 3))]
            tokens = [*bench.engine.branch_tokens(branch), *more]
            assert len(tokens) < 70
            bench.add(name, tokens, parent=Parent(parent, branch.index), keep=keep, n=n, max_tokens=count)
        except (IndexError, InvalidRequest, AssertionError):
            tokens = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
            bench.add(name, tokens, keep=keep, n=n, max_tokens=count)
        names.append(name)
        wanted |= {(name, index): alone(tokens, count, index) for index in range(n)}
        bench.step(rng.randint(0, 6))
        if rng.random() < 0.2:
            pruned.add(victim := rng.choice(names))
            bench.engine.abort(victim)
            bench.engine.release(victim)
    bench.run()
    for (name, index), expected in wanted.items():
        got = bench.output(name, index)
        assert got == (expected[: len(got)] if name in pruned else expected)
    for name in names:
        bench.engine.release(name)
    stats = bench.cache.stats()
    assert (stats.num_used, stats.num_sequences, stats.num_parked) == (0, 0, 0)
