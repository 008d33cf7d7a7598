"""Native attention on the CPU: bits that depend on a row's own keys alone, and agreement with the reference in fp64."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import octavo_kernels as ok
from octavo_kernels.testing import PagedInputs, assert_close, make_paged_inputs

pytestmark = pytest.mark.usefixtures("native_library")

OPTIONS = {
    "plain": {},
    "window": {"window": 70},
    "soft cap": {"soft_cap": 3.0},
    "sinks and slopes": {"sinks": True, "alibi_slopes": True},
    "both sides": {"causal": False, "window": 100},
    "all": {"window": 33, "soft_cap": 2.0, "sinks": True, "alibi_slopes": True},
}


@pytest.fixture(autouse=True)
def every_call_is_native() -> Iterator[None]:
    """Fail a test whose calls in fp32 were served by torch."""
    before = ok.fallbacks().get("paged_attention")
    yield
    assert ok.fallbacks().get("paged_attention") == before


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back after a test that changes it."""
    before = torch.get_num_threads()
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
    later = stop - start - end
    return PagedInputs(
        inputs.q[start + first : start + end],
        inputs.k_cache,
        inputs.v_cache,
        torch.tensor([0, end - first], dtype=torch.int32),
        inputs.seq_lens[sequence : sequence + 1] - later,
        inputs.block_table[sequence : sequence + 1],
        end - first,
        inputs.slot_mapping[start + first : start + end],
        (),
        (),
    )


def check_against_reference(oracle, inputs: PagedInputs, options, dtype=torch.float32):
    out, lse = attend(inputs, **options)
    wide = inputs.to(torch.float64)
    expected_lse = torch.empty(inputs.q.shape[:2])
    expected = oracle(ok.paged_attention, **wide.arguments(), **options, lse=expected_lse)
    rows = inputs.num_rows
    assert_close(out[:rows], expected[:rows], dtype)
    assert_close(lse[:rows], expected_lse[:rows], dtype)
    assert out[rows:].isnan().all()
    assert lse[rows:].isnan().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_chunking_of_a_prompt_gives_the_same_bits(options):
    inputs = make_paged_inputs([130], [130], num_heads=6, num_kv_heads=2)
    options = per_head({name: value for name, value in options.items() if name != "causal"}, 6)
    out, lse = attend(inputs, **options)
    for size in (1, 2, 7, 16, 63, 64, 65, 129):
        for first in range(0, 130, size):
            end = min(first + size, 130)
            chunk_out, chunk_lse = attend(part(inputs, 0, first, end), **options)
            assert torch.equal(chunk_out, out[first:end])
            assert torch.equal(chunk_lse, lse[first:end])


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_chunking_gives_the_same_bits_from_caches_of_half_precision(dtype, head_dim):
    inputs = make_paged_inputs([130], [130], num_heads=6, num_kv_heads=2, head_dim=head_dim)
    caches = inputs.to(dtype)
    inputs = dataclasses.replace(inputs, k_cache=caches.k_cache, v_cache=caches.v_cache)
    out, _ = attend(inputs)
    for size in (1, 3, 16, 65):
        for first in range(0, 130, size):
            end = min(first + size, 130)
            assert torch.equal(attend(part(inputs, 0, first, end))[0], out[first:end])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_sequence_alone_and_in_a_batch_has_the_same_bits(options):
    query_lens, seq_lens = [1, 1, 40, 1, 17, 130, 3], [1, 600, 40, 129, 300, 130, 64]
    inputs = make_paged_inputs(query_lens, seq_lens, num_heads=9, num_kv_heads=3, num_padding_rows=2)
    options = per_head(options, 9)
    out, lse = attend(inputs, **options)
    starts = [0, *itertools.accumulate(query_lens)]
    for sequence, query_len in enumerate(query_lens):
        alone_out, alone_lse = attend(part(inputs, sequence, 0, query_len), **options)
        rows = slice(starts[sequence], starts[sequence + 1])
        assert torch.equal(alone_out, out[rows])
        assert torch.equal(alone_lse, lse[rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_threads_and_splits_do_not_change_bits(options, dtype):
    # One sequence is far longer than a thread's share, so that with 2 and more threads its tiles are dealt out.
    inputs = make_paged_inputs([1, 20, 1], [1500, 700, 9], num_heads=6, num_kv_heads=2)
    caches = inputs.to(dtype)
    calls = inputs.arguments() | {"k_cache": caches.k_cache, "v_cache": caches.v_cache}
    results = []
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        lse = torch.empty(inputs.q.shape[:2])
        results.append((ok.paged_attention(**calls, **per_head(options, 6), lse=lse), lse))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_lengths_around_tiles_and_blocks(oracle, num_threads):
    torch.set_num_threads(num_threads)
    lengths = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1100]
    inputs = make_paged_inputs([1] * len(lengths), lengths, num_heads=3, num_kv_heads=1, num_padding_rows=1)
    check_against_reference(oracle, inputs, {})
    queries = [0, 3, 16, 17, 1, 64, 2, 127, 70, 5]
    inputs = make_paged_inputs(queries, [7, *lengths[1:10]], num_heads=4, num_kv_heads=2, seed=1)
    check_against_reference(oracle, inputs, {})


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64, 128])
def test_block_sizes(oracle, block_size):
    lengths = ([1, 5, 40, 1], [block_size, block_size + 1, 150, 3 * block_size - 1])
    inputs = make_paged_inputs(*lengths, block_size=block_size, head_dim=32)
    check_against_reference(oracle, inputs, {})
    check_against_reference(oracle, inputs, {"window": 21})


