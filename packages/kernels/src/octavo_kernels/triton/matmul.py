"""Products by packed weights, and rows of them, in Triton: read as `octavo_kernels.packed_weight` says they lie.

A program owns BLOCK_M rows and BLOCK_N outputs, and walks the groups of 32 inputs. Codes become whole numbers that
every dtype of x holds; the products of a group, or of half a group where halves have scales of their own, are summed
before the scale is applied in fp32. So no value is rounded to the dtype of x, as happens when a weight is expanded.

Few rows are a matter of reading the weight: as in `weight_only`, spans of inputs are programs of their own, and a
second kernel adds their sums in order; for many rows one program adds all spans of its tile, in the same order.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._spans import PACKED_STEP, num_spans, splits_rows
from octavo_kernels._workspace import take
from octavo_kernels.errors import OptionError
from octavo_kernels.packed_weight import GROUP, PANEL, PackedWeight
from octavo_kernels.triton._codes import codes_of, inverse_of, largest_magnitude, stored
from octavo_kernels.triton._launch import check_dtypes, interpreted, next_power_of_2
from octavo_kernels.triton._planes import group_numbers, group_scales, plane_constants, plane_layout
from octavo_kernels.triton._tiles import dot_precision, sum_spans, tile_of
from octavo_kernels.triton._tuned import device_name as _device_name
from octavo_kernels.tuning import Config, Key, row_bucket, tuning_cache

_GROUP = tl.constexpr(GROUP)
_PANEL = tl.constexpr(PANEL)
_STEP_GROUPS = tl.constexpr(PACKED_STEP // GROUP)
_INT8_MAX = tl.constexpr(127.0)

TUNABLE = ("columns", "groups", "num_warps", "num_stages")
"""What a tuned configuration says of a tile."""


class Tile(NamedTuple):
    """How a product is cut: rows and outputs of a tile, groups of inputs at once (1, 2 or 4), warps and stages."""

    rows: int
    columns: int
    groups: int
    num_warps: int
    num_stages: int


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    int8_activations: bool,
    out: Tensor,
    workspace: Tensor | None,
    tile: Tile | None = None,
) -> None:
    """Fill out as `octavo_kernels.packed_linear` says; with a tile that is tried, or the one known to be best."""
    check_dtypes("packed_linear", x=x)
    num_tokens, out_features = out.shape
    num_steps = triton.cdiv(weight.in_features, PACKED_STEP)
    spans = num_spans(out_features, num_steps)
    split = spans > 1 and splits_rows(num_tokens)
    target = out
    if split:
        if workspace is None:
            workspace = torch.empty(spans * num_tokens * out_features * 4, dtype=torch.uint8, device=x.device)
        target = take(workspace, 0, torch.float32, spans, num_tokens, out_features)[0]
    tile = tile or _tuned_tile(x, weight)
    tiles = triton.cdiv(num_tokens, tile.rows) * triton.cdiv(out_features, tile.columns)
    wide = interpreted() and (x.dtype == torch.bfloat16 or int8_activations)
    _product[(tiles, spans if split else 1)](
        x, *_views(weight), None if split else bias, target,
        num_tokens, out_features, weight.in_features, weight.num_bytes // weight.num_panels // 4,
        triton.cdiv(num_steps, spans), num_steps, 1 if split else spans, x.stride(0), target.stride(-2),
        **_constants(weight), ROUNDED=int8_activations, UNROLLED=tile.groups, BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        WIDE_DOT=wide, PRECISION=dot_precision(_operand_dtype(x, weight)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if split:
        sum_spans(target, bias, out)


def packed_embedding(weight: PackedWeight, token_ids: Tensor, out: Tensor) -> None:
    """Fill out as `octavo_kernels.packed_embedding` says."""
    num_tokens = len(token_ids)
    rows = min(64, next_power_of_2(num_tokens)) if interpreted() else 1
    _rows[(triton.cdiv(num_tokens, rows), triton.cdiv(weight.in_features, PACKED_STEP))](
        *_views(weight), token_ids.contiguous(), out,
        num_tokens, weight.in_features, weight.num_bytes // weight.num_panels // 4, out.stride(0),
        **_constants(weight), BLOCK_N=rows, num_warps=1,
    )  # fmt: skip


def choose_tile(num_tokens: int, dtype: torch.dtype) -> Tile:
    """Return the tile of a product: few rows read the weight once, many take wgmma's 64 rows or twice that.

    fp32 has tiles of one height, so that a row's bits do not depend on how many rows come with it.
    """
    if interpreted():
        return Tile(64, 128, 1, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 32, 1, 4, 3)
    if num_tokens <= 16:
        return Tile(16, 64, 4, 4, 4)
    if splits_rows(num_tokens):
        return Tile(32, 64, 1, 4, 4)
    return Tile(64, 64, 1, 4, 3) if num_tokens <= 64 else Tile(128, 64, 1, 8, 3)


def tuning_key(x: Tensor, weight: PackedWeight) -> Key:
    """Return what a product's configuration is kept by."""
    shape = f"{weight.format.value} {weight.out_features}x{weight.in_features}"
    return Key("packed_linear", _device_name(x.device), str(x.dtype).removeprefix("torch."), row_bucket(len(x)), shape)


