"""The ceilings: copy bandwidth and bf16 products, which all other parts are shares of."""

from __future__ import annotations

from on_device.bench import Bench


def run(bench: Bench) -> None:
    ceilings = bench.ceilings()
    bench.add("copy, read and written", value=ceilings.copy / 1e12, unit="TB/s")
    bench.add("bf16 product 8192 x 8192 x 8192", value=ceilings.gemm / 1e12, unit="TFLOP/s")
