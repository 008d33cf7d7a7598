"""Norms of the backend under test against the reference in fp64."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (5, 576), (2, 3, 80)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(oracle, device, shape, dtype, offset):
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device).to(dtype)
    out = torch.full_like(x, float("nan"))
    assert ok.rms_norm(x, weight, 1e-5, offset=offset, out=out) is out
    assert_close(out, oracle(ok.rms_norm, x.double(), weight.double(), 1e-5, offset=offset))
    assert torch.equal(ok.rms_norm(x, weight, 1e-5, offset=offset), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
