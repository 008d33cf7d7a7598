"""Native attention of sequences that hold the same blocks: each row has the bits that it has alone."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import octavo_kernels as ok
from octavo_kernels.testing import PagedInputs, assert_close, make_paged_inputs

pytestmark = pytest.mark.usefixtures("native_library", "threads")

OPTIONS = {
    "plain": {},
    "window within what is shared": {"window": 150},
    "window of a tile": {"window": 64},
    "soft cap": {"soft_cap": 3.0},
    "sinks and slopes": {"sinks": True, "alibi_slopes": True},
    "both sides": {"causal": False, "window": 100},
    "all": {"window": 200, "soft_cap": 2.0, "sinks": True, "alibi_slopes": True},
}

Shares = Mapping[int, tuple[int, int]]  # sequence: (an earlier one, how many of its first blocks it holds)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def share(inputs: PagedInputs, shares: Shares) -> PagedInputs:
    """Return the inputs with blocks in common; what such a sequence had in its own first blocks is not read."""
    table = inputs.block_table.clone()
    for sequence, (other, num_blocks) in shares.items():
        table[sequence, :num_blocks] = table[other, :num_blocks]
    return replace(inputs, block_table=table)


def make_siblings(query_lens: list[int], seq_lens: list[int], shares: Shares, **shape: int) -> PagedInputs:
    return share(make_paged_inputs(query_lens, seq_lens, **{"num_heads": 6, "num_kv_heads": 2, **shape}), shares)


def to_int8(arguments: dict) -> dict:
    """Return a call with caches in int8 and a scale per vector, of random factors where nothing was written."""
    for name in ("k", "v"):
        cache = arguments[f"{name}_cache"]
        scales = cache.abs().amax(-1) / 127
        whole = (cache / scales[..., None]).nan_to_num().round().to(torch.int8)
        arguments = arguments | {f"{name}_cache": whole, f"{name}_scale": scales.contiguous()}
    return arguments


def call_of(inputs: PagedInputs, options: Mapping[str, object], dtype: torch.dtype) -> dict:
    """Return the arguments of one call, with caches in `dtype` and options per head as tensors."""
    num_heads = inputs.q.shape[1]
    tensors = {"sinks": torch.linspace(-2.0, 2.0, num_heads), "alibi_slopes": torch.linspace(0.5, 0.01, num_heads)}
    chosen = {name: tensors[name] if name in tensors and value else value for name, value in options.items()}
    arguments = inputs.arguments() | chosen
    if dtype == torch.int8:
        return to_int8(arguments)
    return arguments | {name: arguments[name].to(dtype) for name in ("k_cache", "v_cache")}


def attend(call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse, poisoned beforehand."""
    out, lse = torch.full_like(call["q"], float("nan")), torch.full(call["q"].shape[:2], float("nan"))
    ok.paged_attention(**call, out=out, lse=lse)
    return out, lse


def alone(call: dict, sequence: int) -> dict:
    """Return the call of one sequence by itself, which has nobody to share with."""
    start, stop = call["query_start_loc"][sequence : sequence + 2].tolist()
    one = slice(sequence, sequence + 1)
    return call | {
        "q": call["q"][start:stop],
        "query_start_loc": torch.tensor([0, stop - start], dtype=torch.int32),
        "seq_lens": call["seq_lens"][one],
        "block_table": call["block_table"][one],
        "max_query_len": stop - start,
    }


def check_bits(call: dict, num_threads: tuple[int, ...] = (1, 2, 5)) -> None:
    """Compare every sequence with itself alone on one thread."""
    torch.set_num_threads(1)
    expected = [attend(alone(call, sequence)) for sequence in range(len(call["seq_lens"]))]
    expected_out, expected_lse = (torch.cat(parts) for parts in zip(*expected, strict=True))
    for count in num_threads:
        torch.set_num_threads(count)
        out, lse = attend(call)
        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)


