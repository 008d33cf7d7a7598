"""CPU kernels beside torch's and beside the bounds of the machine, all measured in turn in one process.

    python benchmarks/cpu_kernels.py --out benchmarks/results/cpu_kernels
    python benchmarks/cpu_kernels.py --only attention --contexts 512
    python benchmarks/cpu_kernels.py --only products --rows 1 --formats q4_1 q4_k q6_k

Bounds: R, the bandwidth of reading a buffer as large as what the kernel reads (the faster of torch's sum and the native
read loop); G, the rate of torch's fp32 product of 2048-cubed matrices; V, the native peak of int8 dot products. Decode
attention (32 sequences, 9 and 3 heads of 64, blocks of 16, scattered) goes through as many layers' caches as fill some
250 MB. Products go through all weights of SmolLM2-135M in the model's order, the head included, so that a weight has
left the caches when its turn comes again. Where native code serves, a pass over the layers is recorded and run by one
call, as the engine runs a model; `torch` is torch's linear on fp32 weights of the same shapes, attention on
keys and values side by side. With a format whose blocks of 256 do not divide the model's 576 inputs, every format is
measured on 768 in their place; GB/s of one row beside those of q4_1 are the speed per byte read. Percentages and
ratios count; absolute figures move from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Call, seconds
from torch import Tensor

from octavo_kernels import (
    PackedWeight,
    Recording,
    WeightFormat,
    cpu_isa,
    host_empty,
    pack_weight,
    packed_linear,
    paged_attention,
)
from octavo_kernels.packed_weight import plane_panels

try:
    from octavo_kernels.cpu import probe
except ImportError:  # these kernels cannot measure the machine: R is torch's alone, and V is not known
    probe = None  # type: ignore[assignment]

NUM_LAYERS = 30
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # qkv, attention out, gate and up, down: [out, in]
HEAD = (49152, 576)
SHAPES = LAYER * NUM_LAYERS + (HEAD,)
WIDTH, WIDTH_OF_WHOLE_BLOCKS = 576, 768
NUM_SEQS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 9, 3, 64, 16
CACHE_BYTES = 250_000_000  # of all layers' caches together
CONTEXTS = (256, 512, 1024, 2048)
NUM_ROWS = (1, 8, 16, 32, 64)
BLOCK_FORMATS = (WeightFormat.Q4_1, WeightFormat.Q4_0, WeightFormat.Q8_0)

Rate = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """What one kernel reached: `rate` in GB/s (bound R) or GFLOP/s, and its share of a bound that is known."""

    kernel: str
    size: str
    rate: float
    bound: str
    percent: float | None
    target_percent: float | None
    times_torch: float

    def __str__(self) -> str:
        parts = [f"{self.kernel:22} {self.size:12} {self.rate:8.1f} {'GB/s   ' if self.bound == 'R' else 'GFLOP/s'}"]
        parts.append("bound not known" if self.percent is None else f"{self.percent:5.1f} % of {self.bound}")
        if self.percent is not None and self.target_percent is not None:
            verdict = "met" if self.percent >= self.target_percent else "NOT met"
            parts.append(f"(target {self.target_percent:g} %, {verdict})")
        parts.append(f"{self.times_torch:.2f} x torch")
        return "  ".join(parts)


_REST = 0.02  # seconds: torch's threads go on spinning after a call, and would take a core from the next one


def alternate(calls: dict[str, Call], rates: dict[str, Rate], num_rounds: int) -> dict[str, float]:
    """Time each call and measure each rate in turn, round after round; return medians, of seconds and of rates."""
    for call in calls.values():
        call()
    measured: dict[str, list[float]] = {name: [] for name in (*calls, *rates)}
    for _ in range(num_rounds):
        for name, call in calls.items():
            time.sleep(_REST)
            call()  # wakes the threads, as the step before does in an engine
            measured[name].append(seconds(call))
        for name, rate in rates.items():
            time.sleep(_REST)
            rate()
            measured[name].append(rate())
    return {name: statistics.median(values) for name, values in measured.items()}


def recorded(call: Call, num_rows: int) -> Call:
    """Return a call that runs the native ops of `call` without Python between them, as the engine does."""
    if cpu_isa() == "none":
        return call
    with Recording(num_rows) as recording:
        call()
    return lambda: recording.program.run(num_rows, num_rows)


def read_rates(name: str, num_bytes: int) -> dict[str, Rate]:
    """Return the ways of measuring how fast `num_bytes` are read, in bytes per second."""
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64)
    rates: dict[str, Rate] = {f"{name} torch": lambda: num_bytes / seconds(buffer.sum)}
    if probe is not None:
        rates[f"{name} native"] = lambda: probe.read_bandwidth(num_bytes)
    return rates


def fastest_read(name: str, measured: dict[str, float]) -> float:
    """Return R in bytes per second, as measured by `read_rates`."""
    return max(measured[f"{name} torch"], measured.get(f"{name} native", 0.0))


def scattered_caches(context: int, num_layers: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Make K and V caches for all layers and a block table whose blocks lie in random order."""
    num_blocks = NUM_SEQS * context // BLOCK_SIZE
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    caches = []
    for _ in range(num_layers):
        layer = host_empty((num_blocks, 2, *shape[1:]), dtype)  # as the engine takes its caches
        layer.copy_(torch.randn(layer.shape))
        caches.append((layer[:, 0], layer[:, 1]))
    return caches, torch.randperm(num_blocks, dtype=torch.int32).view(NUM_SEQS, -1)


