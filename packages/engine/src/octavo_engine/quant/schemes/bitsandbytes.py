"""bitsandbytes checkpoints: nf4 and fp4 (QLoRA, arXiv 2305.14314), and int8 (LLM.int8(), arXiv 2208.07339).

A linear [out_features, in_features] of 4 bits is stored as::

    weight                 two neighbouring codes in a byte, the first in the high bits, row after row; of any dtype
    weight.quant_map       [16] fp32, what a code stands for
    weight.absmax          [num_blocks] fp32, the factor of each `blocksize` values; uint8 if quantised in turn
    weight.nested_quant_map, weight.nested_absmax    the same for those: [256] and [num_blocks / nested_blocksize] fp32
    weight.quant_state.bitsandbytes__nf4 (or fp4)    bytes of JSON: shape, blocksize, nested_blocksize, nested_offset

and means `quant_map[code] * absmax`, in which a nested absmax is `quant_map[byte] * absmax + offset`. One of int8::

    weight                 [out_features, in_features] int8
    SCB                    [out_features] fp32, the largest magnitude of a row

and means `(code * SCB) * (1 / 127)`. All of it in fp32. Inputs are not rounded, and no outliers are told apart.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo_engine.quant.schemes.base import Scheme, StoredLinear
from octavo_engine.quant.schemes.settings import Settings
from octavo_engine.weights.cut import Cut
from octavo_engine.weights.quantized import ALL, QuantizedTensor

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
_NUM_CODES, _NUM_NESTED_CODES = 16, 256
INT8_STEP = 1 / 127
_ROW_FORMAT = 0
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Table4(QuantizedTensor):
    """A matrix of 4-bit codes by a table, with a factor per block of neighbouring values, row after row.

    codes: [out_features * in_features / 2] uint8. table: [16] fp32. block_size: values that share a factor.
    absmax: [num_blocks] fp32, or uint8 with `nested_table` [256], `nested_absmax` fp32 and `nested_offset`.
    """

    block_size: int
    codes: Tensor
    table: Tensor
    absmax: Tensor
    nested_block_size: int = 1
    nested_table: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: float = 0.0

    def values(self, rows: slice = ALL) -> Tensor:
        """Return `table[code] * absmax`."""
        start, stop, _ = rows.indices(self.shape[0])
        codes = self.unpacked(start, stop)
        first, last = start * self.shape[1], stop * self.shape[1]
        blocks = torch.arange(first, last, device=codes.device) // self.block_size
        first_block = first // self.block_size
        inner = torch.arange(first_block, -(-last // self.block_size), device=codes.device)
        factors = self._factors(inner)[blocks - first_block]
        return (self.table[codes.int()] * factors).view(stop - start, self.shape[1])

    def part(self, cut: Cut) -> Table4:
        """Return some rows or columns.

        Blocks that are cut are made smaller; unless rows are cut between blocks of factors, those come unquantised.
        """
        out_features, in_features = self.shape
        nested_size = self.nested_block_size if self.nested_table is not None else 1
        if cut.axis == 0 and cut.start * in_features % math.lcm(2, self.block_size * nested_size) == 0:
            return self._rows(cut)
        rows = range(out_features)[cut.span] if cut.axis == 0 else range(out_features)
        columns = range(in_features)[cut.span] if cut.axis == 1 else range(in_features)
        codes = self.unpacked(rows.start, rows.stop).view(len(rows), in_features)[:, columns.start : columns.stop]
        codes = F.pad(codes.flatten(), (0, codes.numel() % 2))
        size = math.gcd(self.block_size, in_features, columns.start, columns.stop)
        firsts = torch.tensor(rows)[:, None] * in_features + torch.arange(columns.start, columns.stop, size)
        return Table4(
            shape=(len(rows), len(columns)),
            block_size=size,
            codes=codes[::2] << 4 | codes[1::2],
            table=self.table,
            absmax=self._factors(firsts.flatten() // self.block_size),
        )

    def _rows(self, cut: Cut) -> Table4:
        """Return rows of which the first begins blocks of values and of factors."""
        first, last = cut.start * self.shape[1], cut.stop * self.shape[1]
        blocks = slice(first // self.block_size, -(-last // self.block_size))
        nested = self.nested_absmax
        if nested is not None:
            nested = nested[blocks.start // self.nested_block_size : -(-blocks.stop // self.nested_block_size)]
        codes = self.codes[first // 2 : -(-last // 2)]
        return replace(self, shape=self.shape_of(cut), codes=codes, absmax=self.absmax[blocks], nested_absmax=nested)

    def unpacked(self, start: int, stop: int) -> Tensor:
        """Return the codes of some rows, one after the other, a byte each."""
        first, last = start * self.shape[1], stop * self.shape[1]
        bytes_ = self.codes[first // 2 : -(-last // 2)]
        return torch.stack([bytes_ >> 4, bytes_ & 15], dim=-1).flatten()[first % 2 :][: last - first]

    def _factors(self, blocks: Tensor) -> Tensor:
        """Return the factors of some blocks, by their numbers."""
        absmax = self.absmax[blocks]
        if self.nested_table is None or self.nested_absmax is None:
            return absmax
        outer = blocks // self.nested_block_size
        return self.nested_table[absmax.int()] * self.nested_absmax[outer] + self.nested_offset


@dataclass(frozen=True, slots=True)
class RowBytes(QuantizedTensor):
    """A matrix of int8 codes [out_features, in_features]; 127 means `largest`, [out_features] fp32, in each row."""

    codes: Tensor
    largest: Tensor

    def values(self, rows: slice = ALL) -> Tensor:
        """Return `(code * largest) * (1 / 127)`."""
        return self.codes[rows].float().mul_(self.largest[rows, None]).mul_(INT8_STEP)

    def part(self, cut: Cut) -> RowBytes:
        """Return some rows or columns."""
        largest = self.largest[cut.span] if cut.axis == 0 else self.largest
        return RowBytes(self.shape_of(cut), cut.part(self.codes), largest)


class BitsAndBytes(Scheme):
    """Reads the linears of a bitsandbytes checkpoint.

    Args:
        settings: the `quantization_config`; what it says of linears, their own tensors say too.
    """

    parts = (
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(*_STATES, "SCB", "weight_format"),
    )
    ignored = ()

    def __init__(self, settings: Settings) -> None:
        settings.only(
            *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"),
            *("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold"),
            *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules"),
            "target_modules",
        )
        settings.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")

    def read(self, linear: StoredLinear) -> QuantizedTensor:
        """Return a linear's weight."""
        return _int8(linear) if "SCB" in linear else _table4(linear)


