"""Products by weights in some forms, each as a call to be timed and as what it should come to, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import octavo_kernels as ok
from octavo_kernels import PackedWeight, WeightFormat
from on_device.backends import in_reference
from on_device.bench import Bench

FP8 = torch.float8_e4m3fn

_HALVES = {WeightFormat.Q4_0: (0,), WeightFormat.Q8_0: (0,), WeightFormat.Q4_K: (0, 2), WeightFormat.Q6_K: (208,)}
"""Where a block of some of GGUF's types has numbers in fp16, which random bytes would make infinite."""


class Product(NamedTuple):
    """call: makes the product, [rows, out_features]. exact: what it should be, in float64; after the call alone."""

    call: Callable[[], Tensor]
    exact: Callable[[], Tensor]


class Sizes(NamedTuple):
    """x [rows, in_features] times a weight [out_features, in_features]."""

    rows: int
    out_features: int
    in_features: int


class Kind(NamedTuple):
    """A form of weights: makes a product by a weight of its own; weight_bytes of each weight, its scale included."""

    make: Callable[[Bench, Sizes], Product]
    weight_bytes: float


def kinds() -> dict[str, Kind]:
    """Return all forms by name: the first is the plain one, and what torch multiplies says so."""
    return {
        "bf16 (torch)": Kind(_bf16, 2.0),
        "W4A16, groups of 128": Kind(lambda *of: _weight_only(4, *of), 0.5 + 2 / 128),
        "W8A16, groups of 128": Kind(lambda *of: _weight_only(8, *of), 1 + 2 / 128),
        "FP8, rows and outputs": Kind(lambda *of: _scaled(FP8, None, *of), 1.0),
        "FP8, groups and blocks of 128": Kind(lambda *of: _scaled(FP8, 128, *of), 1.0),
        "FP8, rows and outputs (torch)": Kind(_torch_fp8, 1.0),
        "int8, rows and outputs": Kind(lambda *of: _scaled(torch.int8, None, *of), 1.0),
        **{f"GGUF {form.value}": _gguf(form) for form in (WeightFormat.Q4_0, WeightFormat.Q4_K, WeightFormat.Q6_K)},
    }


def error_of(product: Product) -> float:
    """Return by how much a product is off, as a share of its size."""
    actual = product.call().double()
    exact = product.exact()
    return float((actual - exact).norm() / exact.norm())


def activations(bench: Bench, rows: int, in_features: int) -> Tensor:
    """Return random activations [rows, in_features] bf16."""
    return torch.randn(rows, in_features, device=bench.device).to(torch.bfloat16)


@functools.cache
def packed_weight(form: WeightFormat, out_features: int, in_features: int) -> PackedWeight:
    """Return a weight of random codes and scales on the host."""
    generator = torch.Generator().manual_seed(0)
    num_blocks = in_features // form.block_inputs
    raw = torch.randint(0, 256, (out_features, num_blocks, form.block_bytes), dtype=torch.uint8, generator=generator)
    for start in _HALVES[form]:
        halves = 0.01 * torch.rand(out_features, num_blocks, 1, generator=generator) + 0.001
        raw[:, :, start : start + 2] = halves.half().view(torch.uint8)
    return ok.pack_weight(raw.flatten(1), form, in_features=in_features)


def _bf16(bench: Bench, sizes: Sizes) -> Product:
    x = activations(bench, sizes.rows, sizes.in_features)
    weight = activations(bench, sizes.out_features, sizes.in_features)
    return Product(lambda: F.linear(x, weight), lambda: x.double() @ weight.double().T)