def measure_attention(context: int, dtype: torch.dtype, num_rounds: int) -> Figure:
    """Time decode attention over all layers' caches, beside torch's on keys and values that lie side by side."""
    bytes_per_layer = NUM_SEQS * context * 2 * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    num_layers = max(1, round(CACHE_BYTES / bytes_per_layer))
    num_bytes = num_layers * bytes_per_layer
    caches, block_table = scattered_caches(context, num_layers, dtype)
    plain = [torch.randn(2, NUM_SEQS, NUM_KV_HEADS, context, HEAD_DIM).to(dtype) for _ in range(num_layers)]
    q = torch.randn(NUM_SEQS, NUM_HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    query_start_loc = torch.arange(NUM_SEQS + 1, dtype=torch.int32)
    seq_lens = torch.full((NUM_SEQS,), context, dtype=torch.int32)
    scale = HEAD_DIM**-0.5

    def ours() -> None:
        for k_cache, v_cache in caches:
            paged_attention(
                q, k_cache, v_cache, query_start_loc, seq_lens, block_table, max_query_len=1, scale=scale, out=out
            )

    query = q.to(dtype).unsqueeze(2)

    def theirs() -> None:
        for k, v in plain:
            F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=True)

    times = alternate({"ours": recorded(ours, NUM_SEQS), "torch": theirs}, read_rates("read", num_bytes), num_rounds)
    bound = fastest_read("read", times)
    return Figure(
        kernel=f"attention {str(dtype).removeprefix('torch.')}",
        size=f"context {context}",
        rate=num_bytes / times["ours"] / 1e9,
        bound="R",
        percent=100 * num_bytes / times["ours"] / bound,
        target_percent=70,
        times_torch=times["torch"] / times["ours"],
    )


