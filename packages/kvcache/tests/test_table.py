import pytest

from octavo_kvcache import BlockTable, InvalidArgument


@pytest.fixture
def table() -> BlockTable:
    table = BlockTable(block_size=4)
    table.grow([7, 3])
    table.grow([9])
    return table


def test_slots_follow_the_blocks(table):
    assert table.slots(2, 9) == [30, 31, 12, 13, 14, 15, 36]
    assert table.slots(12, 12) == []


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (11, 13), (5, 4)], ids=["negative", "past the end", "reversed"])
def test_slots_outside_of_the_table_are_refused(table, start, stop):
    with pytest.raises(InvalidArgument, match=r"which covers \[0, 12\)"):
        table.slots(start, stop)


def test_skipped_blocks_become_null_and_have_no_slots(table):
    assert table.skip(2) == [7, 3]
    assert table.block_ids == [0, 0, 9]
    assert table.held == [9]
    assert table.skip(1) == []
    assert table.slots(8, 10) == [36, 37]
    with pytest.raises(InvalidArgument, match=r"which covers \[8, 12\)"):
        table.slots(7, 9)


def test_fork_has_the_same_blocks_and_its_own_list(table):
    table.num_tokens = 10
    table.skip(1)
    child = table.fork()
    table.grow([5])
    assert (child.block_ids, child.num_tokens, child.num_null, child.capacity) == ([0, 3, 9], 10, 1, 12)
