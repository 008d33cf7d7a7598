"""How values in fp32 become what a tensor stores: rounded to its dtype, or codes of 8 bits with their scales."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803, SIM300
# Triton has no types, and its compile-time parameters are written in capitals.

import triton
import triton.language as tl

from octavo_kernels.triton._launch import interpreted

_INTERPRETED = tl.constexpr(interpreted())
_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to a small number in fp32 rounds that half to even
_NO_RECIPROCAL = tl.constexpr(2.0**-128)  # the largest number whose reciprocal is not finite in fp32
_TO_LEAST_CODE = tl.constexpr(24576.0)  # 1.5 * 2**14: the same to a multiple of 2**-9, the least of e4m3


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """Return x, fp32, in a floating dtype, rounded half to even.

    The interpreter cuts bits off for bf16 and carries none for e4m3, so it gets numbers that need no rounding.
    """
    if _INTERPRETED and DTYPE != tl.float32 and DTYPE != tl.float16:
        kept: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 20
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + (((bits >> kept) & 1) + ((1 << (kept - 1)) - 1))) & (-1 << kept)
        rounded = bits.to(tl.float32, bitcast=True)
        if DTYPE != tl.bfloat16:
            rounded = tl.where(tl.abs(x) < 0.015625, (x + _TO_LEAST_CODE) - _TO_LEAST_CODE, rounded)
        x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)


@triton.jit
def inverse_of(scale):
    """Return 1 / scale, and 0 where the scale or that is not finite."""
    usable = (scale > _NO_RECIPROCAL) & (scale < float("inf"))
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def largest_magnitude(x):
    """Return the largest of |x| along the last of two axes, NaN where one of them is."""
    # The largest number that is not NaN would hide that one is.
    poisoned = tl.max((x != x).to(tl.int32), 1) > 0
    return tl.where(poisoned, float("nan"), tl.max(tl.abs(x), 1))


@triton.jit
def larger(a, b):
    """Return the larger of two magnitudes, NaN where one of them is."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def codes_of(x, inverse, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """Return x * inverse in a dtype of codes; 0 where inverse is, whatever x."""
    codes = tl.where(inverse == 0.0, 0.0, x) * inverse
    codes = tl.where(codes == codes, tl.minimum(tl.maximum(codes, -LARGEST), LARGEST), codes)
    return ((codes + _TO_WHOLE) - _TO_WHOLE).to(tl.int8) if DTYPE == tl.int8 else stored(codes, DTYPE)


@triton.jit
def store_codes(
    x, out, mask, scales_ptr, rows, num_rows, first_group, num_scales,
    GROUPS: tl.constexpr, LARGEST: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Store x [ROWS, BLOCK], 0 outside the mask, as codes in GROUPS equal parts of a row, and the scales of these.

    out: pointers like x. rows: [ROWS, 1]. num_scales: of a row, of which the first part has number first_group.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    if FIXED:
        codes = codes_of(x, inverse_of(tl.load(scales_ptr)), dtype, LARGEST)
    else:
        num_tile_rows: tl.constexpr = x.shape[0]
        size: tl.constexpr = x.shape[1] // GROUPS
        parts = tl.reshape(x, [num_tile_rows * GROUPS, size])
        scales = tl.div_rn(largest_magnitude(parts), LARGEST)
        codes = tl.reshape(codes_of(parts, inverse_of(scales)[:, None], dtype, LARGEST), x.shape)
        groups = first_group + tl.arange(0, GROUPS)[None, :]
        places = scales_ptr + rows * num_scales + groups
        tl.store(places, tl.reshape(scales, [num_tile_rows, GROUPS]), mask=(rows < num_rows) & (groups < num_scales))
    tl.store(out, codes, mask=mask)
