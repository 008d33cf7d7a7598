"""Products by weights that stay packed, as a checkpoint stores them: dense, or in GGUF's blocks of 32 or 256.

Each output of a product is reduced in an order that depends on the weight's shape alone, never on the number of rows,
on where a row stands among them or on threads: a row computed alone equals the same row in any batch, bit for bit.
(The reference computes in fp64. In Triton the order is as fixed, but rows in fp16 and bf16 share their bits only with
batches of one tile height: up to 16 rows, 32, 64, and more.)
"""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._spans import PACKED_STEP, spans_workspace
from octavo_kernels._workspace import check_workspace
from octavo_kernels.host_memory import host_empty
from octavo_kernels.packed_weight import PackedWeight, WeightFormat, packed_num_bytes
from octavo_kernels.recording import empty_result

_ROWS_AT_ONCE = 2048  # unpacked


def pack_weight(stored: Tensor, format: WeightFormat, *, in_features: int) -> PackedWeight:  # noqa: A002  # the field's name
    """Return a weight packed for products; its values stay what they are, bit for bit.

    Args:
        stored: [out_features, in_features] of the format's dtype, or for block formats [out_features, bytes per row]
            uint8, rows as a GGUF file stores them. The stride of rows is free. Not modified.
        format: what `stored` holds.
        in_features: columns of the weight; a multiple of 32 for block formats, of 256 for those of K types and iq4_xs.

    Returns:
        the weight, in new memory on the device of `stored`.

    Raises:
        ShapeError, DtypeError, OptionError: an argument does not fit.

    """
    op = "pack_weight"
    _check.rank(op, "stored", stored, ("out_features", "in_features" if format.dtype else "bytes per row"))
    num_bytes = packed_num_bytes(format, stored.shape[0], in_features)
    if format.block_bytes is not None:
        _check.dtype(op, "stored", stored, torch.uint8)
        _check.shape(op, "stored", stored, ("out_features", in_features // format.block_inputs * format.block_bytes))
    else:
        assert format.dtype is not None
        _check.dtype(op, "stored", stored, format.dtype)
        _check.shape(op, "stored", stored, ("out_features", in_features))
    _check.last_dim_contiguous(op, stored=stored)
    on_host = stored.device.type == "cpu"
    data = (
        host_empty((num_bytes,), torch.uint8)
        if on_host
        else torch.empty(num_bytes, dtype=torch.uint8, device=stored.device)
    )
    weight = PackedWeight(data, format, stored.shape[0], in_features)
    implementation(op, stored.device)(stored, weight)
    return weight


def unpack_weight(weight: PackedWeight) -> Tensor:
    """Return the values of a weight: [out_features, in_features] fp32, bit for bit what the file means."""
    out = torch.empty((weight.out_features, weight.in_features), dtype=torch.float32, device=weight.data.device)
    implementation("unpack_weight", out.device)(weight, out)
    return out


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    int8_activations: bool = False,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return x times the transposed weight, plus the bias.

    With `int8_activations` each group of 32 inputs of a row is rounded to 8 bits first: s = max|x| / 127 in fp32, and
    code = x * (1 / s), rounded half to even; code = 0 where s or 1 / s is not finite. The product is then the sum over
    groups of s * (d * sum(code * q) + m * sum(code)), whose inner sums are exact; an input that is not finite makes
    every output of its row NaN. Natively, with Q4_0, Q4_1 and Q8_0, the s that multiplies is rounded to 22 bits, and
    inputs of 2**111 and more count as not finite.

    Without it the product is exact to fp32: a chain of fp32 additions, or, for block formats where bytes are multiplied
    fast, inputs as three digits of 8 bits in groups of 32 whose sums are exact (the scheme of Ootomo, Ozaki and Yokota,
    arXiv 2306.11975, with one scale per group). Inputs below 2**-104 are then rounded to multiples of 2**-126. Triton
    multiplies codes as whole numbers in the dtype of x, exactly, and applies scales to the sums of a group in fp32; for
    fp32 by tensor cores in three parts of tf32.

    Args:
        x: [num_tokens, in_features] fp32, fp16 or bf16; the stride of rows is free. Native code on CPUs is for fp32.
        weight: packed by `pack_weight`.
        bias: [out_features] fp32, or None.
        int8_activations: for block formats only.
        out: [num_tokens, out_features] in the dtype of x, the stride of rows is free; allocated when None.
        workspace: for Triton, memory for the sums of spans, [at least packed_linear_workspace(num_tokens, weight)]
            uint8, which the call overwrites; allocated when None. Other backends leave it alone.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.
        OptionError: int8_activations with a dense format.

    """
    op = "packed_linear"
    device = _check.same_device(op, x=x, weight=weight.data, bias=bias, out=out, workspace=workspace)
    _check_product(op, x, weight, int8_activations, torch.float32, torch.float16, torch.bfloat16)
    if bias is not None:
        _check.shape(op, "bias", bias, (weight.out_features,))
        _check.dtype(op, "bias", bias, torch.float32)
        _check.last_dim_contiguous(op, bias=bias)
    out = _output(op, out, (len(x), weight.out_features), x.dtype, device)
    if workspace is not None:
        workspace = check_workspace(op, workspace, packed_linear_workspace(len(x), weight), device)
    if len(x):
        implementation(op, device)(x, weight, bias, int8_activations, out, workspace)
    return out


def packed_linear_workspace(num_tokens: int, weight: PackedWeight) -> int:
    """Return the bytes of workspace that `packed_linear` wants in Triton for so many tokens, 0 where it needs none."""
    return spans_workspace(num_tokens, weight.out_features, -(-weight.in_features // PACKED_STEP))


def packed_embedding(weight: PackedWeight, token_ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return rows of a weight, exactly as `unpack_weight` has them.

    Args:
        weight: packed by `pack_weight`.
        token_ids: [num_tokens] int64, each below out_features; one out of range is the caller's mistake.
        out: [num_tokens, in_features] fp32, the stride of rows is free; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError: a tensor does not fit.

    """
    op = "packed_embedding"
    device = _check.same_device(op, weight=weight.data, token_ids=token_ids, out=out)
    _check.rank(op, "token_ids", token_ids, ("num_tokens",))
    _check.dtype(op, "token_ids", token_ids, torch.int64)
    out = _output(op, out, (len(token_ids), weight.in_features), torch.float32, device)
    if len(token_ids):
        implementation(op, device)(weight, token_ids, out)
    return out


def weight_norms(weight: PackedWeight) -> Tensor:
    """Return the Euclidean norm of each output's weights, rounded up: [out_features] fp32, for `packed_argmax`."""
    norms = torch.empty(weight.out_features, dtype=torch.float32, device=weight.data.device)
    margin = 1.0 + weight.in_features * 2.0**-23  # more than fp32 loses, and where squares vanish, more than these are
    for some, rows in zip(
        norms.split(_ROWS_AT_ONCE), torch.arange(weight.out_features).split(_ROWS_AT_ONCE), strict=True
    ):
        values = packed_embedding(weight, rows.to(norms.device))
        some.copy_(torch.linalg.vector_norm(values, dim=-1).mul_(margin).add_(1e-18 * weight.in_features))
    return norms


def packed_argmax(
    x: Tensor, weight: PackedWeight, *, norms: Tensor | None = None, int8_activations: bool = False
) -> tuple[Tensor, Tensor]:
    """Return where each row's product is largest, and how large, without keeping the products.

    With `norms`, native code screens the products of several rows by inputs rounded to 8 bits, and computes in full
    only those that may be the largest: of Q4_0, Q8_0 and the other block formats without minimums. The answer has the
    same bits.

    Args:
        x: [num_tokens, in_features] fp32; the stride of rows is free.
        weight: packed by `pack_weight`.
        norms: [out_features] fp32, `weight_norms` of the weight; None: every product is computed in full.
        int8_activations: as in `packed_linear`; nothing is screened then.

    Returns:
        ids: [num_tokens] int64, the lowest index of the largest product.
        best: [num_tokens] fp32, that product. If any product of a row is NaN, its best is NaN, and its id is some
        index.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: as in `packed_linear`.

    """
    op = "packed_argmax"
    device = _check.same_device(op, x=x, weight=weight.data, norms=norms)
    _check_product(op, x, weight, int8_activations, torch.float32)
    check_norms(op, norms, weight)
    ids = empty_result((len(x),), torch.int64, device)
    best = empty_result((len(x),), torch.float32, device)
    if len(x):
        implementation(op, device)(x, weight, norms, int8_activations, ids, best)
    return ids, best


def check_norms(op: str, norms: Tensor | None, weight: PackedWeight) -> None:
    """Check the norms of a weight's outputs, if they are given."""
    if norms is not None:
        _check.shape(op, "norms", norms, (weight.out_features,))
        _check.dtype(op, "norms", norms, torch.float32)
        _check.last_dim_contiguous(op, norms=norms)


def _check_product(op: str, x: Tensor, weight: PackedWeight, int8_activations: bool, *dtypes: torch.dtype) -> None:
    _check.shape(op, "x", x, ("num_tokens", weight.in_features))
    _check.dtype(op, "x", x, *dtypes)
    _check.last_dim_contiguous(op, x=x)
    served = not int8_activations or weight.format.dtype is None
    _check.option(op, "int8_activations", int8_activations, served, f"False for {weight.format.value} weights")


def _output(op: str, out: Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        return empty_result(shape, dtype, device)
    _check.shape(op, "out", out, shape)
    _check.dtype(op, "out", out, dtype)
    _check.last_dim_contiguous(op, out=out)
    return out
