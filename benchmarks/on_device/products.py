"""Matrix products of an 8B Llama's shapes by quantised weights, beside bf16 by torch and the ceilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import octavo_kernels as ok
from on_device.bench import Bench, Ceilings

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # out_features, in_features of a layer
ROWS = (1, 4, 16, 32, 64, 128, 512)
FP8 = torch.float8_e4m3fn
TARGET_ROWS, TARGET = 16, 2.2

Make = Callable[[int, int, int], Callable[[], object]]
"""(rows, out_features, in_features) -> a call with weights of its own"""


def run(bench: Bench) -> None:
    ceilings = bench.ceilings()
    shapes = SHAPES if not bench.smoke else ((48, 128),)
    kinds: dict[str, tuple[Make, float]] = {  # and the bytes of a weight
        "bf16 (torch)": (lambda *sizes: _bf16(bench, *sizes), 2.0),
        "W4A16, groups of 128": (lambda *sizes: _weight_only(bench, 4, *sizes), 0.516),
        "W8A16, groups of 128": (lambda *sizes: _weight_only(bench, 8, *sizes), 1.016),
        "FP8, rows and outputs": (lambda *sizes: _scaled(bench, FP8, None, *sizes), 1.0),
        "FP8, groups and blocks of 128": (lambda *sizes: _scaled(bench, FP8, 128, *sizes), 1.0),
        "FP8, rows and outputs (torch)": (lambda *sizes: _torch_fp8(bench, *sizes), 1.0),
        "int8, rows and outputs": (lambda *sizes: _scaled(bench, torch.int8, None, *sizes), 1.0),
    }
    for rows in ROWS if not bench.smoke else (1, 40):
        dense = 0.0
        for kind, (make, weight_bytes) in kinds.items():
            name = f"{kind}, {rows} rows"
            with bench.attempt(name, ours="torch" not in kind):
                seconds = sum(_time(bench, make, rows, shape, weight_bytes) for shape in shapes)
                dense = dense or seconds
                _add(bench, name, kind, rows, dense / seconds, seconds, shapes, weight_bytes, ceilings)
    with bench.attempt("fused_moe"):
        _mixture(bench, ceilings)
    with bench.attempt("adapters"):
        _adapters(bench)


def _time(bench: Bench, make: Make, rows: int, shape: tuple[int, int], weight_bytes: float) -> float:
    num_copies = bench.num_copies(int(shape[0] * shape[1] * weight_bytes))
    seconds = bench.seconds([make(rows, *shape) for _ in range(num_copies)])
    bench.free()
    return seconds


def _add(
    bench: Bench, name: str, kind: str, rows: int, ratio: float, seconds: float,
    shapes: Sequence[tuple[int, int]], weight_bytes: float, ceilings: Ceilings,
) -> None:  # fmt: skip
    num_weights = sum(out * inputs for out, inputs in shapes)
    figures = {
        "unit": "x bf16",
        "us": seconds * 1e6,
        "of_copy": num_weights * weight_bytes / seconds / ceilings.copy,
        "of_gemm": 2 * rows * num_weights / seconds / ceilings.gemm,
    }
    if kind.startswith("W4A16") and rows == TARGET_ROWS:
        bench.add(name, value=ratio, target=TARGET, **figures)
    else:
        bench.add(name, value=ratio, **figures)


def _x(bench: Bench, rows: int, in_features: int) -> Tensor:
    return torch.randn(rows, in_features, device=bench.device).to(torch.bfloat16)


def _bf16(bench: Bench, rows: int, out_features: int, in_features: int) -> Callable[[], object]:
    x = _x(bench, rows, in_features)
    weight = torch.randn(out_features, in_features, device=bench.device).to(torch.bfloat16)
    return lambda: F.linear(x, weight)


def _weight_only(bench: Bench, bits: int, rows: int, out_features: int, in_features: int) -> Callable[[], object]:
    x = _x(bench, rows, in_features)
    per_word = 32 // bits
    words = torch.randint(-(1 << 31), 1 << 31, (in_features // per_word, out_features), device=bench.device)
    scales = torch.rand(in_features // 128, out_features, device=bench.device).to(torch.float16)
    weight = ok.IntWeight(words.to(torch.int32), scales, None, None, in_features, 128, bits, 1 << (bits - 1))
    out = torch.empty(rows, out_features, dtype=x.dtype, device=bench.device)
    workspace = torch.empty(ok.weight_only_workspace(rows, weight), dtype=torch.uint8, device=bench.device)
    return lambda: ok.weight_only_linear(x, weight, out=out, workspace=workspace)


def _codes(bench: Bench, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-100, 100, (rows, columns), device=bench.device).to(dtype)


def _scaled(
    bench: Bench, dtype: torch.dtype, block: int | None, rows: int, out_features: int, in_features: int
) -> Callable[[], object]:
    """Activations are rounded in the call, as a model does it before each product."""
    x = _x(bench, rows, in_features)
    weight = _codes(bench, out_features, in_features, dtype)
    w_shape = (out_features, 1) if block is None else (-(-out_features // 128), -(-in_features // 128))
    w_scale = torch.rand(w_shape, device=bench.device)
    codes, scales = ok.quantize_rows(x, dtype, group_size=block)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=bench.device)
    size = ok.scaled_workspace(rows, out_features, in_features)
    workspace = torch.empty(size, dtype=torch.uint8, device=bench.device)

    def call() -> object:
        ok.quantize_rows(x, dtype, group_size=block, out=codes, scales=scales)
        return ok.scaled_linear(codes, weight, scales, w_scale, out=out, workspace=workspace)

    return call


def _torch_fp8(bench: Bench, rows: int, out_features: int, in_features: int) -> Callable[[], object]:
    x = _x(bench, rows, in_features)
    weight = _codes(bench, out_features, in_features, FP8)
    w_scale = torch.rand(1, out_features, device=bench.device)
    codes, scales = ok.quantize_rows(x, FP8)

    def call() -> object:
        ok.quantize_rows(x, FP8, out=codes, scales=scales)
        return torch._scaled_mm(codes, weight.T, scales, w_scale, out_dtype=torch.bfloat16)

    return call


def _mixture(bench: Bench, ceilings: Ceilings) -> None:
    """Eight experts of Mixtral's sizes, two of them for each token."""
    num_experts, top_k = 8, 2
    hidden, intermediate = bench.size(4096, 64), bench.size(14336, 64)
    shape13, shape2 = (num_experts, 2 * intermediate, hidden), (num_experts, hidden, intermediate)
    w13 = torch.randn(shape13, device=bench.device, dtype=torch.bfloat16)
    w2 = torch.randn(shape2, device=bench.device, dtype=torch.bfloat16)
    for rows in (1, 16, 128, 2048) if not bench.smoke else (3,):
        x = _x(bench, rows, hidden)
        weights, ids = torch.rand(rows, num_experts, device=bench.device).topk(top_k)
        ids = ids.to(torch.int32)
        size = ok.moe_workspace(rows, top_k, num_experts, hidden, intermediate, x.dtype)
        workspace, out = torch.empty(size, dtype=torch.uint8, device=bench.device), torch.empty_like(x)
        used = len(ids.unique())
        call = [lambda: ok.fused_moe(x, w13, w2, weights, ids, out=out, workspace=workspace)]  # noqa: B023
        seconds = bench.seconds(call)
        num_bytes = used * 3 * hidden * intermediate * 2
        flops = 6 * rows * top_k * hidden * intermediate
        bound = max(num_bytes / ceilings.copy, flops / ceilings.gemm)
        bench.add(f"fused_moe, {rows} tokens", value=bound / seconds, unit="of roofline", us=seconds * 1e6)


