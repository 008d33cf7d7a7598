"""rope_kv_write of the backend under test against the reference in fp64."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

NAN = float("nan")


def make_inputs(device, dtype, rot_dim, head_dim, with_norm):
    generator = torch.Generator().manual_seed(rot_dim)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    qkv = normal(6, 8, head_dim)
    tensors = {"q": qkv[:, :4], "k": qkv[:, 4:6], "v": qkv[:, 6:]}
    weights = {name: normal(head_dim) if with_norm else None for name in ("q_norm_weight", "k_norm_weight")}
    angles = torch.outer(torch.arange(50.0), 1000.0 ** -(torch.arange(0, rot_dim, 2) / max(rot_dim, 1)))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
    positions = torch.tensor([0, 49, 7, 7, 0, 31], device=device)
    slots = torch.tensor([16, -1, 63, 0, -1, 31], device=device)
    return tensors, weights, positions, cos_sin, slots


def run(tensors, weights, positions, cos_sin, slots, dtype, layout, interleaved, call=None):
    q, k, v = (x.clone().to(dtype) for x in tensors.values())
    head_dim = q.shape[-1]
    shape = (4, 2, 16, 2, head_dim) if layout == "nhd" else (4, 2, 2, 16, head_dim)
    whole = torch.full(shape, NAN, dtype=dtype, device=q.device)
    whole = whole.transpose(2, 3) if layout == "nhd" else whole
    weights = {name: None if x is None else x.to(dtype) for name, x in weights.items()}
    arguments = (q, k, v, positions, cos_sin, whole[:, 0], whole[:, 1], slots)
    options = {"interleaved": interleaved, "eps": 1e-5, **weights}
    call(ok.rope_kv_write, *arguments, **options) if call else ok.rope_kv_write(*arguments, **options)
    return q, k, whole[:, 0], whole[:, 1]


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("rot_dim", "head_dim"), [(64, 64), (32, 80), (0, 16)], ids=["full", "partial", "none"])
def test_rotation_norm_and_write(oracle, device, rot_dim, head_dim, interleaved, with_norm, layout):
    inputs = make_inputs(device, torch.float32, rot_dim, head_dim, with_norm)
    actual = run(*inputs, torch.float32, layout, interleaved)
    expected = run(*inputs, torch.float64, layout, interleaved, call=oracle)
    for mine, wanted in zip(actual[:2], expected[:2], strict=True):
        assert_close(mine, wanted)
    for mine, wanted in zip(actual[2:], expected[2:], strict=True):
        assert torch.equal(mine.isnan(), wanted.isnan())
        assert_close(mine.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(oracle, device, dtype):
    inputs = make_inputs(device, dtype, 32, 32, with_norm=True)
    for mine, wanted in zip(
        run(*inputs, dtype, "hnd", False), run(*inputs, torch.float64, "hnd", False, oracle), strict=True
    ):
        torch.testing.assert_close(mine, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


def test_cache_holds_what_k_holds(device):
    inputs = make_inputs(device, torch.bfloat16, 16, 16, with_norm=True)
    _, k, k_cache, v_cache = run(*inputs, torch.bfloat16, "hnd", False)
    for token, slot in enumerate(inputs[-1].tolist()):
        if slot >= 0:
            assert torch.equal(k_cache[slot // 16, :, slot % 16], k[token])
            assert torch.equal(v_cache[slot // 16, :, slot % 16], inputs[0]["v"][token])


def test_views_of_one_projection_are_rotated_in_place(oracle, device):
    tensors, weights, positions, cos_sin, slots = make_inputs(device, torch.float32, 64, 64, with_norm=False)
    expected = run(tensors, weights, positions, cos_sin, slots, torch.float64, "hnd", False, call=oracle)
    k_cache, v_cache = (torch.zeros(4, 2, 16, 64, device=device) for _ in range(2))
    ok.rope_kv_write(*tensors.values(), positions, cos_sin, k_cache, v_cache, slots)
    assert_close(tensors["q"], expected[0])
    assert_close(tensors["k"], expected[1])
