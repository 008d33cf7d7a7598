"""Products by Hugging Face's quantised formats at one row, beside float32's: time, GB/s and memory.

    python benchmarks/grouped_products.py --out benchmarks/results/grouped_products

One row goes through the weights of 30 layers of SmolLM2-135M's shapes in the model's order, with 768 inputs in place
of 576, which groups of 128 divide. Each pass is recorded and run by one call, as the engine runs a model; formats take
turns in one process, and the figure is the median of the rounds. `memory` is what a weight takes, beside what a file
does: codes, scales and zeros in their own bits, and the order of inputs in 32. Ratios count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from cpu_kernels import LAYER, NUM_LAYERS, alternate, fastest_read, random_weight, read_rates, recorded
from timing import Call

from octavo_kernels import (
    Finish,
    GroupedCodes,
    GroupedWeight,
    NestedScales,
    PackedWeight,
    WeightFormat,
    grouped_linear,
    host_empty,
    pack_grouped,
    packed_linear,
)

SHAPES = tuple((rows, 768 if columns == 576 else columns) for rows, columns in LAYER)
TARGET_SPEED, TARGET_MEMORY = 2.0, 1.05
Weight = GroupedWeight | PackedWeight


@dataclass(frozen=True)
class Format:
    """A format: its codes, scales and zeros, and the bits that a file has of each.

    bits: of a code; floats are E4M3. group_size: 0 for one scale per output. scale_bits: of a scale in the file.
    """

    bits: int
    group_size: int
    scales: torch.dtype | type[NestedScales]
    zeros: bool = False
    order: bool = False
    floats: bool = False
    factor: bool = False

    def make(self, out_features: int, in_features: int) -> tuple[GroupedWeight, float]:
        """Return a random weight, and the bytes of it in a file."""
        group = self.group_size or in_features
        num_groups = in_features // group
        if self.bits < 8:
            codes = torch.randint(0, 1 << self.bits, (out_features, in_features), dtype=torch.uint8)
        elif self.floats:
            codes = torch.randn(out_features, in_features).to(torch.float8_e4m3fn)
        else:
            codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
        num_scales = out_features * num_groups
        weight = GroupedCodes(
            codes,
            _scales(self.scales, out_features, num_groups),
            group,
            self.bits,
            torch.randn(1 << self.bits) if self.bits < 8 else None,
            torch.randint(0, 1 << self.bits, (out_features, num_groups)) if self.zeros else None,
            order=torch.randperm(in_features) if self.order else None,
            finish=Finish.OVER if self.factor else Finish.NONE,
            factor=3.0,
        )
        bits = self.bits * codes.numel() + num_scales * (8 * _bytes_of(self.scales) + self.bits * self.zeros)
        return pack_grouped(weight), bits / 8 + 4 * in_features * self.order


def _scales(kind: torch.dtype | type[NestedScales], out_features: int, num_groups: int) -> torch.Tensor | NestedScales:
    codes = torch.randint(100, 120, (out_features, num_groups), dtype=torch.uint8)
    if isinstance(kind, torch.dtype):
        return codes if kind == torch.uint8 else (torch.rand(out_features, num_groups) / 64).to(kind)
    return NestedScales(codes, torch.rand(256), torch.rand(codes.numel() // 256 + 1), 256, 0.01)


def _bytes_of(kind: torch.dtype | type[NestedScales]) -> float:
    return kind.itemsize if isinstance(kind, torch.dtype) else 1 + 4 / 256


FORMATS = {
    "gptq 4 bits, g128": Format(4, 128, torch.float16),
    "gptq 4 bits, g128, zeros": Format(4, 128, torch.float16, zeros=True),
    "gptq 4 bits, g64, zeros": Format(4, 64, torch.float16, zeros=True),
    "gptq 4 bits, g32, zeros": Format(4, 32, torch.float16, zeros=True),
    "gptq 4 bits, g128, desc_act": Format(4, 128, torch.float16, zeros=True, order=True),
    "w4a16 bf16 scales, g128": Format(4, 128, torch.bfloat16),
    "w4a16 channel": Format(4, 0, torch.bfloat16),
    "nf4": Format(4, 64, torch.float32),
    "nf4, double quantisation": Format(4, 64, NestedScales),
    "mxfp4": Format(4, 32, torch.uint8),
    "nvfp4": Format(4, 16, torch.float8_e4m3fn, factor=True),
    "gptq 3 bits, g128, zeros": Format(3, 128, torch.float16, zeros=True),
    "gptq 2 bits, g64, zeros": Format(2, 64, torch.float16, zeros=True),
    "int8 by row": Format(8, 0, torch.float32),
    "gptq 8 bits, g128, zeros": Format(8, 128, torch.float16, zeros=True),
    "fp8 by tensor or channel": Format(8, 0, torch.float32, floats=True),
    "fp8 by blocks of 128": Format(8, 128, torch.float32, floats=True),
}


@dataclass(frozen=True)
class Figure:
    """What a format reached at one row; `memory` is beside a file's bytes, None where no file is meant."""

    format: str
    bits: int
    milliseconds: float
    gigabytes_per_second: float
    percent_of_read: float
    times_float32: float
    memory: float | None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f"  memory {self.memory:.3f} of the file"
        verdict = ""
        if self.bits <= 4 and self.memory is not None:
            met = self.times_float32 >= TARGET_SPEED and self.memory <= TARGET_MEMORY
            verdict = f"  (targets {TARGET_SPEED:g} and {TARGET_MEMORY:g}, {'met' if met else 'NOT met'})"
        return (
            f"{self.format:28} {self.milliseconds:7.2f} ms  {self.gigabytes_per_second:5.1f} GB/s"
            f"  {self.percent_of_read:5.1f} % of R  {self.times_float32:5.2f} x float32{memory}{verdict}"
        )


