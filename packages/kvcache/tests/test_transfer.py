import pytest

torch = pytest.importorskip("torch", reason="blocks are tensors")

from octavo_kvcache.transfer import gather, move, runs, scatter


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "expected"),
    [
        ([4], [7], [(4, 7, 1)]),
        ([4, 5, 6], [1, 2, 3], [(4, 1, 3)]),
        ([4, 5, 7], [1, 2, 3], [(4, 1, 2), (7, 3, 1)]),
        ([4, 5, 6], [1, 3, 4], [(4, 1, 1), (5, 3, 2)]),
        ([6, 5, 4], [1, 2, 3], [(6, 1, 1), (5, 2, 1), (4, 3, 1)]),
    ],
    ids=["one", "together", "gap in sources", "gap in destinations", "backwards"],
)
def test_runs_are_as_long_as_both_sides_allow(src_ids, dst_ids, expected):
    assert list(runs(src_ids, dst_ids)) == expected


@pytest.mark.parametrize("copy", [move, gather, scatter])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_copies_the_same_blocks(copy, dtype):
    source = torch.randn(9, 2, 3, 4).to(dtype)
    destination = torch.full((6, 2, 3, 4), 7.0, dtype=dtype)
    copy(source, destination, [8, 1, 2, 5], [1, 2, 3, 5])
    expected = torch.full_like(destination, 7.0)
    expected[[1, 2, 3, 5]] = source[[8, 1, 2, 5]]
    assert torch.equal(destination, expected)
