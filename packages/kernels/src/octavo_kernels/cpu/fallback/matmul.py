"""Packed weights and their products in torch: some panels at a time are unpacked, and multiplied while in the cache.

torch's own product of a row depends on how many rows come with it, up to 15 of them; so rows are filled up to a
multiple of 16, and how the outputs are cut does not depend on the rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
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

_CHUNK_VALUES = 1 << 18  # weights unpacked at once: 1 MiB of fp32
_ROW_MULTIPLE = 16
_INT8_MAX = 127


def pack_weight(stored: Tensor, weight: PackedWeight) -> None:
    """Fill the weight's data from the rows of a file."""
    for part in _parts(weight):
        rows = stored[part.start * PANEL : part.stop * PANEL]
        if weight.format.layout is not None:
            fill_panels(rows, weight.format.layout, plane_panels(weight)[part])
            continue
        if len(rows) < PANEL * (part.stop - part.start):
            rows = F.pad(rows, (0, 0, 0, PANEL * (part.stop - part.start) - len(rows)))
        if weight.format.dtype is not None:
            dense_panels(weight)[part] = rows.reshape(-1, PANEL, weight.in_features).transpose(1, 2)
        else:
            _pack_blocks(rows.contiguous(), weight, part)


def _pack_blocks(rows: Tensor, weight: PackedWeight, part: slice) -> None:
    blocks = rows.view(-1, PANEL, weight.num_groups, rows.shape[1] // weight.num_groups).transpose(1, 2)
    _as_bytes(block_scales(weight)[part])[...] = blocks[..., :2]
    minimums = block_minimums(weight)
    if minimums is not None:
        _as_bytes(minimums[part])[...] = blocks[..., 2:4]
    words = block_words(weight)[part]  # [panel, group, row, output, byte]
    if weight.format is WeightFormat.Q8_0:
        words[...] = split_last(blocks[..., 2:] ^ CODE_OFFSET, 8, 4).transpose(2, 3)
        return
    # A byte of the file holds codes j and j + 16, a byte of a word holds 8i + b and 8i + 4 + b.
    halves = split_last(blocks[..., -GROUP // 2 :], 2, 2, 4)
    first, second = halves[..., 0, :].transpose(2, 3), halves[..., 1, :].transpose(2, 3)
    words[:, :, :2] = (first & 15) | (second << 4)
    words[:, :, 2:] = (first >> 4) | (second & 0xF0)


def _as_bytes(halves: Tensor) -> Tensor:
    """View [..., 32] fp16 as [..., 32, 2] uint8."""
    return split_last(halves.view(torch.uint8), PANEL, 2)


def unpack_weight(weight: PackedWeight, out: Tensor) -> None:
    """Fill out with the weight's values."""
    for part in _parts(weight):
        rows = out[part.start * PANEL : part.stop * PANEL]
        rows.copy_(_values(weight, part)[: len(rows)])


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    int8_activations: bool,
    out: Tensor,
    workspace: Tensor | None,  # noqa: ARG001 - Triton's
) -> None:
    """Fill out with the product."""
    for columns, product in _products(x.float(), weight, int8_activations):
        if bias is None:
            out[:, columns] = product
        else:
            torch.add(product, bias[columns], out=out[:, columns])


def packed_embedding(weight: PackedWeight, token_ids: Tensor, out: Tensor) -> None:
    """Fill out with rows of the weight."""
    panels, places = token_ids // PANEL, token_ids % PANEL
    if weight.format.dtype is not None:
        out.copy_(dense_panels(weight)[panels, :, places])
        return
    if weight.format.layout is not None:
        for row, panel, place in zip(out, panels.tolist(), places.tolist(), strict=True):
            row.copy_(_plane_values(weight, slice(panel, panel + 1)).weights()[0, place].flatten())
        return
    blocks = _Blocks.of(weight)
    minimums = blocks.minimums
    picked = _Blocks(
        blocks.scales[panels, :, places],
        None if minimums is None else minimums[panels, :, places],
        blocks.words[panels, :, :, places],
    )
    split_last(out, -1, GROUP)[...] = picked.values(weight.format)


def packed_argmax(
    x: Tensor,
    weight: PackedWeight,
    norms: Tensor | None,  # noqa: ARG001  # nothing is screened here
    int8_activations: bool,
    ids: Tensor,
    best: Tensor,
) -> None:
    """Fill ids and best with the running maximum over the parts of the outputs."""
    ids.zero_()
    best.fill_(float("-inf"))
    for columns, product in _products(x, weight, int8_activations):
        part_best, part_ids = product.max(dim=-1)  # the first of equals, and NaN if any is
        better = (part_best > best) | part_best.isnan()
        torch.where(better, part_ids + columns.start, ids, out=ids)
        torch.where(better, part_best, best, out=best)


class _Blocks(NamedTuple):
    """Some blocks of 32 inputs: scales and minimums [...] fp16, words [..., rows, 4] uint8."""

    scales: Tensor
    minimums: Tensor | None
    words: Tensor

    @classmethod
    def of(cls, weight: PackedWeight, part: slice = slice(None)) -> "_Blocks":
        """Take some panels; the words' rows stand before the outputs."""
        minimums = block_minimums(weight)
        return cls(block_scales(weight)[part], None if minimums is None else minimums[part], block_words(weight)[part])

    def codes(self, format_: WeightFormat) -> Tensor:
        """Return the codes as numbers around 0, [..., 32] fp32 (q4_1: from 0 to 15)."""
        if format_ is WeightFormat.Q8_0:
            return self.words.flatten(-2).float().sub_(CODE_OFFSET)
        codes = torch.stack([self.words & 15, self.words >> 4], dim=-2).flatten(-3).float()
        return codes.sub_(8) if format_ is WeightFormat.Q4_0 else codes

    def values(self, format_: WeightFormat) -> Tensor:
        """Return the values, [..., 32] fp32."""
        values = self.codes(format_).mul_(self.scales.float()[..., None])
        return values if self.minimums is None else values.add_(self.minimums.float()[..., None])


def _panel_blocks(weight: PackedWeight, part: slice) -> _Blocks:
    """Return the blocks of some panels as [panel, output, group]."""
    blocks = _Blocks.of(weight, part)
    return _Blocks(
        blocks.scales.transpose(1, 2),
        None if blocks.minimums is None else blocks.minimums.transpose(1, 2),
        blocks.words.permute(0, 3, 1, 2, 4),
    )


def _values(weight: PackedWeight, part: slice) -> Tensor:
    """Return the values of some panels, filling rows included: [num_panels * 32, in_features] fp32."""
    if weight.format.dtype is not None:
        return dense_panels(weight)[part].transpose(1, 2).float().reshape(-1, weight.in_features)
    if weight.format.layout is not None:
        return _plane_values(weight, part).weights().reshape(-1, weight.in_features)
    return _panel_blocks(weight, part).values(weight.format).view(-1, weight.in_features)


def _plane_values(weight: PackedWeight, part: slice) -> GroupValues:
    """Return the values of some panels by [panel, output]."""
    layout = weight.format.layout
    assert layout is not None
    return panel_values(plane_panels(weight)[part], layout)


def _parts(weight: PackedWeight) -> Iterator[slice]:
    """Cut the panels of a weight."""
    step = max(1, _CHUNK_VALUES // (PANEL * weight.in_features))
    for start in range(0, weight.num_panels, step):
        yield slice(start, min(start + step, weight.num_panels))


def _products(x: Tensor, weight: PackedWeight, int8_activations: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield the product in parts: which outputs, and [num_tokens, those outputs] fp32."""
    rows = _quantise(x) if int8_activations else _fill_up(x)
    for part in _parts(weight):
        columns = slice(part.start * PANEL, min(part.stop * PANEL, weight.out_features))
        if isinstance(rows, _Int8Rows):
            by_format = _int8_product if weight.format.layout is None else _int8_plane_product
            product = by_format(rows, weight, part)
        else:
            product = F.linear(rows, _values(weight, part))
        yield columns, product[: len(x), : columns.stop - columns.start]


def _fill_up(x: Tensor) -> Tensor:
    missing = -len(x) % _ROW_MULTIPLE
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


class _Int8Rows(NamedTuple):
    """Rows in 8 bits: codes [num_groups, num_tokens, 32], their sums and the scales [num_groups, num_tokens, 1]."""

    codes: Tensor
    sums: Tensor
    scales: Tensor


def _quantise(x: Tensor) -> _Int8Rows:
    groups = split_last(x, -1, GROUP).transpose(0, 1)
    scales = groups.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
    inverse = scales.reciprocal()
    usable = scales.isfinite() & inverse.isfinite()
    codes = torch.where(usable, groups.mul(inverse).round_(), 0)
    return _Int8Rows(codes, codes.sum(dim=-1, keepdim=True), scales)


def _int8_product(rows: _Int8Rows, weight: PackedWeight, part: slice) -> Tensor:
    """Multiply group by group: sums of 32 products of codes are whole numbers that fp32 holds, in any order."""
    blocks = _panel_blocks(weight, part)
    codes = blocks.codes(weight.format).flatten(0, 1).permute(1, 2, 0)  # [group, 32, output]
    scales = blocks.scales.float().flatten(0, 1).T  # [group, output]
    minimums = None if blocks.minimums is None else blocks.minimums.float().flatten(0, 1).T
    total = torch.zeros((rows.codes.shape[1], codes.shape[2]), device=codes.device)
    for group in range(len(codes)):
        sums = (rows.codes[group] @ codes[group]) * scales[group]
        if minimums is not None:
            sums += minimums[group] * rows.sums[group]
        total += rows.scales[group] * sums
    return total


def _int8_plane_product(rows: _Int8Rows, weight: PackedWeight, part: slice) -> Tensor:
    """As `_int8_product`, by the groups of 32 or 16 inputs that have a scale of their own."""
    values = _plane_values(weight, part)
    inputs = values.codes.shape[-1]
    codes = values.codes.flatten(0, 1).permute(1, 2, 0)  # [group of a scale, inputs, output]
    d = values.d.flatten(0, 1).T
    m = None if values.m is None else values.m.flatten(0, 1).T
    total = torch.zeros((rows.codes.shape[1], codes.shape[2]), device=codes.device)
    for group in range(len(codes)):
        whole, start = divmod(group * inputs, GROUP)
        x_codes = rows.codes[whole][:, start : start + inputs]
        sums = (x_codes @ codes[group]) * d[group]
        if m is not None:
            sums += m[group] * x_codes.sum(dim=-1, keepdim=True)
        total += rows.scales[whole] * sums
    return total
