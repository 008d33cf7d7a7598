"""Matrix products of an 8B Llama's shapes by quantised weights, beside bf16 by torch and the ceilings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import octavo_kernels as ok
from on_device.bench import Bench, Ceilings
from on_device.product_kinds import Kind, Sizes, activations, error_of, kinds

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # out_features, in_features of a layer
ROWS = (1, 4, 16, 32, 64, 128, 512)
TARGET_ROWS, TARGET = 16, 2.2
_MOST_ERROR = 1e-2  # of its size: outputs are rounded to bf16, and tensor cores add FP8 in fewer bits than fp32 has


def run(bench: Bench) -> None:
    ceilings = bench.ceilings()
    shapes = SHAPES if not bench.smoke else ((48, 256),)
    for rows in ROWS if not bench.smoke else (3,):
        dense = 0.0
        for name, kind in kinds().items():
            with bench.attempt(f"{name}, {rows} rows", ours="torch" not in name):
                sizes = [Sizes(rows, *shape) for shape in shapes]
                error = max(_checked(bench, kind, each) for each in sizes)
                seconds = sum(_time(bench, kind, each) for each in sizes)
                dense = dense or seconds
                _add(bench, name, kind, sizes, dense / seconds, seconds, error, ceilings)
    with bench.attempt("fused_moe"):
        _mixture(bench, ceilings)
    with bench.attempt("adapters"):
        _adapters(bench)


def _checked(bench: Bench, kind: Kind, sizes: Sizes) -> float:
    """Return by how much a product is off; one that is wrong is not timed."""
    error = error_of(kind.make(bench, sizes))
    bench.free()
    if not error <= _MOST_ERROR:
        raise ArithmeticError(f"the product of {sizes} is off by {error:.3g} of its size, expected {_MOST_ERROR}")
    return error


def _time(bench: Bench, kind: Kind, sizes: Sizes) -> float:
    num_copies = bench.num_copies(int(sizes.out_features * sizes.in_features * kind.weight_bytes))
    seconds = bench.seconds([kind.make(bench, sizes).call for _ in range(num_copies)])
    bench.free()
    return seconds


def _add(
    bench: Bench, name: str, kind: Kind, sizes: Sequence[Sizes], ratio: float, seconds: float, error: float,
    ceilings: Ceilings,
) -> None:  # fmt: skip
    num_weights = sum(each.out_features * each.in_features for each in sizes)
    rows = sizes[0].rows
    targeted = {"target": TARGET} if name.startswith("W4A16") and rows == TARGET_ROWS else {}
    bench.add(
        f"{name}, {rows} rows",
        value=ratio,
        **targeted,
        unit="x bf16",
        us=seconds * 1e6,
        of_copy=num_weights * kind.weight_bytes / seconds / ceilings.copy,
        of_gemm=2 * rows * num_weights / seconds / ceilings.gemm,
        error=error,
    )


def _mixture(bench: Bench, ceilings: Ceilings) -> None:
    """Eight experts of Mixtral's sizes, two of them for each token."""
    num_experts, top_k = 8, 2
    hidden, intermediate = bench.size(4096, 64), bench.size(14336, 64)
    shape13, shape2 = (num_experts, 2 * intermediate, hidden), (num_experts, hidden, intermediate)
    w13 = torch.randn(shape13, device=bench.device, dtype=torch.bfloat16)
    w2 = torch.randn(shape2, device=bench.device, dtype=torch.bfloat16)
    for rows in (1, 16, 128, 2048) if not bench.smoke else (3,):
        x = activations(bench, rows, hidden)
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
        x, out = activations(bench, rows, in_features), activations(bench, rows, out_features)
        groups = ok.group_rows(torch.arange(rows, device=bench.device) % (num_adapters + 1) - 1, num_adapters)
        shrunk = ok.lora_shrink(x, a, groups, ranks)

        def call() -> object:
            ok.lora_shrink(x, a, groups, ranks, out=shrunk)  # noqa: B023
            return ok.lora_expand(shrunk, b, groups, ranks, scales, out)  # noqa: B023

        plain = kinds()["bf16 (torch)"].make(bench, Sizes(rows, out_features, in_features))
        dense = bench.seconds([plain.call])
        seconds = bench.seconds([call])
        bench.add(f"adapters, {rows} tokens", value=seconds / dense, unit="of the bf16 product", us=seconds * 1e6)
