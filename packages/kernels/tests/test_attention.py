"""Attention of the backend under test against the reference in fp64."""

import itertools

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close, make_paged_inputs, random_lengths

BATCHES = {
    "one token": ([1], [1]),
    "decode around block edges": ([1, 1, 1, 1, 1], [1, 15, 16, 17, 40]),
    "decode beside prefill": ([1, 5, 0, 17, 1, 2], [33, 5, 9, 20, 64, 16]),
    "fresh prompts": ([15, 16, 17], [15, 16, 17]),
    "chunks": ([8, 8, 3], [8, 24, 35]),
    "idle sequences only": ([0, 0], [5, 0]),
}
OPTIONS = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window 1": {"window": 1},
    "window 16": {"window": 16},
    "window 20": {"window": 20},
    "window both sides": {"window": 5, "causal": False},
    "soft cap": {"soft_cap": 1.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 7, "sinks": True},
    "cap and alibi": {"soft_cap": 1.5, "alibi": True},
    "all": {"window": 18, "soft_cap": 1.5, "alibi": True, "sinks": True},
}


def per_head(options, num_heads, device):
    """Turn the marks alibi and sinks into tensors."""
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.linspace(0.5, 0.01, num_heads, device=device)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2.0, 2.0, num_heads, device=device)
    return options


def check_paged(oracle, inputs, options, *, with_lse=True):
    """Compare out and lse, poisoned beforehand, with the reference; padding rows must keep the poison."""
    out = torch.full_like(inputs.q, float("nan"))
    lse = torch.full(inputs.q.shape[:2], float("nan"), device=inputs.q.device) if with_lse else None
    assert ok.paged_attention(**inputs.arguments(), **options, out=out, lse=lse) is out
    wide = inputs.to(torch.float64)
    expected_lse = torch.empty(inputs.q.shape[:2], device=inputs.q.device)
    expected = oracle(ok.paged_attention, **wide.arguments(), **options, lse=expected_lse)
    rows = inputs.num_rows
    assert_close(out[:rows], expected[:rows])
    assert out[rows:].isnan().all()
    if lse is not None:
        # Scores carry the rounding of their inputs' dtype once, in the sum.
        assert_close(lse[:rows], expected_lse[:rows])
        assert lse[rows:].isnan().all()


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_ragged_batches(oracle, device, interpreted, lengths, layout):
    inputs = make_paged_inputs(*lengths, layout=layout, num_padding_rows=3, device=device, head_dim=32)
    if layout == "hnd" or not interpreted:
        check_paged(oracle, inputs, {})
    if layout == "nhd" or not interpreted:
        check_paged(oracle, inputs, {}, with_lse=False)


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(oracle, device, interpreted, options, with_lse):
    if interpreted and with_lse != ("causal" in options or len(options) > 1):
        pytest.skip("the interpreter takes each option once")
    inputs = make_paged_inputs([1, 1, 5, 17, 1], [17, 40, 21, 17, 3], device=device, head_dim=32, seed=1)
    check_paged(oracle, inputs, per_head(options, 4, device), with_lse=with_lse)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_grouped_heads(oracle, device, group, num_kv_heads):
    shape = {"num_heads": group * num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": 16}
    inputs = make_paged_inputs([1, 1, 6], [20, 9, 19], **shape, device=device, seed=2)
    check_paged(oracle, inputs, {})


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_head_dims_and_block_sizes(oracle, device, interpreted, head_dim, block_size):
    if interpreted and (head_dim == 64) != (block_size == 16):
        pytest.skip("the interpreter takes each head_dim and each block_size once or twice")
    inputs = make_paged_inputs([1, 4], [33, 20], head_dim=head_dim, block_size=block_size, device=device, seed=3)
    check_paged(oracle, inputs, {})


@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0, "window": 9}], ids=["plain", "capped window"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(oracle, device, interpreted, dtype, options, with_lse):
    if interpreted and with_lse == bool(options):
        pytest.skip("the interpreter takes each dtype with and without options, and with and without lse")
    inputs = make_paged_inputs([1, 1, 20], [30, 16, 50], dtype=dtype, device=device, seed=4)
    out = ok.paged_attention(**inputs.arguments(), **options)
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments(), **options)
    assert_close(out, expected)
    if with_lse:
        lse = torch.empty(inputs.q.shape[:2], device=device)
        expected_lse = torch.empty_like(lse)
        assert_close(ok.paged_attention(**inputs.arguments(), **options, lse=lse), expected)
        oracle(ok.paged_attention, **inputs.to(torch.float64).arguments(), **options, lse=expected_lse)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def test_cache_may_be_narrower_than_queries(oracle, device):
    inputs = make_paged_inputs([1, 5], [20, 18], dtype=torch.bfloat16, device=device, head_dim=32)
    arguments = inputs.arguments() | {"q": inputs.q.float()}
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments())
    assert_close(ok.paged_attention(**arguments), expected)


