"""Soak: thousands of random requests through one engine that is too small for them; nothing leaks, nobody is changed.

Everything that a caller can ask for comes over asyncio, mixed: samples, searches, branches off ended and off running
requests, grammars, embeddings, tenants. Some leave at random moments. Blocks are so few that sequences are preempted.
At the end only the prefix cache holds blocks, no row is taken, and the answer of everyone who stayed equals
that of the request alone, in an engine with room and without a prefix cache.

40 requests, new ones in each run, of whose answers some are compared, are for every day; 2000 are marked `slow`:

    OCTAVO_SEED=7 OCTAVO_REQUESTS=500 pytest tests/test_soak.py -m slow -s
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import pytest
from answers import Answer, grown, run_all, stream
from demo_engines import DemoEngines, Shape, runner_of
from random_requests import Ask, RandomAsks

from octavo_engine import AsyncEngine, InvalidRequest, SamplingParams
from octavo_engine.branch import Branch, Parent

pytestmark = pytest.mark.model

NUM_EVERY_DAY = 40
NUM_COMPARED_EVERY_DAY = 12
NUM_SLOW = int(os.environ.get("OCTAVO_REQUESTS", 2000))
NUM_AT_ONCE = 24
SHAPES = (
    Shape(num_blocks=36, block_size=8, max_num_seqs=12, max_num_batched_tokens=64, num_host_blocks=24),
    Shape(num_blocks=40, block_size=8, max_num_seqs=16, max_num_batched_tokens=256),
    Shape(num_blocks=36, block_size=8, max_num_seqs=16, max_num_batched_tokens=32, prefix_cache=False),
)
RecordProperty = Callable[[str, object], None]


@dataclass(frozen=True, slots=True)
class Caller:
    """Someone with a request: how many seconds they wait for its answer, and what they do with one that is kept."""

    name: str
    ask: Ask
    patience: float | None
    branches_early: bool
    releases: bool

    @classmethod
    def draw(cls, rng: random.Random, name: str, ask: Ask) -> Caller:
        patience = rng.uniform(0, 0.5) if rng.random() < 0.15 else None
        return cls(name, ask, patience, branches_early=rng.random() < 0.5, releases=rng.random() < 0.7)


@dataclass(slots=True)
class Soak:
    """Callers of one engine, many at once; `asked` and `answers` are of those who stayed, by name."""

    engine: AsyncEngine
    asked: dict[str, Ask] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    async def run(self, callers: Sequence[Caller]) -> None:
        """Let everyone come, and wait until all have gone."""
        places = asyncio.Semaphore(NUM_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(self._serve(places, caller))
        for caller in callers:
            await self.engine.release(caller.name)
        await stream(
            self.engine, "last", Ask((1, 2), SamplingParams(temperature=0, max_tokens=2))
        )  # all before is told

    async def _serve(self, places: asyncio.Semaphore, caller: Caller) -> None:
        """Run a caller's request, then what goes on from its answer, and mostly release it."""
        async with places, asyncio.TaskGroup() as group:
            answer = await self._run(
                caller.name, caller.ask, patience=caller.patience, watch=self._early(caller, group)
            )
            if answer is None or not caller.ask.twigs:
                return
            branches = grown(caller.name, caller.ask, answer).items()
            await asyncio.gather(*(self._branch(name, *branch) for name, branch in branches))
            if caller.releases:
                await self.engine.release(caller.name)

    async def _run(
        self,
        name: str,
        ask: Ask,
        parent: Parent | None = None,
        patience: float | None = None,
        watch: Callable[[Answer], None] = lambda _: None,
    ) -> Answer | None:
        """Run a request; None if its caller leaves before it ends."""
        self.counts["requests"] += 1
        try:
            async with asyncio.timeout(patience):
                answer = await stream(self.engine, name, ask, parent, watch)
        except TimeoutError:
            self.counts["aborted"] += 1
            return None
        self.asked[name], self.answers[name] = replace(ask, twigs=()), answer
        return answer

    def _early(self, caller: Caller, group: asyncio.TaskGroup) -> Callable[[Answer], None]:
        """Return what begins a branch off a request that still runs, at its first tokens."""
        name, ask = f"{caller.name}/early", caller.ask
        pending = caller.branches_early and bool(ask.twigs)

        def watch(answer: Answer) -> None:
            nonlocal pending
            if pending and (choice := answer.choices.get(ask.index)) is not None and choice.finish_reason is None:
                pending = False
                twig, taken = ask.twigs[0], choice.token_ids
                branch = Branch(caller.name, ask.index, len(taken), twig.continuation)
                prompt = (*ask.prompt, *taken, *twig.continuation)
                early = Ask(prompt, twig.params, salt=ask.salt, priority=ask.priority)
                group.create_task(self._branch(name, branch, early))

        return watch

    async def _branch(self, name: str, branch: Branch, ask: Ask) -> None:
        """Go on from a token of a request that runs or is kept, unless it has gone."""
        try:
            tokens = await self.engine.branch_tokens(branch, ask.salt)
        except InvalidRequest:
            self.counts["parents gone"] += 1
            return
        assert tuple(tokens) == ask.prompt
        self.counts["branches"] += 1
        await self._run(name, ask, Parent(branch.request_id, branch.index))


