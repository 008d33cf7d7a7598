"""Many adapters in one batch against each by itself in fp64, with base tokens among them."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

RANKS = [16, 1, 40, 0]


def make_adapters(in_features, out_features, dtype, device):
    """Adapters of several ranks; what lies beyond a rank is NaN."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, max(RANKS), in_features, generator=generator) * in_features**-0.5
    b = torch.randn(4, out_features, max(RANKS), generator=generator)
    for adapter, rank in enumerate(RANKS):
        a[adapter, rank:] = float("nan")
        b[adapter, :, rank:] = float("nan")
    ranks = torch.tensor(RANKS, dtype=torch.int32, device=device)
    scales = torch.tensor([2.0, 0.5, 1.0, 3.0], device=device)
    return a.to(dtype).to(device), b.to(dtype).to(device), ranks, scales


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "in_features", "out_features"),
    [
        (torch.float32, torch.float32, 80, 70),
        (torch.bfloat16, torch.bfloat16, 2100, 33),
        (torch.float32, torch.bfloat16, 80, 48),
        (torch.float32, torch.float16, 2100, 33),
    ],
    ids=["fp32, one span", "bf16, two spans", "fp32 by bf16", "fp32 by fp16, two spans"],
)
def test_adapters_of_a_batch_equal_each_by_itself(backend, device, dtype, weight_dtype, in_features, out_features):
    a, b, ranks, scales = make_adapters(in_features, out_features, weight_dtype, device)
    rounded_to = weight_dtype if backend is ok.Backend.TRITON else dtype
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (0, 1, 21):
        x = torch.randn(num_tokens, in_features, generator=generator).to(dtype).to(device)
        ids = torch.randint(-1, 4, (num_tokens,), generator=generator, dtype=torch.int32).to(device)
        base = torch.randn(num_tokens, out_features + 16, generator=generator).to(dtype).to(device)
        out = base.clone()
        groups = ok.group_rows(ids, 4)
        shape = (ok.lora_spans(in_features), num_tokens, max(RANKS))
        shrunk = ok.lora_shrink(x, a, groups, ranks, out=torch.full(shape, float("nan"), device=device))
        ok.lora_expand(shrunk, b, groups, ranks, scales, out[:, :out_features])
        assert torch.equal(out[:, out_features:], base[:, out_features:])
        for token, adapter in enumerate(ids.tolist()):
            if adapter < 0 or RANKS[adapter] == 0:
                assert torch.equal(out[token], base[token])
                continue
            rank = RANKS[adapter]
            delta = b[adapter, :, :rank].double() @ (a[adapter, :rank].double() @ x[token].double())
            expected = base[token, :out_features].double() + scales[adapter].double() * delta
            assert_close(out[token, :out_features] / 16, expected / 16, rounded_to)


def test_a_token_does_not_depend_on_the_others_bit_for_bit(device):
    a, b, ranks, scales = make_adapters(2100, 33, torch.float32, device)
    x = torch.randn(20, 2100, generator=torch.Generator().manual_seed(2)).to(device)
    ids = (torch.arange(20, dtype=torch.int32) % 5 - 1).to(device)

    def run(tokens):
        groups = ok.group_rows(ids[tokens], 4)
        shrunk = ok.lora_shrink(x[tokens], a, groups, ranks)
        return ok.lora_expand(shrunk, b, groups, ranks, scales, torch.zeros(len(x[tokens]), 33, device=device))

    assert torch.equal(run(slice(3, 9)), run(slice(0, 20))[3:9])


def test_arguments_that_do_not_fit_are_refused():
    a, b, ranks, scales = make_adapters(32, 8, torch.float32, "cpu")
    groups = ok.group_rows(torch.zeros(2, dtype=torch.int32), 4)
    with pytest.raises(ok.ShapeError, match=r"a has shape \[4, 40, 32\], expected \[num_adapters, max_rank, 31\]"):
        ok.lora_shrink(torch.zeros(2, 31), a, groups, ranks)
    with pytest.raises(ok.DtypeError, match="ranks has dtype int64, expected int32"):
        ok.lora_shrink(torch.zeros(2, 32), a, groups, ranks.long())
    with pytest.raises(ok.ShapeError, match=r"out has shape \[3, 8\], expected \[2, 8\]"):
        ok.lora_expand(torch.zeros(1, 2, 40), b, groups, ranks, scales, torch.zeros(3, 8))


