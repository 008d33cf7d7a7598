"""Rows sorted by group, of the `cpu` backend: native, one thread."""

from torch import Tensor

from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import row_groups as in_torch
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for


def group_rows(ids: Tensor, num_groups: int, rows: Tensor, groups: Tensor, workspace: Tensor) -> None:
    """Fill rows and groups as `octavo_kernels.group_rows` says."""
    if library_for("group_rows") is None:
        return in_torch.group_rows(ids, num_groups, rows, groups, workspace)
    args = abi.GroupRowsArgs(
        ids=pointer(ids),
        rows=pointer(rows),
        groups=pointer(groups),
        places=pointer(workspace),
        num_groups=num_groups,
        num_tiles=len(groups),
        tile_rows=rows.shape[1],
        bytes_of_id=ids.element_size(),
    )
    return launch(abi.OpKind.GROUP_ROWS, args, len(ids), ids, rows, groups, workspace)
