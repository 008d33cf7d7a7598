"""Workspaces: memory that an op needs while it runs, which a caller may give so that nothing is allocated."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels.errors import ShapeError

_ALIGNMENT = 16


def check_workspace(op: str, workspace: Tensor | None, num_bytes: int, device: torch.device) -> Tensor:
    """Return a workspace of at least so many bytes: the one given, if it fits, or a new one.

    Raises: ShapeError (too small), DtypeError, OptionError (not aligned to 16 bytes).
    """
    if workspace is None:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    _check.rank(op, "workspace", workspace, ("num_bytes",))
    _check.dtype(op, "workspace", workspace, torch.uint8)
    _check.last_dim_contiguous(op, workspace=workspace)
    if len(workspace) < num_bytes:
        raise ShapeError(
            f"{op}: workspace has {len(workspace)} bytes, expected at least {num_bytes}; pass a larger one"
        )
    offset = workspace.data_ptr() % _ALIGNMENT
    _check.option(op, "workspace.data_ptr() % 16", offset, offset == 0, "0")
    return workspace


def take(workspace: Tensor, offset: int, dtype: torch.dtype, *shape: int) -> tuple[Tensor, int]:
    """Return a tensor in a workspace from a byte on, and the first byte behind it that the next may begin at."""
    size = torch.Size(shape).numel() * dtype.itemsize
    tensor = workspace[offset : offset + size].view(dtype).view(shape)
    return tensor, offset + aligned(size)


def aligned(num_bytes: int) -> int:
    """Return a size that keeps what follows aligned to 16 bytes."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
