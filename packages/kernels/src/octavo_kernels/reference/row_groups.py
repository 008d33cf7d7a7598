"""Rows sorted by group, one group after the other."""

import torch
from torch import Tensor


def group_rows(ids: Tensor, num_groups: int, rows: Tensor, groups: Tensor, workspace: Tensor) -> None:  # noqa: ARG001
    """Fill rows and groups."""
    num_tiles, tile_rows = rows.shape
    rows.fill_(len(ids))
    groups.fill_(-1)
    tile = 0
    for group in range(num_groups):
        members = torch.nonzero(ids == group).flatten().to(torch.int32)
        for first in range(0, len(members), tile_rows):
            part = members[first : first + tile_rows]
            rows[tile, : len(part)] = part
            groups[tile] = group
            tile += 1
    assert tile <= num_tiles
