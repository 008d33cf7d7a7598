"""Rotary tables: inverse frequencies equal Transformers', and the table holds their cosines and sines."""

from typing import Any

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.layers.rotary import inverse_frequencies, rope_table
from octavo_engine.models.config import RopeConfig

HEAD_DIM = 64
MAX_POSITION = 4096

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
KINDS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "default": ("default", 10000.0, {}),
    "large theta": ("default", 500000.0, {}),
    "linear": ("linear", 10000.0, {"factor": 4.0}),
    "dynamic": ("dynamic", 10000.0, {"factor": 2.0}),
    "llama3": ("llama3", 500000.0, LLAMA3),
    "yarn": ("yarn", 10000.0, YARN),
    "yarn with betas": ("yarn", 10000.0, {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}),
}


def transformers_rope(kind: str, theta: float, extra: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **extra},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", KINDS, ids=str)
def test_inverse_frequencies_equal_transformers(name: str) -> None:
    kind, theta, extra = KINDS[name]
    ours = inverse_frequencies(RopeConfig(kind=kind, theta=theta, **extra), HEAD_DIM)  # type: ignore[arg-type]  # a str
    torch.testing.assert_close(ours, transformers_rope(kind, theta, extra).inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", KINDS, ids=str)
def test_table_equals_transformers_at_all_positions(name: str) -> None:
    kind, theta, extra = KINDS[name]
    rope = transformers_rope(kind, theta, extra)
    cos, sin = rope(torch.zeros(1, 1, HEAD_DIM), torch.arange(MAX_POSITION)[None])
    table = rope_table(RopeConfig(kind=kind, theta=theta, **extra), HEAD_DIM, MAX_POSITION)  # type: ignore[arg-type]
    expected = torch.cat([cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]], dim=-1)
    torch.testing.assert_close(table, expected, rtol=0, atol=3e-4 if kind in ("llama3", "yarn") else 1e-5)


def test_factors_divide_each_frequency() -> None:
    config = RopeConfig(kind="factors", freq_factors=(1.0, 2.0, 4.0, 8.0))
    plain = inverse_frequencies(RopeConfig(), 8)
    assert inverse_frequencies(config, 8).tolist() == (plain / torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist()


def test_table_has_cosines_before_sines() -> None:
    table = rope_table(RopeConfig(), 4, 3)
    assert table.shape == (3, 4)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(
        table[2],
        torch.tensor([2.0, 0.02, 2.0, 0.02]).cos() * torch.tensor([1, 1, 0, 0])
        + torch.tensor([2.0, 0.02, 2.0, 0.02]).sin() * torch.tensor([0, 0, 1, 1]),
    )
