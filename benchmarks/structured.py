"""Structured output: tokens per second with a grammar beside without, at batch 16, in turn in one process.

    python benchmarks/structured.py --out benchmarks/results/structured

All requests draw at temperature 1. With a grammar each writes JSON that does not end before its last token: a list of
objects whose texts are the model's own, or one long text. `step by step` draws every token; `jump ahead` takes tokens
that the grammar forces without a draw, as the engine does by default. The contenders of a round run in random order.
Ratios count; absolute figures move from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from octavo_engine import LLM, SamplingParams, StructuredOutputsParams

TARGET = 0.97
PROMPT = "Here is a list of people, their towns and what they like, as JSON: "
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "town": {"type": "string", "maxLength": 40},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
    },
    "required": ["name", "age", "town", "likes"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "objects": {"type": "array", "items": PERSON, "minItems": 1000},
    "one text": {"type": "string", "minLength": 10_000},
}
FREE, STEPS, JUMPS = "no grammar", "step by step", "jump ahead"


@dataclass(frozen=True)
class Figure:
    """One contender's tokens per second, the median over rounds, and its ratio to the run without a grammar."""

    name: str
    tokens_per_second: float
    ratio: float
    num_steps: int

    def __str__(self) -> str:
        line = f"{self.name:24} {self.tokens_per_second:8.1f} tokens/s {self.ratio:7.3f}  {self.num_steps} steps"
        if self.name == FREE:
            return line
        return f"{line}  (target {TARGET:g}, {'met' if self.ratio >= TARGET else 'NOT met'})"


def contenders(num_tokens: int) -> dict[str, tuple[SamplingParams, bool]]:
    """Return what each contender asks for, and whether it jumps ahead."""
    free = SamplingParams(temperature=1.0, max_tokens=num_tokens)
    found = {FREE: (replace(free, ignore_eos=True), False)}
    for name, schema in GRAMMARS.items():
        held = replace(free, structured_outputs=StructuredOutputsParams(json=schema))
        found[f"{name}, {STEPS}"] = (held, False)
        found[f"{name}, {JUMPS}"] = (held, True)
    return found


def run(llm: LLM, sampling: SamplingParams, *, batch: int, seed: int, jumps: bool) -> tuple[float, int]:
    """Return tokens per second and steps of one batch."""
    llm._engine._executor._runner._jumps_ahead = jumps  # type: ignore[attr-defined]
    each = [replace(sampling, seed=seed + index) for index in range(batch)]
    before, started = llm.stats().num_steps, time.perf_counter()
    outputs = llm.generate([PROMPT] * batch, each)
    seconds = time.perf_counter() - started
    assert all(len(output.outputs[0].token_ids) == sampling.max_tokens for output in outputs)
    return batch * (sampling.max_tokens or 0) / seconds, llm.stats().num_steps - before


def measure(llm: LLM, *, batch: int, num_tokens: int, num_rounds: int) -> list[Figure]:
    """Run all contenders in turn, round by round; the ratio is the median of the rounds' own."""
    asked = contenders(num_tokens)
    for sampling, jumps in asked.values():  # warm: grammars compiled, memory touched
        run(llm, replace(sampling, max_tokens=4), batch=batch, seed=0, jumps=jumps)
    rounds = []
    for seed in range(num_rounds):
        in_turn = random.Random(seed).sample(list(asked.items()), len(asked))
        rounds.append({name: run(llm, own, batch=batch, seed=seed, jumps=jumps) for name, (own, jumps) in in_turn})
    return [
        Figure(
            name=name,
            tokens_per_second=statistics.median(r[name][0] for r in rounds),
            ratio=statistics.median(r[name][0] / r[FREE][0] for r in rounds),
            num_steps=rounds[0][name][1],
        )
        for name in asked
    ]


def plot(figures: list[Figure], path: Path) -> None:
    """Draw the ratios as bars."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 3))
    axes.barh([f.name for f in figures][::-1], [f.ratio for f in figures][::-1], color="tab:blue")
    axes.axvline(TARGET, color="tab:red", linestyle=":", label=f"target {TARGET:g}")
    axes.set_xlabel("tokens per second, as a share of those without a grammar")
    axes.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a GGUF file or a folder; the demo model if left out")
    parser.add_argument("--mode", default="exact", choices=("exact", "fast"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--out", type=Path, help="where to put JSON and a plot, without a suffix")
    args = parser.parse_args()
    with LLM(args.model, mode=args.mode, max_num_seqs=args.batch, max_model_len=1024, show_progress=False) as llm:
        figures = measure(llm, batch=args.batch, num_tokens=args.tokens, num_rounds=args.rounds)
        print(f"batch {args.batch}, {args.tokens} tokens each, mode {args.mode}, {llm.info.kernel_backend}")
        backend = llm.info.kernel_backend
    print(*figures, sep="\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"batch": args.batch, "tokens": args.tokens, "mode": args.mode, "backend": backend}
        content = {**settings, "rounds": args.rounds, "figures": [asdict(figure) for figure in figures]}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        plot(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
