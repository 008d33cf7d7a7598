"""RowGroups: rows sorted by the weights that they are multiplied by, for products by many weights at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._workspace import aligned, check_workspace

CHUNK = 128
"""Rows that are counted together."""

_MOST_GROUPS = 4096


class RowGroups(NamedTuple):
    """Rows sorted by group and cut into tiles that belong to one group each; written by `group_rows`.

    rows: [num_tiles, tile_rows] int32, the rows of a tile in ascending order, and num_rows where there is none.
    groups: [num_tiles] int32, the group of each tile, and -1 for tiles that are not needed, which come last. A group's
        tiles are neighbours, and groups ascend.
    """

    rows: Tensor
    groups: Tensor

    @property
    def tile_rows(self) -> int:
        """Rows in a tile."""
        return self.rows.shape[1]


def group_rows(
    ids: Tensor,
    num_groups: int,
    *,
    tile_rows: int = 16,
    out: RowGroups | None = None,
    workspace: Tensor | None = None,
) -> RowGroups:
    """Sort rows by group, stably, into tiles of one group each.

    The number of tiles is the most that so many rows and groups can need, whatever the ids are, so that nothing waits
    for the device. (For segmented products as in Punica, arXiv 2310.18547, and MegaBlocks, arXiv 2211.15841.)

    Args:
        ids: [num_rows] int32 or int64, the group of each row; one below 0 or from num_groups on puts it in none.
        num_groups: how many groups there are, up to 4096.
        tile_rows: rows in a tile, a power of two from 16 to 128.
        out: rows [num_row_tiles(num_rows, num_groups, tile_rows), tile_rows] and groups, contiguous; allocated when
            None.
        workspace: [at least group_rows_workspace(num_rows, num_groups)] uint8, which the call overwrites; allocated
            when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "group_rows"
    _check.rank(op, "ids", ids, ("num_rows",))
    _check.dtype(op, "ids", ids, torch.int32, torch.int64)
    _check.last_dim_contiguous(op, ids=ids)
    _check.option(op, "num_groups", num_groups, 0 < num_groups <= _MOST_GROUPS, f"1 to {_MOST_GROUPS}")
    _check.option(op, "tile_rows", tile_rows, tile_rows in (16, 32, 64, 128), "16, 32, 64 or 128")
    num_tiles = num_row_tiles(len(ids), num_groups, tile_rows)
    if out is None:
        rows = torch.empty((num_tiles, tile_rows), dtype=torch.int32, device=ids.device)
        out = RowGroups(rows, torch.empty(num_tiles, dtype=torch.int32, device=ids.device))
    _check.same_device(op, ids=ids, rows=out.rows, groups=out.groups, workspace=workspace)
    _check.shape(op, "out.rows", out.rows, (num_tiles, tile_rows))
    _check.shape(op, "out.groups", out.groups, (num_tiles,))
    for name, tensor in (("out.rows", out.rows), ("out.groups", out.groups)):
        _check.dtype(op, name, tensor, torch.int32)
        _check.contiguous(op, **{name: tensor})
    workspace = check_workspace(op, workspace, group_rows_workspace(len(ids), num_groups), ids.device)
    if num_tiles:
        implementation(op, ids.device)(ids, num_groups, out.rows, out.groups, workspace)
    return out


def num_row_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """Return how many tiles `group_rows` makes: the most that so many rows can need."""
    return min(num_rows, num_rows // tile_rows + num_groups)


def group_rows_workspace(num_rows: int, num_groups: int) -> int:
    """Return the bytes of workspace that `group_rows` wants."""
    num_chunks = -(-num_rows // CHUNK)
    return aligned(num_chunks * num_groups * 4) + aligned(num_groups * 4)