def _gguf(form: WeightFormat) -> Kind:
    """Weights that stay in a file's blocks: codes are whole numbers, activations are not rounded."""

    def make(bench: Bench, sizes: Sizes) -> Product:
        x = activations(bench, sizes.rows, sizes.in_features)
        weight = packed_weight(form, sizes.out_features, sizes.in_features)
        weight = replace(weight, data=weight.data.to(bench.device, copy=True))
        out = torch.empty(sizes.rows, sizes.out_features, dtype=x.dtype, device=bench.device)
        size = ok.packed_linear_workspace(sizes.rows, weight)
        workspace = torch.empty(size, dtype=torch.uint8, device=bench.device)
        return Product(
            lambda: ok.packed_linear(x, weight, out=out, workspace=workspace),
            in_reference(lambda: ok.packed_linear(x.float(), weight).double()),
        )

    return Kind(make, form.block_bytes / form.block_inputs)


def _weight_only(bits: int, bench: Bench, sizes: Sizes) -> Product:
    x = activations(bench, sizes.rows, sizes.in_features)
    shape = (sizes.in_features * bits // 32, sizes.out_features)
    words = torch.randint(-(1 << 31), 1 << 31, shape, device=bench.device)
    scales = torch.rand(sizes.in_features // 128, sizes.out_features, device=bench.device).to(torch.float16)
    weight = ok.IntWeight(words.to(torch.int32), scales, None, None, sizes.in_features, 128, bits, 1 << (bits - 1))
    out = torch.empty(sizes.rows, sizes.out_features, dtype=x.dtype, device=bench.device)
    size = ok.weight_only_workspace(sizes.rows, weight)
    workspace = torch.empty(size, dtype=torch.uint8, device=bench.device)
    return Product(
        lambda: ok.weight_only_linear(x, weight, out=out, workspace=workspace),
        in_reference(lambda: ok.weight_only_linear(x.double(), weight)),
    )


class _Codes(NamedTuple):
    """x rounded to codes with their scales, as each call does it anew, and a weight of codes with its scales."""

    x: Tensor
    x_scale: Tensor
    weight: Tensor
    w_scale: Tensor

    def exact(self) -> Tensor:
        """Return the product of what the codes mean."""
        return ok.scaled_linear(self.x, self.weight, self.x_scale, self.w_scale, out_dtype=torch.float32).double()


def _codes(bench: Bench, sizes: Sizes, dtype: torch.dtype, block: int | None) -> tuple[Tensor, _Codes]:
    x = activations(bench, sizes.rows, sizes.in_features)
    shape = (sizes.out_features, sizes.in_features)
    weight = torch.randint(-100, 100, shape, device=bench.device).to(dtype)
    w_shape = (sizes.out_features, 1) if block is None else tuple(-(-size // block) for size in shape)
    codes, scales = ok.quantize_rows(x, dtype, group_size=block)
    return x, _Codes(codes, scales, weight, torch.rand(w_shape, device=bench.device))


def _scaled(dtype: torch.dtype, block: int | None, bench: Bench, sizes: Sizes) -> Product:
    """Activations are rounded in the call, as a model does it before each product."""
    x, codes = _codes(bench, sizes, dtype, block)
    out = torch.empty(sizes.rows, sizes.out_features, dtype=x.dtype, device=bench.device)
    workspace = torch.empty(ok.scaled_workspace(*sizes), dtype=torch.uint8, device=bench.device)

    def call() -> Tensor:
        ok.quantize_rows(x, dtype, group_size=block, out=codes.x, scales=codes.x_scale)
        return ok.scaled_linear(codes.x, codes.weight, codes.x_scale, codes.w_scale, out=out, workspace=workspace)

    return Product(call, in_reference(codes.exact))


def _torch_fp8(bench: Bench, sizes: Sizes) -> Product:
    x, codes = _codes(bench, sizes, FP8, None)

    def call() -> Tensor:
        ok.quantize_rows(x, FP8, out=codes.x, scales=codes.x_scale)
        product: Tensor = torch._scaled_mm(
            codes.x, codes.weight.T, codes.x_scale, codes.w_scale.T, out_dtype=torch.bfloat16
        )
        return product

    return Product(call, in_reference(codes.exact))
