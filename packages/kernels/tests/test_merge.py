"""merge_states of the backend under test: against the reference, and at its edges."""

import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

EMPTY = -float("inf")


def make_sides(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(5, 3, 16, generator=generator).to(dtype).to(device) for _ in range(2)]
    sums = [(30 * torch.randn(5, 3, generator=generator)).to(device) for _ in range(2)]
    return outs[0], sums[0], outs[1], sums[1]


def test_merge_equals_the_reference(oracle, device, backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if dtype == torch.float64 and backend is ok.Backend.TRITON:
            continue
        o_a, lse_a, o_b, lse_b = make_sides(device, dtype)
        out, lse = ok.merge_states(o_a, lse_a, o_b, lse_b)
        expected, expected_lse = oracle(ok.merge_states, o_a.double(), lse_a, o_b.double(), lse_b)
        assert_close(out, expected, dtype=torch.float32 if dtype == torch.float64 else dtype)
        assert_close(lse, expected_lse)


def test_an_empty_side_gives_way_even_when_it_holds_nan(device):
    o_a, lse_a, o_b, lse_b = make_sides(device)
    lse_a[0], lse_b[1] = EMPTY, EMPTY
    o_a[0], o_b[1] = float("nan"), float("nan")
    out, lse = ok.merge_states(o_a, lse_a, o_b, lse_b)
    assert torch.equal(out[0], o_b[0])
    assert torch.equal(out[1], o_a[1])
    assert torch.equal(lse[0], lse_b[0])
    assert torch.equal(lse[1], lse_a[1])


def test_two_empty_sides_give_zero(device):
    o_a, lse_a, o_b, lse_b = make_sides(device)
    for side in (lse_a, lse_b):
        side[2] = EMPTY
    o_a[2] = float("nan")
    out, lse = ok.merge_states(o_a, lse_a, o_b, lse_b)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert lse[2].tolist() == [EMPTY] * 3


def test_the_result_may_replace_a_side(device):
    o_a, lse_a, o_b, lse_b = make_sides(device)
    expected, expected_lse = ok.merge_states(o_a, lse_a, o_b, lse_b)
    out, lse = ok.merge_states(o_a, lse_a, o_b, lse_b, out=o_a, lse=lse_a)
    assert out is o_a
    assert lse is lse_a
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
