"""Packed weights and their products of the `cpu` backend: native code, or batched torch where there is none."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import matmul as fallback
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.packed_parts import native_grid
from octavo_kernels.packed_weight import GROUP, PANEL, PackedWeight, WeightFormat
from octavo_kernels.recording import empty_result

FORMAT_CODES = {format_: code for code, format_ in enumerate(WeightFormat)}
_NUM_SLICES = 64  # of an arg-max, as in csrc/argmax.cpp
_BEST_BYTES = 16  # of a slice's best product and its index
_TILE_ROWS = 16  # so many rows lie together
_GROUP_BYTES = 136  # of a group of rounded inputs, at most


def pack_weight(stored: Tensor, weight: PackedWeight) -> None:
    """Fill the weight's data from the rows of a file."""
    if library_for("pack_weight") is None:
        return fallback.pack_weight(stored, weight)
    grid_of(weight)  # made now: products may be recorded, which no op of torch can be
    stored = stored.contiguous()
    args = abi.PackWeightArgs(
        stored=stored.data_ptr(),
        packed=weight.data.data_ptr(),
        format=FORMAT_CODES[weight.format],
        out_features=weight.out_features,
        in_features=weight.in_features,
    )
    return launch(abi.OpKind.PACK_WEIGHT, args, 0, stored, weight.data)


def unpack_weight(weight: PackedWeight, out: Tensor) -> None:
    """Fill out [out_features, in_features] with the weight's values."""
    packed_embedding(weight, torch.arange(weight.out_features), out)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    int8_activations: bool,
    out: Tensor,
    spans: Tensor | None,
) -> None:
    """Fill out with x times the weight, plus the bias."""
    served = library_for("packed_linear") is not None
    if served and x.dtype != torch.float32:
        note_fallback("packed_linear", "x is not float32; convert it with .float()")
        served = False
    if not served:
        return fallback.packed_linear(x, weight, bias, int8_activations, out, spans)
    workspace = None if weight.format.dtype is not None else workspace_of(rounded_bytes(x))
    args = linear_args(x, weight, bias, int8_activations, out, workspace)
    return launch(abi.OpKind.PACKED_LINEAR, args, len(x), x, weight.data, bias, out, workspace)


def linear_args(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    int8_activations: bool,
    out: Tensor,
    workspace: Tensor | None,
) -> abi.PackedLinearArgs:
    """Return what native code is told of a product; whoever passes it on keeps the tensors."""
    return abi.PackedLinearArgs(
        x=x.data_ptr(),
        weight=weight.data.data_ptr(),
        grid=pointer(grid_of(weight)),
        bias=pointer(bias),
        out=out.data_ptr(),
        workspace=pointer(workspace),
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        format=FORMAT_CODES[weight.format],
        out_features=weight.out_features,
        in_features=weight.in_features,
        int8_activations=int8_activations,
    )


def packed_embedding(weight: PackedWeight, token_ids: Tensor, out: Tensor) -> None:
    """Fill out with rows of the weight."""
    if library_for("packed_embedding") is None:
        return fallback.packed_embedding(weight, token_ids, out)
    token_ids = token_ids.contiguous()
    args = abi.PackedEmbeddingArgs(
        weight=weight.data.data_ptr(),
        grid=pointer(grid_of(weight)),
        token_ids=token_ids.data_ptr(),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        format=FORMAT_CODES[weight.format],
        out_features=weight.out_features,
        in_features=weight.in_features,
    )
    return launch(abi.OpKind.PACKED_EMBEDDING, args, len(token_ids), weight.data, token_ids, out)


def packed_argmax(
    x: Tensor, weight: PackedWeight, norms: Tensor | None, int8_activations: bool, ids: Tensor, best: Tensor
) -> None:
    """Fill ids and best with where each row's product is largest, and how large."""
    if library_for("packed_argmax") is None:
        return fallback.packed_argmax(x, weight, norms, int8_activations, ids, best)
    row_bytes = _NUM_SLICES * _BEST_BYTES + 4 * (-(-weight.out_features // PANEL))
    workspace = workspace_of(len(x) * row_bytes + rounded_bytes(x))
    args = abi.PackedArgmaxArgs(
        x=x.data_ptr(),
        weight=weight.data.data_ptr(),
        grid=pointer(grid_of(weight)),
        norms=pointer(norms),
        ids=ids.data_ptr(),
        best=best.data_ptr(),
        workspace=workspace.data_ptr(),
        x_stride=x.stride(0),
        format=FORMAT_CODES[weight.format],
        out_features=weight.out_features,
        in_features=weight.in_features,
        int8_activations=int8_activations,
    )
    return launch(abi.OpKind.PACKED_ARGMAX, args, len(x), x, weight.data, norms, ids, best, workspace)


def grid_of(weight: PackedWeight) -> Tensor | None:
    """Return the table that the codes of a weight are places in, which is kept for good."""
    return None if weight.format.parts is None else native_grid(weight.format.parts)


def rounded_bytes(x: Tensor) -> int:
    """Return the bytes of x rounded to whole numbers, with room to align them."""
    num_rows, in_features = x.shape
    return int(_next_multiple(num_rows, _TILE_ROWS) * (in_features // GROUP) * _GROUP_BYTES) + 64


def _next_multiple(number: int, factor: int) -> int:
    return -(-number // factor) * factor


def workspace_of(num_bytes: int) -> Tensor:
    """Return memory that one product needs."""
    return empty_result((num_bytes,), torch.uint8, torch.device("cpu"))
