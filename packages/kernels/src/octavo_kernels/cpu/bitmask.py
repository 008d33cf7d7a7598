"""apply_token_bitmask of the `cpu` backend: native code, or batched torch where there is none."""

from torch import Tensor

from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import bitmask as fallback
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for


def apply_token_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor | None) -> None:
    """Remove the tokens whose bit is 0."""
    if library_for("apply_token_bitmask") is None:
        return fallback.apply_token_bitmask(logits, bitmask, rows)
    rows = None if rows is None else rows.contiguous()
    args = abi.ApplyTokenBitmaskArgs(
        logits.data_ptr(),
        bitmask.data_ptr(),
        pointer(rows),
        logits.stride(0),
        bitmask.stride(0),
        logits.shape[1],
    )
    return launch(abi.OpKind.APPLY_TOKEN_BITMASK, args, len(bitmask), logits, bitmask, rows)
