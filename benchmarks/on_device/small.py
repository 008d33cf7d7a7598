"""The small fused ops at 8192 tokens, as a share of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import octavo_kernels as ok
from on_device.bench import Bench

TARGET = 0.8
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128


def run(bench: Bench) -> None:
    ceilings = bench.ceilings()
    bench.add("copy, read and written", value=ceilings.copy / 1e12, unit="TB/s")
    num_tokens, hidden = bench.size(8192, 3), bench.size(4096, 64)
    intermediate = bench.size(14336, 96)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=bench.device).to(torch.bfloat16)

    weight = normal(hidden)
    rows = num_tokens * hidden * 2  # bytes of one pass

    def measure(name: str, num_bytes: int, make: Callable[[], Callable[[], object]]) -> None:
        calls = [make() for _ in range(bench.num_copies(num_bytes))]
        seconds = bench.seconds(calls)
        share = num_bytes / seconds / ceilings.copy
        bench.add(f"{name}, {num_tokens} tokens", value=share, target=TARGET, unit="of copy", us=seconds * 1e6)
        bench.free()

    def rms_norm() -> Callable[[], object]:
        x, out = normal(num_tokens, hidden), normal(num_tokens, hidden)
        return lambda: ok.rms_norm(x, weight, 1e-5, out=out)

    def add_rms_norm() -> Callable[[], object]:
        x, residual = normal(num_tokens, hidden), normal(num_tokens, hidden)
        return lambda: ok.add_rms_norm(x, residual, weight, 1e-5, out=x)

    def silu_and_mul() -> Callable[[], object]:
        x, out = normal(num_tokens, 2 * intermediate), normal(num_tokens, intermediate)
        return lambda: ok.silu_and_mul(x, out)

    def quantize_rows() -> Callable[[], object]:
        x = normal(num_tokens, hidden)
        out, scales = ok.quantize_rows(x, torch.int8)
        return lambda: ok.quantize_rows(x, torch.int8, out=out, scales=scales)

    measure("rms_norm", 2 * rows, rms_norm)
    measure("add_rms_norm", 4 * rows, add_rms_norm)
    measure("silu_and_mul", 3 * num_tokens * intermediate * 2, silu_and_mul)
    measure("quantize_rows to int8", rows + rows // 2, quantize_rows)
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    measure("rope_kv_write", 2 * num_tokens * heads * HEAD_DIM * 2, lambda: _rope(bench, num_tokens, normal))


def _rope(bench: Bench, num_tokens: int, normal: Callable[..., Tensor]) -> Callable[[], object]:
    q, k, v = (normal(num_tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    num_blocks = -(-num_tokens // 16) + 1
    cache = normal(num_blocks, 2, NUM_KV_HEADS, 16, HEAD_DIM)
    positions = torch.arange(num_tokens, device=bench.device)
    slots = torch.randperm(num_tokens, device=bench.device) + 16
    cos_sin = torch.randn(num_tokens, HEAD_DIM, device=bench.device)
    return lambda: ok.rope_kv_write(q, k, v, positions, cos_sin, cache[:, 0], cache[:, 1], slots)
