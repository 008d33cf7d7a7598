"""What every launch needs: dtypes that kernels take, sizes that tiles can have, and programs that a device holds."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels.errors import ShapeError


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Require dtypes that the kernels compute with; fp64 belongs to the reference.

    Raises: DtypeError.
    """
    for name, tensor in tensors.items():
        _check.dtype(f"{op} (triton)", name, tensor, torch.float32, torch.float16, torch.bfloat16)


def as_rows(op: str, name: str, tensor: Tensor) -> Tensor:
    """View [..., size] as [num_outer, num_inner, size]: two strides say where each row begins.

    Raises: ShapeError (more leading dimensions than that have strides of their own, or elements not side by side).
    """
    _check.last_dim_contiguous(f"{op} (triton)", **{name: tensor})
    if tensor.dim() < 3:
        return tensor.view(1, 1, -1) if tensor.dim() == 1 else tensor.unsqueeze(1)
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError as error:
        raise ShapeError(
            f"{op} (triton): {name} has strides {tensor.stride()}, expected rows at one distance in all dimensions but "
            f"two; pass {name}.contiguous()"
        ) from error


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which rounds bf16 towards zero and cannot multiply it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def next_power_of_2(value: int) -> int:
    """Return the least power of two that is not below value, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def num_resident_programs(device: torch.device) -> int:
    """Return the grid of a kernel that walks over its work: two programs per multiprocessor.

    A constant of the device, so that a CUDA graph keeps it. In the interpreter programs run one after another.
    """
    if device.type == "cpu":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def rows_of_a_program(num_rows: int, columns: int) -> int:
    """Return how many rows a program takes that could take one: one on a GPU, many at once in the interpreter."""
    return min(next_power_of_2(num_rows), max(1, 2**18 // columns)) if interpreted() else 1


def seconds_of(launch: Callable[[], None]) -> float:
    """Return how long a launch takes, compiled before and with nothing of its in the device's cache."""
    from triton.testing import do_bench

    return float(do_bench(launch)) / 1e3
