"""Bad arguments: a typed error that names the op, the argument, what was expected and what came."""

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.testing import make_paged_inputs


def attend(**changes):
    inputs = make_paged_inputs([1, 2], [5, 7], head_dim=16)
    return ok.paged_attention(**(inputs.arguments() | changes))


BAD_ATTENTION = {
    "head_dim": ({"q": torch.zeros(3, 4, 8)}, ok.ShapeError, r"paged_attention: k_cache has shape .*, expected .* 8\]"),
    "rank": ({"q": torch.zeros(3, 64)}, ok.ShapeError, r"q has shape \[3, 64\], expected \[num_tokens, num_heads"),
    "heads": ({"q": torch.zeros(3, 5, 16)}, ok.ShapeError, "q has 5 heads, expected a multiple of the 2 key heads"),
    "seq_lens": ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, ok.ShapeError, "query_start_loc has shape"),
    "index dtype": ({"seq_lens": torch.tensor([5, 7])}, ok.DtypeError, "seq_lens has dtype int64, expected int32"),
    "query dtype": ({"q": torch.zeros(3, 4, 16, dtype=torch.int8)}, ok.DtypeError, "q has dtype int8"),
    "window": ({"window": 0}, ok.OptionError, "window is 0, expected None or at least 1"),
    "soft cap": ({"soft_cap": 0.0}, ok.OptionError, r"soft_cap is 0\.0, expected None or a finite number above 0"),
    "scale": ({"scale": float("nan")}, ok.OptionError, "scale is nan, expected a finite number"),
    "max_query_len": ({"max_query_len": -1}, ok.OptionError, "max_query_len is -1"),
    "sinks": ({"sinks": torch.zeros(3)}, ok.ShapeError, r"sinks has shape \[3\], expected \[4\]"),
    "slopes": ({"alibi_slopes": torch.zeros(4).double()}, ok.DtypeError, "alibi_slopes has dtype float64"),
    "one scale": ({"k_scale": torch.zeros(4, 2, 16)}, ok.OptionError, "expected both k_scale and v_scale, or neither"),
    "stride": ({"q": torch.zeros(3, 4, 32)[..., ::2]}, ok.ShapeError, r"q has stride 2 .* pass q\.contiguous\(\)"),
    "out": ({"out": torch.zeros(3, 4, 8)}, ok.ShapeError, r"out has shape \[3, 4, 8\], expected \[3, 4, 16\]"),
    "lse": ({"lse": torch.zeros(3, 4).double()}, ok.DtypeError, "lse has dtype float64, expected float32"),
    "device": ({"q": torch.zeros(3, 4, 16, device="meta")}, ok.DeviceError, "k_cache is on cpu, expected meta where q"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ATTENTION.values(), ids=BAD_ATTENTION.keys())
def test_paged_attention_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        attend(**changes)


def test_int8_caches_need_scales():
    cache = torch.zeros(4, 2, 16, 16, dtype=torch.int8)
    with pytest.raises(ok.DtypeError, match="k_cache has dtype int8, expected a floating dtype"):
        attend(k_cache=cache, v_cache=cache)


Z = torch.zeros
I64 = torch.int64


def write(k, slots):
    ok.write_kv(k, k, Z(3, 1, 8, 4), Z(3, 1, 8, 4), slots)


BAD_CALLS = {
    "write_kv slots": (lambda: write(Z(2, 1, 4), Z(3, dtype=I64)), ok.ShapeError),
    "write_kv heads": (lambda: write(Z(2, 2, 4), Z(2, dtype=I64)), ok.ShapeError),
    "write_kv slot dtype": (lambda: write(Z(2, 1, 4), Z(2)), ok.DtypeError),
    "copy_blocks lengths": (lambda: ok.copy_blocks(Z(3, 2), Z(2, dtype=I64), Z(1, dtype=I64)), ok.ShapeError),
    "copy_blocks dtype": (lambda: ok.copy_blocks(Z(3, 2), Z(1), Z(1)), ok.DtypeError),
    "rms_norm weight": (lambda: ok.rms_norm(Z(2, 4), Z(3), 1e-5), ok.ShapeError),
    "rms_norm dtype": (lambda: ok.rms_norm(Z(2, 4, dtype=I64), Z(4), 1e-5), ok.DtypeError),
    "add_rms_norm residual": (lambda: ok.add_rms_norm(Z(2, 4), Z(2, 4).double(), Z(4), 1e-5), ok.DtypeError),
    "silu_and_mul odd": (lambda: ok.silu_and_mul(Z(2, 3)), ok.ShapeError),
    "gelu approximate": (lambda: ok.gelu(Z(2), "erf"), ok.OptionError),
    "merge_states lse": (lambda: ok.merge_states(Z(2, 3, 4), Z(2, 3), Z(2, 3, 4), Z(3, 2)), ok.ShapeError),
    "philox dtype": (lambda: ok.philox(Z(2), Z(2), Z(2), 4), ok.DtypeError),
    "philox columns": (lambda: ok.philox(*[Z(2, dtype=I64)] * 3, -1), ok.OptionError),
    "rope rot_dim": (
        lambda: ok.rope_kv_write(
            Z(1, 2, 4), Z(1, 1, 4), Z(1, 1, 4), Z(1, dtype=I64), Z(9, 6), Z(3, 1, 8, 4), Z(3, 1, 8, 4), Z(1, dtype=I64)
        ),
        ok.OptionError,
    ),
    "varlen key_start_loc": (
        lambda: ok.varlen_attention(
            Z(2, 2, 4), Z(2, 1, 4), Z(2, 1, 4), Z(2, dtype=torch.int32), Z(3, dtype=torch.int32),
            max_query_len=2, max_key_len=2, scale=1.0,
        ),
        ok.ShapeError,
    ),
    "gather_kv table": (
        lambda: ok.gather_kv(Z(3, 1, 8, 4), Z(3, 1, 8, 4), Z(1, 2, dtype=torch.int32), Z(2, dtype=torch.int32)),
        ok.ShapeError,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_ops_refuse(call, error):
    with pytest.raises(error, match="expected"):
        call()


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (ok.ShapeError, ValueError),
        (ok.DtypeError, TypeError),
        (ok.DeviceError, ValueError),
        (ok.OptionError, ValueError),
        (ok.BackendUnavailable, RuntimeError),
    ],
    ids=lambda item: item.__name__,
)
def test_errors_have_one_root_and_a_builtin_kind(error, base):
    assert issubclass(error, ok.KernelError)
    assert issubclass(error, base)
