"""CodeOutput: where an op leaves its result in 8 bits, and with which scales; checked once and handed to a backend."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import _check

SCALE_GROUP = 128
"""Elements that share a scale where a row has several."""

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True)
class CodeOutput:
    """Memory for codes; nobody replaces it after construction.

    codes: [..., size] int8 or float8_e4m3fn, filled by the op.
    scales: [..., num_groups] fp32, contiguous, filled by the op; where is_fixed, [1, 1], read by it.
    group_size: elements of a row that share a scale; size itself where a row has one.
    is_fixed: whether the scale is the caller's.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    is_fixed: bool

    @property
    def largest(self) -> float:
        """The largest code."""
        return LARGEST_CODE[self.codes.dtype]


def code_output(
    op: str,
    shape: Sequence[int],
    device: torch.device,
    *,
    dtype: torch.dtype,
    group_size: int | None,
    fixed_scale: Tensor | None,
    out: Tensor | None,
    scales: Tensor | None,
) -> CodeOutput:
    """Check the arguments that all ops with such a result share, and allocate what is not given.

    Raises: ShapeError, DtypeError, DeviceError, OptionError.
    """
    _check.option(op, "dtype", dtype, dtype in LARGEST_CODE, "torch.int8 or torch.float8_e4m3fn")
    _check.option(op, "group_size", group_size, group_size in (None, SCALE_GROUP), f"{SCALE_GROUP} or None")
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
    _check.shape(op, "out", out, shape)
    _check.dtype(op, "out", out, dtype)
    size = shape[-1]
    if fixed_scale is not None:
        _check.option(op, "group_size", group_size, group_size is None, "None beside a fixed_scale, which is for all")
        _check.option(op, "scales", "a tensor", scales is None, "None beside a fixed_scale, which is returned")
        _check.shape(op, "fixed_scale", fixed_scale, (1, 1))
        scales = fixed_scale
    else:
        num_groups = 1 if group_size is None else -(-size // group_size)
        if scales is None:
            scales = torch.empty((*shape[:-1], num_groups), dtype=torch.float32, device=device)
        _check.shape(op, "scales", scales, (*shape[:-1], num_groups))
        _check.contiguous(op, scales=scales)
    _check.dtype(op, "scales", scales, torch.float32)
    _check.same_device(op, out=out, scales=scales)
    return CodeOutput(out, scales, size if group_size is None else group_size, fixed_scale is not None)