def _tuned_tile(x: Tensor, weight: PackedWeight) -> Tile:
    """Return the default tile with what the tuning cache says in its place; rows stay, and with them a row's bits."""
    default = choose_tile(len(x), x.dtype)
    if interpreted() or x.dtype == torch.float32:
        return default
    return tile_from(default, tuning_cache().find(tuning_key(x, weight)))


def tile_from(default: Tile, config: Config | None) -> Tile:
    """Return a tile with the sizes of a configuration.

    Raises: OptionError (a name that a tile has not, or rows, which are fixed; groups that do not divide a step).
    """
    unknown = {*(config or {})} - {*TUNABLE}
    if unknown:
        raise OptionError(
            f"packed_linear (triton): a tuned configuration has {', '.join(sorted(unknown))}, expected "
            f"{', '.join(TUNABLE)}; measure again with python -m octavo_kernels.tune"
        )
    tile = default._replace(**(config or {}))
    if tile.groups not in (1, 2, 4):  # a span's last iteration would reach into the next span
        raise OptionError(
            f"packed_linear (triton): a tuned configuration has groups {tile.groups}, expected 1, 2 or 4; "
            "measure again with python -m octavo_kernels.tune"
        )
    return tile


def _operand_dtype(x: Tensor, weight: PackedWeight) -> torch.dtype:
    """Return the dtype that is multiplied: that of x, but fp32 where a dense weight has another."""
    return x.dtype if weight.format.dtype in (None, x.dtype) else torch.float32


