"""Products by grouped weights of the `cpu` backend: native code, or batched torch where there is none."""

import torch
from torch import Tensor

from octavo_kernels._dispatch import note_fallback
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import grouped as fallback
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.grouped_weight import GroupedWeight
from octavo_kernels.recording import empty_result

_FORMAT = -1  # as in csrc/ops.h
_NUM_SLICES = 64  # of an arg-max, as in csrc/matmul.cpp
_BEST_BYTES = 16  # of a slice's best product and its index
_PREPARED_BYTES = 160  # of a row's 32 inputs, as in csrc/grouped.h


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Fill out with x times the weight, plus the bias."""
    served = library_for("grouped_linear") is not None
    if served and x.dtype != torch.float32:
        note_fallback("grouped_linear", "x is not float32; convert it with .float()")
        served = False
    if not served:
        return fallback.grouped_linear(x, weight, bias, out)
    workspace = _workspace(_prepared_bytes(x, weight))
    args = abi.PackedLinearArgs(
        x=x.data_ptr(),
        weight=weight.data.data_ptr(),
        bias=pointer(bias),
        out=out.data_ptr(),
        workspace=workspace.data_ptr(),
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        format=_FORMAT,
        out_features=weight.out_features,
        in_features=weight.in_features,
        int8_activations=0,
    )
    return launch(abi.OpKind.PACKED_LINEAR, args, len(x), x, weight.data, bias, out, workspace)


def grouped_argmax(x: Tensor, weight: GroupedWeight, ids: Tensor, best: Tensor) -> None:
    """Fill ids and best with where each row's product is largest, and how large."""
    if library_for("grouped_argmax") is None:
        return fallback.grouped_argmax(x, weight, ids, best)
    workspace = _workspace(_NUM_SLICES * len(x) * _BEST_BYTES + _prepared_bytes(x, weight))
    args = abi.PackedArgmaxArgs(
        x=x.data_ptr(),
        weight=weight.data.data_ptr(),
        ids=ids.data_ptr(),
        best=best.data_ptr(),
        workspace=workspace.data_ptr(),
        x_stride=x.stride(0),
        format=_FORMAT,
        out_features=weight.out_features,
        in_features=weight.in_features,
        int8_activations=0,
    )
    return launch(abi.OpKind.PACKED_ARGMAX, args, len(x), x, weight.data, ids, best, workspace)


def _prepared_bytes(x: Tensor, weight: GroupedWeight) -> int:
    """Return the bytes of x in the weight's order of inputs, with the sums of its groups, and room to align them."""
    return int(len(x) * (weight.layout.padded_inputs // 32) * _PREPARED_BYTES) + 64


def _workspace(num_bytes: int) -> Tensor:
    return empty_result((num_bytes,), torch.uint8, torch.device("cpu"))
