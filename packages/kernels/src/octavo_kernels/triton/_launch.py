"""What every launch needs: dtypes that kernels take, and sizes that tiles can have."""

import os

import torch
from torch import Tensor

from octavo_kernels import _check


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Require dtypes that the kernels compute with; fp64 belongs to the reference.

    Raises: DtypeError.
    """
    for name, tensor in tensors.items():
        _check.dtype(f"{op} (triton)", name, tensor, torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which rounds bf16 towards zero and cannot multiply it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def next_power_of_2(value: int) -> int:
    """Return the least power of two that is not below value, at least 1."""
    return 1 << max(value - 1, 0).bit_length()
