"""Activations of the backend under test against the reference in fp64."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPS = {
    "silu_and_mul": ok.silu_and_mul,
    "gelu_and_mul": ok.gelu_and_mul,
    "gelu_and_mul tanh": lambda x, out=None: ok.gelu_and_mul(x, approximate="tanh", out=out),
    "gelu": ok.gelu,
    "gelu tanh": lambda x, out=None: ok.gelu(x, "tanh", out),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
