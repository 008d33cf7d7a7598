"""Dequantisation: equal to the gguf package bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.gguf import TensorType

PLAIN = {
    TensorType.F64: "<f8",
    TensorType.I8: "<i1",
    TensorType.I16: "<i2",
    TensorType.I32: "<i4",
    TensorType.I64: "<i8",
}
WITH_ORACLE = [item for item in TensorType if item not in (*PLAIN, TensorType.Q8_K)]
"""The gguf package refuses the others."""


@pytest.fixture(scope="module")
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="the gguf package is the oracle")


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    assert found.dtype == expected.dtype == np.float32
    return bool(((found.view("u4") == expected.view("u4")) | (np.isnan(found) & np.isnan(expected))).all())


@pytest.mark.parametrize("num_blocks", [1, 2, 4095, 4096, 4097], ids=lambda n: f"{n}-blocks")
@pytest.mark.parametrize("tensor_type", WITH_ORACLE, ids=lambda t: t.name)
def test_values_equal_the_gguf_package_bit_for_bit(gguf: Any, tensor_type: TensorType, num_blocks: int) -> None:
    num_blocks = -(-num_blocks * 32 // max(32, tensor_type.block_elements))
    rng = np.random.default_rng(num_blocks)
    raw = rng.integers(0, 256, size=(num_blocks, tensor_type.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales include infinities and NaN
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(int(tensor_type)))
    assert same_bits(dequantize(raw, tensor_type, expected.shape), expected)


def test_names_and_sizes_are_those_of_the_gguf_package(gguf: Any) -> None:
    for tensor_type in TensorType:
        oracle = gguf.GGMLQuantizationType(int(tensor_type))
        assert oracle.name == tensor_type.name
        assert gguf.GGML_QUANT_SIZES[oracle] == (tensor_type.block_elements, tensor_type.block_bytes)


@pytest.mark.parametrize("tensor_type", PLAIN, ids=lambda t: t.name)
def test_whole_and_double_numbers_are_rounded_to_float32(tensor_type: TensorType) -> None:
    values = np.array([0, -3, 100, 0.1, 127], PLAIN[tensor_type])
    assert same_bits(dequantize(values.view(np.uint8), tensor_type, (5,)), values.astype(np.float32))


def test_q8_k_is_a_float32_times_signed_bytes() -> None:
    raw = np.concatenate([np.array([-0.3], "<f4").view("u1"), np.arange(256, dtype=np.uint8), np.full(32, 7, "u1")])
    expected = np.arange(256).astype(np.int8).astype(np.float32) * np.float32(-0.3)
    assert same_bits(dequantize(raw, TensorType.Q8_K, (256,)), expected)


def test_q4_1_packs_low_nibbles_first() -> None:
    scales = np.array([2.0, -1.0], np.float16).view(np.uint8)
    packed = np.array([0x10 + i for i in range(16)], np.uint8)  # low nibbles 0 to 15, high nibbles 1
    values = dequantize(np.concatenate([scales, packed]), TensorType.Q4_1, (32,))
    assert values.tolist() == [2.0 * i - 1 for i in range(16)] + [1.0] * 16


def test_a_model_has_the_values_of_its_types(make_gguf: Callable[..., Path], gguf: Any) -> None:
    """Every type in a file, each where the tiny model's weights are multiples of its block."""
    pytest.importorskip("torch", reason="weights are read with the extra octavo-engine[local]")
    from octavo_engine.weights.source import GGUFSource

    rng = np.random.default_rng(0)
    for tensor_type in WITH_ORACLE:
        raw = rng.integers(0, 256, (64, 256 // tensor_type.block_elements * tensor_type.block_bytes), dtype=np.uint8)
        raw &= 0xBB  # no scale is NaN or infinite, wherever it lies
        path = make_gguf({"llama.feed_forward_length": 256}, tensors={"blk.0.ffn_down.weight": (int(tensor_type), raw)})
        found = dict(GGUFSource(path).weights())["model.layers.0.mlp.down_proj.weight"]
        values = found.float() if hasattr(found, "float") else found.values()
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(int(tensor_type)))
        assert same_bits(values.numpy(), expected), tensor_type.name


def test_a_models_double_numbers_keep_their_type(make_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("torch", reason="weights are read with the extra octavo-engine[local]")
    from octavo_engine.weights.source import GGUFSource

    values = np.linspace(-1, 1, 64)
    path = make_gguf(tensors={"output_norm.weight": (int(TensorType.F64), values.view(np.uint8))})
    assert dict(GGUFSource(path).weights())["model.norm.weight"].tolist() == values.tolist()
