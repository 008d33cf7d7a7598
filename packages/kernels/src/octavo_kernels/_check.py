"""The one form of argument errors: shape, dtype, device and plain options.

Nothing here reads a tensor's values, so no check waits for a device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels.errors import DeviceError, DtypeError, OptionError, ShapeError


def shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Require a shape; a string stands for a dimension of any size and names it in the message.

    Raises: ShapeError.
    """
    actual = tensor.shape
    if len(actual) == len(expected) and all(
        want == have or isinstance(want, str) for want, have in zip(expected, actual, strict=True)
    ):
        return
    wanted = ", ".join(str(dim) for dim in expected)
    raise ShapeError(f"{op}: {name} has shape {list(actual)}, expected [{wanted}]; pass a tensor of that shape")


def rank(op: str, name: str, tensor: Tensor, dims: Sequence[str]) -> None:
    """Require a number of dimensions, named for the message.

    Raises: ShapeError.
    """
    if tensor.dim() != len(dims):
        shape(op, name, tensor, dims)


def last_dim_contiguous(op: str, **tensors: Tensor) -> None:
    """Require stride 1 in the last dimension, the only stride that is not free.

    Raises: ShapeError.
    """
    for name, tensor in tensors.items():
        if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ShapeError(
                f"{op}: {name} has stride {tensor.stride(-1)} in its last dimension, expected 1; "
                f"pass {name}.contiguous()"
            )


def contiguous(op: str, **tensors: Tensor) -> None:
    """Require elements that lie side by side, in order.

    Raises: ShapeError.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{op}: {name} has strides {tensor.stride()}, expected contiguous memory; pass {name}.contiguous()"
            )


def dtype(op: str, name: str, tensor: Tensor, *expected: torch.dtype) -> None:
    """Require one of some dtypes.

    Raises: DtypeError.
    """
    if tensor.dtype not in expected:
        wanted = " or ".join(str(item).removeprefix("torch.") for item in expected)
        actual = str(tensor.dtype).removeprefix("torch.")
        raise DtypeError(f"{op}: {name} has dtype {actual}, expected {wanted}; convert it with {name}.to(...)")


def floating(op: str, **tensors: Tensor) -> None:
    """Require floating-point tensors.

    Raises: DtypeError.
    """
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            actual = str(tensor.dtype).removeprefix("torch.")
            raise DtypeError(
                f"{op}: {name} has dtype {actual}, expected a floating dtype; convert it with {name}.to(...)"
            )


def same_device(op: str, **tensors: Tensor | None) -> torch.device:
    """Require one device for all tensors that are given, and return it.

    Raises: DeviceError.
    """
    device: torch.device | None = None
    first = ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            device, first = tensor.device, name
        elif tensor.device != device:
            raise DeviceError(
                f"{op}: {name} is on {tensor.device}, expected {device} where {first} is; "
                f"move it with {name}.to({first}.device)"
            )
    assert device is not None
    return device


def option(op: str, name: str, value: object, holds: bool, expected: str) -> None:
    """Require that a plain argument is in its range.

    Raises: OptionError.
    """
    if not holds:
        raise OptionError(f"{op}: {name} is {value!r}, expected {expected}; pass such a value")


def grouped_heads(op: str, num_heads: int, num_kv_heads: int) -> None:
    """Require that query heads share key heads evenly.

    Raises: ShapeError.
    """
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ShapeError(
            f"{op}: q has {num_heads} heads, expected a multiple of the {num_kv_heads} key heads; "
            "pass q with num_kv_heads * group heads"
        )