def _views(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a weight's bytes as words, as halves and as bytes; of a dense one its values alone."""
    if weight.format.dtype is not None:
        return weight.data.view(weight.format.dtype), None, None
    return weight.data.view(torch.int32), weight.data.view(torch.float16), weight.data.view(torch.int8)


def _constants(weight: PackedWeight) -> dict[str, Any]:
    """Return what a format is to the kernels; INPUTS share a scale, 0 in dense formats."""
    if weight.format.dtype is None:
        return {"INPUTS": plane_layout(weight.format).scale_inputs, **plane_constants(weight.format)}
    none = dict.fromkeys(("SCALES", "LOW", "HIGH", "ZERO", "SCALES_AT", "CODES_AT", "GROUP_WORDS", "BLOCK_WORDS"), 0)
    return {"INPUTS": 0, "NUM_GROUPS": 1, **none, **dict.fromkeys(("MINIMUM", "NIBBLES", "LEVELED"), False)}


@triton.jit
def _product(
    x_ptr, words_ptr, halves_ptr, bytes_ptr, bias_ptr, out_ptr,
    num_tokens, out_features, in_features, panel_words, span_steps, num_steps, num_spans, x_stride, out_stride,
    INPUTS: tl.constexpr, NUM_GROUPS: tl.constexpr, SCALES: tl.constexpr, MINIMUM: tl.constexpr,
    NIBBLES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELED: tl.constexpr, ZERO: tl.constexpr,
    SCALES_AT: tl.constexpr, CODES_AT: tl.constexpr, GROUP_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    ROUNDED: tl.constexpr, UNROLLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of one span, or of all; see the file's docstring for the order."""
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N), 8
    )  # fmt: skip
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < num_tokens
    in_columns = columns < out_features
    x_rows = x_ptr + rows[:, None] * x_stride
    panels, lanes = (columns // _PANEL).to(tl.int64), columns % _PANEL
    # Rounded inputs and codes are whole numbers that bf16 holds.
    narrow: tl.constexpr = tl.bfloat16 if ROUNDED else x_ptr.dtype.element_ty
    dtype: tl.constexpr = tl.float32 if WIDE_DOT else narrow
    first_span = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for span in range(first_span, first_span + num_spans):
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        first_group = span * span_steps * _STEP_GROUPS
        end_group = tl.minimum((span + 1) * span_steps, num_steps) * _STEP_GROUPS
        for start in range(first_group, end_group, UNROLLED):
            for index in tl.static_range(UNROLLED):
                group = start + index
                inputs = group * _GROUP + tl.arange(0, _GROUP)
                if INPUTS == 0:
                    inside = inputs < in_features
                    x = tl.load(x_rows + inputs[None, :], mask=in_rows[:, None] & inside[None, :], other=0.0)
                    weight_ptrs = (
                        words_ptr + (panels * in_features * _PANEL + lanes)[None, :] + inputs[:, None] * _PANEL
                    )
                    numbers = tl.load(weight_ptrs, mask=inside[:, None] & in_columns[None, :], other=0.0)
                    if WIDE_DOT or numbers.dtype != x.dtype:
                        x, numbers = x.to(tl.float32), numbers.to(tl.float32)
                    sums = tl.dot(x, numbers, acc=sums, input_precision=PRECISION)
                else:
                    # A step's last groups may lie past the end.
                    in_group = columns < tl.where(group * _GROUP < in_features, out_features, 0)
                    x_mask = rows < tl.where(group * _GROUP < in_features, num_tokens, 0)
                    block, place = group // NUM_GROUPS, group % NUM_GROUPS
                    first_word = panels * panel_words + block * BLOCK_WORDS
                    if ROUNDED:
                        x = tl.load(x_rows + inputs[None, :], mask=x_mask[:, None], other=0.0).to(tl.float32)
                        x_scales = tl.div_rn(largest_magnitude(x), _INT8_MAX)
                        inverses = inverse_of(x_scales)[:, None]
                    for part in tl.static_range(_GROUP // INPUTS):
                        numbers = group_numbers(
                            words_ptr + (first_word + CODES_AT + place * GROUP_WORDS + lanes), in_group,
                            part, INPUTS, dtype, LOW, HIGH, LEVELED, ZERO,
                        )  # fmt: skip
                        d, m = group_scales(
                            halves_ptr + (first_word * 2 + lanes), bytes_ptr + (first_word * 4 + lanes),
                            in_group, place, NUM_GROUPS, part, SCALES, MINIMUM, NIBBLES, SCALES_AT,
                        )  # fmt: skip
                        part_inputs = group * _GROUP + part * INPUTS + tl.arange(0, INPUTS)
                        x = tl.load(x_rows + part_inputs[None, :], mask=x_mask[:, None], other=0.0)
                        if ROUNDED:
                            x = codes_of(x.to(tl.float32), inverses, tl.int8, _INT8_MAX).to(dtype)
                        x = x.to(dtype)
                        products = tl.dot(x, numbers, input_precision=PRECISION) * d[None, :]
                        if MINIMUM:
                            products += tl.sum(x.to(tl.float32), 1)[:, None] * m[None, :]
                        sums += products * x_scales[:, None] if ROUNDED else products
        total += sums
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    out_rows = (first_span * num_tokens + rows) * out_stride
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(out_ptr + out_rows[:, None] + columns[None, :], stored(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows(
    words_ptr, halves_ptr, bytes_ptr, ids_ptr, out_ptr, num_tokens, in_features, panel_words, out_stride,
    INPUTS: tl.constexpr, NUM_GROUPS: tl.constexpr, SCALES: tl.constexpr, MINIMUM: tl.constexpr,
    NIBBLES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LEVELED: tl.constexpr, ZERO: tl.constexpr,
    SCALES_AT: tl.constexpr, CODES_AT: tl.constexpr, GROUP_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the inputs of one step, of BLOCK_N rows of the weight."""
    tokens = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_tokens = tokens < num_tokens
    ids = tl.load(ids_ptr + tokens, mask=in_tokens, other=0)
    panels, lanes = ids // _PANEL, ids % _PANEL
    out_rows = out_ptr + tokens[None, :] * out_stride
    for index in tl.static_range(_STEP_GROUPS):
        group = tl.program_id(1) * _STEP_GROUPS + index
        inputs = group * _GROUP + tl.arange(0, _GROUP)
        if INPUTS == 0:
            mask = (inputs < in_features)[:, None] & in_tokens[None, :]
            weight_ptrs = words_ptr + (panels * in_features * _PANEL + lanes)[None, :] + inputs[:, None] * _PANEL
            tl.store(out_rows + inputs[:, None], tl.load(weight_ptrs, mask=mask).to(tl.float32), mask=mask)
        else:
            in_group = tokens < tl.where(group * _GROUP < in_features, num_tokens, 0)
            block, place = group // NUM_GROUPS, group % NUM_GROUPS
            first_word = panels * panel_words + block * BLOCK_WORDS
            for part in tl.static_range(_GROUP // INPUTS):
                numbers = group_numbers(
                    words_ptr + (first_word + CODES_AT + place * GROUP_WORDS + lanes), in_group,
                    part, INPUTS, tl.float32, LOW, HIGH, LEVELED, ZERO,
                )  # fmt: skip
                d, m = group_scales(
                    halves_ptr + (first_word * 2 + lanes), bytes_ptr + (first_word * 4 + lanes), in_group, place,
                    NUM_GROUPS, part, SCALES, MINIMUM, NIBBLES, SCALES_AT,
                )  # fmt: skip
                values = numbers * d[None, :]
                if MINIMUM:  # without one the sign of zero stays
                    values += m[None, :]
                part_inputs = group * _GROUP + part * INPUTS + tl.arange(0, INPUTS)
                tl.store(out_rows + part_inputs[:, None], values, mask=in_group[None, :])
