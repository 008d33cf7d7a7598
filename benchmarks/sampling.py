"""Sampling from logits: milliseconds per row of the native code and of batched torch, in turn in one process.

    python benchmarks/sampling.py --out benchmarks/results/sampling

Rows have 49152 logits, normally distributed with a spread of 4, so that the likeliest token of a row has a probability
of about 0.1, with temperature 1. Torch is what serves without a native library. Times on one thread, unless --threads
says otherwise; ratios count, absolute figures move from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timing import Call, seconds
from torch import Tensor

import octavo_kernels as ok
from octavo_kernels._draw import DrawOptions
from octavo_kernels.cpu.fallback.sampling import sample_tokens as sample_in_torch

VOCAB_SIZE = 49152
NUM_ROWS = (1, 32, 128)
SETTINGS: dict[str, dict[str, float]] = {
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.1": {"min_p": 0.1},
    "greedy": {"temperature": 0.0},
}
TARGET_MS = 0.1  # per row and thread, for a plain temperature


@dataclass(frozen=True)
class Figure:
    """What a row of one setting took, in milliseconds, beside a number of others."""

    setting: str
    num_rows: int
    native_ms: float
    torch_ms: float

    def __str__(self) -> str:
        parts = f"{self.setting:12} {self.num_rows:4} rows  {self.native_ms:8.4f} ms per row"
        ratio = f"{self.torch_ms / self.native_ms:6.1f} x torch's {self.torch_ms:.3f}"
        if self.setting != "temperature":
            return f"{parts}  {ratio}"
        return f"{parts}  {ratio}  (target {TARGET_MS:g}, {'met' if self.native_ms <= TARGET_MS else 'NOT met'})"


def measure(setting: str, logits: Tensor, num_rounds: int) -> Figure:
    """Time both on the same rows, round after round; the figures are medians."""
    num_rows = len(logits)
    index = torch.arange(num_rows)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **SETTINGS[setting]}
    arguments = {name: torch.full((num_rows,), value) for name, value in values.items()}
    arguments |= {"seeds": index, "sequence_index": index % 3, "positions": index + 100}
    options = DrawOptions(**arguments, source_rows=None)
    token_ids, best = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
    calls: dict[str, Call] = {
        "native": lambda: ok.sample_tokens(logits, **arguments),
        "torch": lambda: sample_in_torch(logits, options, token_ids, best),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(num_rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    native, in_torch = (1000 * statistics.median(times[name]) / num_rows for name in ("native", "torch"))
    return Figure(setting, num_rows, native, in_torch)


def plot(figures: list[Figure], path: Path) -> None:
    """Draw both times of every setting and number of rows, on a logarithmic scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(figures) + 1), layout="constrained")
    places = range(len(figures))
    axes.barh([place - 0.2 for place in places], [f.native_ms for f in figures], 0.4, label="native")
    axes.barh([place + 0.2 for place in places], [f.torch_ms for f in figures], 0.4, label="torch")
    axes.axvline(TARGET_MS, color="tab:red", label="target of a plain temperature")
    axes.set_yticks(places, [f"{f.setting}, {f.num_rows} rows" for f in figures], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms per row of {VOCAB_SIZE} logits")
    axes.legend()
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if ok.cpu_isa() == "none":
        parser.error("there is no native library to measure")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    all_logits = 4 * torch.randn(max(arguments.rows), VOCAB_SIZE)
    figures: list[Figure] = []
    with torch.inference_mode():
        for setting in SETTINGS:
            for num_rows in arguments.rows:
                figures.append(measure(setting, all_logits[:num_rows], arguments.rounds))
                print(figures[-1], flush=True)
    if arguments.out:
        document = {"torch": torch.__version__, "isa": ok.cpu_isa(), "num_threads": arguments.threads}
        document["figures"] = [asdict(f) for f in figures]
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(figures, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