def random_weight(weight_format: WeightFormat, out_features: int, in_features: int) -> PackedWeight:
    """Make a weight of random codes, as a file would store it; scales are small and finite."""
    if weight_format.block_bytes is None:
        assert weight_format.dtype is not None
        stored = torch.randn(out_features, in_features).to(weight_format.dtype)
        return pack_weight(stored, weight_format, in_features=in_features)
    num_blocks = in_features // weight_format.block_inputs
    stored = torch.randint(0, 256, (out_features, num_blocks, weight_format.block_bytes), dtype=torch.uint8)
    if weight_format.parts is not None:
        weight = pack_weight(stored.flatten(1), weight_format, in_features=in_features)
        size = weight_format.parts.words[0]  # of d, or of a scale of 8 bits
        small = {1: torch.tensor([32], dtype=torch.uint8), 2: torch.tensor([1e-4]).half(), 4: torch.tensor([1e-4])}
        plane_panels(weight)[..., : 32 * size] = small[size].view(torch.uint8).repeat(32)
        return weight
    if weight_format.planes is not None:
        weight = pack_weight(stored.flatten(1), weight_format, in_features=in_features)
        units = plane_panels(weight)[..., : sum(weight_format.planes.part_bytes[:2])]
        units.copy_(torch.full((*units.shape[:-1], units.shape[-1] // 2), 1e-4).to(torch.float16).view(torch.uint8))
        return weight
    num_scales = 2 if weight_format is WeightFormat.Q4_1 else 1
    scales = torch.rand(out_features, in_features // 32, num_scales).mul_(0.01).to(torch.float16)
    stored[:, :, : 2 * num_scales] = scales.view(torch.uint8)
    return pack_weight(stored.flatten(1), weight_format, in_features=in_features)


def products(weights: list[PackedWeight], num_rows: int, int8_activations: bool) -> Call:
    """Return a call that goes through all weights in the model's order."""
    inputs = {size: torch.randn(num_rows, size) for size in {weight.in_features for weight in weights}}
    outs = {size: torch.empty(num_rows, size) for size in {weight.out_features for weight in weights}}

    def run() -> None:
        for weight in weights:
            x, out = inputs[weight.in_features], outs[weight.out_features]
            packed_linear(x, weight, int8_activations=int8_activations, out=out)

    return run


def torch_products(weights: list[Tensor], num_rows: int) -> Call:
    """Return the same on torch's linear."""
    inputs = {size: torch.randn(num_rows, size) for size in {weight.shape[1] for weight in weights}}

    def run() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return run


class Products:
    """All weights of the model in every format, made once."""

    def __init__(self, formats: Sequence[WeightFormat]) -> None:
        whole = all(WIDTH % item.block_inputs == 0 for item in formats)
        width = WIDTH if whole else WIDTH_OF_WHOLE_BLOCKS
        shapes = [(rows, width if columns == WIDTH else columns) for rows, columns in SHAPES]
        self._num_weights = sum(rows * columns for rows, columns in shapes)
        self._packed = {
            weight_format: [random_weight(weight_format, *shape) for shape in shapes]
            for weight_format in (*formats, WeightFormat.F32)
        }
        self._plain = [torch.randn(shape) for shape in shapes]
        self._square = torch.randn(2048, 2048)

    def measure(self, num_rows: int, num_rounds: int) -> list[Figure]:
        """Time every format and mode with some rows, torch's products and the bound."""
        calls: dict[str, Call] = {"mkl": torch_products(self._plain, num_rows)}
        calls["gemm"] = lambda: self._square @ self._square
        for weight_format, weights in self._packed.items():
            calls[f"{weight_format.value} exact"] = recorded(products(weights, num_rows, False), num_rows)
            if weight_format is not WeightFormat.F32:
                calls[f"{weight_format.value} fast"] = recorded(products(weights, num_rows, True), num_rows)
        sizes = {f.value: sum(w.data.numel() for w in weights) for f, weights in self._packed.items()}
        rates: dict[str, Rate] = {}
        if num_rows == 1:
            for name, size in sizes.items():
                rates |= read_rates(f"read {name}", size)
        elif probe is not None:
            rates["vnni"] = probe.vnni_peak
        measured = alternate(calls, rates, num_rounds)
        kernels = [kernel for kernel in calls if kernel not in ("mkl", "gemm")]
        if num_rows == 1:
            return [_one_row(kernel, sizes[kernel.split()[0]], measured) for kernel in kernels]
        return [_many_rows(kernel, num_rows, self._num_weights, measured) for kernel in kernels]


def _one_row(kernel: str, num_bytes: int, measured: dict[str, float]) -> Figure:
    name = kernel.split()[0]
    rate = num_bytes / measured[kernel]
    return Figure(
        kernel=kernel,
        size="1 row",
        rate=rate / 1e9,
        bound="R",
        percent=100 * rate / fastest_read(f"read {name}", measured),
        target_percent=None if name == "f32" else 80,
        times_torch=measured["mkl"] / measured[kernel],
    )


def _many_rows(kernel: str, num_rows: int, num_weights: int, measured: dict[str, float]) -> Figure:
    rate = 2 * num_rows * num_weights / measured[kernel]
    exact = kernel.endswith("exact")
    bound = 2 * 2048**3 / measured["gemm"] if exact else measured.get("vnni")
    return Figure(
        kernel=kernel,
        size=f"{num_rows} rows",
        rate=rate / 1e9,
        bound="G" if exact else "V",
        percent=100 * rate / bound if bound else None,
        target_percent=(78 if exact else 60) if num_rows == 64 and not kernel.startswith("f32") else None,
        times_torch=measured["mkl"] / measured[kernel],
    )


def plot(figures: list[Figure], path: Path) -> None:
    """Draw the share of the bound of every kernel and size, targets as marks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.24 * len(figures) + 1), layout="constrained")
    places = range(len(figures))
    colours = {"R": "tab:blue", "G": "tab:green", "V": "tab:purple"}
    axes.barh(places, [f.percent or 0 for f in figures], color=[colours[f.bound] for f in figures])
    for place, f in zip(places, figures, strict=True):
        if f.target_percent is not None:
            axes.plot([f.target_percent] * 2, [place - 0.4, place + 0.4], color="tab:red")
    axes.set_yticks(places, [f"{f.kernel}, {f.size}" for f in figures], fontsize=8)
    axes.set_xlabel("% of read bandwidth (blue), fp32 GEMM rate (green), int8 peak (purple); red: target")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("attention", "products"))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(NUM_ROWS))
    names = [item.value for item in WeightFormat if item.dtype is None]
    default = [item.value for item in BLOCK_FORMATS]
    parser.add_argument("--formats", nargs="+", choices=names, default=default, metavar="FORMAT", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    figures: list[Figure] = []

    def report(figure: Figure) -> None:
        figures.append(figure)
        print(figure, flush=True)

    with torch.inference_mode():
        if arguments.only != "products":
            for dtype in (torch.float32, torch.bfloat16):
                for context in arguments.contexts:
                    report(measure_attention(context, dtype, arguments.rounds))
        if arguments.only != "attention":
            weights = Products([WeightFormat(name) for name in arguments.formats])
            for num_rows in arguments.rows:
                for figure in weights.measure(num_rows, arguments.rounds):
                    report(figure)
    if arguments.out:
        document = {"torch": torch.__version__, "num_threads": torch.get_num_threads()}
        document["figures"] = [asdict(f) for f in figures]
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(figures, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
