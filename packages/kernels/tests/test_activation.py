"""Activations of the backend under test against the reference in fp64."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close, assert_codes

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's, in numpy
OPS = {
    "silu_and_mul": ok.silu_and_mul,
    "gelu_and_mul": ok.gelu_and_mul,
    "gelu_and_mul tanh": lambda x, out=None: ok.gelu_and_mul(x, approximate="tanh", out=out),
    "gelu": ok.gelu,
    "gelu tanh": lambda x, out=None: ok.gelu(x, "tanh", out),
}


@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (7, 96), (2, 3, 34)], ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_activation(oracle, device, op, shape, dtype):
    x = (4 * torch.randn(shape, device=device)).to(dtype)
    expected = oracle(op, x.double())
    out = torch.full_like(expected, float("nan"), dtype=dtype)
    assert op(x, out=out) is out
    assert_close(out, expected)
    assert torch.equal(op(x), out)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_large_values_do_not_overflow(device, op):
    x = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=device)
    assert op(x)[0, :2].tolist() == [0.0, 1e4]


ROUNDED = {
    "silu_and_mul": (ok.silu_and_mul_quant, {}),
    "gelu_and_mul": (ok.gelu_and_mul_quant, {"approximate": "none"}),
    "gelu tanh": (ok.gelu_quant, {"approximate": "tanh"}),
}


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("form", ["row", "group", "fixed"])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_activations_hold_the_activation(oracle, device, name, form, codes):
    op, options = ROUNDED[name]
    for size in (1, 129, 1280):
        x = (2 * torch.randn(2, size if name == "gelu tanh" else 2 * size, device=device)).to(torch.float16)
        expected = oracle(OPS[name], x.double())
        scaling = {"group_size": 128} if form == "group" else {}
        if form == "fixed":
            scaling["fixed_scale"] = (expected.abs().amax() / 100).to(torch.float32).view(1, 1)
        out, scales = op(x, codes, **options, **scaling)
        assert_codes(out, scales, expected)


def test_nan_in_a_row_shows_in_its_scale_alone(device):
    x = torch.randn(2, 2 * 5000, device=device)
    x[1, 4999] = float("nan")
    out, scales = ok.silu_and_mul_quant(x, torch.int8)
    assert scales[:, 0].isfinite().tolist() == [True, False]
    assert not out[1].any()
    out, scales = ok.silu_and_mul_quant(x, torch.int8, group_size=128)
    assert scales.isfinite().sum().item() == 2 * 40 - 1