def _int8(linear: StoredLinear) -> QuantizedTensor:
    codes = linear.matrix("weight", torch.int8)
    largest = linear.scales("SCB", torch.float32)
    if largest.numel() != len(codes):
        linear.corrupt("SCB", f"shape [{len(codes)}]", list(largest.shape))
    if "weight_format" in linear:
        order = linear.tensor("weight_format", torch.uint8)
        if order.numel() != 1 or int(order) != _ROW_FORMAT:
            linear.corrupt("weight_format", f"{_ROW_FORMAT}, codes row after row", order.tolist())
    return RowBytes((codes.shape[0], codes.shape[1]), codes, largest.reshape(-1))


def _table4(linear: StoredLinear) -> QuantizedTensor:
    state = _State(linear)
    shape, block_size = state.shape(), state.size("blocksize")
    num_values = shape[0] * shape[1]
    codes = linear.tensor("weight", *_STORAGE).flatten().view(torch.uint8)
    if len(codes) != -(-num_values // 2):
        linear.corrupt("weight", f"{-(-num_values // 2)} bytes for the shape {list(shape)}", f"{len(codes)} bytes")
    table = linear.scales("weight.quant_map", torch.float32, shape=(_NUM_CODES,))
    num_blocks = -(-num_values // block_size)
    if "weight.nested_absmax" not in linear:
        absmax = linear.scales("weight.absmax", torch.float32, shape=(num_blocks,))
        return Table4(shape, block_size, codes, table, absmax)
    nested_size = state.size("nested_blocksize")
    return Table4(
        shape,
        block_size,
        codes,
        table,
        linear.tensor("weight.absmax", torch.uint8, shape=(num_blocks,)),
        nested_size,
        linear.scales("weight.nested_quant_map", torch.float32, shape=(_NUM_NESTED_CODES,)),
        linear.scales("weight.nested_absmax", torch.float32, shape=(-(-num_blocks // nested_size),)),
        state.offset(),
    )


class _State:
    """The JSON that describes a linear of 4 bits, checked as it is read."""

    def __init__(self, linear: StoredLinear) -> None:
        self._linear = linear
        self._part = next((part for part in _STATES if part in linear), _STATES[0])
        text = linear.tensor(self._part, torch.uint8).flatten()
        if len(text) > _MAX_STATE_BYTES:
            self._fail(f"at most {_MAX_STATE_BYTES} bytes", f"{len(text)}")
        try:
            values = json.loads(bytes(text.tolist()))
        except (ValueError, RecursionError) as error:
            linear.corrupt(self._part, "JSON", error)
        if not isinstance(values, dict):
            self._fail("an object", values)
        self._values: dict[str, Any] = values

    def _fail(self, expected: str, found: object) -> NoReturn:
        self._linear.corrupt(self._part, expected, found)

    def shape(self) -> tuple[int, int]:
        match self._values.get("shape"):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
            case found:
                return self._fail("a 'shape' [rows, columns]", found)

    def size(self, key: str) -> int:
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._fail(f"a size {key!r}", value)
        return value

    def offset(self) -> float:
        value = self._values.get("nested_offset")
        if not isinstance(value, int | float) or not abs(value) < float("inf"):
            self._fail("a number 'nested_offset'", value)
        return float(value)
