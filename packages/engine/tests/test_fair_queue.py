"""Fair shares in the queue: nobody is starved, no flood delays others, and without tenants nothing changes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.executor.fake import hashed_next_token
from octavo_engine.fair_queue import FairQueue
from octavo_engine.scheduler_bench import SchedulerBench
from octavo_engine.sequence import Sequence, SequenceStatus
from octavo_engine.types import Request, Tenant, TokenSpan
from octavo_engine.waiting import WaitingQueue

NEXT_TOKEN = hashed_next_token(1000)
ROWS, LONGEST_PROMPT, LONGEST_OUTPUT = 4, 24, 12
ONE_ADMISSION, ALL_ROWS = LONGEST_PROMPT, 2 * ROWS * (LONGEST_PROMPT + LONGEST_OUTPUT)
BOUND = 2 * max(ONE_ADMISSION, ALL_ROWS)
"""Theorem 4.4 of the paper, in tokens of a prompt."""


def sequence(number, tenant=None, priority=0, num_tokens=8):
    request = Request(
        request_id=str(number),
        inputs=(TokenSpan((1,) * num_tokens),),
        priority=priority,
        tenant=tenant,
        arrival_time=float(number),
    )
    return Sequence(number, request, 0, [1] * num_tokens, num_tokens, 4, frozenset())


def drain(queue):
    order = []
    while (first := queue.first()) is not None:
        order.append(first.request.request_id)
        queue.pop(len(first.token_ids))
    assert len(queue) == 0
    return order


def test_tenants_take_turns_however_many_requests_one_has():
    queue, (a, b) = FairQueue(), (Tenant("a"), Tenant("b"))
    for number in range(6):
        queue.push(sequence(number, a))
    for number in range(6, 9):
        queue.push(sequence(number, b))
    assert drain(queue) == ["0", "6", "1", "7", "2", "8", "3", "4", "5"]


def test_tokens_count_and_not_requests():
    queue, (a, b) = FairQueue(), (Tenant("a"), Tenant("b"))
    for number in range(3):
        queue.push(sequence(number, a, num_tokens=30))
    for number in range(3, 9):
        queue.push(sequence(number, b, num_tokens=10))
    assert drain(queue) == ["0", "3", "4", "5", "1", "6", "7", "8", "2"]


def test_a_share_of_two_gets_twice_as_much():
    queue, (a, b) = FairQueue(), (Tenant("a", 2.0), Tenant("b"))
    for number in range(12):
        queue.push(sequence(number, a if number < 6 else b))
    first = drain(queue)[:9]
    assert sum(int(number) < 6 for number in first) == 6


def test_answers_count_twice():
    queue, (a, b) = FairQueue(), (Tenant("a"), Tenant("b"))
    queue.push(sequence(0, a))
    queue.push(sequence(1, b))
    queue.charge(a, 5)
    assert (queue.service(a), queue.service(b)) == (10, 0)
    assert drain(queue) == ["1", "0"]


def test_a_pause_saves_nothing_up():
    queue, (a, b) = FairQueue(), (Tenant("a"), Tenant("b"))
    queue.push(sequence(0, b))
    drain(queue)
    for number in range(1, 101):
        queue.push(sequence(number, a))
    for _ in range(90):
        queue.pop(8)
    for number in range(101, 111):
        queue.push(sequence(number, b))
    assert sum(int(number) > 100 for number in drain(queue)[:10]) == 5


def test_within_a_tenant_priority_and_arrival_hold():
    queue, a = FairQueue(), Tenant("a")
    for number, priority in enumerate((0, 5, -1, 0)):
        queue.push(sequence(number, a, priority))
    assert drain(queue) == ["2", "0", "3", "1"]


def test_tenants_that_were_never_seen_again_are_forgotten():
    queue = FairQueue()
    for number in range(2000):
        queue.push(sequence(number, Tenant(str(number))))
        drain(queue)
    assert len(queue._accounts) < 1000


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["push", "push", "pop", "end"]), st.integers(-2, 2), st.integers(0, 30)), max_size=80
)


@given(ACTIONS)
@settings(deadline=None)
def test_without_tenants_the_order_is_that_of_priority_and_arrival(actions):
    plain, fair = WaitingQueue(), FairQueue()
    waiting = []
    for number, (action, priority, pick) in enumerate(actions):
        if action == "push":
            pair = sequence(number, priority=priority), sequence(number, priority=priority)
            plain.push(pair[0])
            fair.push(pair[1])
            waiting.append(pair)
        elif waiting:
            pair = waiting[pick % len(waiting)]
            if action == "pop":
                first = plain.first()
                pair = next(pair for pair in waiting if pair[0] is first)
                plain.pop(8)
                fair.first()
                fair.pop(8)
            else:
                for queue, ended in zip((plain, fair), pair, strict=True):
                    ended.status = SequenceStatus.FINISHED
                    queue.discard()
            waiting.remove(pair)
        assert (plain.first() is None) is (fair.first() is None)
        if waiting:
            assert fair.first().request.request_id == plain.first().request.request_id
        assert len(plain) == len(fair) == len(waiting)


class Served:
    """What tenants got from an engine, step by step, counted from its batches and not by the queue."""

    def __init__(self, bench, owners):
        self.bench, self.owners = bench, owners
        self.tokens = dict.fromkeys(owners.values(), 0)
        self._seen = set()

    def step(self):
        before = len(self.bench.updates)
        self.bench.step()
        for sequences in self.bench.engine.scheduler._residents.by_request.values():
            for running in sequences:
                request = running.request
                if running.scheduled_time is not None and request.request_id not in self._seen:
                    self._seen.add(request.request_id)
                    self.tokens[request.tenant] += len(request.prompt_token_ids)
        for update in self.bench.updates[before:]:
            self.tokens[self.owners[update.request_id]] += 2 * len(update.token_ids)


def waits(bench, tenant):
    residents = bench.engine.scheduler._residents
    return any(
        s.request.tenant == tenant and s.status is SequenceStatus.WAITING
        for sequences in residents.by_request.values()
        for s in sequences
    )


@given(st.integers(0, 2**32), st.integers(0, 1), st.sampled_from((0.5, 1.0, 3.0)))
@settings(max_examples=25, deadline=None)
def test_a_flood_takes_no_more_than_its_share_from_one_who_waits(seed, num_late, share):
    """As long as both wait, what they get differs by no more than the bound, whatever the flood sends."""
    pick = random.Random(seed)
    flood, guest = Tenant("flood"), Tenant("guest", share)
    owners = {}
    bench = SchedulerBench.make(
        NEXT_TOKEN, num_late, queue=FairQueue(), max_num_seqs=ROWS, num_blocks=200, budget=40, prefix_cache=False
    )

    def send(tenant, count):
        for _ in range(count):
            name = f"{tenant.name}-{len(owners)}"
            owners[name] = tenant
            prompt = [pick.randrange(1000) for _ in range(pick.randint(1, LONGEST_PROMPT))]
            bench.add(name, prompt, max_tokens=pick.randint(1, LONGEST_OUTPUT), tenant=tenant)

    send(flood, 60)
    served = Served(bench, owners)
    for _ in range(pick.randint(0, 30)):
        served.tokens.setdefault(flood, 0)
        served.step()
    send(guest, pick.randint(3, 15))
    start = {tenant: served.tokens.get(tenant, 0) for tenant in (flood, guest)}
    served.tokens = start.copy()
    for _ in range(2000):
        if not (waits(bench, flood) and waits(bench, guest)):
            break
        served.step()
        got = {tenant: (served.tokens[tenant] - start[tenant]) / tenant.share for tenant in (flood, guest)}
        assert abs(got[flood] - got[guest]) <= BOUND / min(share, 1.0)
    else:
        raise AssertionError("neither came to an end")
    bench.run()
    bench.assert_empty()


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_nobody_starves_beside_a_flood_that_never_ends(seed):
    """A request is done after a bounded number of steps, though there is always more of the flood than rows."""
    pick = random.Random(seed)
    flood, guest = Tenant("flood", 10.0), Tenant("guest", 1.0)
    bench = SchedulerBench.make(
        NEXT_TOKEN, 0, queue=FairQueue(), max_num_seqs=ROWS, num_blocks=60, budget=40, prefix_cache=False
    )
    count = 0

    def keep_flooding():
        nonlocal count
        while bench.engine.scheduler.num_waiting < 2 * ROWS:
            count += 1
            bench.add(f"flood-{count}", [pick.randrange(1000) for _ in range(20)], max_tokens=10, tenant=flood)

    keep_flooding()
    bench.step(20)
    for number in range(3):
        bench.add(f"guest-{number}", [5] * 10, max_tokens=5, tenant=guest)
    steps = 0
    while len({request_id for request_id, _ in bench.reasons() if request_id.startswith("guest")}) < 3:
        keep_flooding()
        bench.step()
        steps += 1
        assert steps < 300, "the guest is starved"


def test_who_comes_first_waits_behind_the_whole_flood_without_fair_shares():
    """What the queue by arrival does, so that the tests above are seen to say something."""
    order = {}
    for name, queue in (("arrival", None), ("fair", FairQueue())):
        bench = SchedulerBench.make(NEXT_TOKEN, 0, queue=queue, max_num_seqs=ROWS)
        for number in range(40):
            bench.add(f"flood-{number}", [3] * 10, tenant=Tenant("flood"))
        bench.step(2)
        bench.add("guest", [4] * 10, tenant=Tenant("guest"))
        bench.run()
        order[name] = [request_id for request_id, _ in bench.reasons()].index("guest")
    assert order["arrival"] == 40
    assert order["fair"] <= 2 * ROWS


def test_an_unknown_policy_is_refused():
    with pytest.raises(InvalidConfig, match="queue_policy 'lottery' is not one of arrival, fair"):
        EngineConfig(queue_policy="lottery")
