"""Decode attention of sequences that hold the same blocks, beside the same keys and values in blocks of their own.

    python benchmarks/shared_prefix_attention.py --out benchmarks/results/shared_prefix_attention

Groups of siblings (samples of one prompt, beams, requests with one cached prefix) have `shared` tokens in blocks that
all siblings hold, down to the last whole block, and `own` tokens behind them; 9 and 3 heads of 64, blocks of 16,
scattered. Both ways go through as many layers' caches as make the memory that is read with sharing some 100 MB,
recorded and run by one call, and give equal bits. `times` is how much faster sharing is; `bytes` is how many times less
memory it has to read at all, the bound where memory is what limits.
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

from octavo_kernels import Recording, cpu_isa, host_empty, paged_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
GROUPS = ((16, 3), (4, 8))  # groups and siblings in each
SHARED = (64, 300, 1000, 4000)
OWN = (1, 150)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
READ_BYTES = 100_000_000  # by all layers together, with sharing


@dataclass(frozen=True)
class Figure:
    """Milliseconds of one layer with blocks in common and with copies of them."""

    dtype: str
    num_groups: int
    num_siblings: int
    shared: int
    own: int
    shared_ms: float
    copies_ms: float
    bytes_ratio: float

    @property
    def times(self) -> float:
        return self.copies_ms / self.shared_ms

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.num_groups} x {self.num_siblings}, {self.shared} + {self.own} tokens"

    def __str__(self) -> str:
        figures = f"{self.shared_ms:8.4f} ms, copies {self.copies_ms:8.4f} ms"
        return f"{self.name:40} {figures}  times {self.times:5.2f}  (bytes {self.bytes_ratio:5.2f})"


@dataclass(frozen=True)
class Tables:
    """Block tables [num_seqs, num_blocks] with blocks in common and without; `original` names what a copy holds."""

    shared: Tensor
    copies: Tensor
    original: Tensor  # [blocks of all], by block of `copies` the block of `shared`
    num_blocks: int  # of `shared`


def make_tables(num_groups: int, num_siblings: int, shared: int, own: int) -> Tables:
    """Scatter the blocks of both over memory."""
    num_seqs = num_groups * num_siblings
    common, total = shared // BLOCK_SIZE, -(-(shared + own) // BLOCK_SIZE)
    num_blocks = num_groups * common + num_seqs * (total - common)
    order = torch.randperm(num_blocks, dtype=torch.int32)
    prefix = order[: num_groups * common].view(num_groups, 1, common).expand(-1, num_siblings, -1)
    rest = order[num_groups * common :].view(num_groups, num_siblings, -1)
    table = torch.cat([prefix, rest], -1).reshape(num_seqs, total).contiguous()
    copies = torch.randperm(num_seqs * total, dtype=torch.int32).view(num_seqs, total)
    original = torch.empty(num_seqs * total, dtype=torch.int64)
    original[copies.long()] = table.long()
    return Tables(table, copies, original, num_blocks)


def random_cache(num_blocks: int, dtype: torch.dtype) -> Tensor:
    cache = host_empty((num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype)
    return cache.copy_(torch.randn(64, *cache.shape[1:])[torch.arange(num_blocks) % 64])


def measure(dtype_name: str, num_groups: int, num_siblings: int, shared: int, own: int, num_rounds: int) -> Figure:
    """Time both in turn, round after round; the figures are medians."""
    dtype = DTYPES[dtype_name]
    tables = make_tables(num_groups, num_siblings, shared, own)
    num_seqs, num_copies = len(tables.copies), tables.copies.numel()
    block_bytes = 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize
    num_layers = max(1, round(READ_BYTES / (tables.num_blocks * block_bytes)))
    shared_caches = [random_cache(tables.num_blocks, dtype) for _ in range(num_layers)]
    copied_caches = []
    for cache in shared_caches:
        copied_caches.append(host_empty((num_copies, *cache.shape[1:]), dtype))
        torch.index_select(cache, 0, tables.original, out=copied_caches[-1])
    q = torch.randn(num_seqs, NUM_HEADS, HEAD_DIM)
    query_start_loc = torch.arange(num_seqs + 1, dtype=torch.int32)
    seq_lens = torch.full((num_seqs,), shared + own, dtype=torch.int32)

    def recorded(caches: list[Tensor], table: Tensor) -> tuple[Call, Tensor]:
        with Recording(num_seqs) as recording:
            for cache in caches:
                out = paged_attention(
                    q, cache[:, 0], cache[:, 1], query_start_loc, seq_lens, table,
                    max_query_len=1, scale=HEAD_DIM**-0.5,
                )  # fmt: skip
        return lambda: recording.program.run(num_seqs, num_seqs), out

    calls = {"shared": recorded(shared_caches, tables.shared), "copies": recorded(copied_caches, tables.copies)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call, _ in calls.values():
        call()
    if not torch.equal(calls["shared"][1], calls["copies"][1]):
        raise RuntimeError("shared blocks and copies of them give different bits")
    for _ in range(num_rounds):
        for name, (call, _) in calls.items():
            times[name].append(seconds(call))
    shared_ms, copies_ms = (1000 * statistics.median(times[name]) / num_layers for name in ("shared", "copies"))
    ratio = num_copies / tables.num_blocks
    return Figure(dtype_name, num_groups, num_siblings, shared, own, shared_ms, copies_ms, ratio)


def plot(figures: list[Figure], path: Path) -> None:
    """Draw how much faster sharing is, and how much less memory it reads."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.22 * len(figures) + 1), layout="constrained")
    places = range(len(figures))
    axes.barh(places, [f.times for f in figures])
    axes.plot([f.bytes_ratio for f in figures], places, "|", color="tab:red", markersize=8)
    axes.axvline(1.0, color="tab:gray", linewidth=1)
    axes.set_yticks(places, [f.name for f in figures], fontsize=8)
    axes.set_xlabel("times faster with shared blocks than with copies; red: times less memory read")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shared", type=int, nargs="+", default=list(SHARED))
    parser.add_argument("--own", type=int, nargs="+", default=list(OWN))
    parser.add_argument("--groups", nargs="+", default=[f"{g}x{n}" for g, n in GROUPS], help="groups x siblings")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if cpu_isa() == "none":
        parser.error("there is no native library to measure")
    torch.manual_seed(0)
    figures: list[Figure] = []
    with torch.inference_mode():
        for dtype in arguments.dtypes:
            for groups in arguments.groups:
                num_groups, num_siblings = map(int, groups.split("x"))
                for shared in arguments.shared:
                    for own in arguments.own:
                        figures.append(measure(dtype, num_groups, num_siblings, shared, own, arguments.rounds))
                        print(figures[-1], flush=True)
    if arguments.out:
        document = {"torch": torch.__version__, "isa": cpu_isa(), "num_threads": torch.get_num_threads()}
        document["figures"] = [asdict(f) | {"times": f.times} for f in figures]
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(figures, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
