"""Structured output: tokens per second with a grammar beside without, at batch 16, in turn in one process.

    python benchmarks/structured.py --out benchmarks/results/structured

All requests draw at temperature 1. With a grammar each writes JSON that does not end before its last token: a list of
objects whose texts are the model's own, or one long text. `step by step` draws every token that is not forced, one a
step; `jump ahead` takes forced tokens without a step of their own, as the engine does by default.

Each contender has an engine of its own, and one step of each runs in turn, in random order: what else the machine does
falls on all alike, which leaves differences of a few percent to be seen. Free text is written twice, and ratios are to
the mean of both; how far these two lie apart says what a ratio is worth. Absolute figures move from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from octavo_engine import LLM, SamplingParams, StructuredOutputsParams
from octavo_engine.prompts import encode_all

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
FREE, AGAIN, STEPS, JUMPS = "no grammar", "no grammar, again", "step by step", "jump ahead"


@dataclass(frozen=True)
class Figure:
    """One contender's tokens per second, the median over rounds, and its ratio to those without a grammar."""

    name: str
    tokens_per_second: float
    ratio: float
    lower_quartile: float
    upper_quartile: float
    num_steps: int

    def __str__(self) -> str:
        line = (
            f"{self.name:24} {self.tokens_per_second:8.1f} tokens/s {self.ratio:7.3f} "
            f"({self.lower_quartile:.3f} to {self.upper_quartile:.3f})  {self.num_steps} steps"
        )
        if self.name in (FREE, AGAIN):
            return line
        return f"{line}  (target {TARGET:g}, {'met' if self.ratio >= TARGET else 'NOT met'})"


class Contender:
    """An engine and what is asked of it; its clock runs while it takes a step."""

    def __init__(self, llm: LLM, sampling: SamplingParams, *, jumps: bool) -> None:
        self.llm, self._engine, self._sampling = llm, llm._engine, sampling
        self._engine._executor._runner._jumps_ahead = jumps  # type: ignore[attr-defined]
        self._running: dict[str, Any] = {}
        self.seconds = 0.0
        self.num_steps = 0

    def start(self, batch: int, num_tokens: int, seed: int) -> None:
        """Submit a round's requests."""
        each = [replace(self._sampling, max_tokens=num_tokens, seed=seed + index) for index in range(batch)]
        requests = self.llm._runs.requests(encode_all(self.llm._text, [PROMPT] * batch), each)
        self._running = {own.request.request_id: own for own in requests}
        for own in requests:
            self._engine.add(own.request)
        self.seconds, self.num_steps = 0.0, 0

    def step(self) -> bool:
        """Take one step and its texts; True if there is more to do."""
        started = time.perf_counter()
        for update in self._engine.step():
            self.llm._runs.take(self._running[update.request_id], update)
        self.seconds += time.perf_counter() - started
        self.num_steps += 1
        return self._engine.has_work

    def check(self, num_tokens: int) -> None:
        """Fail unless every request of the round wrote as many tokens as it was asked for."""
        for own in self._running.values():
            assert own.error is None, own.error
            assert len(own.output().outputs[0].token_ids) == num_tokens


def contenders(make_llm: Callable[[], LLM]) -> dict[str, Contender]:
    """Build all, each with an engine of its own."""
    free = SamplingParams(temperature=1.0)
    endless = replace(free, ignore_eos=True)
    found = {name: Contender(make_llm(), endless, jumps=False) for name in (FREE, AGAIN)}
    for name, schema in GRAMMARS.items():
        held = replace(free, structured_outputs=StructuredOutputsParams(json=schema))
        found[f"{name}, {STEPS}"] = Contender(make_llm(), held, jumps=False)
        found[f"{name}, {JUMPS}"] = Contender(make_llm(), held, jumps=True)
    return found


def run(running: Iterable[Contender], *, batch: int, num_tokens: int, seed: int) -> None:
    """Run one round of all contenders, a step of each in turn."""
    order, working = random.Random(seed), list(running)
    for contender in working:
        contender.start(batch, num_tokens, seed)
    while working:
        order.shuffle(working)
        working = [contender for contender in working if contender.step()]
    for contender in running:
        contender.check(num_tokens)


def measure(found: dict[str, Contender], *, batch: int, num_tokens: int, num_rounds: int) -> list[Figure]:
    """Run rounds; a ratio is the median of the rounds' own."""
    run(found.values(), batch=batch, num_tokens=4, seed=0)  # warm: grammars compiled, memory touched
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(num_rounds):
        run(found.values(), batch=batch, num_tokens=num_tokens, seed=number * batch)
        for name, contender in found.items():
            seconds[name].append(contender.seconds)
    figures = []
    for name, contender in found.items():
        pairs = zip(seconds[FREE], seconds[AGAIN], seconds[name], strict=True)
        ratios = [(free + again) / 2 / own for free, again, own in pairs]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        tokens_per_second = batch * num_tokens / statistics.median(seconds[name])
        figures.append(Figure(name, tokens_per_second, median, lower, upper, contender.num_steps))
    return figures


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
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where to put JSON and a plot, without a suffix")
    args = parser.parse_args()

    def make_llm() -> LLM:
        options = {"mode": args.mode, "max_num_seqs": args.batch, "max_model_len": 1024}
        return stack.enter_context(LLM(args.model, show_progress=False, **options))

    with ExitStack() as stack:
        found = contenders(make_llm)
        figures = measure(found, batch=args.batch, num_tokens=args.tokens, num_rounds=args.rounds)
        backend = found[FREE].llm.info.kernel_backend
    print(f"batch {args.batch}, {args.tokens} tokens each, mode {args.mode}, {backend}")
    print(*figures, sep="\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"batch": args.batch, "tokens": args.tokens, "mode": args.mode, "backend": backend}
        content = {**settings, "rounds": args.rounds, "figures": [asdict(figure) for figure in figures]}
        args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        plot(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
