"""Attention of groups of sequences that share their first blocks, against the same sequences one by one."""

from dataclasses import replace

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import PagedInputs, assert_close, make_paged_inputs

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float16}
# Three sequences share 320 tokens, one shares nothing, two share a block.
GROUPS, LENGTHS = [0, 3, 4, 6], [320, 0, 16]
BATCH = ([1, 2, 1, 1, 1, 40], [350, 322, 321, 20, 17, 60])


def make_shared(device: str, **shape) -> tuple[PagedInputs, ok.SharedPrefixes]:
    """Return inputs in which each group's sequences have the blocks of its first one."""
    inputs = make_paged_inputs(*BATCH, **SHAPE | shape, num_padding_rows=2, device=device)
    table = inputs.block_table.clone()
    for group, length in enumerate(LENGTHS):
        members = slice(GROUPS[group], GROUPS[group + 1])
        table[members, : length // 16] = table[GROUPS[group], : length // 16]
    starts = torch.tensor(GROUPS, dtype=torch.int32, device=device)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    return replace(inputs, block_table=table), ok.SharedPrefixes(starts, lengths, 41)


def attend(inputs, shared, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(inputs.q, float("nan"))
    lse = torch.full(inputs.q.shape[:2], float("nan"), device=inputs.q.device)
    assert ok.shared_prefix_attention(shared=shared, **inputs.arguments(), **options, out=out, lse=lse) is out
    return out, lse


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_groups_give_what_their_sequences_give_alone(oracle, device, layout):
    inputs, shared = make_shared(device, layout=layout)
    options = {"sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0], device=device), "soft_cap": 2.0} if layout == "hnd" else {}
    expected_lse = torch.empty(inputs.q.shape[:2], device=device)
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments(), **options, lse=expected_lse)
    out, lse = attend(inputs, shared, **options)
    assert_close(out[:-2], expected[:-2])
    assert_close(lse[:-2], expected_lse[:-2])
    assert out[-2:].isnan().all()
    assert lse[-2:].isnan().all()


def test_a_workspace_may_be_given_of_many_sizes(device):
    inputs, shared = make_shared(device)
    best = ok.shared_prefix_workspace(
        len(inputs.q), 6, 3, inputs.block_table.shape[1], 16, 4, 2, 16, max_query_len=40, max_group_query_len=41
    )
    out, _ = attend(inputs, shared)
    given, _ = attend(inputs, shared, workspace=torch.empty(best, dtype=torch.uint8, device=device))
    assert torch.equal(given[:-2], out[:-2])
    with pytest.raises(ok.ShapeError, match="shared_prefix_attention: workspace has 100 bytes, expected at least"):
        attend(inputs, shared, workspace=torch.empty(100, dtype=torch.uint8, device=device))


def test_misfits_are_refused(device):
    inputs, shared = make_shared(device)
    with pytest.raises(ok.OptionError, match="max_group_query_len is 39, expected at least max_query_len, 40"):
        attend(inputs, shared._replace(max_group_query_len=39))
    with pytest.raises(ok.ShapeError, match=r"group_start_loc has shape \[3\], expected \[4\]"):
        attend(inputs, shared._replace(group_start_loc=shared.group_start_loc[1:]))
