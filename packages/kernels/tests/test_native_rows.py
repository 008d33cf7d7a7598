"""Native norms, gates, rotation and cache writes: bits that depend on a row alone, rests of vectors, and fallbacks."""

from collections.abc import Iterator

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("native_library")

WEIGHT = torch.linspace(0.5, 2.0, 100)
OPS = {
    "rms_norm": lambda x: ok.rms_norm(x, WEIGHT, 1e-5, offset=1.0),
    "add_rms_norm": lambda x: ok.add_rms_norm(x, x.clone(), WEIGHT, 1e-5),
    "silu_and_mul": ok.silu_and_mul,
    "gelu_and_mul": ok.gelu_and_mul,
    "gelu_and_mul tanh": lambda x: ok.gelu_and_mul(x, approximate="tanh"),
}


@pytest.fixture
def threads() -> Iterator[None]:
    """Put torch's number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_a_row_has_the_same_bits_beside_any_others(op):
    x = 3 * torch.randn(65, 100)
    alone = torch.cat([op(x[row : row + 1]) for row in range(65)])
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for num_rows in (2, 8, 17, 64, 65):
            assert torch.equal(op(x[:num_rows]), alone[:num_rows])


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 63, 64, 65, 100, 2047, 2049, 4096])
def test_sizes_around_vectors_and_parts(oracle, size):
    x, weight = torch.randn(3, size), torch.randn(size)
    assert_close(ok.rms_norm(x, weight, 1e-5), oracle(ok.rms_norm, x.double(), weight.double(), 1e-5))
    pairs = 4 * torch.randn(3, 2 * size)
    for op in (ok.silu_and_mul, ok.gelu_and_mul, lambda x: ok.gelu_and_mul(x, approximate="tanh")):
        assert_close(op(pairs), oracle(op, pairs.double()))


@pytest.mark.parametrize("op", list(OPS.values())[2:], ids=list(OPS)[2:])
def test_gates_are_accurate_everywhere(oracle, op):
    gate = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -200.0, -88.0, -0.0, 88.0, 200.0, 1e30])])
    x = torch.stack([gate, torch.ones_like(gate)], dim=-1)
    torch.testing.assert_close(op(x).double(), oracle(op, x.double()), rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_nan_stays_nan(op):
    x = torch.randn(2, 100)
    x[1, 7] = float("nan")
    out = op(x)
    assert out[0].isfinite().all()
    assert out[1, 7].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_writes_round_as_torch_does(dtype):
    values = [0.0, -0.0, 1e-8, 3e-8, 6e-8, 6.1e-5, 1.00048828125, 1.0009765625, 65519.0, 65520.0, 1e9, float("inf")]
    row = torch.tensor(values + [-value for value in values])
    k = torch.stack([row, row * 1.001, torch.full_like(row, float("nan"))])[:, None]
    k_cache, v_cache = (torch.zeros(1, 1, 8, row.numel(), dtype=dtype) for _ in range(2))
    ok.write_kv(k, -k, k_cache, v_cache, torch.tensor([5, 0, 2]))
    for token, slot in enumerate((5, 0, 2)):
        torch.testing.assert_close(k_cache[0, 0, slot], k[token, 0].to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(v_cache[0, 0, slot], -k[token, 0].to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rotation_of_a_token_has_the_same_bits_beside_any_others(interleaved):
    angles = torch.rand(64, 12)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    weight = torch.rand(40)
    fresh = torch.randn(33, 4, 40), torch.randn(33, 2, 40), torch.randn(33, 2, 40)
    positions, slots = torch.randint(0, 64, (33,)), torch.randperm(48)[:33]

    def rotate(rows):
        q, k, v = (x[rows].clone() for x in fresh)
        k_cache, v_cache = torch.zeros(2, 3, 2, 16, 40)
        options = {"interleaved": interleaved, "q_norm_weight": weight, "k_norm_weight": weight}
        ok.rope_kv_write(q, k, v, positions[rows], cos_sin, k_cache, v_cache, slots[rows], **options)
        return q, k, k_cache, v_cache

    alone = [rotate(slice(row, row + 1)) for row in range(33)]
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        q, k, k_cache, v_cache = rotate(slice(0, 33))
        assert torch.equal(q, torch.cat([one[0] for one in alone]))
        assert torch.equal(k, torch.cat([one[1] for one in alone]))
        assert torch.equal(k_cache, sum(one[2] for one in alone))
        assert torch.equal(v_cache, sum(one[3] for one in alone))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("known", [False, True], ids=["scale per vector", "scale per head"])
def test_codes_of_a_token_have_the_same_bits_beside_any_others(known):
    angles = torch.rand(64, 12)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    fresh = torch.randn(33, 4, 40), torch.randn(33, 2, 40), torch.randn(33, 2, 40)
    positions, slots = torch.randint(0, 64, (33,)), torch.randperm(48)[:33]

    def write(rows):
        q, k, v = (x[rows].clone() for x in fresh)
        codes = torch.zeros(2, 3, 2, 16, 40, dtype=torch.int8)
        scales = torch.full((2, 2), 0.02) if known else torch.zeros(2, 3, 2, 16)
        ok.rope_kv_write_quant(q, k, v, positions[rows], cos_sin, *codes, slots[rows], *scales)
        return codes, scales

    alone = [write(slice(row, row + 1)) for row in range(33)]
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        codes, scales = write(slice(0, 33))
        assert torch.equal(codes, sum(one[0] for one in alone))
        if not known:
            assert torch.equal(scales, sum(one[1] for one in alone))


def test_codes_that_native_code_does_not_write_are_counted(monkeypatch):
    from octavo_kernels import _dispatch

    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    q, k, v = torch.randn(3, 2, 4, 16)
    positions, cos_sin, slots = torch.arange(2), torch.ones(8, 16), torch.tensor([3, 7])
    for codes in (torch.int8, torch.float8_e4m3fn):
        caches, scales = torch.zeros(2, 2, 4, 8, 16).to(codes), torch.zeros(2, 2, 4, 8)
        ok.rope_kv_write_quant(q, k, v, positions, cos_sin, *caches, slots, *scales)
    assert ok.fallbacks()["rope_kv_write_quant"].num_calls == 1
    assert "expected int8" in ok.fallbacks()["rope_kv_write_quant"].reason


def test_other_dtypes_are_counted_as_fallbacks(monkeypatch):
    from octavo_kernels import _dispatch

    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    for _ in range(2):
        ok.silu_and_mul(x)
    with pytest.warns(ok.BackendFallbackWarning, match="rms_norm: torch serves it"):
        ok.rms_norm(x, weight, 1e-5)
    ok.rms_norm(x.float(), weight.float(), 1e-5)
    assert {op: (entry.used, entry.num_calls) for op, entry in ok.fallbacks().items()} == {
        "silu_and_mul": ("torch", 2),
        "rms_norm": ("torch", 1),
    }
    assert "expected float32" in ok.fallbacks()["silu_and_mul"].reason
