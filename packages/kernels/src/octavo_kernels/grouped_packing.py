"""Grouped weights packed from codes, and their values out of packed ones; `grouped_weight` says how they lie."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels.errors import OptionError, ShapeError
from octavo_kernels.grouped_weight import (
    CodeKind,
    Finish,
    GroupedCodes,
    GroupedLayout,
    GroupedWeight,
    NestedScales,
    ScaleKind,
    ZeroKind,
)
from octavo_kernels.host_memory import host_empty
from octavo_kernels.packed_weight import PANEL, split_last

LEAST_GROUP = MappingProxyType({2: 16, 3: 32, 4: 8, 8: 8})
"""Inputs of the smallest group, by bits of a code; larger ones are multiples of it."""

_ALIGNMENT = 64
_HEADER_BYTES = 256
_BLOCK = 32  # inputs are filled up to a multiple
_NUM_LEVELS = 16
_CHUNK_VALUES = 1 << 22
_SCALE_KINDS = MappingProxyType(
    {
        torch.float32: ScaleKind.F32,
        torch.float16: ScaleKind.F16,
        torch.bfloat16: ScaleKind.BF16,
        torch.uint8: ScaleKind.E8M0,
        torch.float8_e4m3fn: ScaleKind.E4M3,
    }
)
_SCALE_DTYPES = MappingProxyType({kind: dtype for dtype, kind in _SCALE_KINDS.items()})
_ZERO_KINDS = MappingProxyType({2: ZeroKind.NIBBLES, 3: ZeroKind.NIBBLES, 4: ZeroKind.BYTES, 8: ZeroKind.SHORTS})
_MOST_ZERO = MappingProxyType({ZeroKind.NIBBLES: 15, ZeroKind.BYTES: 255, ZeroKind.SHORTS: (1 << 15) - 1})
_HEADER = struct.Struct("<15q20f")


def pack_grouped(weight: GroupedCodes) -> GroupedWeight:
    """Return a weight packed for `grouped_linear`; its values stay what they are, bit for bit.

    Raises:
        ShapeError, DtypeError, OptionError: if parts of the weight do not fit each other, or groups are of a size that
            products do not take (`LEAST_GROUP`).
    """
    _check_parts(weight)
    out_features, in_features = weight.codes.shape
    layout, num_bytes = _layout(weight)
    data = host_empty((num_bytes,), torch.uint8)
    header = _HEADER.pack(*layout[:-1], *layout.table).ljust(_HEADER_BYTES, b"\0")
    data[:_HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    packed = GroupedWeight(data, layout, out_features, in_features)
    data[_HEADER_BYTES : layout.panels_at] = 0
    if weight.order is not None:
        _put(data, layout.order_at, weight.order.to(torch.int32))
    scales = weight.scales
    if isinstance(scales, NestedScales):
        _put(data, layout.nested_table_at, scales.table)
        _put(data, layout.nested_scales_at, scales.outer)
        scales = scales.codes
    panels = packed.panels()
    step = max(1, _CHUNK_VALUES // (PANEL * layout.padded_inputs))
    for start in range(0, packed.num_panels, step):
        part = panels[start : start + step]
        rows = slice(start * PANEL, min((start + len(part)) * PANEL, out_features))
        part[:, : layout.scales_at] = _code_bytes(weight.codes[rows], len(part), layout)
        part[:, layout.scales_at : layout.zeros_at] = _by_panel(scales[rows], len(part))
        part[:, layout.zeros_at :] = 0
        if weight.zeros is not None:
            zeros = _zero_bytes(weight.zeros[rows], len(part), layout)
            part[:, layout.zeros_at : layout.zeros_at + zeros.shape[1]] = zeros
    return packed


def unpack_grouped(weight: GroupedWeight) -> Tensor:
    """Return the values of a weight: [out_features, in_features] fp32, bit for bit what it was packed from."""
    return torch.cat([values for _, values in unpack_parts(weight)])


def unpack_parts(weight: GroupedWeight, num_values: int = _CHUNK_VALUES) -> Iterator[tuple[slice, Tensor]]:
    """Yield the values of some outputs at a time: which, and [num_outputs, in_features] fp32."""
    layout, panels = weight.layout, weight.panels()
    order = None
    if layout.order_at:
        order = weight.data[layout.order_at : layout.order_at + 4 * weight.in_features].view(torch.int32).argsort()
    groups = (torch.arange(layout.padded_inputs) // layout.group_inputs).clamp(max=layout.num_groups - 1)
    step = max(1, num_values // (PANEL * layout.padded_inputs))
    for start in range(0, weight.num_panels, step):
        part = panels[start : start + step]
        rows = slice(start * PANEL, min((start + len(part)) * PANEL, weight.out_features))
        levels = _levels(part[:, : layout.scales_at], layout)
        scales = _scales(weight, part, start)
        if layout.zeros is not ZeroKind.NONE:
            levels += (layout.middle - _zeros(part, layout))[:, groups]
        if layout.finish is not Finish.NONE and layout.scales is ScaleKind.E4M3:
            scales = _finished(scales, layout)
        values = levels * scales[:, groups]
        if layout.finish is not Finish.NONE and layout.scales is not ScaleKind.E4M3:
            values = _finished(values, layout)
        values = values[: rows.stop - rows.start, : weight.in_features]
        yield rows, values if order is None else values[:, order]


def _check_parts(weight: GroupedCodes) -> None:
    op = "pack_grouped"
    _check.rank(op, "codes", weight.codes, ("out_features", "in_features"))
    out_features, in_features = weight.codes.shape
    _check.option(op, "bits", weight.bits, weight.bits in LEAST_GROUP, "2, 3, 4 or 8")
    if weight.bits < 8:
        _check.dtype(op, "codes", weight.codes, torch.uint8)
        if weight.levels is None:
            raise OptionError(f"{op}: levels is None, expected what each of {1 << weight.bits} codes stands for")
        _check.shape(op, "levels", weight.levels, (1 << weight.bits,))
    else:
        _check.dtype(op, "codes", weight.codes, torch.int8, torch.float8_e4m3fn)
    least, size = LEAST_GROUP[weight.bits], weight.group_size
    if size < 1 or (size < in_features and size % least):
        raise ShapeError(
            f"{op}: group_size is {size}, expected a multiple of {least} for codes of {weight.bits} bits, or all "
            f"{in_features} inputs; multiply such a weight by its values"
        )
    expected = (out_features, -(-in_features // size))
    nested = isinstance(weight.scales, NestedScales)
    scales = weight.scales.codes if isinstance(weight.scales, NestedScales) else weight.scales
    _check.shape(op, "scales", scales, expected)
    _check.dtype(op, "scales", scales, *((torch.uint8,) if nested else _SCALE_KINDS))
    if isinstance(weight.scales, NestedScales):
        power = weight.scales.size
        _check.option(op, "scales.size", power, power > 0 and power & (power - 1) == 0, "a power of two")
        _check.shape(op, "scales.table", weight.scales.table, (256,))
    if weight.zeros is not None:
        _check.shape(op, "zeros", weight.zeros, expected)
        most = _MOST_ZERO[_ZERO_KINDS[weight.bits]]
        fits = bool(((weight.zeros >= 0) & (weight.zeros <= most)).all())
        _check.option(op, "zeros", "outside", fits, f"0 to {most}")
    if weight.order is not None:
        _check.shape(op, "order", weight.order, (in_features,))


def _layout(weight: GroupedCodes) -> tuple[GroupedLayout, int]:
    """Return where everything lies, and the bytes of all."""
    out_features, in_features = weight.codes.shape
    num_panels = -(-out_features // PANEL)
    padded = -(-in_features // _BLOCK) * _BLOCK
    group = min(weight.group_size, padded) if weight.group_size < in_features else padded
    num_groups = -(-in_features // group)
    nested = weight.scales if isinstance(weight.scales, NestedScales) else None
    scale_kind = ScaleKind.NESTED if isinstance(weight.scales, NestedScales) else _SCALE_KINDS[weight.scales.dtype]
    zero_kind = ZeroKind.NONE if weight.zeros is None else _ZERO_KINDS[weight.bits]
    scales_at = padded * PANEL * weight.bits // 8
    zeros_at = scales_at + num_groups * PANEL * (_SCALE_DTYPES.get(scale_kind, torch.uint8)).itemsize
    zero_bytes = PANEL * (0, -(-num_groups // 2), num_groups, 2 * num_groups)[zero_kind]
    order_at = _HEADER_BYTES
    table_at = _aligned(order_at + (0 if weight.order is None else 4 * in_features))
    outer_at = table_at + (0 if nested is None else 4 * 256)
    num_outer = 0 if nested is None else max(len(nested.outer), num_panels * PANEL * num_groups // nested.size + 1)
    panels_at, panel_bytes = _aligned(outer_at + 4 * num_outer), _aligned(zeros_at + zero_bytes)
    levels = [] if weight.levels is None else weight.levels.float().tolist()
    layout = GroupedLayout(
        codes=weight.kind,
        scales=scale_kind,
        zeros=zero_kind,
        finish=weight.finish,
        padded_inputs=padded,
        group_inputs=group,
        num_groups=num_groups,
        panels_at=panels_at,
        panel_bytes=panel_bytes,
        scales_at=scales_at,
        zeros_at=zeros_at,
        order_at=0 if weight.order is None else order_at,
        nested_table_at=table_at,
        nested_scales_at=outer_at,
        nested_shift=0 if nested is None else nested.size.bit_length() - 1,
        nested_offset=0.0 if nested is None else nested.offset,
        factor=weight.factor,
        middle=float(weight.middle),
        unused=0.0,
        table=tuple((levels * _NUM_LEVELS)[:_NUM_LEVELS]) if levels else (0.0,) * _NUM_LEVELS,
    )
    return layout, panels_at + num_panels * panel_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _put(data: Tensor, at: int, values: Tensor) -> None:
    stored = values.contiguous().view(torch.uint8)
    data[at : at + stored.numel()] = stored


def _filled_up(rows: Tensor, num_panels: int, num_columns: int) -> Tensor:
    """Return rows [num_panels, 32, num_columns], zeros after the last row and column."""
    filled = rows.new_zeros(num_panels * PANEL, num_columns)
    filled[: len(rows), : rows.shape[1]] = rows
    return filled.view(num_panels, PANEL, num_columns)


def _by_panel(values: Tensor, num_panels: int) -> Tensor:
    """Return numbers [num_rows, n] as bytes [num_panels, ...], the 32 outputs of a panel side by side."""
    size = values.element_size()
    whole = values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])
    return _filled_up(whole, num_panels, whole.shape[1]).transpose(1, 2).contiguous().view(torch.uint8).flatten(1)


def _code_bytes(codes: Tensor, num_panels: int, layout: GroupedLayout) -> Tensor:
    """Return the codes of some outputs as panels have them: [num_panels, bytes] uint8."""
    bytes_ = _filled_up(codes.contiguous().view(torch.uint8), num_panels, layout.padded_inputs)
    if layout.codes.bits == 8:
        return bytes_.transpose(1, 2).flatten(1)
    if layout.codes is not CodeKind.TABLE_3:
        return _words(bytes_, layout.codes.bits).transpose(1, 2).contiguous().view(torch.uint8).flatten(1)
    low, high = _words(bytes_ & 3, 2), _words(bytes_ >> 2, 1)  # two and one word for every 32 inputs
    words = torch.cat([split_last(low, -1, 2), high[..., None]], dim=-1)  # [panel, output, block, word]
    return words.permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(1)


def _words(fields: Tensor, bits: int) -> Tensor:
    """Pack neighbouring fields into words: [..., num_inputs] uint8 -> [..., num_inputs * bits / 32] int32."""
    in_byte = split_last(fields, -1, 8 // bits)
    bytes_ = in_byte[..., 0].clone()
    for index in range(1, 8 // bits):
        bytes_ |= in_byte[..., index] << (bits * index)
    return bytes_.view(torch.int32)


def _fields(words: Tensor, bits: int) -> Tensor:
    """Take words apart: [..., num_words] int32 -> [..., num_words * 32 / bits] uint8."""
    bytes_ = words.contiguous().view(torch.uint8)
    shifts = range(0, 8, bits)
    return torch.stack([(bytes_ >> shift) & ((1 << bits) - 1) for shift in shifts], dim=-1).flatten(-2)


def _zero_bytes(zeros: Tensor, num_panels: int, layout: GroupedLayout) -> Tensor:
    if layout.zeros is ZeroKind.SHORTS:
        return _by_panel(zeros.to(torch.int16), num_panels)
    zeros = zeros.to(torch.uint8)
    if layout.zeros is ZeroKind.NIBBLES:
        zeros = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
        zeros = zeros[:, ::2] | zeros[:, 1::2] << 4
    return _by_panel(zeros, num_panels)


def _levels(bytes_: Tensor, layout: GroupedLayout) -> Tensor:
    """Return the levels of some panels: [num_rows, padded_inputs] fp32."""
    num_panels, inputs = len(bytes_), layout.padded_inputs
    if layout.codes.bits == 8:
        dtype = torch.int8 if layout.codes is CodeKind.INT8 else torch.float8_e4m3fn
        by_output = bytes_.contiguous().view(num_panels, inputs, PANEL).transpose(1, 2).contiguous()
        return by_output.view(dtype).float().view(-1, inputs)
    words = bytes_.contiguous().view(torch.int32)
    if layout.codes is CodeKind.TABLE_3:
        by_output = words.view(num_panels, -1, 3, PANEL).permute(0, 3, 1, 2)
        codes = _fields(by_output[..., :2].flatten(-2), 2) | _fields(by_output[..., 2], 1) << 2
    else:
        codes = _fields(words.view(num_panels, -1, PANEL).transpose(1, 2), layout.codes.bits)
    return torch.tensor(layout.table)[codes.int()].view(-1, inputs)


def _numbers(part: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return numbers of some panels: [num_rows, n]."""
    values = part[:, start:stop].contiguous().view(dtype).view(len(part), -1, PANEL)
    return values.transpose(1, 2).reshape(len(part) * PANEL, -1)