def _adapters(bench: Bench) -> None:
    """The time of adapters of rank 16 beside the product that they are added to."""
    in_features, out_features, num_adapters = bench.size(4096, 64), bench.size(6144, 64), 8
    a = torch.randn(num_adapters, 16, in_features, device=bench.device).to(torch.bfloat16)
    b = torch.randn(num_adapters, out_features, 16, device=bench.device).to(torch.bfloat16)
    ranks = torch.full((num_adapters,), 16, dtype=torch.int32, device=bench.device)
    scales = torch.ones(num_adapters, device=bench.device)
    for rows in (16, 128) if not bench.smoke else (3,):
        x, out = _x(bench, rows, in_features), _x(bench, rows, out_features)
        groups = ok.group_rows(torch.arange(rows, device=bench.device) % (num_adapters + 1) - 1, num_adapters)
        shrunk = ok.lora_shrink(x, a, groups, ranks)

        def call() -> object:
            ok.lora_shrink(x, a, groups, ranks, out=shrunk)  # noqa: B023
            return ok.lora_expand(shrunk, b, groups, ranks, scales, out)  # noqa: B023

        dense = bench.seconds([_bf16(bench, rows, out_features, in_features)])
        seconds = bench.seconds([call])
        bench.add(f"adapters, {rows} tokens", value=seconds / dense, unit="of the bf16 product", us=seconds * 1e6)
