"""The reference against independent statements: loops in numpy, and torch's own attention."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import octavo_kernels as ok
from octavo_kernels.testing import make_paged_inputs


@pytest.fixture(autouse=True)
def _on_reference(monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")


def attend_in_loops(q, k, v, position, scale, causal, window, soft_cap, slope, sink):
    """One query, one head, one key at a time: q [D], k and v [K, D]. Returns out [D] and lse."""
    scores, values = [], []
    for j in range(len(k)):
        if causal and j > position:
            continue
        if window is not None and not (position - window < j < position + window):
            continue
        score = scale * float(q @ k[j])
        if soft_cap is not None:
            score = soft_cap * math.tanh(score / soft_cap)
        if slope is not None:
            score -= slope * abs(position - j)
        scores.append(score)
        values.append(v[j])
    exponents = [math.exp(score) for score in scores] + ([math.exp(sink)] if sink is not None else [])
    total = sum(exponents)
    out = sum((e / total * x for e, x in zip(exponents, values, strict=False)), np.zeros(len(q)))
    return out, math.log(total) if total else -math.inf


OPTIONS = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window of one": {"window": 1},
    "window": {"window": 6},
    "window both sides": {"window": 4, "causal": False},
    "soft cap": {"soft_cap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"window": 9, "soft_cap": 2.0, "alibi": True, "sinks": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_paged_attention_equals_loops_over_keys(options):
    settings = {"causal": True, "window": None, "soft_cap": None} | options
    alibi, sinks = settings.pop("alibi", False), settings.pop("sinks", False)
    inputs = make_paged_inputs([1, 3, 0, 5], [7, 3, 4, 18], head_dim=8, block_size=8, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if alibi else None
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0]) if sinks else None
    lse = torch.empty(inputs.q.shape[:2])
    out = ok.paged_attention(**inputs.arguments(), **settings, alibi_slopes=slopes, sinks=logits, lse=lse)
    for sequence, (k, v) in enumerate(zip(inputs.keys, inputs.values, strict=True)):
        start, stop = inputs.query_start_loc[sequence : sequence + 2].tolist()
        for row in range(start, stop):
            position = len(k) - (stop - row)
            for head in range(4):
                slope = float(slopes[head]) if slopes is not None else None
                sink = float(logits[head]) if logits is not None else None
                expected, expected_lse = attend_in_loops(
                    inputs.q[row, head].numpy(), k[:, head // 2].numpy(), v[:, head // 2].numpy(), position,
                    inputs.scale, *settings.values(), slope, sink,
                )  # fmt: skip
                np.testing.assert_allclose(out[row, head].numpy(), expected, rtol=1e-11, atol=1e-12)
                assert lse[row, head].item() == pytest.approx(expected_lse, abs=1e-6)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_varlen_attention_equals_torch_attention(causal):
    q, k, v = (torch.randn(12, heads, 16, dtype=torch.float64) for heads in (6, 2, 2))
    starts = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    out = ok.varlen_attention(q, k, v, starts, starts, max_query_len=7, max_key_len=7, scale=0.25, causal=causal)
    for rows in (slice(0, 5), slice(5, 12)):
        heads_first = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=0.25, enable_gqa=True)
        torch.testing.assert_close(out[rows], expected[0].transpose(0, 1))


def test_rms_norm_equals_its_formula():
    x, weight = torch.randn(3, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    for offset in (0.0, 1.0):
        out = ok.rms_norm(x, weight, 1e-3, offset=offset)
        for row in range(3):
            mean_square = sum(float(value) ** 2 for value in x[row]) / 10
            for column in range(10):
                expected = x[row, column] / math.sqrt(mean_square + 1e-3) * (offset + weight[column])
                assert out[row, column].item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rope_is_a_complex_rotation(interleaved):
    head_dim, rot_dim, num_tokens = 12, 8, 5
    angles = torch.outer(torch.arange(20.0), 100.0 ** -(torch.arange(0, rot_dim, 2) / rot_dim))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.tensor([0, 3, 19, 3, 7])
    q, k, v = (torch.randn(num_tokens, heads, head_dim, dtype=torch.float64) for heads in (4, 2, 2))
    before = {"q": q.clone(), "k": k.clone()}
    k_cache, v_cache = (torch.zeros(2, 2, 4, head_dim, dtype=torch.float64) for _ in range(2))
    slots = torch.tensor([5, -1, 0, 7, 2])
    ok.rope_kv_write(q, k, v, positions, cos_sin, k_cache, v_cache, slots, interleaved=interleaved)
    half = rot_dim // 2
    for name, after in (("q", q), ("k", k)):
        for token in range(num_tokens):
            for pair in range(half):
                first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
                row = cos_sin[positions[token]].double()
                turn = torch.complex(row[pair], row[half + pair])
                old, new = before[name][token], after[token]
                expected = torch.complex(old[:, first], old[:, second]) * turn
                torch.testing.assert_close(torch.complex(new[:, first], new[:, second]), expected)
        torch.testing.assert_close(after[..., rot_dim:], before[name][..., rot_dim:], rtol=0, atol=0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_cache[slot // 4, :, slot % 4], k[token])
            assert torch.equal(v_cache[slot // 4, :, slot % 4], v[token])
    assert int((k_cache != 0).any(-1).any(1).sum()) == 4


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_equal_torch(approximate):
    x = torch.randn(4, 10, dtype=torch.float64)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(ok.silu_and_mul(x), F.silu(gate) * up)
    torch.testing.assert_close(ok.gelu(x, approximate), F.gelu(x, approximate=approximate))
    gated = ok.gelu_and_mul(x, approximate=approximate)
    torch.testing.assert_close(gated, F.gelu(gate, approximate=approximate) * up)