def one_row(weights: list[Weight]) -> Call:
    """Return a call that multiplies one row by all weights in their order."""
    inputs = {size: torch.randn(1, size) for size in {weight.in_features for weight in weights}}
    outs = {size: torch.empty(1, size) for size in {weight.out_features for weight in weights}}

    def run() -> None:
        for weight in weights:
            x, out = inputs[weight.in_features], outs[weight.out_features]
            if isinstance(weight, GroupedWeight):
                grouped_linear(x, weight, out=out)
            else:
                packed_linear(x, weight, out=out)

    return recorded(run, 1)


def in_layers(layer: Sequence[Weight]) -> list[Weight]:
    """Return a layer's weights for each layer, in memory of their own."""
    copies: list[Weight] = []
    for _ in range(NUM_LAYERS):
        for weight in layer:
            data = host_empty(weight.data.shape, torch.uint8)
            copies.append(replace(weight, data=data.copy_(weight.data)))
    return copies


def measure(names: list[str], num_rounds: int) -> list[Figure]:
    """Time all formats in turn."""
    weights: dict[str, list[Weight]] = {}
    memory: dict[str, float] = {}
    for name in names:
        made = [FORMATS[name].make(*shape) for shape in SHAPES]
        weights[name] = in_layers([weight for weight, _ in made])
        memory[name] = sum(weight.num_bytes for weight, _ in made) / sum(in_file for _, in_file in made)
    for item in (WeightFormat.F32, WeightFormat.Q4_0):
        weights[item.value] = in_layers([random_weight(item, *shape) for shape in SHAPES])
    sizes = {name: sum(weight.num_bytes for weight in many) for name, many in weights.items()}
    rates: dict[str, Callable[[], float]] = {}
    for name in ("q4_0", "f32"):
        rates |= read_rates(f"read {name}", sizes[name])
    times = alternate({name: one_row(many) for name, many in weights.items()}, rates, num_rounds)
    return [
        Figure(
            format=name,
            bits=FORMATS[name].bits if name in FORMATS else 0,
            milliseconds=1000 * times[name],
            gigabytes_per_second=sizes[name] / times[name] / 1e9,
            percent_of_read=100
            * sizes[name]
            / times[name]
            / fastest_read("read f32" if name == "f32" else "read q4_0", times),
            times_float32=times["f32"] / times[name],
            memory=memory.get(name),
        )
        for name in weights
    ]


def plot(figures: list[Figure], path: Path) -> None:
    """Draw how many times as fast as float32 each format is."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.26 * len(figures) + 1), layout="constrained")
    axes.barh(range(len(figures)), [item.times_float32 for item in figures], color="tab:blue")
    axes.axvline(TARGET_SPEED, color="tab:red", linewidth=1)
    axes.set_yticks(range(len(figures)), [item.format for item in figures], fontsize=8)
    axes.set_xlabel("times as fast as float32 at one row; red: the target for 4 bits")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    with torch.inference_mode():
        figures = measure(arguments.formats, arguments.rounds)
    for item in figures:
        print(item)
    if arguments.out:
        document = {"torch": torch.__version__, "num_threads": torch.get_num_threads()}
        document["figures"] = [asdict(item) for item in figures]
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(figures, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
