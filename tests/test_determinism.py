"""Determinism of the whole engine: a request's answer in any company is its answer alone, bit for bit.

A composition is an engine on the real model, of random shape (rows, blocks so few that sequences are preempted, block
size, chunks, prefix cache), and a random company: everything that a caller can ask for, arriving at random steps, some
of it aborted. Tokens, text, log-probabilities of outputs and prompts, scores and embeddings are compared with those of
the request alone, in an engine with room and without a prefix cache.

One composition in each mode, a new one in each run, is for every day; 200 are marked `slow`:

    OCTAVO_SEED=7 OCTAVO_COMPOSITIONS=50 pytest tests/test_determinism.py -m slow -s

OCTAVO_CPU_ISA chooses the native code, or torch.
"""

from __future__ import annotations

import os
import random
import secrets
from collections import Counter
from collections.abc import Callable
from itertools import islice

import pytest
from answers import run_all
from demo_engines import DemoEngines, Shape
from random_requests import RandomAsks

from octavo_kernels import cpu_isa

pytestmark = pytest.mark.model

MODES = ("exact",) if cpu_isa() == "none" else ("exact", "fast")
NUM_EVERY_DAY = 1
NUM_SLOW = int(os.environ.get("OCTAVO_COMPOSITIONS", 200))
NUM_LOOKED_AT = 4
NUM_MAY_FAIL = 2  # of few answers: bans and a grammar can contradict each other
RecordProperty = Callable[[str, object], None]


@pytest.fixture(params=MODES)
def engines(request: pytest.FixtureRequest) -> DemoEngines:
    return DemoEngines(mode=request.param, deterministic=True)


def random_shape(rng: random.Random) -> Shape:
    """Draw a shape that can hold the widest search, and in most cases little more."""
    block_size = rng.choice((8, 8, 16, 32))
    return Shape(
        num_blocks=6 + rng.choice((12, 14, 100)) * 16 // block_size,
        block_size=block_size,
        max_num_seqs=rng.choice((4, 8, 16)),
        max_num_batched_tokens=rng.choice((4, 17, 64, 256, 1024)),
        prefix_cache=rng.random() < 0.7,
        num_host_blocks=rng.choice((0, 12, 60)),
    )


def check_composition(engines: DemoEngines, rng: random.Random, max_tokens: int, counts: Counter[str]) -> None:
    """Run one company, then some of its members alone."""
    shape, text = random_shape(rng), engines.built.text
    num_asks = rng.randint(2 * NUM_LOOKED_AT, 14)
    source = RandomAsks(rng, text, max_tokens=max_tokens, share_long=rng.choice((0.2, 0.9)))
    asks = {str(number): ask for number, ask in enumerate(islice(source, num_asks))}
    arrivals = {name: rng.choice((0, 0, rng.randint(0, 12))) for name in asks}
    bystanders = list(asks)[NUM_LOOKED_AT:]
    departures = {name: rng.randint(1, 15) for name in bystanders if rng.random() < 0.3}
    engine = engines.make(shape)
    together = run_all(engine, text, asks, arrivals, departures)
    counts["preemptions"] += engine.scheduler.counters.num_preemptions
    counts["swaps"] += engine.scheduler.counters.num_swaps
    counts["cached prompt tokens"] += engine.scheduler.counters.cached_prompt_tokens.total
    for name in list(asks)[:NUM_LOOKED_AT]:
        alone = run_all(engines.built.engine, text, {name: asks[name]})
        for part, answer in alone.items():
            assert together[part] == answer, f"{shape}, request {part} of {asks[name]}"
            counts["answers compared"] += 1
            counts["failed alike"] += answer.error is not None
    engine.close()


def check(engines: DemoEngines, num_compositions: int, max_tokens: int, record: RecordProperty) -> None:
    seed = int(os.environ.get("OCTAVO_SEED") or secrets.randbits(32))
    print(f"\nOCTAVO_SEED={seed}, mode {engines.built.info.mode}, {engines.built.info.kernel_backend}")
    counts: Counter[str] = Counter()
    for number in range(num_compositions):
        check_composition(engines, random.Random(f"{seed} {number}"), max_tokens, counts)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    described = {"seed": seed, "compositions": num_compositions, "kernels": engines.built.info.kernel_backend}
    for name, value in (described | counts).items():
        record(name, value)
    may_fail = max(NUM_MAY_FAIL, 0.1 * counts["answers compared"])
    assert counts["failed alike"] <= may_fail, "requests should mostly succeed"
    engines.built.engine.close()


def test_answers_do_not_depend_on_company(engines: DemoEngines, record_property: RecordProperty) -> None:
    check(engines, NUM_EVERY_DAY, 24, record_property)


@pytest.mark.slow
def test_answers_do_not_depend_on_company_in_many_compositions(
    engines: DemoEngines, record_property: RecordProperty
) -> None:
    check(engines, NUM_SLOW, 64, record_property)
