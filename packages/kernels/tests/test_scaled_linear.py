"""Products of 8-bit codes, and the rounding of rows to them: against fp64, with every form of scales."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import _spans
from octavo_kernels.testing import assert_close

FP8 = torch.float8_e4m3fn


@pytest.fixture
def spans(monkeypatch):
    """Cut even small weights into spans."""
    monkeypatch.setattr(_spans, "_LEAST_BLOCKS", 1)
    monkeypatch.setattr(_spans, "_PROGRAMS", 6)


def bits(codes):
    return codes.view(torch.int8).int()


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("group_size", [None, 128], ids=["rows", "groups"])
def test_rows_are_rounded_as_the_reference_does(device, oracle, dtype, group_size):
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    x[1] = 0
    x[2, 140] = float("inf")
    x[3, 299] = float("nan")
    wide = torch.zeros(5, 310, dtype=torch.int8, device=device).view(dtype)
    codes, scales = ok.quantize_rows(x, dtype, group_size=group_size, out=wide[:, :300])
    expected, expected_scales = oracle(ok.quantize_rows, x, dtype, group_size=group_size)
    torch.testing.assert_close(scales[[0, 1, 4]], expected_scales[[0, 1, 4]], rtol=1e-6, atol=0)
    assert torch.equal(scales.isfinite(), expected_scales.isfinite())
    assert (bits(codes) - bits(expected)).abs().max() <= 1  # a code beside, where a scale's last bit differs
    assert (bits(codes) != bits(expected)).float().mean() < 0.01
    assert bits(wide[:, 300:]).abs().max() == 0
    values = codes.double()[[0, 4]] * scales.double()[[0, 4]].repeat_interleave(group_size or 300, 1)[:, :300]
    assert (values - x[[0, 4]].double()).norm() / x[[0, 4]].double().norm() < (0.01 if dtype == torch.int8 else 0.03)


def test_numbers_half_way_between_codes_become_even_ones(device):
    step = 2.0**-9  # of e4m3 below 2**-6
    x = torch.tensor([[448.0, 17, 19, -17, 31, 1.5 * step, 2.5 * step, 0.5 * step]], device=device)
    codes, scales = ok.quantize_rows(x, FP8)
    assert scales.item() == 1
    assert codes.float().tolist() == [[448, 16, 20, -16, 32, 2 * step, 2 * step, 0]]
    codes, _ = ok.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5]], device=device), torch.int8)
    assert codes.tolist() == [[127, 0, 2, -2]]


def random_codes(rows, columns, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-127, 128, (rows, columns + 16), generator=generator)
    codes = wide.to(torch.int8) if dtype == torch.int8 else (wide / 127 * 4).to(dtype)
    return codes.to(device)[:, :columns]


def random_scales(shape, device, seed=3):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device) / 64


FORMS = {
    "fp8, a scale for all": (FP8, "all", "all", (17,)),
    "fp8, rows and outputs": (FP8, "rows", "rows", (1,)),
    "fp8, groups and blocks": (FP8, "groups", "blocks", (0, 1, 33)),
    "int8, rows and outputs": (torch.int8, "rows", "rows", (1, 65)),
    "int8, groups and blocks": (torch.int8, "groups", "blocks", (17,)),
}


@pytest.mark.parametrize(("dtype", "x_form", "weight_form", "counts"), FORMS.values(), ids=FORMS)
def test_products_equal_those_of_the_values(device, spans, dtype, x_form, weight_form, counts):
    out_features, in_features, groups = 140, 270, 3
    weight = random_codes(out_features, in_features, dtype, device, 1)
    weight_scale = random_scales({"all": (1, 1), "rows": (out_features, 1), "blocks": (2, groups)}[weight_form], device)
    bias = torch.linspace(-1, 1, out_features, device=device)
    factors = weight_scale.double()
    if weight_form == "blocks":
        factors = factors.repeat_interleave(128, 0)[:out_features].repeat_interleave(128, 1)[:, :in_features]
    values = weight.double() * factors
    for num_tokens in counts:
        x = random_codes(num_tokens, in_features, dtype, device, 2)
        x_shape = {"all": (1, 1), "rows": (num_tokens, 1), "groups": (num_tokens, groups)}[x_form]
        x_scale = random_scales(x_shape, device, 4)
        x_factors = x_scale.double()
        if x_form == "groups":
            x_factors = x_factors.repeat_interleave(128, 1)[:, :in_features]
        wide = torch.full((num_tokens, out_features + 3), float("nan"), device=device)
        size = ok.scaled_workspace(num_tokens, out_features, in_features)
        workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
        out = wide[:, :out_features]
        ok.scaled_linear(x, weight, x_scale, weight_scale, bias, out=out, workspace=workspace)
        assert_close(out, (x.double() * x_factors) @ values.T + bias.double())
        assert wide[:, out_features:].isnan().all()


def test_int8_sums_of_a_span_are_exact(device):
    x = torch.full((2, 1024), 127, dtype=torch.int8, device=device)
    x[1, ::2] = -128
    weight = torch.full((3, 1024), 127, dtype=torch.int8, device=device)
    one = torch.ones(1, 1, device=device)
    out = ok.scaled_linear(x, weight, one, one, out_dtype=torch.float32)
    assert torch.equal(out.double(), x.double() @ weight.double().T)


def test_a_row_does_not_depend_on_the_rows_beside_it_bit_for_bit(device, spans):
    weight = random_codes(70, 400, FP8, device, 1)
    x = random_codes(16, 400, FP8, device, 2)
    x_scale, weight_scale = random_scales((16, 1), device), random_scales((70, 1), device)
    together = ok.scaled_linear(x, weight, x_scale, weight_scale)
    alone = ok.scaled_linear(x[9:10], weight, x_scale[9:10], weight_scale)
    assert torch.equal(alone[0], together[9])


def test_spans_have_the_same_sums_in_one_program_bit_for_bit(device, spans, monkeypatch):
    weight, x = random_codes(70, 400, FP8, device, 1), random_codes(5, 400, FP8, device, 2)
    x_scale, weight_scale = random_scales((5, 4), device), random_scales((1, 4), device)
    split = ok.scaled_linear(x, weight, x_scale, weight_scale, out_dtype=torch.float32)
    assert ok.scaled_workspace(5, 70, 400) == 3 * 5 * 70 * 4
    monkeypatch.setattr(_spans, "_SPLIT_ROWS", 0)
    assert torch.equal(ok.scaled_linear(x, weight, x_scale, weight_scale, out_dtype=torch.float32), split)


def test_arguments_that_do_not_fit_are_refused():
    x, weight = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(4, 64, dtype=torch.int8)
    one = torch.ones(1, 1)
    with pytest.raises(ok.DtypeError, match="weight has dtype float8_e4m3fn, expected int8"):
        ok.scaled_linear(x, weight.view(FP8), one, one)
    with pytest.raises(ok.ShapeError, match=r"x_scale has shape \[3, 1\], expected \[2, 1\] or \[2, 1\] or \[1, 1\]"):
        ok.scaled_linear(x, weight, torch.ones(3, 1), one)
    with pytest.raises(ok.OptionError, match="group_size is 64, expected 128 or None"):
        ok.quantize_rows(torch.zeros(1, 64), torch.int8, group_size=64)
    with pytest.raises(ok.OptionError, match=r"dtype is torch\.int16, expected torch\.int8 or"):
        ok.quantize_rows(torch.zeros(1, 64), torch.int16)
