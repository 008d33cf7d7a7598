"""Dequantisation: equal to the gguf package bit for bit."""

import numpy as np
import pytest

from octavo_engine.weights.dequantize import dequantize
from octavo_engine.weights.gguf import TensorType


@pytest.mark.parametrize("num_blocks", [1, 2, 4095, 4096, 4097], ids=lambda n: f"{n}-blocks")
@pytest.mark.parametrize("tensor_type", list(TensorType), ids=lambda t: t.name)
def test_values_equal_the_gguf_package_bit_for_bit(tensor_type: TensorType, num_blocks: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    rng = np.random.default_rng(num_blocks)
    raw = rng.integers(0, 256, size=(num_blocks, tensor_type.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales include infinities and NaN
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(int(tensor_type)))
    found = dequantize(raw, tensor_type, expected.shape)
    assert found.dtype == np.float32
    same = (found.view(np.uint32) == expected.astype(np.float32).view(np.uint32)) | (
        np.isnan(found) & np.isnan(expected)
    )
    assert same.all()


def test_q4_1_packs_low_nibbles_first() -> None:
    scales = np.array([2.0, -1.0], np.float16).view(np.uint8)
    packed = np.array([0x10 + i for i in range(16)], np.uint8)  # low nibbles 0 to 15, high nibbles 1
    values = dequantize(np.concatenate([scales, packed]), TensorType.Q4_1, (32,))
    assert values.tolist() == [2.0 * i - 1 for i in range(16)] + [1.0] * 16