def test_matrices_that_lie_by_rank_give_the_same_bits(backend, device):
    if backend is ok.Backend.TRITON:
        pytest.skip("a layout for CPUs")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b, ranks, scales = make_adapters(96, 75, dtype, device)
        x = torch.randn(37, 96, generator=torch.Generator().manual_seed(3))
        groups = ok.group_rows(torch.arange(37) % 5 - 1, 4)
        shrunk = ok.lora_shrink(x, a, groups, ranks)
        expected = ok.lora_expand(shrunk, b, groups, ranks, scales, torch.zeros(37, 75))
        by_rank = b.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(ok.lora_expand(shrunk, by_rank, groups, ranks, scales, torch.zeros(37, 75)), expected)
        assert expected[1:4].abs().sum() > 0


@pytest.mark.skipif(ok.cpu_isa() == "none", reason="no native kernels")
def test_a_recording_runs_on_fewer_tokens_and_other_groups(backend):
    if backend is not ok.Backend.CPU:
        pytest.skip("programs are of native code")
    a, b, ranks, scales = make_adapters(80, 48, torch.bfloat16, "cpu")
    b = b.transpose(1, 2).contiguous().transpose(1, 2)
    x, out = torch.randn(40, 80, generator=torch.Generator().manual_seed(4)), torch.zeros(40, 64)
    groups = ok.group_rows(torch.full((40,), -1), 4)
    with ok.Recording(40) as recording:
        ok.lora_expand(ok.lora_shrink(x, a, groups, ranks), b, groups, ranks, scales, out[:, 16:])
    for num_tokens in (1, 7, 40, 0):
        ids = torch.full((40,), -1)
        ids[:num_tokens] = torch.arange(num_tokens) % 5 - 1
        ok.group_rows(ids, 4, out=groups)
        out.zero_()
        recording.program.run(num_tokens, num_tokens)
        alone = ok.group_rows(ids[:num_tokens], 4)
        expected = torch.zeros(40, 64)
        shrunk = ok.lora_shrink(x[:num_tokens], a, alone, ranks)
        ok.lora_expand(shrunk, b, alone, ranks, scales, expected[:num_tokens, 16:])
        assert torch.equal(out, expected)