def _scales(weight: GroupedWeight, part: Tensor, first_panel: int) -> Tensor:
    layout = weight.layout
    stop = layout.scales_at + layout.num_groups * PANEL * _SCALE_DTYPES.get(layout.scales, torch.uint8).itemsize
    stored = _numbers(part, layout.scales_at, stop, _SCALE_DTYPES.get(layout.scales, torch.uint8))
    if layout.scales is ScaleKind.E8M0:
        bits = stored.int()
        return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)
    if layout.scales is not ScaleKind.NESTED:
        return stored.float()
    table = weight.data[layout.nested_table_at : layout.nested_scales_at].view(torch.float32)
    outer = weight.data[layout.nested_scales_at : layout.panels_at].view(torch.float32)
    index = torch.arange(stored.numel()).view(stored.shape) + first_panel * PANEL * layout.num_groups
    return table[stored.int()] * outer[index >> layout.nested_shift] + layout.nested_offset


def _zeros(part: Tensor, layout: GroupedLayout) -> Tensor:
    if layout.zeros is ZeroKind.SHORTS:
        stop = layout.zeros_at + 2 * PANEL * layout.num_groups
        return _numbers(part, layout.zeros_at, stop, torch.int16).float()
    if layout.zeros is ZeroKind.BYTES:
        return _numbers(part, layout.zeros_at, layout.zeros_at + PANEL * layout.num_groups, torch.uint8).float()
    stop = layout.zeros_at + PANEL * -(-layout.num_groups // 2)
    pairs = _numbers(part, layout.zeros_at, stop, torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)[:, : layout.num_groups].float()


def _finished(values: Tensor, layout: GroupedLayout) -> Tensor:
    return values * layout.factor if layout.finish is Finish.TIMES else values / layout.factor
