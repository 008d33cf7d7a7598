"""The public test helpers: what the made inputs promise."""

import pytest
import torch

from octavo_kernels.testing import assert_close, assert_codes, make_paged_inputs, random_lengths


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_the_cache_holds_the_keys_and_nan_elsewhere(layout):
    inputs = make_paged_inputs([1, 4], [17, 16], layout=layout, num_padding_rows=2)
    held = 0
    for sequence, keys in enumerate(inputs.keys):
        for position, key in enumerate(keys):
            block_id = int(inputs.block_table[sequence, position // 16])
            assert block_id != 0
            assert torch.equal(inputs.k_cache[block_id, :, position % 16], key)
            held += 1
    assert int(inputs.k_cache[:, 0, :, 0].isfinite().sum()) == held == 33
    assert inputs.k_cache.shape == (5, 2, 16, 64)
    assert (inputs.k_cache.stride(1) < inputs.k_cache.stride(2)) == (layout == "nhd")


def test_slots_are_the_new_tokens_and_minus_one_for_padding():
    inputs = make_paged_inputs([2], [17], num_padding_rows=1)
    first, second = inputs.block_table[0, :2].tolist()
    assert inputs.slot_mapping.tolist() == [first * 16 + 15, second * 16, -1]


def test_entries_past_the_end_are_no_blocks():
    inputs = make_paged_inputs([1, 1], [1, 17])
    assert (inputs.block_table[0, 1:] >= inputs.k_cache.shape[0]).all()


def test_equal_seeds_give_equal_inputs():
    one, two, other = (make_paged_inputs([1], [9], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.q, two.q)
    assert not torch.equal(one.q, other.q)


def test_random_lengths_hold_the_block_edges():
    lengths = random_lengths(8, 16, 50, seed=0)
    assert {1, 15, 16, 17, 50} <= set(lengths)
    assert max(lengths) == 50


def test_assert_close_fails_outside_the_tolerance():
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0]), torch.tensor([1.001]))
    assert_close(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.001]))


def test_assert_codes_allows_half_a_step_and_no_more():
    scales = torch.tensor([[0.5]])
    assert_codes(torch.tensor([[3]], dtype=torch.int8), scales, torch.tensor([[1.74]]))
    assert_codes(torch.tensor([[3.0]]).to(torch.float8_e4m3fn), scales, torch.tensor([[1.59]]))
    with pytest.raises(AssertionError, match="1 codes are off"):
        assert_codes(torch.tensor([[3]], dtype=torch.int8), scales, torch.tensor([[1.76]]))
    with pytest.raises(AssertionError, match="1 codes are off"):
        assert_codes(torch.tensor([[3.0]]).to(torch.float8_e4m3fn), scales, torch.tensor([[1.61]]))
