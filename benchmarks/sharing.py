"""Memory saved by sharing blocks: parallel samples and beams on Alpaca-like and ShareGPT-like lengths.

    python benchmarks/sharing.py                        # samples on a model of 0 ms, beams on the demo model
    python benchmarks/sharing.py --requests 4 --scale 0.25 --cases alpaca

Saved = 1 - blocks held / blocks that the same sequences would hold if none were shared, summed over all steps: the
definition of the PagedAttention paper (arXiv 2309.06180, section 6.3), whose figures for OPT-13B stand beside ours.
What samples share depends on lengths alone, so the scheduler and the cache run on a model that takes no time. Which
beams survive depends on the model, so beams run on a real one. The counts are exact on any machine.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from workload import WorkloadRequest, english_ids, lognormal_length, with_text

from octavo_engine import BeamSearchParams, EngineConfig, Request, SamplingParams
from octavo_engine.batch import ScheduledBatch
from octavo_engine.engine import Engine
from octavo_engine.executor.base import Executor, Pending
from octavo_engine.executor.fake import FakeExecutor, hashed_next_token
from octavo_engine.scheduler import Scheduler
from octavo_engine.types import TokenSpan
from octavo_kvcache import CacheManager

WIDTHS = (2, 4, 6)
BLOCK_SIZE = 16
MAX_NUM_SEQS = 96


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens in a data set, and what the paper says sharing saves on it, in percent."""

    prompt: int
    output: int
    paper_samples: str
    paper_beams: str


CASES = {
    "alpaca": Lengths(19, 58, "6.1 to 9.8", "37.6 to 55.2"),
    "sharegpt": Lengths(161, 338, "16.2 to 30.5", "44.3 to 66.3"),
}


@dataclass(frozen=True)
class Saved:
    """One measurement."""

    case: str
    kind: str  # samples or beams
    width: int
    num_requests: int
    num_steps: int
    num_copies: int
    saved: float


class Watched:
    """An executor that counts the blocks of every step before it runs."""

    def __init__(self, executor: Executor, cache: CacheManager) -> None:
        self._executor = executor
        self._cache = cache
        self.max_in_flight = executor.max_in_flight
        self.num_held = 0
        self.num_without_sharing = 0
        self.num_steps = 0

    def submit(self, batch: ScheduledBatch) -> Pending:
        stats = self._cache.stats()
        self.num_held += stats.num_used - stats.num_parked
        self.num_without_sharing += stats.num_table_blocks
        self.num_steps += 1
        return self._executor.submit(batch)

    def close(self) -> None:
        self._executor.close()


def make_requests(lengths: Lengths, arguments: argparse.Namespace, token_ids: list[int]) -> list[WorkloadRequest]:
    """Draw lengths with the data set's means; prompts are English prose."""
    rng = random.Random(arguments.seed)
    drawn = [
        WorkloadRequest(
            prompt_ids=[0] * lognormal_length(rng, lengths.prompt * arguments.scale, 0.8, 4, 1024),
            out=lognormal_length(rng, lengths.output * arguments.scale, 0.8, 4, 768),
        )
        for _ in range(arguments.requests)
    ]
    return with_text(drawn, token_ids, arguments.seed)


def samples_engine() -> tuple[Engine, Watched]:
    """Make an engine whose model takes no time; nothing is cached, so that only samples share."""
    cache = CacheManager(1 << 16, BLOCK_SIZE, prefix_cache=False)
    scheduler = Scheduler(cache, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=2048, max_model_len=2048)
    watched = Watched(FakeExecutor(BLOCK_SIZE, hashed_next_token(49152)), cache)
    return Engine(scheduler, watched), watched


def beams_engine(model: str | None) -> tuple[Engine, Watched]:
    """Make the engine that a user gets, without the prefix cache."""
    from octavo_engine.build import build_engine

    config = EngineConfig(
        model=model,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        prefix_cache=False,
        kv_cache_bytes=2 << 30,
        max_model_len=2048,
    )
    engine = build_engine(config).engine
    watched = Watched(engine._executor, engine.scheduler.cache)
    return Engine(engine.scheduler, watched), watched


