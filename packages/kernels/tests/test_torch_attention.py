"""Attention by torch on the CPU, where nothing is native: bits that depend on a query's own keys alone."""

import itertools
from collections.abc import Iterator

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import attention
from octavo_kernels.cpu.fallback import attention as in_torch
from octavo_kernels.reference import attention as reference
from octavo_kernels.testing import PagedInputs, assert_close, make_paged_inputs

OPTIONS = {
    "plain": {},
    "window": {"window": 70},
    "both sides": {"causal": False, "window": 100},
    "cap, sinks and slopes": {"window": 33, "soft_cap": 2.0, "sinks": True, "alibi_slopes": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "cpu")
    monkeypatch.setattr(attention, "implementation", lambda op, device: getattr(in_torch, op))


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def per_head(options, num_heads):
    """Turn the marks into tensors."""
    tensors = {"sinks": torch.linspace(-2.0, 2.0, num_heads), "alibi_slopes": torch.linspace(0.5, 0.01, num_heads)}
    return {name: tensors[name] if value and name in tensors else value for name, value in options.items()}


def attend(inputs: PagedInputs, **options):
    """Return out and lse, poisoned beforehand."""
    out, lse = torch.full_like(inputs.q, float("nan")), torch.full(inputs.q.shape[:2], float("nan"))
    ok.paged_attention(**inputs.arguments(), **options, out=out, lse=lse)
    return out, lse


def part(inputs: PagedInputs, sequence: int, first: int, end: int) -> PagedInputs:
    """Return the call that computes queries first .. end - 1 of one sequence alone, as if the rest came later."""
    start, stop = inputs.query_start_loc[sequence : sequence + 2].tolist()
    return PagedInputs(
        inputs.q[start + first : start + end],
        inputs.k_cache,
        inputs.v_cache,
        torch.tensor([0, end - first], dtype=torch.int32),
        inputs.seq_lens[sequence : sequence + 1] - (stop - start - end),
        inputs.block_table[sequence : sequence + 1],
        end - first,
        inputs.slot_mapping[start + first : start + end],
        (),
        (),
    )


@every_option
@pytest.mark.parametrize("head_dim", [64, 80], ids="head_dim {}".format)
def test_every_chunking_of_a_prompt_gives_the_same_bits(head_dim, options):
    inputs = make_paged_inputs([140], [140], num_heads=6, num_kv_heads=2, head_dim=head_dim)
    options = per_head({name: value for name, value in options.items() if name != "causal"}, 6)
    out, lse = attend(inputs, **options)
    for size in (5, 16, 64, 65, 129):
        for first in range(0, 140, size):
            end = min(first + size, 140)
            chunk_out, chunk_lse = attend(part(inputs, 0, first, end), **options)
            assert torch.equal(chunk_out, out[first:end]), (first, end)
            assert torch.equal(chunk_lse, lse[first:end])
    for last in (0, 1, 15, 16, 63, 64, 65, 139):
        assert torch.equal(attend(part(inputs, 0, last, last + 1), **options)[0], out[last : last + 1]), last


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [8, 20], ids="blocks of {}".format)
def test_a_sequence_alone_and_in_a_batch_has_the_same_bits(block_size, dtype, options):
    query_lens, seq_lens = [1, 1, 40, 1, 1, 17, 130, 3], [1, 600, 40, 129, 300, 300, 130, 64]
    inputs = make_paged_inputs(query_lens, seq_lens, num_heads=9, num_kv_heads=3, block_size=block_size).to(dtype)
    options = per_head(options, 9)
    out, lse = attend(inputs, **options)
    starts = [0, *itertools.accumulate(query_lens)]
    for sequence, query_len in enumerate(query_lens):
        alone_out, alone_lse = attend(part(inputs, sequence, 0, query_len), **options)
        rows = slice(starts[sequence], starts[sequence + 1])
        assert torch.equal(alone_out, out[rows]), sequence
        assert torch.equal(alone_lse, lse[rows])


@every_option
@pytest.mark.parametrize("batch_invariant", [True, False], ids=["tiles", "buckets"])
def test_both_ways_equal_the_reference(monkeypatch, batch_invariant, options):
    lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 513]
    inputs = make_paged_inputs([1, 3, 16, 17, 1, 64, 2, 127, 70, 5, 200], lengths, num_heads=4, num_kv_heads=2)
    options = per_head(options, 4)
    out, lse = attend(inputs, **options, batch_invariant=batch_invariant)
    expected_lse = torch.empty(lse.shape)
    monkeypatch.setattr(attention, "implementation", lambda op, device: getattr(reference, op))
    expected = ok.paged_attention(**inputs.to(torch.float64).arguments(), **options, lse=expected_lse)
    assert_close(out, expected, torch.float32)
    assert_close(lse, expected_lse, torch.float32)