@pytest.mark.parametrize("options", [{}, {"sinks": True, "soft_cap": 2.0}], ids=["plain", "cap and sinks"])
def test_int8_cache_with_scales(oracle, device, options):
    inputs = make_paged_inputs([1, 4, 1], [20, 18, 3], device=device, head_dim=32)
    arguments = inputs.arguments()
    wide = inputs.to(torch.float64).arguments()
    for name in ("k", "v"):
        cache = arguments[f"{name}_cache"]
        scales = cache.abs().amax(-1) / 127
        whole = (cache / scales[..., None]).nan_to_num().round().to(torch.int8)
        arguments |= {f"{name}_cache": whole, f"{name}_scale": scales}
        wide[f"{name}_cache"] = whole.double() * scales.double()[..., None]
    options = per_head(options, 4, device)
    assert_close(ok.paged_attention(**arguments, **options), oracle(ok.paged_attention, **wide, **options))


def test_query_longer_than_sequence_gives_zero_and_minus_infinity(device):
    inputs = make_paged_inputs([3], [5], device=device, head_dim=16)
    arguments = inputs.arguments() | {"seq_lens": torch.tensor([2], dtype=torch.int32, device=device)}
    lse = torch.empty(3, 4, device=device)
    out = ok.paged_attention(**arguments, lse=lse)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert lse[0].tolist() == [-float("inf")] * 4
    assert lse[1:].isfinite().all()
    no_lse = ok.paged_attention(**arguments)
    assert_close(no_lse, out)


def test_no_sequences_leave_all_rows_untouched(device):
    inputs = make_paged_inputs([], [], num_padding_rows=2, device=device)
    out = torch.full_like(inputs.q, 7.0)
    ok.paged_attention(**inputs.arguments(), out=out)
    assert torch.equal(out, torch.full_like(out, 7.0))


def test_blocks_behind_the_window_are_not_seen(device):
    inputs = make_paged_inputs([1, 4], [60, 50], device=device, head_dim=16)
    arguments = inputs.arguments()
    expected = ok.paged_attention(**arguments, window=18)
    forgotten = arguments["block_table"].clone()
    forgotten[:, :1] = 0
    # Block 0 is the null block, and holds NaN.
    out = ok.paged_attention(**(arguments | {"block_table": forgotten}), window=18)
    assert torch.equal(out, expected)


def test_strided_queries_and_outputs(oracle, device):
    inputs = make_paged_inputs([1, 6], [20, 9], device=device, head_dim=32)
    qkv = torch.randn(7, 12, 32, device=device)
    q = qkv[:, 2:6].copy_(inputs.q)
    out = torch.empty(7, 6, 32, device=device)[:, 1:5]
    expected = oracle(ok.paged_attention, **inputs.to(torch.float64).arguments())
    ok.paged_attention(**(inputs.arguments() | {"q": q}), out=out)
    assert_close(out, expected)


def test_a_large_batch_is_split_without_loss(oracle, device, interpreted):
    lengths = random_lengths(6 if interpreted else 60, 16, 40 if interpreted else 700, seed=5)
    inputs = make_paged_inputs([1] * len(lengths), lengths, num_heads=9, num_kv_heads=3, device=device)
    check_paged(oracle, inputs, {}, with_lse=False)