def measure(
    engine: Engine, watched: Watched, requests: list[WorkloadRequest], case: str, kind: str, width: int
) -> Saved:
    """Offer all requests at once and count until they have ended."""
    watched.num_held = watched.num_without_sharing = watched.num_steps = 0
    copies_before = engine.scheduler.cache.stats().num_copies
    for place, request in enumerate(requests):
        beams = BeamSearchParams(beam_width=width, max_tokens=request["out"], ignore_eos=True)
        sampling = SamplingParams(n=width, seed=place, max_tokens=request["out"], ignore_eos=True)
        engine.add(
            Request(
                request_id=str(place),
                inputs=(TokenSpan(tuple(request["prompt_ids"])),),
                sampling=sampling if kind == "samples" else beams.sampling(),
                beams=beams if kind == "beams" else None,
            )
        )
    while engine.has_work:
        engine.step()
    return Saved(
        case=case,
        kind=kind,
        width=width,
        num_requests=len(requests),
        num_steps=watched.num_steps,
        num_copies=engine.scheduler.cache.stats().num_copies - copies_before,
        saved=1 - watched.num_held / watched.num_without_sharing,
    )


def measurements(arguments: argparse.Namespace) -> Iterator[Saved]:
    """Measure samples, then beams, for each data set and width."""
    token_ids = english_ids(arguments.model)
    makers = {"samples": samples_engine, "beams": lambda: beams_engine(arguments.model)}
    for kind in arguments.kinds.split(","):
        engine, watched = makers[kind]()
        for case in arguments.cases.split(","):
            requests = make_requests(CASES[case], arguments, token_ids)
            for width in map(int, arguments.widths.split(",")):
                yield measure(engine, watched, requests, case, kind, width)


def table(rows: list[Saved]) -> str:
    """Return a Markdown table, one row per data set and kind."""
    lines = ["| lengths | | 2 | 4 | 6 | the paper, 2 to 6 |", "|---|---|---|---|---|---|"]
    for case, kind in dict.fromkeys((row.case, row.kind) for row in rows):
        own = {row.width: f"{row.saved:.1%}" for row in rows if (row.case, row.kind) == (case, kind)}
        paper = CASES[case].paper_samples if kind == "samples" else CASES[case].paper_beams
        lines.append(f"| {case} | {kind} | {' | '.join(own.get(width, '-') for width in WIDTHS)} | {paper} % |")
    return "\n".join(lines)


def plot(rows: list[Saved], path: Path) -> None:
    """Draw what sharing saves by data set and kind, with the paper's range for 2 to 6 as a line beside the bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    groups = list(dict.fromkeys((row.case, row.kind) for row in rows))
    for group, (case, kind) in enumerate(groups):
        own = {row.width: 100 * row.saved for row in rows if (row.case, row.kind) == (case, kind)}
        for place, width in enumerate(WIDTHS):
            bar = axes.bar(group + 0.22 * (place - 1.2), own.get(width, 0), 0.2, color=f"C{place}")
            axes.bar_label(bar, fmt="%.0f", fontsize=8)
        paper = CASES[case].paper_samples if kind == "samples" else CASES[case].paper_beams
        low, high = map(float, paper.split(" to "))
        axes.plot([group + 0.42] * 2, [low, high], color="tab:gray", linewidth=4, solid_capstyle="butt")
    axes.set_xticks(range(len(groups)), [f"{case}\n{kind}" for case, kind in groups])
    axes.set_ylabel("blocks saved, %")
    axes.legend(
        [*(plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(3)), plt.Line2D([], [], color="tab:gray", lw=4)],
        [*(f"{width} of a prompt" for width in WIDTHS), "the paper, 2 to 6"],
        fontsize=8,
    )
    axes.set_title(f"Memory saved by sharing, blocks of {BLOCK_SIZE}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="alpaca,sharegpt")
    parser.add_argument("--kinds", default="samples,beams")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths, for a trial")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", default=None, help="of the beams; the demo model if left out")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    rows = []
    for row in measurements(arguments):
        rows.append(row)
        print(f"{row.case}, {row.kind} {row.width}: {row.saved:.1%} saved in {row.num_steps} steps", flush=True)
    print(table(rows))
    if arguments.out:
        document = {"block_size": BLOCK_SIZE, "scale": arguments.scale, "rows": [asdict(row) for row in rows]}
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
