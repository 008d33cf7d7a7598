"""Rows sorted by group in Triton, in three launches: chunks count their rows, one program places, chunks write.

No atomics: a row's place is where its group begins, plus the rows of its group in earlier chunks, plus those before it
in its own.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803
# Triton has no types, and its compile-time parameters are written in capitals.

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo_kernels._workspace import take
from octavo_kernels.row_groups import CHUNK
from octavo_kernels.triton._launch import next_power_of_2

_AT_ONCE = 32  # groups that a chunk counts, or tiles that the placing program names, in one step


def group_rows(ids: Tensor, num_groups: int, rows: Tensor, groups: Tensor, workspace: Tensor) -> None:
    """Fill rows and groups as `octavo_kernels.group_rows` says."""
    num_rows = len(ids)
    num_tiles, tile_rows = rows.shape
    num_chunks = triton.cdiv(num_rows, CHUNK)
    counts, offset = take(workspace, 0, torch.int32, num_chunks, num_groups)
    starts, _ = take(workspace, offset, torch.int32, num_groups)
    rows.fill_(num_rows)
    _count[(num_chunks,)](ids, counts, num_rows, num_groups, CHUNK=CHUNK, AT_ONCE=_AT_ONCE, num_warps=4)
    _place[(1,)](
        counts, starts, groups, num_chunks, num_groups, num_tiles,
        GROUPS=next_power_of_2(num_groups), TILE_ROWS=tile_rows, AT_ONCE=_AT_ONCE, num_warps=4,
    )  # fmt: skip
    _write[(num_chunks,)](ids, counts, starts, rows, num_rows, num_groups, CHUNK=CHUNK, num_warps=4)


@triton.jit
def _count(ids, counts, num_rows, num_groups, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Store how many rows of this chunk each group has."""
    chunk = tl.program_id(0)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    row_ids = tl.load(ids + rows, mask=rows < num_rows, other=-1)
    for first in range(0, num_groups, AT_ONCE):
        groups = first + tl.arange(0, AT_ONCE)
        found = tl.sum((row_ids[:, None] == groups[None, :]).to(tl.int32), 0)
        tl.store(counts + chunk * num_groups + groups, found, mask=groups < num_groups)


@triton.jit
def _place(
    counts, starts, tile_groups, num_chunks, num_groups, num_tiles,
    GROUPS: tl.constexpr, TILE_ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Turn counts into the number of rows in earlier chunks, store where groups begin, and name the tiles' groups."""
    groups = tl.arange(0, GROUPS)
    mask = groups < num_groups
    total = tl.zeros([GROUPS], tl.int32)
    for chunk in range(num_chunks):
        found = tl.load(counts + chunk * num_groups + groups, mask=mask, other=0)
        tl.store(counts + chunk * num_groups + groups, total, mask=mask)
        total += found
    tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    ends = tl.cumsum(tiles, 0)
    tl.store(starts + groups, (ends - tiles) * TILE_ROWS, mask=mask)
    num_used = tl.sum(tiles, 0)
    for first in range(0, num_tiles, AT_ONCE):
        at = first + tl.arange(0, AT_ONCE)
        group = tl.sum((ends[None, :] <= at[:, None]).to(tl.int32), 1)
        tl.store(tile_groups + at, tl.where(at < num_used, group, -1), mask=at < num_tiles)


@triton.jit
def _write(ids, counts, starts, sorted_rows, num_rows, num_groups, CHUNK: tl.constexpr):
    """Store each row of this chunk at its place."""
    chunk = tl.program_id(0)
    places = tl.arange(0, CHUNK)
    rows = chunk * CHUNK + places
    row_ids = tl.load(ids + rows, mask=rows < num_rows, other=-1)
    others = tl.load(ids + chunk * CHUNK + places, mask=rows < num_rows, other=-1)
    before = (row_ids[:, None] == others[None, :]) & (places[None, :] < places[:, None])
    grouped = (row_ids >= 0) & (row_ids < num_groups)
    place = tl.load(starts + row_ids, mask=grouped, other=0)
    place += tl.load(counts + chunk * num_groups + row_ids, mask=grouped, other=0)
    place += tl.sum(before.to(tl.int32), 1)
    tl.store(sorted_rows + place, rows, mask=grouped)
