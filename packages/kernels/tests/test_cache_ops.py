"""Cache writes, copies and reads: exact, since they only move values."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import make_paged_inputs


def make_caches(device, layout, dtype=torch.float32):
    shape = (5, 2, 8, 3, 16) if layout == "nhd" else (5, 2, 3, 8, 16)
    whole = torch.full(shape, float("nan"), dtype=dtype, device=device)
    whole = whole.transpose(2, 3) if layout == "nhd" else whole
    return whole[:, 0], whole[:, 1]


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_kv_fills_the_named_slots_only(device, interpreted, layout, dtype):
    k_cache, v_cache = make_caches(device, layout, dtype)
    slots = [39, -1, 0, 8, -1, 7]
    kv = torch.randn(6, 6, 16, device=device)
    if interpreted:
        # Triton's interpreter rounds bf16 towards zero; values that need no rounding show the rest.
        kv = kv.to(dtype).float()
    k, v = kv[:, :3], kv[:, 3:]
    ok.write_kv(k, v, k_cache, v_cache, torch.tensor(slots, device=device))
    for cache, source in ((k_cache, k), (v_cache, v)):
        for slot in range(40):
            written = cache[slot // 8, :, slot % 8]
            if slot in slots:
                assert torch.equal(written, source[slots.index(slot)].to(dtype))
            else:
                assert written.isnan().all()


@pytest.mark.parametrize("slots", [[], [-1, -1]], ids=["no tokens", "skipped tokens"])
def test_write_kv_may_write_nothing(device, slots):
    k_cache, v_cache = make_caches(device, "hnd")
    k = torch.randn(len(slots), 3, 16, device=device)
    ok.write_kv(k, k, k_cache, v_cache, torch.tensor(slots, dtype=torch.int64, device=device))
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        ([0], [2], [0, 1, 0, 3]),
        ([0, 1], [1, 0], [1, 0, 2, 3]),
        ([0, 1, 2], [1, 2, 3], [0, 0, 1, 2]),
        ([3, 3], [0, 1], [3, 3, 2, 3]),
        ([1], [1], [0, 1, 2, 3]),
        ([], [], [0, 1, 2, 3]),
    ],
    ids=["one", "swap", "chain", "one to two", "onto itself", "none"],
)
def test_copy_blocks_reads_before_it_writes(device, src, dst, expected):
    layers = [torch.arange(4.0, device=device)[:, None, None].expand(4, 2, 3).clone() + 10 * layer for layer in (0, 1)]
    pair = torch.stack(layers, dim=1)
    arguments = [torch.tensor(ids, dtype=torch.int64, device=device) for ids in (src, dst)]
    ok.copy_blocks(layers, *arguments)
    assert [layers[0][:, 0, 0].tolist(), (layers[1][:, 1, 2] - 10).tolist()] == [expected, expected]
    ok.copy_blocks(pair[:, 1], *arguments)
    assert (pair[:, 1, 0, 0] - 10).tolist() == expected
    assert pair[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_copy_blocks_of_a_cache_that_lies_in_pieces(device, dtype):
    whole = torch.arange(4 * 3 * 8 * 6, device=device).view(4, 3, 8, 6).to(dtype)
    before = whole.clone()
    src, dst = torch.tensor([0, 3], device=device), torch.tensor([3, 1], device=device)
    ok.copy_blocks([whole.transpose(1, 2)[..., 1:4]], src, dst)
    assert torch.equal(whole[dst][..., 1:4], before[src][..., 1:4])
    whole[dst, ..., 1:4] = before[dst, ..., 1:4]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("pairs", [[], [(3, 0)], [(0, 1), (1, 2), (3, 0)], [(1, 3), (0, 2), (2, 1)]], ids=str)
def test_swap_blocks_copies_to_another_cache(device, pairs):
    gpu = torch.arange(4 * 3 * 2.0, device=device).view(4, 3, 2)
    host = torch.full((5, 3, 2), -1.0)
    ok.swap_blocks(gpu, host, pairs)
    back = torch.zeros_like(gpu)
    ok.swap_blocks(host, back, [(dst, src) for src, dst in pairs])
    if device == "cuda":
        torch.cuda.synchronize()
    for block_id in range(4):
        kept = block_id in [src for src, _ in pairs]
        assert torch.equal(back[block_id], gpu[block_id] if kept else torch.zeros_like(gpu[0]))
    untouched = [block_id for block_id in range(5) if block_id not in [dst for _, dst in pairs]]
    assert (host[untouched] == -1).all()


def test_swap_blocks_refuses_misfits(device):
    cache = torch.zeros(4, 3, device=device)
    with pytest.raises(ok.OptionError, match="a block id is 5, expected a block of target, 0 to 4"):
        ok.swap_blocks(cache, torch.zeros(5, 3), [(0, 5)])
    with pytest.raises(ok.ShapeError, match=r"target has shape \[5, 2\], expected \[num_blocks, 3\]"):
        ok.swap_blocks(cache, torch.zeros(5, 2), [])


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_gather_kv_returns_what_was_written(device, layout):
    lengths = [1, 15, 0, 16, 17]
    inputs = make_paged_inputs([1, 1, 0, 1, 1], lengths, device=device, layout=layout)
    k, v = ok.gather_kv(inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seq_lens)
    assert torch.equal(k, torch.cat(inputs.keys))
    assert torch.equal(v, torch.cat(inputs.values))


def test_gather_kv_of_nothing_is_empty(device):
    inputs = make_paged_inputs([], [], device=device)
    k, _ = ok.gather_kv(inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seq_lens)
    assert k.shape == (0, 2, 64)