def make_parts(in_features, widths, dtype, device):
    """Linears side by side in a product, each with adapters of its own."""
    parts, first_column = [], 0
    for width in widths:
        generator = torch.Generator().manual_seed(width)
        a = (torch.randn(4, max(RANKS), in_features, generator=generator) * in_features**-0.5).to(dtype).to(device)
        b = torch.randn(4, max(RANKS), width, generator=generator).to(dtype).to(device)
        ranks = torch.tensor(RANKS, dtype=torch.int32, device=device)
        b = b.transpose(1, 2) if device == "cpu" else b.transpose(1, 2).contiguous()
        parts.append(ok.LoraPart(a, b, ranks, torch.rand(4, generator=generator).to(device) + 0.5, first_column))
        first_column += width
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_features", [80, 2100], ids=["one span", "two spans"])
def test_linears_side_by_side_have_the_bits_of_each_by_itself(device, interpreted, dtype, in_features):
    parts = make_parts(in_features, (300, 33, 1040), dtype, device)
    generator = torch.Generator().manual_seed(5)
    for num_tokens in (0, 1, 37) if interpreted else (0, 1, 37, 300):  # threads share columns, or tiles whole ones
        x = torch.randn(num_tokens, in_features, generator=generator).to(device)
        base = torch.randn(num_tokens, 1380, generator=generator).to(device)
        groups = ok.group_rows((torch.arange(num_tokens) % 5 - 1).to(device), 4)
        expected = base.clone()
        for part in parts:
            shrunk = ok.lora_shrink(x, part.a, groups, part.ranks)
            ok.lora_expand(shrunk, part.b, groups, part.ranks, part.scales, expected[:, part.columns])
        assert torch.equal(ok.lora_linear(x, parts, groups, base.clone()), expected)
        assert num_tokens < 2 or not torch.equal(expected[1], base[1])
        assert torch.equal(expected[:, 1373:], base[:, 1373:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_multiply_the_sum_of_both_products_for_rows_with_an_adapter(device, interpreted, dtype):
    parts = make_parts(80, (300, 33), torch.float32, device)
    factors = torch.rand(4, 33, generator=torch.Generator().manual_seed(8)).to(device) + 0.5
    generator = torch.Generator().manual_seed(9)
    for num_tokens in (0, 1, 37) if interpreted else (0, 1, 37, 300):  # threads share columns, or tiles whole ones
        x = torch.randn(num_tokens, 80, generator=generator).to(dtype).to(device)
        base = torch.randn(num_tokens, 333, generator=generator).to(dtype).to(device)
        ids = (torch.arange(num_tokens) % 5 - 1).to(device)
        groups = ok.group_rows(ids, 4)
        expected = ok.lora_linear(x, parts, groups, base.clone())
        found = ok.lora_linear(x, [parts[0], parts[1]._replace(factors=factors)], groups, base.clone())
        has_factor = [adapter >= 0 and RANKS[adapter] > 0 for adapter in ids.tolist()]
        expected[has_factor, 300:] *= factors[ids[has_factor]].to(dtype)
        assert torch.equal(found, expected)
        assert num_tokens < 2 or not torch.equal(found, ok.lora_linear(x, parts, groups, base.clone()))


def test_threads_and_tiles_change_no_bit(native_library):
    parts = make_parts(2100, (300, 33, 1040), torch.bfloat16, "cpu")
    x = torch.randn(45, 2100, generator=torch.Generator().manual_seed(6))
    ids = torch.arange(45) * 7 % 5 - 1
    found = []
    for num_threads in (1, 2, 3, 16):
        for tile_rows in (16, 64):
            with ok.native_threads(num_threads):
                groups = ok.group_rows(ids, 4, tile_rows=tile_rows)
                found.append(ok.lora_linear(x, parts, groups, torch.zeros(45, 1373)))
    assert all(torch.equal(out, found[0]) for out in found[1:])
    alone = ok.lora_linear(x[8:9], parts, ok.group_rows(ids[8:9], 4), torch.zeros(1, 1373))
    assert torch.equal(alone, found[0][8:9])
    assert alone.abs().sum() > 0


def test_a_recording_groups_its_rows_itself_and_adds_to_several_linears(native_library):
    parts = make_parts(80, (48, 33), torch.bfloat16, "cpu")
    x, ids = torch.randn(40, 80, generator=torch.Generator().manual_seed(7)), torch.full((40,), -1)
    out, groups = torch.zeros(40, 81), ok.group_rows(ids, 4)
    workspace = torch.empty(ok.group_rows_workspace(40, 4), dtype=torch.uint8)
    with ok.Recording(40) as recording:
        ok.lora_linear(x, parts, ok.group_rows(ids, 4, out=groups, workspace=workspace), out)
    assert recording.program.num_ops == 2
    for num_tokens in (1, 40, 0, 7):
        ids[:] = torch.arange(40) % 5 - 1
        out.zero_()
        recording.program.run(num_tokens, num_tokens)
        expected = torch.zeros(40, 81)
        ok.lora_linear(x[:num_tokens], parts, ok.group_rows(ids[:num_tokens], 4), expected[:num_tokens])
        assert torch.equal(out, expected)


def test_linears_side_by_side_that_do_not_fit_are_refused():
    parts = make_parts(32, (8, 9), torch.float32, "cpu")
    groups = ok.group_rows(torch.zeros(2, dtype=torch.int32), 4)
    x, out = torch.zeros(2, 32), torch.zeros(2, 17)
    with pytest.raises(ok.OptionError, match=r"len\(parts\) is 0, expected at least 1"):
        ok.lora_linear(x, [], groups, out)
    with pytest.raises(ok.OptionError, match="columns is 17, expected at most the 16 of out"):
        ok.lora_linear(x, parts, groups, out[:, :16])
    with pytest.raises(ok.DtypeError, match="b has dtype bfloat16, expected float32"):
        ok.lora_linear(x, [parts[0], parts[1]._replace(b=parts[1].b.bfloat16())], groups, out)
    with pytest.raises(ok.ShapeError, match=r"a has shape \[4, 8, 32\], expected \[4, 40, 32\]"):
        ok.lora_linear(x, [parts[0], parts[1]._replace(a=parts[1].a[:, :8].contiguous())], groups, out)
    with pytest.raises(ok.ShapeError, match=r"factors has shape \[4, 9\], expected \[4, 8\]"):
        ok.lora_linear(x, [parts[0]._replace(factors=torch.ones(4, 9))], groups, out)
    with pytest.raises(ok.ShapeError, match=r"out has shape \[3, 17\], expected \[2, 17\]"):
        ok.lora_linear(x, parts, groups, torch.zeros(3, 17))
