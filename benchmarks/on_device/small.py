"""The small fused ops at 8192 tokens, as a share of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import octavo_kernels as ok
from on_device.backends import served_by
from on_device.bench import Bench, Ceilings

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
    _copies(bench, ceilings)


def _rope(bench: Bench, num_tokens: int, normal: Callable[..., Tensor]) -> Callable[[], object]:
    q, k, v = (normal(num_tokens, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    num_blocks = -(-num_tokens // 16) + 1
    cache = normal(num_blocks, 2, NUM_KV_HEADS, 16, HEAD_DIM)
    positions = torch.arange(num_tokens, device=bench.device)
    slots = torch.randperm(num_tokens, device=bench.device) + 16
    cos_sin = torch.randn(num_tokens, HEAD_DIM, device=bench.device)
    return lambda: ok.rope_kv_write(q, k, v, positions, cos_sin, cache[:, 0], cache[:, 1], slots)


def _copies(bench: Bench, ceilings: Ceilings) -> None:
    """Measure copies of blocks as a sequence that was forked makes them: few of them, in each layer's K and V."""
    num_layers, num_blocks = bench.size(32, 2), bench.size(256, 8)
    caches = [
        torch.randn(num_blocks, 2, NUM_KV_HEADS, 16, HEAD_DIM, device=bench.device).to(torch.bfloat16)
        for _ in range(num_layers)
    ]
    parts = [part for cache in caches for part in (cache[:, 0], cache[:, 1])]
    fastest = ok.choose("copy_blocks", bench.device)
    for num_copies in (1, 64) if not bench.smoke else (2,):
        ids = torch.randperm(num_blocks, device=bench.device)
        src, dst = ids[:num_copies], ids[num_copies : 2 * num_copies]
        num_bytes = 2 * num_copies * sum(part[0].nbytes for part in parts)
        for backend in dict.fromkeys((fastest, ok.Backend.TRITON)):
            name = f"copy_blocks by {backend.value}, {num_copies} blocks of {num_layers} layers"
            with bench.attempt(name), served_by(backend.value):
                seconds = bench.seconds([lambda: ok.copy_blocks(parts, src, dst)])  # noqa: B023
                bench.add(name, value=num_bytes / seconds / ceilings.copy, unit="of copy", us=seconds * 1e6)