@pytest.mark.parametrize("group", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_groups_and_head_dims(oracle, group, head_dim):
    shape = {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": head_dim}
    inputs = make_paged_inputs([1, 9, 1], [70, 33, 5], **shape)
    check_against_reference(oracle, inputs, {})


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_agree_with_the_reference(oracle, options, layout):
    inputs = make_paged_inputs([1, 30, 2], [200, 150, 2], num_heads=6, num_kv_heads=2, layout=layout)
    check_against_reference(oracle, inputs, per_head(options, 6))


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_caches_of_half_precision(oracle, dtype, head_dim):
    inputs = make_paged_inputs([1, 20], [140, 70], dtype=dtype, head_dim=head_dim)
    arguments = inputs.arguments() | {"q": inputs.q.float()}
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments())
    assert_close(ok.paged_attention(**arguments), expected)


@pytest.mark.usefixtures("threads")
def test_int8_caches_with_scales(oracle):
    inputs = make_paged_inputs([1, 20, 1], [140, 70, 900], num_heads=6, num_kv_heads=2)
    arguments, wide = inputs.arguments(), inputs.to(torch.float64).arguments()
    for name in ("k", "v"):
        cache = arguments[f"{name}_cache"]
        scales = cache.abs().amax(-1) / 127  # NaN where nothing was written
        whole = (cache / scales[..., None]).nan_to_num().round().to(torch.int8)
        arguments |= {f"{name}_cache": whole, f"{name}_scale": scales}
        wide[f"{name}_cache"] = whole.double() * scales.double()[..., None]
    out = ok.paged_attention(**arguments)
    assert_close(out, oracle(ok.paged_attention, **wide))
    torch.set_num_threads(3)
    assert torch.equal(ok.paged_attention(**arguments), out)


def test_nan_that_a_query_sees_reaches_its_output_and_no_other():
    inputs = make_paged_inputs([80], [80], num_heads=2, num_kv_heads=1)
    clean, _ = attend(inputs)
    block, offset = divmod(int(inputs.slot_mapping[70]), 16)
    for name in ("k_cache", "v_cache"):
        cache = getattr(inputs, name)
        before = cache[block, 0, offset].clone()
        cache[block, 0, offset] = float("nan")
        out, _ = attend(inputs)
        cache[block, 0, offset] = before
        assert torch.equal(out[:70], clean[:70])
        assert out[70:].isnan().all()


def test_infinite_scores_of_masked_weight_zero():
    inputs = make_paged_inputs([1], [40], num_heads=1, num_kv_heads=1, head_dim=16)
    out, lse = attend(inputs, sinks=torch.tensor([float("-inf")]))
    plain, plain_lse = attend(inputs)
    assert torch.equal(out, plain)
    assert torch.equal(lse, plain_lse)


def test_large_scores_do_not_overflow(oracle):
    inputs = make_paged_inputs([1, 5], [100, 70], num_heads=2, num_kv_heads=1)
    arguments = inputs.arguments() | {"scale": 200.0}
    expected = oracle(ok.paged_attention, **(inputs.to(torch.float64).arguments() | {"scale": 200.0}))
    torch.testing.assert_close(ok.paged_attention(**arguments).double(), expected, rtol=2e-3, atol=2e-3)


@st.composite
def calls(draw):
    """A ragged batch and options."""
    num_seqs = draw(st.integers(1, 5))
    seq_lens = draw(st.lists(st.integers(0, 200), min_size=num_seqs, max_size=num_seqs))
    query_lens = [draw(st.integers(0, seq_len)) for seq_len in seq_lens]
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    shape = {
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([16, 32, 64, 112])),
        "block_size": draw(st.sampled_from([8, 16, 20, 128])),
    }
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 17, 64, 150])),
        "soft_cap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.sampled_from([None, True])),
        "alibi_slopes": draw(st.sampled_from([None, True])),
    }
    return query_lens, seq_lens, shape, options


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_any_batch_agrees_with_the_reference(oracle, call):
    query_lens, seq_lens, shape, options = call
    inputs = make_paged_inputs(query_lens, seq_lens, **shape)
    check_against_reference(oracle, inputs, per_head(options, shape["num_heads"]))
