"""Packed weights and their products: codes one format at a time, sums in fp64."""

import torch
from torch import Tensor

from octavo_kernels.packed_parts import fill_panels, panel_values
from octavo_kernels.packed_planes import GroupValues
from octavo_kernels.packed_weight import (
    CODE_OFFSET,
    GROUP,
    PANEL,
    PackedWeight,
    WeightFormat,
    block_minimums,
    block_scales,
    block_words,
    dense_panels,
    plane_panels,
    split_last,
)

_INT8_MAX = 127


def pack_weight(stored: Tensor, weight: PackedWeight) -> None:
    """Fill the weight's data from the rows of a file."""
    if weight.format.layout is not None:
        fill_panels(stored, weight.format.layout, plane_panels(weight))
        return
    rows = torch.zeros((weight.num_panels * PANEL, stored.shape[1]), dtype=stored.dtype, device=stored.device)
    rows[: len(stored)] = stored
    if weight.format.dtype is not None:
        dense_panels(weight).copy_(rows.view(-1, PANEL, weight.in_features).transpose(1, 2))
        return
    blocks = rows.view(weight.num_panels, PANEL, weight.num_groups, -1).transpose(1, 2)  # [panel, group, output, byte]
    block_scales(weight).copy_(blocks[..., :2].contiguous().view(torch.float16).squeeze(-1))
    minimums = block_minimums(weight)
    if minimums is not None:
        minimums.copy_(blocks[..., 2:4].contiguous().view(torch.float16).squeeze(-1))
    block_words(weight).copy_(_words(blocks, weight.format))


def _words(blocks: Tensor, format_: WeightFormat) -> Tensor:
    """Return the words of stored blocks: [num_panels, num_groups, rows, 32, 4] uint8."""
    if format_ is WeightFormat.Q8_0:
        codes = blocks[..., 2:].to(torch.int16)  # as unsigned: -1 is 255, and becomes 127
        return split_last(((codes + CODE_OFFSET) % 256).to(torch.uint8), 8, 4).transpose(2, 3)
    packed = blocks[..., -GROUP // 2 :]
    codes = split_last(torch.cat([packed & 15, packed >> 4], dim=-1), 4, 2, 4)  # [..., row, half, byte]
    return (codes[..., 0, :] | codes[..., 1, :] << 4).transpose(2, 3)


def unpack_weight(weight: PackedWeight, out: Tensor) -> None:
    """Fill out with the weight's values."""
    if weight.format.dtype is not None:
        out.copy_(_rows(dense_panels(weight).transpose(1, 2), weight))
        return
    if weight.format.layout is not None:
        out.copy_(_plane_values(weight).weights().flatten(1))
        return
    codes, scales, minimums = _blocks(weight)
    values = codes * scales[..., None]
    if minimums is not None:
        values += minimums[..., None]
    out.copy_(values.flatten(1))


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    int8_activations: bool,
    out: Tensor,
    workspace: Tensor | None,  # noqa: ARG001 - sums in fp64 need no order
) -> None:
    """Fill out with the product, rounded once."""
    if int8_activations:
        by_format = _int8_product if weight.format.layout is None else _int8_plane_product
        product = by_format(x.float(), weight)
    else:
        product = _product(x, weight)
    out.copy_(product if bias is None else product + bias.double())


def packed_embedding(weight: PackedWeight, token_ids: Tensor, out: Tensor) -> None:
    """Fill out with rows of the weight."""
    values = torch.empty((weight.out_features, weight.in_features), device=out.device)
    unpack_weight(weight, values)
    out.copy_(values[token_ids])


def packed_argmax(
    x: Tensor,
    weight: PackedWeight,
    norms: Tensor | None,  # noqa: ARG001  # nothing is screened here
    int8_activations: bool,
    ids: Tensor,
    best: Tensor,
) -> None:
    """Fill ids and best from the products, each rounded to fp32 as `packed_linear` rounds it."""
    products = torch.empty((len(x), weight.out_features), device=x.device)
    packed_linear(x, weight, None, int8_activations, products, None)
    best.copy_(products.amax(dim=-1))  # NaN if any is
    ids.copy_((products == best[:, None]).to(torch.uint8).argmax(dim=-1))


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit codes of x [num_tokens, in_features] and their scales.

    Returns:
        codes: [num_tokens, num_groups, 32] fp32, whole numbers from -127 to 127.
        scales: [num_tokens, num_groups] fp32.

    """
    groups = split_last(x, -1, GROUP)
    scales = groups.abs().amax(dim=-1) / _INT8_MAX
    inverse = 1 / scales
    usable = (scales.isfinite() & inverse.isfinite())[..., None]
    return torch.where(usable, (groups * inverse[..., None]).round(), 0), scales


def _product(x: Tensor, weight: PackedWeight) -> Tensor:
    values = torch.empty((weight.out_features, weight.in_features), device=x.device)
    unpack_weight(weight, values)
    return x.double() @ values.double().T


def _int8_product(x: Tensor, weight: PackedWeight) -> Tensor:
    codes, scales, minimums = _blocks(weight)
    x_codes, x_scales = quantise_rows(x)
    sums = torch.einsum("tgi,ogi->tog", x_codes.double(), codes.double()) * scales.double()
    if minimums is not None:
        sums += minimums.double() * x_codes.double().sum(dim=-1)[:, None]
    return (x_scales.double()[:, None] * sums).sum(dim=-1)


def _int8_plane_product(x: Tensor, weight: PackedWeight) -> Tensor:
    values = _plane_values(weight)
    inputs = values.codes.shape[-1]  # of a scale: a group of x or a half of one
    x_codes, x_scales = quantise_rows(x)
    codes = split_last(x_codes.double().flatten(1), -1, inputs)
    sums = torch.einsum("tgi,ogi->tog", codes, values.codes.double()) * values.d.double()
    if values.m is not None:
        sums += values.m.double() * codes.sum(dim=-1)[:, None]
    return (x_scales.double().repeat_interleave(GROUP // inputs, dim=-1)[:, None] * sums).sum(dim=-1)


def _plane_values(weight: PackedWeight) -> GroupValues:
    """Return codes [out_features, groups of a scale, inputs] and their scales."""
    layout = weight.format.layout
    assert layout is not None
    found = panel_values(plane_panels(weight), layout)
    codes, d = _rows(found.codes, weight), _rows(found.d, weight)
    return GroupValues(codes, d, None if found.m is None else _rows(found.m, weight))


def _blocks(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes [out_features, num_groups, 32], scales and minimums [out_features, num_groups], all fp32."""
    words = block_words(weight).transpose(2, 3)  # [panel, group, output, row, byte]
    if weight.format is WeightFormat.Q8_0:
        codes = words.flatten(-2).float() - CODE_OFFSET
    else:
        codes = torch.stack([words & 15, words >> 4], dim=-2).flatten(-3).float()
        if weight.format is WeightFormat.Q4_0:
            codes -= 8
    minimums = block_minimums(weight)
    return (
        _rows(codes.transpose(1, 2), weight),
        _rows(block_scales(weight).transpose(1, 2), weight).float(),
        None if minimums is None else _rows(minimums.transpose(1, 2), weight).float(),
    )


def _rows(panels: Tensor, weight: PackedWeight) -> Tensor:
    """Turn [num_panels, 32, ...] into [out_features, ...]."""
    return panels.flatten(0, 1)[: weight.out_features]
