"""KV waste at saturation: the share of slots in allocated blocks that hold no live token.

    python benchmarks/kv_waste.py                 # the demo model
    python benchmarks/kv_waste.py --fake          # the same scheduler and cache on a model of 0 ms
    python benchmarks/kv_waste.py --n 3           # three samples a request, which share their prompt's blocks

Waste of a step = 1 - live unique tokens / (allocated blocks x block size), where live tokens are those computed so far
and those that the step computes; counted exactly, averaged over the steps during which requests are waiting. Beside it
stands what reserving the maximum length for each running sequence would have wasted in the same steps.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from workload import WorkloadRequest, make_workload

from octavo_engine import EngineConfig, Request, SamplingParams
from octavo_engine.engine import Engine
from octavo_engine.executor.fake import FakeExecutor, hashed_next_token
from octavo_engine.scheduler import Scheduler
from octavo_engine.types import TokenSpan
from octavo_kvcache import CacheManager

RESERVED_LENGTH = 2048  # tokens a contiguous cache sets aside for a sequence: the paper's setting


@dataclass(frozen=True)
class Waste:
    """The outcome for one block size; ratios from 0 to 1."""

    block_size: int
    num_requests: int
    num_samples: int
    num_steps: int
    num_saturated_steps: int
    num_preemptions: int
    waste: float
    waste_all_steps: float
    waste_if_maximum_reserved: float


def measure(engine: Engine, requests: list[WorkloadRequest], block_size: int, n: int) -> Waste:
    """Offer all requests at once, each with n samples, and follow the waste step by step."""
    temperature = 0.0 if n == 1 else 1.0
    for place, request in enumerate(requests):
        sampling = SamplingParams(n=n, temperature=temperature, max_tokens=request["out"], ignore_eos=True)
        inputs = (TokenSpan(tuple(request["prompt_ids"])),)
        engine.add(Request(request_id=str(place), inputs=inputs, sampling=sampling))
    scheduler = engine.scheduler
    paged, reserved, all_steps = [], [], []
    before = scheduler.counters.sum_waste
    while engine.has_work:
        engine.step()
        waste = scheduler.counters.sum_waste - before
        before = scheduler.counters.sum_waste
        all_steps.append(waste)
        if scheduler.num_waiting:
            stats = scheduler.cache.stats()
            paged.append(waste)
            reserved.append(1 - stats.num_live_tokens / (stats.num_sequences * RESERVED_LENGTH))
    return Waste(
        block_size=block_size,
        num_requests=len(requests),
        num_samples=n,
        num_steps=len(all_steps),
        num_saturated_steps=len(paged),
        num_preemptions=scheduler.counters.num_preemptions,
        waste=_mean(paged),
        waste_all_steps=_mean(all_steps),
        waste_if_maximum_reserved=_mean(reserved),
    )


def fake_engine(*, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> Engine:
    """Make an engine whose model takes no time; scheduler and cache are the real ones."""
    scheduler = Scheduler(
        CacheManager(num_blocks, block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=RESERVED_LENGTH,
    )
    return Engine(scheduler, FakeExecutor(block_size, hashed_next_token(49152)))


def real_engine(model: str | None, *, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> Engine:
    """Make the engine that a user gets."""
    from octavo_engine.build import build_engine

    config = EngineConfig(
        model=model,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=RESERVED_LENGTH,
    )
    return build_engine(config).engine


def plot(rows: list[Waste], path: Path) -> None:
    """Draw paged waste by block size beside the reserved maximum."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    labels = [f"paged, block {r.block_size}" for r in rows] + [f"reserve {RESERVED_LENGTH} tokens"]
    values = [100 * r.waste for r in rows] + [100 * rows[0].waste_if_maximum_reserved]
    bars = axes.bar(labels, values, color=["tab:blue"] * len(rows) + ["tab:gray"])
    axes.bar_label(bars, fmt="%.1f %%")
    axes.set_ylabel("KV slots without a live token, %")
    samples = f", n = {rows[0].num_samples}" if rows[0].num_samples > 1 else ""
    axes.set_title(f"KV waste at saturation, ShareGPT-like lengths{samples}")
    axes.tick_params(axis="x", labelrotation=15)
    figure.savefig(path, dpi=120)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, help="a workload file; drawn from --requests and --seed if left out")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--n", type=int, default=1, help="samples a request; above 1 at temperature 1")
    parser.add_argument("--model", default=None)
    parser.add_argument("--fake", action="store_true", help="a model of 0 ms; the figures are the same")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768, help="size of the KV cache, in tokens")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if arguments.workload:
        requests = json.loads(arguments.workload.read_text())
    else:
        requests = make_workload(arguments.requests, arguments.seed)
    rows = []
    for block_size in arguments.block_sizes:
        size = {
            "num_blocks": arguments.tokens // block_size + 1,
            "block_size": block_size,
            "max_num_seqs": arguments.max_num_seqs,
            "budget": arguments.budget,
        }
        engine = fake_engine(**size) if arguments.fake else real_engine(arguments.model, **size)
        row = measure(engine, requests, block_size, arguments.n)
        engine.close()
        rows.append(row)
        print(
            f"block size {block_size:3}: waste {row.waste:.2%} over {row.num_saturated_steps} steps at saturation;"
            f" reserving {RESERVED_LENGTH} tokens a sequence would waste {row.waste_if_maximum_reserved:.1%}"
        )
    if arguments.out:
        document = {
            "model": "fake" if arguments.fake else arguments.model or "demo",
            "max_num_seqs": arguments.max_num_seqs,
            "rows": [asdict(r) for r in rows],
        }
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
