"""Preemption with a KV cache that is too small: computing again, swapping to the host, and what the cost model chooses.

    python benchmarks/preemption.py --out benchmarks/results/preemption

The same requests run in turn in engines that differ in what becomes of preempted sequences, and in one whose cache
holds all of them; round by round, so that ratios are of one time. Tokens are the same everywhere, which is checked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo_engine import LLM, SamplingParams

BLOCK_SIZE = 16
VOCAB_SIZE = 49152
MODES = ("recompute", "swap", "auto")
ENOUGH = "enough memory"


@dataclass(frozen=True)
class Figure:
    """One engine's tokens per second, the median over rounds, and what one round did.

    `ratio` is the median of the rounds' own ratios to `recompute`.
    """

    name: str
    tokens_per_second: float
    ratio: float
    num_recomputed: int
    num_swapped: int
    num_blocks_moved: int

    def __str__(self) -> str:
        return (
            f"{self.name:14} {self.tokens_per_second:8.1f} tokens/s {self.ratio:6.3f} x recompute   "
            f"{self.num_recomputed:3} recomputed, {self.num_swapped:3} swapped, {self.num_blocks_moved} blocks moved"
        )


def requests(count: int, prompt_tokens: int, output_tokens: int, seed: int) -> list[tuple[list[int], int]]:
    """Draw prompts and the lengths of their answers, from half to one and a half of what is given."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        length = rng.randint(prompt_tokens // 2, prompt_tokens * 3 // 2)
        prompt = [rng.randrange(1000, VOCAB_SIZE) for _ in range(length)]
        drawn.append((prompt, rng.randint(output_tokens // 2, output_tokens * 3 // 2)))
    return drawn


def num_blocks_of(tokens: int) -> int:
    """Return how many blocks hold some tokens."""
    return -(-tokens // BLOCK_SIZE)


def engines(model: str | None, asked: list[tuple[list[int], int]], share: float) -> dict[str, LLM]:
    """Make an engine for each contender; all but one have blocks for a share of what requests hold at their ends."""
    num_all = sum(num_blocks_of(len(prompt) + out) for prompt, out in asked)
    longest = max(len(prompt) + out for prompt, out in asked)
    num_few = max(int(num_all * share), num_blocks_of(longest)) + 1
    common = {"model": model, "block_size": BLOCK_SIZE, "max_num_seqs": len(asked), "max_model_len": longest}

    def make(num_blocks: int, mode: str, host_kv_bytes: int) -> LLM:
        options = {"num_blocks": num_blocks, "preemption_mode": mode, "host_kv_bytes": host_kv_bytes}
        return LLM(**common, **options, show_progress=False)

    found = {ENOUGH: make(num_all + len(asked) + 1, "recompute", 0)}
    bytes_per_block = found[ENOUGH].info.kv_cache_bytes // found[ENOUGH].info.num_blocks
    return found | {mode: make(num_few, mode, (num_all + 1) * bytes_per_block) for mode in MODES}


def run(llm: LLM, asked: list[tuple[list[int], int]], seed: int) -> tuple[float, list[list[int]]]:
    """Return the seconds that all requests take at once, and their tokens."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    sampling = [SamplingParams(temperature=1.0, seed=seed, max_tokens=out, ignore_eos=True) for _, out in asked]
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling)
    return time.perf_counter() - started, [list(output.outputs[0].token_ids) for output in outputs]


def measure(model: str | None, *, count: int, prompt: int, output: int, share: float, num_rounds: int) -> list[Figure]:
    """Run all engines in turn, round by round, each round with other prompts."""
    llms = engines(model, requests(count, prompt, output, seed=0), share)
    for llm in llms.values():  # warm: memory touched
        run(llm, requests(4, prompt // 2, 8, seed=99), seed=0)
    rounds: list[dict[str, float]] = []
    done: list[Mapping[str, tuple[int, int, int]]] = []
    for seed in range(num_rounds):
        asked = [(p[::-1] if seed % 2 else p, out) for p, out in requests(count, prompt, output, seed=0)]
        seconds, answers, counts = {}, {}, {}
        for name, llm in llms.items():
            before = work_of(llm)
            seconds[name], answers[name] = run(llm, asked, seed)
            counts[name] = tuple(after - b for after, b in zip(work_of(llm), before, strict=True))
        assert all(answer == answers[ENOUGH] for answer in answers.values()), "preemption changed an answer"
        rounds.append({name: sum(out for _, out in asked) / taken for name, taken in seconds.items()})
        done.append(counts)
    for llm in llms.values():
        llm.close()
    return [
        Figure(
            name,
            statistics.median(speeds[name] for speeds in rounds),
            statistics.median(speeds[name] / speeds["recompute"] for speeds in rounds),
            *done[-1][name],
        )
        for name in llms
    ]


def work_of(llm: LLM) -> tuple[int, int, int]:
    """Return how often an engine has preempted so far, by kind, and how many blocks it has moved."""
    stats = llm.stats()
    moved = stats.cache.host.num_blocks_out + stats.cache.host.num_blocks_in
    return stats.preemption.num_recomputed, stats.preemption.num_swapped, moved


def plot(figures: list[Figure], path: Path) -> None:
    """Draw the speeds as bars."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
    bars = axes.barh([f.name for f in figures][::-1], [f.tokens_per_second for f in figures][::-1], color="tab:blue")
    axes.bar_label(bars, labels=[f"{f.ratio:.2f} x" for f in figures][::-1], padding=3)
    axes.set_xlabel("tokens per second; ratios to computing again")
    axes.margins(x=0.15)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file or a folder; the demo model if left out")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=96, help="mean tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="mean tokens of an answer")
    parser.add_argument("--share", type=float, default=0.5, help="of the blocks that all requests hold at their ends")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to put JSON and a plot, without a suffix")
    args = parser.parse_args()
    sizes = {"count": args.requests, "prompt": args.prompt, "output": args.output, "share": args.share}
    figures = measure(args.model, **sizes, num_rounds=args.rounds)
    print(f"{args.requests} requests at once, blocks for {args.share:.0%} of them")
    print(*figures, sep="\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {**sizes, "rounds": args.rounds, "figures": [asdict(figure) for figure in figures]}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        plot(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