# Samples of a prompt of 300 tokens, far from each other in the batch; a pair with 160 tokens in common; and others.
SAMPLES = ([1] * 8, [310, 500, 333, 170, 310, 90, 401, 200], {2: (0, 18), 4: (0, 18), 6: (2, 18), 7: (3, 10)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_siblings_have_the_bits_that_they_have_alone(options, dtype):
    check_bits(call_of(make_siblings(*SAMPLES), options, dtype))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_siblings_agree_with_the_reference(oracle, options):
    inputs = make_siblings(*SAMPLES)
    out, lse = attend(call_of(inputs, options, torch.float32))
    expected_lse = torch.empty(lse.shape)
    wide = call_of(inputs.to(torch.float64), options, torch.float64)
    assert_close(out, oracle(ok.paged_attention, **wide, lse=expected_lse))
    assert_close(lse, expected_lse)


def test_a_common_beginning_and_groups_behind_it_form_a_tree():
    # All begin with 5 blocks; 0 to 3 go on together for 20, of which 2 and 3 for 31; 4 to 6 for 9, 5 and 6 for 24.
    shares = {1: (0, 20), 2: (0, 20), 3: (2, 31), 4: (0, 5), 5: (4, 9), 6: (5, 24), 7: (0, 5)}
    seq_lens = [500, 333, 520, 600, 401, 390, 430, 81]
    order = [3, 6, 0, 7, 1, 4, 2, 5]
    call = call_of(make_siblings([1] * 8, seq_lens, shares), {}, torch.float32)
    check_bits(call)
    check_bits(call | {"block_table": call["block_table"][order], "seq_lens": call["seq_lens"][order]})


@pytest.mark.parametrize("block_size", [8, 16, 24, 128])
def test_blocks_that_end_within_tiles(block_size):
    num_shared = 260 // block_size
    shares = dict.fromkeys((1, 2, 3), (0, num_shared))
    inputs = make_siblings([1] * 4, [num_shared * block_size, 261, 300, 450], shares, block_size=block_size)
    check_bits(call_of(inputs, {}, torch.float32))


@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 127, 128, 129, 200])
def test_twins_share_their_last_block_too(seq_len):
    inputs = make_siblings([1, 1, 1], [seq_len, 100, seq_len], {2: (0, -(-seq_len // 16))})
    check_bits(call_of(inputs, {}, torch.float32))


def test_siblings_at_the_edge_of_a_tile():
    shares = {sequence: (0, num_blocks) for sequence, num_blocks in enumerate((7, 8, 8, 8, 9, 12), start=1)}
    inputs = make_siblings([1] * 7, [300, 113, 128, 129, 191, 192, 193], shares)
    for options in OPTIONS.values():
        check_bits(call_of(inputs, options, torch.float32))


def test_sequences_with_several_queries_share_too():
    shares = {1: (0, 16), 2: (0, 16), 3: (0, 17), 4: (0, 12), 5: (4, 30), 6: (0, 12)}
    query_lens, seq_lens = [1, 4, 2, 5, 70, 90, 9], [280, 300, 270, 277, 500, 620, 201]
    inputs = make_siblings(query_lens, seq_lens, shares)
    for options in OPTIONS.values():
        check_bits(call_of(inputs, options, torch.float32))


def test_more_siblings_than_are_taken_at_once():
    shares = dict.fromkeys(range(1, 40), (0, 20)) | {7: (0, 25), 23: (7, 25)}
    inputs = make_siblings([1] * 40, [450, *range(321, 360)], shares)
    check_bits(call_of(inputs, {}, torch.float32))


def test_tiles_of_siblings_are_dealt_out_to_threads():
    # One sequence is so long that the others' tasks are cut too, to be done beside it.
    shares = dict.fromkeys(range(2, 9), (1, 64))
    inputs = make_siblings([1] * 9, [6000, *range(1033, 1041)], shares, num_heads=3, num_kv_heads=1, head_dim=16)
    check_bits(call_of(inputs, {}, torch.float32), (1, 2, 3, 4, 6))


def test_blocks_behind_the_window_may_be_gone():
    inputs = make_siblings([1] * 4, [400, 390, 400, 330], {1: (0, 20), 2: (0, 20), 3: (0, 20)})
    call = call_of(inputs, {"window": 170}, torch.float32)
    expected, _ = attend(call)
    for sequence, seq_len in enumerate(inputs.seq_lens.tolist()):
        inputs.block_table[sequence, : (seq_len - 170) // 16] = 0  # the null block, which holds NaN
    check_bits(call)
    assert torch.equal(attend(call)[0], expected)


def test_nan_in_a_branch_stays_in_it():
    inputs = make_siblings([1] * 3, [300, 310, 320], {1: (0, 16), 2: (0, 16)})
    call = call_of(inputs, {}, torch.float32)
    clean, _ = attend(call)
    inputs.v_cache[int(inputs.block_table[1, 17])] = float("nan")
    out, _ = attend(call_of(inputs, {}, torch.float32))
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert out[1].isnan().all()


@st.composite
def families(draw):
    """A batch in which sequences hold first blocks of earlier ones, a shape and options."""
    num_seqs = draw(st.integers(2, 9))
    seq_lens = draw(st.lists(st.integers(1, 420), min_size=num_seqs, max_size=num_seqs))
    query_lens = [min(seq_len, draw(st.sampled_from([1, 1, 1, 2, 5, 40]))) for seq_len in seq_lens]
    block_size = draw(st.sampled_from([8, 16, 20, 128]))
    shares = {}
    for sequence in range(1, num_seqs):
        other = draw(st.integers(0, sequence - 1))
        if draw(st.booleans()):
            whole = min(seq_lens[sequence], seq_lens[other]) // block_size
            shares[sequence] = (other, whole - draw(st.integers(0, min(whole, 3))))
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4, 7, 13]))
    shape = {
        "num_heads": num_kv_heads * group,
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([16, 64, 112])),
        "block_size": block_size,
    }
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 64, 150, 300])),
        "soft_cap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.sampled_from([None, True])),
        "alibi_slopes": draw(st.sampled_from([None, True])),
    }
    order = draw(st.permutations(range(num_seqs)))
    return query_lens, seq_lens, shares, shape, options, order


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=families(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_any_family_has_the_bits_of_its_members(family, dtype):
    query_lens, seq_lens, shares, shape, options, order = family
    call = call_of(make_siblings(query_lens, seq_lens, shares, **shape), options, dtype)
    starts = [0, *itertools.accumulate(query_lens)]
    call |= {
        "q": torch.cat([call["q"][starts[i] : starts[i + 1]] for i in order]),
        "query_start_loc": torch.tensor([0, *itertools.accumulate(query_lens[i] for i in order)], dtype=torch.int32),
        "seq_lens": call["seq_lens"][list(order)],
        "block_table": call["block_table"][list(order)],
    }
    check_bits(call, (1, 3))
