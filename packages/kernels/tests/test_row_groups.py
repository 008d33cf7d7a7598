"""Rows sorted by group: exact places, whatever the ids."""

import pytest
import torch

import octavo_kernels as ok


@pytest.mark.parametrize("num_rows", [0, 1, 17, 300])
@pytest.mark.parametrize("num_groups", [1, 40])
def test_rows_are_sorted_stably_into_tiles_of_one_group(device, oracle, num_rows, num_groups):
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(-1, num_groups + 1, (num_rows,), generator=generator, dtype=torch.int32).to(device)
    num_tiles = ok.num_row_tiles(num_rows, num_groups, 16)
    out = ok.RowGroups(
        torch.full((num_tiles, 16), -7, dtype=torch.int32, device=device),
        torch.full((num_tiles,), -7, dtype=torch.int32, device=device),
    )
    size = ok.group_rows_workspace(num_rows, num_groups)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    found = ok.group_rows(ids, num_groups, out=out, workspace=workspace)
    expected = oracle(ok.group_rows, ids, num_groups)
    assert torch.equal(found.groups, expected.groups)
    used = found.groups >= 0
    assert torch.equal(found.rows[used], expected.rows[used])
    rows = found.rows[used][found.rows[used] < num_rows].tolist()
    in_order = sorted((int(group), row) for row, group in enumerate(ids.tolist()) if 0 <= group < num_groups)
    assert rows == [row for _, row in in_order]


def test_there_are_tiles_enough_for_the_worst_case(device):
    ids = torch.cat([torch.arange(7), torch.full((16 * 3,), 7)]).to(device)  # seven tiles of one row, three full ones
    found = ok.group_rows(ids, 8)
    assert found.groups[found.groups >= 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert len(found.groups) == ok.num_row_tiles(55, 8, 16) == 11


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ok.OptionError, match="tile_rows is 24, expected 16, 32, 64 or 128"):
        ok.group_rows(torch.zeros(3, dtype=torch.int32), 2, tile_rows=24)
    with pytest.raises(ok.DtypeError, match="ids has dtype float32, expected int32 or int64"):
        ok.group_rows(torch.zeros(3), 2)
