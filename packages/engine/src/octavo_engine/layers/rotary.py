"""The rotary table: cosines and sines of every position, for each kind of RoPE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo_engine.models.config import RopeConfig


def rope_table(config: RopeConfig, head_dim: int, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """Return cosines and sines of all positions: [num_positions, head_dim] fp32, first half cosines, second half sines.

    RoPE: arXiv 2104.09864, section 3.4. The angles are fp32 products, as in the implementations that models are
    trained with.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(config, head_dim)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * _attention_factor(config)
    return table.to(device)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of dimensions: [head_dim / 2] fp32.

    Kind `dynamic` equals `default`: it differs beyond the model's context only, where this engine does not go.
    """
    inv_freq = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match config.kind:
        case "default" | "dynamic":
            return inv_freq
        case "linear":
            return inv_freq / config.factor
        case "llama3":
            return _llama3(config, inv_freq)
        case "yarn":
            return _yarn(config, inv_freq)
        case "factors":
            return inv_freq / torch.tensor(config.freq_factors, dtype=torch.float32)


def _llama3(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Divide the waves that are longer than the original context, keep the short ones, blend in between."""
    low, high = config.low_freq_factor, config.high_freq_factor
    original = config.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert original is not None
    num_turns = original * inv_freq / (2 * math.pi)  # of each pair over the original context
    kept = ((num_turns - low) / (high - low)).clamp(0, 1)
    return kept * inv_freq + (1 - kept) * inv_freq / config.factor


def _yarn(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Blend by dimension between the ones that turn often and the ones that turn rarely (arXiv 2309.00071, eq. 23)."""
    original = config.original_max_position_embeddings
    assert original is not None
    num_pairs = len(inv_freq)

    def pair_that_turns(num_turns: float) -> float:
        return num_pairs * math.log(original / (num_turns * 2 * math.pi)) / math.log(config.theta)

    first = max(math.floor(pair_that_turns(config.beta_fast or 32.0)), 0)
    last = min(math.ceil(pair_that_turns(config.beta_slow or 1.0)), 2 * num_pairs - 1)
    divided = ((torch.arange(num_pairs) - first) / max(last - first, 0.001)).clamp(0, 1)
    return (1 - divided) * inv_freq + divided * inv_freq / config.factor


def _attention_factor(config: RopeConfig) -> float:
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    return 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
