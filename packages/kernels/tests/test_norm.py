"""Norms of the backend under test against the reference in fp64; rounded ones also against what codes can hold."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close, assert_codes

SHAPES = [(0, 8), (1, 1), (5, 576), (2, 3, 80)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(oracle, device, shape, dtype, offset):
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)
    out = torch.full_like(x, float("nan"))
    assert ok.rms_norm(x, weight, 1e-5, offset=offset, out=out) is out
    assert_close(out, oracle(ok.rms_norm, x.double(), weight.double(), 1e-5, offset=offset))
    assert torch.equal(ok.rms_norm(x, weight, 1e-5, offset=offset), out)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_keeps_the_sum_in_the_residual(oracle, device, shape, dtype):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    total = (x.double() + residual.double()).to(dtype)
    out = ok.add_rms_norm(x, residual, weight, 1e-5, offset=1.0)
    assert torch.equal(residual, total)
    assert_close(out, oracle(ok.rms_norm, total.double(), weight.double(), 1e-5, offset=1.0))


def test_norms_may_write_over_their_input(device):
    x, weight = torch.randn(4, 32, device=device), torch.randn(32, device=device)
    expected = ok.rms_norm(x, weight, 1e-5)
    ok.rms_norm(x, weight, 1e-5, out=x)
    assert torch.equal(x, expected)


def test_rows_may_be_strided(oracle, device):
    x, weight = torch.randn(4, 64, device=device)[:, 16:48], torch.randn(32, device=device)
    assert_close(ok.rms_norm(x, weight, 1e-5), oracle(ok.rms_norm, x.double(), weight.double(), 1e-5))


def test_heads_of_a_projection_are_normed_in_place(oracle, device):
    heads = torch.randn(3, 6, 16, device=device)[:, 1:4]
    weight = torch.randn(16, device=device)
    expected = oracle(ok.rms_norm, heads.double(), weight.double(), 1e-5)
    ok.rms_norm(heads, weight, 1e-5, out=heads)
    assert_close(heads, expected)


@pytest.mark.parametrize("row", [0, 3])
def test_a_row_has_the_same_bits_in_every_batch(device, row):
    x, weight = torch.randn(4, 320, device=device), torch.randn(320, device=device)
    whole, alone = ok.rms_norm(x, weight, 1e-5), ok.rms_norm(x[row : row + 1], weight, 1e-5)
    assert torch.equal(alone, whole[row : row + 1])
    whole, alone = (ok.rms_norm_quant(part, weight, 1e-5, torch.int8) for part in (x, x[row : row + 1]))
    assert torch.equal(alone[0], whole[0][row : row + 1])
    assert torch.equal(alone[1], whole[1][row : row + 1])


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("group_size", [None, 128], ids=["row", "group"])
@pytest.mark.parametrize("size", [1, 127, 128, 129, 576])
def test_rounded_norms_hold_the_norm(oracle, device, size, group_size, codes):
    x, residual = (torch.randn(3, size, device=device).to(torch.bfloat16) for _ in range(2))
    weight = torch.randn(size, device=device)
    expected = oracle(ok.rms_norm, x.double(), weight.double(), 1e-5, offset=1.0)
    out = torch.full((3, size), 77, device=device).to(codes)
    scales = torch.full((3, 1 if group_size is None else -(-size // 128)), float("nan"), device=device)
    options = {"offset": 1.0, "group_size": group_size, "out": out, "scales": scales}
    assert ok.rms_norm_quant(x, weight, 1e-5, codes, **options)[0] is out
    assert_codes(out, scales, expected)
    largest = [group.abs().amax(dim=-1) for group in expected.split(group_size or size, dim=-1)]
    wanted = torch.stack(largest, dim=-1) / (127 if codes == torch.int8 else 448)
    torch.testing.assert_close(scales.double(), wanted, rtol=1e-5, atol=0)
    total = (x.double() + residual.double()).to(torch.bfloat16)
    ok.add_rms_norm_quant(x, residual, weight, 1e-5, codes, **options)
    assert torch.equal(residual, total)
    assert_codes(out, scales, oracle(ok.rms_norm, total.double(), weight.double(), 1e-5, offset=1.0))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_fixed_scale_is_used_for_all_and_cuts_off_what_it_cannot_hold(oracle, device, codes):
    x, weight = torch.randn(2, 3, 200, device=device), torch.ones(200, device=device)
    largest = 127 if codes == torch.int8 else 448
    fixed = torch.full((1, 1), 1.0 / largest, device=device)
    out, scales = ok.rms_norm_quant(x, weight, 1e-5, codes, fixed_scale=fixed)
    assert scales is fixed
    expected = oracle(ok.rms_norm, x.double(), weight.double(), 1e-5)
    assert_codes(out, scales, expected.clamp(-1, 1))
    assert out.float().abs().amax() == largest


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's, in numpy
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_of_zeros_and_of_nan_say_so_in_their_scales(device, codes):
    x, weight = torch.randn(3, 200, device=device), torch.ones(200, device=device)
    x[0], x[2, 199] = 0.0, float("nan")
    out, scales = ok.rms_norm_quant(x, weight, 1e-5, codes)
    assert out[0].float().tolist() == out[2].float().tolist() == [0.0] * 200
    assert (scales[:, 0] == 0).tolist() == [True, False, False]
    assert scales[:, 0].isfinite().tolist() == [True, True, False]


X, WEIGHT = torch.zeros(2, 256), torch.ones(256)
REFUSED = {
    "dtype": ({"dtype": torch.uint8}, ok.OptionError, "dtype is torch.uint8, expected torch.int8 or"),
    "group_size": ({"group_size": 64}, ok.OptionError, "group_size is 64, expected 128 or None"),
    "fixed group": ({"group_size": 128, "fixed_scale": torch.ones(1, 1)}, ok.OptionError, "None beside a fixed_scale"),
    "fixed shape": ({"fixed_scale": torch.ones(1)}, ok.ShapeError, r"fixed_scale has shape \[1\]"),
    "scales": ({"scales": torch.ones(2, 2)}, ok.ShapeError, r"scales has shape \[2, 2\], expected \[2, 1\]"),
    "scales dtype": ({"scales": torch.ones(2, 1).half()}, ok.DtypeError, "scales has dtype float16"),
    "scales strides": (
        {"scales": torch.ones(2, 2).T, "group_size": 128}, ok.ShapeError, "scales has strides .*contiguous",
    ),
    "out": ({"out": torch.zeros(2, 256)}, ok.DtypeError, "out has dtype float32, expected int8"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_rounded_to_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        ok.rms_norm_quant(X, WEIGHT, 1e-5, **{"dtype": torch.int8} | options)