def leaks(engine: AsyncEngine, max_num_rows: int) -> dict[str, int]:
    """Return what is still held in an engine that has nothing to do."""
    stats, scheduler, runner = engine.stats(), engine._engine.scheduler, runner_of(engine._engine)
    return {
        "blocks": stats.cache.num_used,
        "blocks on the host": stats.cache.host.num_used,
        "tables": stats.cache.num_sequences,
        "rows": max_num_rows - scheduler._rows.num_available,
        "waiting": stats.num_waiting,
        "running": stats.num_running,
        "requests": len(scheduler._residents.by_request),
        "readers": len(engine._readers),
        "rows that draw": len(runner._sampling._special),
        "rows that search": runner._rows.num_searching,
        "rows that pool": runner._rows.num_embedding,
        "kept": len(scheduler._residents.kept),
    }


def check(
    shapes: Sequence[Shape], num_requests: int, max_tokens: int, num_compared: int | None, record: RecordProperty
) -> Counter[str]:
    seed = int(os.environ.get("OCTAVO_SEED") or secrets.randbits(32))
    rng = random.Random(seed)
    shape = rng.choice(shapes)
    print(f"\nOCTAVO_SEED={seed}, {shape}")
    engines = DemoEngines(mode="exact")
    engine = AsyncEngine(engines.make(shape), engines.built.text, engines.built.info)
    asks = islice(RandomAsks(rng, engines.built.text, max_tokens=max_tokens), num_requests)
    callers = [Caller.draw(rng, str(number), ask) for number, ask in enumerate(asks)]
    soak = Soak(engine)
    asyncio.run(soak.run(callers))
    counts = soak.counts
    counters = engine._engine.scheduler.counters
    counts["preemptions"], counts["swaps"] = counters.num_preemptions, counters.num_swaps
    counts["cached prompt tokens"] = counters.cached_prompt_tokens.total
    counts["errors"] = sum(answer.error is not None for answer in soak.answers.values())
    held = leaks(engine, shape.max_num_seqs)
    engine.close()
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, value in ({"seed": seed, "shape": str(shape), "leaked": sum(held.values())} | counts).items():
        record(name, value)
    assert not any(held.values()), held
    looked_at = list(soak.asked)[:num_compared]
    for name in looked_at:
        alone = run_all(engines.built.engine, engines.built.text, {name: soak.asked[name]})
        assert alone == {name: soak.answers[name]}, f"request {name}: {soak.asked[name]}"
    record("answers compared", len(looked_at))
    engines.built.engine.close()
    return counts


def test_forty_requests_leave_nothing_behind(record_property: RecordProperty) -> None:
    check(SHAPES, NUM_EVERY_DAY, 24, NUM_COMPARED_EVERY_DAY, record_property)


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(record_property: RecordProperty) -> None:
    counts = check(SHAPES[:1], NUM_SLOW, 40, None, record_property)
    assert counts["preemptions"] > 0
