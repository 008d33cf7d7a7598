"""Float32 products on a CPU: torch's plain linear beside the same weight packed for oneDNN.

    python benchmarks/packed_products.py --out benchmarks/results/packed_products

The shapes are those of SmolLM2-135M: fused query, key and value; gate and up; down; output head. Both forms are timed
in turn in one process; the figure is the median of the rounds, and ratios count. The gain depends on the processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octavo_engine.quant.onednn import can_pack, linear, pack

SHAPES = {"qkv": (576, 960), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
NUM_ROWS = (1, 8, 32, 64, 512)


def seconds(call: Callable[[], Any]) -> float:
    """Time enough calls to fill some milliseconds; return the seconds of one."""
    started = time.perf_counter()
    num_calls = 0
    while num_calls < 3 or time.perf_counter() - started < 0.02:
        call()
        num_calls += 1
    return (time.perf_counter() - started) / num_calls


def measure(name: str, num_rows: int, num_rounds: int) -> dict[str, Any]:
    """Time one shape in both forms, alternating."""
    in_features, out_features = SHAPES[name]
    weight, x = torch.randn(out_features, in_features), torch.randn(num_rows, in_features)
    if not can_pack(weight):
        raise SystemExit("this torch cannot pack weights; there is nothing to compare")
    packed = pack(weight)
    torch.testing.assert_close(linear(x, packed), linear(x, weight), rtol=1e-4, atol=1e-3)
    rounds = [(seconds(lambda: linear(x, weight)), seconds(lambda: linear(x, packed))) for _ in range(num_rounds)]
    plain, faster = (statistics.median(column) for column in zip(*rounds, strict=True))
    gflop = 2 * num_rows * in_features * out_features / 1e9
    return {
        "shape": name,
        "num_rows": num_rows,
        "plain_gflop_per_s": round(gflop / plain, 1),
        "packed_gflop_per_s": round(gflop / faster, 1),
        "ratio": round(plain / faster, 2),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratio over the number of rows, a line per shape."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name in SHAPES:
        own = [row for row in rows if row["shape"] == name]
        axes.plot([row["num_rows"] for row in own], [row["ratio"] for row in own], marker="o", label=name)
    axes.axhline(1, color="tab:gray", linewidth=1)
    axes.set(xscale="log", xlabel="rows", ylabel="plain time / packed time", title="Packed float32 products")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name in SHAPES:
            for num_rows in NUM_ROWS:
                row = measure(name, num_rows, arguments.rounds)
                rows.append(row)
                print(
                    f"{name:8} {num_rows:4} rows: plain {row['plain_gflop_per_s']:6.1f},"
                    f" packed {row['packed_gflop_per_s']:6.1f} GFLOP/s, ratio {row['ratio']:.2f}"
                )
    if arguments.out:
        document = {"torch": torch.__version__, "num_threads": torch.get_num_threads(), "rows": rows}
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
