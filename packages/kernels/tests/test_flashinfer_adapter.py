"""FlashInfer's layouts: page tables in compressed rows, both cache layouts, and its units."""

import itertools
import math

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.adapters import flashinfer
from octavo_kernels.testing import assert_close, make_paged_inputs


def pages_of(inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a block table as compressed rows."""
    seq_lens = inputs.seq_lens.tolist()
    counts = [-(-seq_len // 16) for seq_len in seq_lens]
    indices = [row[:count] for row, count in zip(inputs.block_table.tolist(), counts, strict=True)]
    last = [seq_len - 16 * (count - 1) if count else 0 for seq_len, count in zip(seq_lens, counts, strict=True)]
    lists = [0, *torch.tensor(counts).cumsum(0).tolist()], list(itertools.chain(*indices)), last
    return tuple(torch.tensor(values, dtype=torch.int32, device=inputs.q.device) for values in lists)


def test_compressed_rows_become_a_table(device):
    inputs = make_paged_inputs([1, 0, 2, 1], [17, 0, 16, 40], device=device)
    table, seq_lens = flashinfer.blocks_of(*pages_of(inputs), page_size=16, max_num_pages=4)
    assert torch.equal(seq_lens, inputs.seq_lens)
    assert [[block_id for block_id in row if block_id >= 0] for row in table.tolist()] == [
        row[: -(-seq_len // 16)] for row, seq_len in zip(inputs.block_table.tolist(), [17, 0, 16, 40], strict=True)
    ]
    assert flashinfer.blocks_of(*pages_of(make_paged_inputs([], [])), page_size=16, max_num_pages=2)[0].shape == (0, 2)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_batch_attention_equals_the_op(oracle, device, kv_layout):
    inputs = make_paged_inputs([1, 5, 2], [17, 20, 40], device=device, layout=kv_layout.lower(), head_dim=16)
    heads_first = torch.stack([inputs.k_cache, inputs.v_cache], 1)
    cache = heads_first if kv_layout == "HND" else heads_first.transpose(2, 3).contiguous()
    blocks = flashinfer.blocks_of(*pages_of(inputs), page_size=16, max_num_pages=3)
    out, lse = flashinfer.batch_attention(
        inputs.q, cache, inputs.query_start_loc, blocks, max_query_len=5, kv_layout=kv_layout, window_left=8,
        logits_soft_cap=2.0, k_scale=0.5, v_scale=2.0, return_lse=True,
    )  # fmt: skip
    wide, natural = inputs.to(torch.float64).arguments(), torch.empty_like(lse)
    options = {"window": 9, "soft_cap": 2.0, "scale": inputs.scale / 2}
    assert_close(out, 2 * oracle(ok.paged_attention, **wide | options, lse=natural))
    assert_close(lse, natural / math.log(2))


def test_misfits_are_refused(device):
    inputs = make_paged_inputs([1], [17], device=device)
    pages = pages_of(inputs)
    with pytest.raises(ok.ShapeError, match=r"kv_indptr has shape \[1\], expected \[2\]"):
        flashinfer.blocks_of(pages[0][:1], *pages[1:], page_size=16, max_num_pages=2)
    with pytest.raises(ok.OptionError, match='kv_layout is \'DNH\', expected "NHD" or "HND"'):
        flashinfer.caches_of((inputs.k_cache, inputs.v_cache), "DNH")
    blocks = flashinfer.blocks_of(*pages, page_size=16, max_num_pages=2)
    with pytest.raises(ok.OptionError, match="window_left is -2"):
        flashinfer.batch_attention(
            inputs.q, (inputs.k_cache, inputs.v_cache), inputs.query_start_loc, blocks, max_query_len=1, window_left=-2
        )
