"""A model's head with its products screened, beside all of them in full: the arg-max, and draws at temperature 1.

    python benchmarks/screened_head.py --out benchmarks/results/screened_head

Hidden states are the demo model's own, of prompts cut out of English text at their ends, and go through the head as
mode `exact` does, op by op, on all threads. Both ways alternate and give equal bits, which is checked. `times` is how
much faster screening is; fewer than three rows are not screened, since they wait for the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timing import Call, seconds
from torch import Tensor
from workload import english_ids

from octavo_engine import EngineConfig, SamplingParams
from octavo_engine.build import build_engine
from octavo_engine.layers.embedding import LMHead
from octavo_kernels import PackedWeight, cpu_isa, packed_argmax, packed_linear, packed_sample, sample_tokens

NUM_ROWS = (1, 4, 16, 64, 144)
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Figure:
    """Milliseconds of one call for some rows."""

    op: str
    num_rows: int
    full_ms: float
    screened_ms: float

    @property
    def times(self) -> float:
        return self.full_ms / self.screened_ms

    def __str__(self) -> str:
        return (
            f"{self.op:9} {self.num_rows:4} rows  {self.full_ms:7.2f} ms in full, {self.screened_ms:6.2f} screened:"
            f" {self.times:.2f} times"
        )


def head_and_hidden(num_rows: int) -> tuple[PackedWeight, Tensor, Tensor]:
    """Return the head's weight, the norms of its outputs and the last hidden states of `num_rows` prompts."""
    rng = random.Random(7)
    ids = english_ids()
    built = build_engine(EngineConfig(mode="exact", max_num_seqs=num_rows, prefix_cache=False))
    seen: list[tuple[LMHead, Tensor]] = []

    def watch(head: LMHead, hidden: Tensor, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((head, hidden.clone()))
        return draw(head, hidden, out, **options)

    draw = LMHead.draw
    with patch.object(LMHead, "draw", watch):
        for index in range(num_rows):
            start = rng.randrange(len(ids) - PROMPT_TOKENS)
            sampling = SamplingParams(temperature=1.0, max_tokens=1, seed=index)
            request = built.text.make_request(ids[start : start + PROMPT_TOKENS], sampling, request_id=str(index))
            built.engine.add(request)
        while built.engine.has_work:
            built.engine.step()
    parameters = seen[0][0].parameters
    (part,) = parameters.parts
    return part.weight, parameters.norms, torch.cat([hidden for _, hidden in seen])


def measure(calls: dict[str, Call], op: str, num_rows: int, num_rounds: int) -> Figure:
    """Time both ways in turn; the figures are medians."""
    results = [call() for call in calls.values()]
    for one, other in zip(*results, strict=True):  # type: ignore[call-overload]
        assert torch.equal(one, other), f"{op}: screening has changed a result"
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    full, screened = (1000 * statistics.median(times[name]) for name in ("full", "screened"))
    return Figure(op, num_rows, full, screened)


def figures_of(weight: PackedWeight, norms: Tensor, hidden: Tensor, num_rounds: int) -> list[Figure]:
    """Measure both ops on some rows."""
    num_rows = len(hidden)
    logits = torch.empty(num_rows, weight.out_features)
    index = torch.arange(num_rows)
    options = {"temperature": torch.ones(num_rows), "seeds": index, "sequence_index": index % 3, "positions": index}
    argmax: dict[str, Call] = {
        "full": lambda: packed_argmax(hidden, weight),
        "screened": lambda: packed_argmax(hidden, weight, norms=norms),
    }
    draws: dict[str, Call] = {
        "full": lambda: sample_tokens(packed_linear(hidden, weight, out=logits), **options),
        "screened": lambda: packed_sample(hidden, weight, norms=norms, logits=logits, **options),
    }
    return [measure(argmax, "arg-max", num_rows, num_rounds), measure(draws, "draws", num_rows, num_rounds)]


def plot(figures: list[Figure], path: Path) -> None:
    """Draw the milliseconds per row of both ways."""
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axes, op in zip(all_axes, ("arg-max", "draws"), strict=True):
        of_op = [f for f in figures if f.op == op]
        rows = [f.num_rows for f in of_op]
        axes.plot(rows, [f.full_ms / f.num_rows for f in of_op], marker="o", label="in full")
        axes.plot(rows, [f.screened_ms / f.num_rows for f in of_op], marker="o", label="screened")
        axes.set(title=op, xlabel="rows", ylabel="ms per row", xscale="log", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if cpu_isa() == "none":
        parser.error("there is no native library to measure")
    weight, norms, hidden = head_and_hidden(max(arguments.rows))
    figures: list[Figure] = []
    with torch.inference_mode():
        for num_rows in arguments.rows:
            for figure in figures_of(weight, norms, hidden[:num_rows], arguments.rounds):
                figures.append(figure)
                print(figure, flush=True)
    if arguments.out:
        document = {"torch": torch.__version__, "isa": cpu_isa(), "num_threads": torch.get_num_threads()}
        document |= {"weight": weight.format.value, "shape": [weight.out_features, weight.in_features]}
        document["figures"] = [asdict(f) | {"times": f.times} for f in figures]
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(figures, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
