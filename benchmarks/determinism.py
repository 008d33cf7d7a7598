"""What `deterministic=True` costs: tokens per second beside `deterministic=False`, in turn in one process.

    python benchmarks/determinism.py --out benchmarks/results/determinism

Two kinds of kernels are measured, each in a process of its own: the native ones, of which both settings run the same
code, so that the ratio shows the noise of the machine, and torch (`OCTAVO_CPU_ISA=none`), where rows are filled up and
attention is cut into tiles for it. Prompts are computed and then tokens decoded, at several batch sizes. Ratios count;
absolute figures move from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from octavo_engine import LLM, SamplingParams

KERNELS = {"native": {}, "torch": {"OCTAVO_CPU_ISA": "none"}}


@dataclass(frozen=True)
class Figure:
    """One kind of work: seconds with and without, medians over rounds, and the median of the rounds' ratios."""

    kernels: str
    work: str
    seconds: float
    seconds_without: float
    cost: float

    def __str__(self) -> str:
        return (
            f"{self.kernels:18} {self.work:28} {self.seconds:8.3f} s {self.seconds_without:8.3f} s without"
            f"   {self.cost:6.3f} times"
        )


@dataclass(frozen=True)
class Work:
    """Prompts of one length, and how many tokens follow each."""

    batch: int
    num_prompt_tokens: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.batch} x ({self.num_prompt_tokens} + {self.num_tokens})"


WORK = [Work(1, 32, 32), Work(4, 32, 32), Work(16, 32, 32), Work(16, 256, 16), Work(1, 512, 1), Work(4, 256, 1)]


def run(llm: LLM, work: Work) -> float:
    """Return the seconds that a piece of work takes."""
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(100, 40_000) for _ in range(work.num_prompt_tokens)]}
        for _ in range(work.batch)
    ]
    started = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=work.num_tokens, ignore_eos=True))
    return time.perf_counter() - started


def measure(num_rounds: int) -> list[Figure]:
    """Run every piece of work with and without in turn, round by round, on this process's kernels."""
    options = {"max_num_seqs": 16, "max_model_len": 1024, "prefix_cache": False, "show_progress": False}
    with LLM(deterministic=True, **options) as held, LLM(deterministic=False, **options) as free:
        figures = []
        for work in WORK:
            rounds: list[tuple[float, float]] = []
            for number in range(num_rounds + 1):  # who goes first changes from round to round
                if number % 2:
                    without, with_ = run(free, work), run(held, work)
                else:
                    with_, without = run(held, work), run(free, work)
                rounds.append((with_, without))
            rounds = rounds[1:]  # the first one warms up
            figures.append(
                Figure(
                    kernels=held.info.kernel_backend,
                    work=str(work),
                    seconds=statistics.median(r[0] for r in rounds),
                    seconds_without=statistics.median(r[1] for r in rounds),
                    cost=statistics.median(r[0] / r[1] for r in rounds),
                )
            )
        return figures


def measured_apart(kernels: str, num_rounds: int) -> list[Figure]:
    """Measure one kind of kernels in a process of its own: which they are is settled when they are loaded."""
    command = [sys.executable, __file__, "--measure", "--rounds", str(num_rounds)]
    done = subprocess.run(command, env=os.environ | KERNELS[kernels], stdout=subprocess.PIPE, check=True, text=True)
    return [Figure(**figure) for figure in json.loads(done.stdout)]


def plot(figures: list[Figure], path: Path) -> None:
    """Draw the ratios as bars."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 0.3 * len(figures) + 1.2))
    colours = ["tab:orange" if "torch" in figure.kernels else "tab:blue" for figure in figures]
    bars = axes.barh([f"{f.kernels}: {f.work}" for f in figures], [f.cost for f in figures], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.axvline(1.0, color="tab:gray", linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time with deterministic=True, as a multiple of the time without")
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--measure", action="store_true", help="measure this process's kernels and print JSON")
    parser.add_argument("--out", type=Path, help="where to put JSON and a plot, without a suffix")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps([asdict(figure) for figure in measure(args.rounds)]))
        return
    figures = [figure for kernels in args.kernels for figure in measured_apart(kernels, args.rounds)]
    print("batch x (prompt + output tokens)", *figures, sep="\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"rounds": args.rounds, "figures": [asdict(figure) for figure in figures]}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        plot(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