def test_long_prompt_is_tiled_without_loss(oracle, device, interpreted):
    lengths = ([70, 3], [90, 70]) if interpreted else ([300, 3], [400, 150])
    inputs = make_paged_inputs(*lengths, device=device, head_dim=32)
    for options in ({}, {"window": 50}, {"soft_cap": 2.0}, {"causal": False}):
        check_paged(oracle, inputs, options, with_lse=False)


def test_inference_mode_and_normal_mode_may_alternate(oracle, device):
    inputs = make_paged_inputs([1, 1], [20, 9], device=device, head_dim=16)
    with torch.inference_mode():
        first = ok.paged_attention(**inputs.arguments())
    assert torch.equal(first, ok.paged_attention(**inputs.arguments()))


VARLEN = {
    "equal lengths": ([3, 16, 17], [3, 16, 17]),
    "longer keys": ([1, 5, 0], [9, 20, 4]),
    "no keys": ([2, 3], [0, 3]),
    "shorter keys": ([6], [4]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", VARLEN.values(), ids=VARLEN.keys())
def test_varlen_attention(oracle, device, interpreted, lengths, options):
    if interpreted and lengths != VARLEN["longer keys"] and options not in (OPTIONS["plain"], OPTIONS["all"]):
        pytest.skip("the interpreter takes each option once")
    query_lens, key_lens = lengths
    generator = torch.Generator().manual_seed(0)

    def normal(count, heads):
        return torch.randn(count, heads, 32, generator=generator).to(device)

    q, k, v = normal(sum(query_lens) + 2, 6), normal(sum(key_lens), 2), normal(sum(key_lens), 2)
    starts = [torch.tensor([0, *lens]).cumsum(0).to(torch.int32).to(device) for lens in lengths]
    options = {"causal": False} | per_head(options, 6, device)
    settings = {"max_query_len": max(query_lens), "max_key_len": max(key_lens), "scale": 0.2} | options
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:2], float("nan"), device=device)
    ok.varlen_attention(q, k, v, *starts, **settings, out=out, lse=lse)
    expected_lse = torch.empty_like(lse)
    wide = (q.double(), k.double(), v.double())
    expected = oracle(ok.varlen_attention, *wide, *starts, **settings, lse=expected_lse)
    rows = sum(query_lens)
    assert_close(out[:rows], expected[:rows])
    assert_close(lse[:rows], expected_lse[:rows])
    assert out[rows:].isnan().all()
    assert lse[rows:].isnan().all()


def test_varlen_does_not_change_its_keys(device):
    q, k, v = (torch.randn(6, 2, 16, device=device) for _ in range(3))
    copies = k.clone(), v.clone()
    starts = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, 6)]
    ok.varlen_attention(q, k, v, *starts, max_query_len=1, max_key_len=6, scale=1.0, causal=True, window=2)
    assert torch.equal(k, copies[0])
    assert torch.equal(v, copies[1])


def test_merged_halves_equal_the_whole(oracle, device):
    q, k, v = (torch.randn(count, 2, 16, device=device) for count in (5, 12, 12))
    starts = torch.tensor([0, 5], dtype=torch.int32, device=device)

    def attend(part):
        lse = torch.empty(5, 2, device=device)
        keys = torch.tensor([0, k[part].shape[0]], dtype=torch.int32, device=device)
        out = ok.varlen_attention(
            q, k[part], v[part], starts, keys, max_query_len=5, max_key_len=12, scale=0.3, lse=lse
        )  # fmt: skip
        return out, lse

    whole, whole_lse = attend(slice(None))
    for cut in (0, 1, 7, 12):
        out, lse = ok.merge_states(*attend(slice(0, cut)), *attend(slice(cut, None)))
        assert_close(out, whole)
        assert_close(lse, whole_lse)


def test_every_combination_of_options(oracle, device, interpreted):
    inputs = make_paged_inputs([1, 4, 9], [20, 18, 9], device=device, head_dim=16, seed=6)
    choices = itertools.product((None, 5), (None, 1.5), (False, True), (False, True), (True, False))
    for index, (window, soft_cap, sinks, alibi, causal) in enumerate(choices):
        if interpreted and index % 5:
            continue
        marks = {"sinks": sinks, "alibi": alibi}
        options = {"window": window, "soft_cap": soft_cap, "causal": causal} | marks
        check_paged(oracle, inputs, per_head(options, 4, device))
