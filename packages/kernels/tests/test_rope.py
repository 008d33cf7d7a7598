"""rope_kv_write of the backend under test against the reference in fp64, and the codes of caches of 8 bits."""

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


def written_codes(inputs, codes, scale_form, *, interleaved=False, layout="hnd", call=None):
    """Return k as it is left, the codes of both caches, and their scales per slot, or per head if they were given."""
    tensors, weights, positions, cos_sin, slots = inputs
    q, k, v = (x.clone() for x in tensors.values())
    head_dim = q.shape[-1]
    shape = (4, 2, 16, 2, head_dim) if layout == "nhd" else (4, 2, 2, 16, head_dim)
    caches = torch.full(shape, 77.0, device=q.device).to(codes)
    caches = caches.transpose(2, 3) if layout == "nhd" else caches
    if scale_form == "slot":
        scales = torch.full((2, 4, 2, 16), NAN, device=q.device)
    else:
        scales = torch.tensor([[0.02, 0.05], [0.01, 0.03]], device=q.device)[:, : 2 if scale_form == "head" else 1]
    arguments = (q, k, v, positions, cos_sin, caches[:, 0], caches[:, 1], slots, scales[0], scales[1])
    options = {"interleaved": interleaved, "eps": 1e-5, **weights}
    call(ok.rope_kv_write_quant, *arguments, **options) if call else ok.rope_kv_write_quant(*arguments, **options)
    return q, k, caches, scales


@pytest.mark.parametrize("values_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("scale_form", "rot_dim", "head_dim", "interleaved", "layout"),
    [
        ("slot", 64, 64, False, "hnd"),
        ("slot", 32, 80, True, "nhd"),
        ("slot", 0, 16, False, "hnd"),
        ("head", 48, 48, False, "nhd"),
        ("all", 32, 32, True, "hnd"),
    ],
)
def test_codes_hold_what_k_and_v_hold(
    oracle, device, scale_form, rot_dim, head_dim, interleaved, layout, codes, values_dtype
):
    inputs = make_inputs(device, values_dtype, rot_dim, head_dim, with_norm=rot_dim != 48)
    q, k, caches, scales = written_codes(inputs, codes, scale_form, interleaved=interleaved, layout=layout)
    expected = run(*inputs, torch.float64, "hnd", interleaved, call=oracle)
    tolerances = {"rtol": 2e-3, "atol": 1e-6} if values_dtype == torch.float16 else {"rtol": 2e-5, "atol": 1e-5}
    torch.testing.assert_close(q, expected[0].to(values_dtype), **tolerances)
    torch.testing.assert_close(k, expected[1].to(values_dtype), **tolerances)
    untouched = torch.ones(4, 16, dtype=torch.bool, device=device)
    largest = 127 if codes == torch.int8 else 448
    for token, slot in enumerate(inputs[-1].tolist()):
        if slot < 0:
            continue
        block_id, offset = slot // 16, slot % 16
        untouched[block_id, offset] = False
        for half, x in enumerate((k, inputs[0]["v"])):
            if scale_form == "slot":
                scale = scales[half, block_id, :, offset]
                assert torch.equal(scale, x[token].float().abs().amax(dim=-1) / largest)
            else:
                scale = scales[half].expand(2)
            values = x[token].float() * (1 / scale)[:, None]
            wanted = values.clamp(-largest, largest)
            wanted = (wanted.round() if codes == torch.int8 else wanted).to(codes)
            assert torch.equal(caches[block_id, half, :, offset].float(), wanted.float())
    assert (caches.float().movedim(3, 1)[untouched] == torch.tensor(77.0).to(codes).float()).all()
    if scale_form == "slot":
        assert scales.movedim(2, -1)[:, untouched].isnan().all()


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_vectors_without_a_scale_have_codes_of_zero(device, codes):
    inputs = make_inputs(device, torch.float32, 0, 48, with_norm=False)
    k = inputs[0]["k"]
    k[0, 0], k[0, 1, 40], k[2, 0, 3], k[2, 1, 47] = 0.0, 1e-39, NAN, -float("inf")
    k[0, 1, :40] = k[0, 1, 41:] = 0.0
    _, _, caches, scales = written_codes(inputs, codes, "slot")
    assert not caches[1, 0, :, 0].any()  # a zero vector, and one whose scale has no reciprocal
    assert not caches[3, 0, :, 15].any()
    assert scales[0, 1, :, 0].tolist()[0] == 0.0
    assert scales[0, 3, 0, 15].isnan()
    assert scales[0, 3, 1, 15].isinf()  # so that what attention makes of them is not finite, and seen


def test_attention_reads_what_was_written(oracle, device):
    inputs = make_inputs(device, torch.float32, 64, 64, with_norm=False)
    q, _, caches, scales = written_codes(inputs, torch.int8, "slot")
    values = [caches[:, half].float() * scales[half][..., None] for half in (0, 1)]
    starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1], [1]))
    table = torch.tensor([[1]], dtype=torch.int32, device=device)
    options = {"max_query_len": 1, "scale": 0.125}
    arguments = (q[:1], caches[:, 0], caches[:, 1], starts, lens, table)
    out = ok.paged_attention(*arguments, **options, k_scale=scales[0], v_scale=scales[1])
    expected = oracle(ok.paged_attention, q[:1].double(), *(x.double() for x in values), *arguments[3:], **options)
    assert_close(out, expected)


def test_scales_that_do_not_fit_are_refused():
    inputs = make_inputs("cpu", torch.float32, 16, 16, with_norm=False)
    q, k, v = inputs[0].values()
    cache = torch.zeros(4, 2, 16, 16, dtype=torch.int8)

    per_head = torch.ones(2)

    def write(caches=(cache, cache), scales=(per_head, per_head)):
        ok.rope_kv_write_quant(q, k, v, inputs[2], inputs[3], *caches, inputs[4], *scales)

    with pytest.raises(ok.DtypeError, match="k_cache has dtype float32, expected int8 or float8_e4m3fn"):
        write(caches=(cache.float(), cache.float()))
    with pytest.raises(ok.DtypeError, match="v_cache has dtype"):
        write(caches=(cache, cache.to(torch.float8_e4m3fn)))
    with pytest.raises(ok.ShapeError, match=r"k_scale has shape \[3\], expected \[4, 2, 16\]"):
        write(scales=(torch.ones(3), per_head))
    with pytest.raises(ok.OptionError, match=r"v_scale.dim\(\) is 3, expected 1, as many as k_scale has"):
        write(scales=(per_head, torch.ones(4, 2, 16)))
    with pytest.raises(ok.DtypeError, match="v_scale has dtype"):
        write(scales=(per_head, per_head.double()))
