"""Scales of blocks that are NaN or infinite: refused, by the name of their file and tensor, in every type of GGUF."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="weights are read with the extra octavo-engine[local]")

from octavo_engine.errors import CorruptModelFile
from octavo_engine.quant.base import QuantMethod
from octavo_engine.quant.packed import Packed
from octavo_engine.quant.unquantized import Unquantized
from octavo_engine.weights.block_scales import has_finite_scales
from octavo_engine.weights.gguf import GGUFFile, TensorType
from octavo_engine.weights.load import load_model
from octavo_engine.weights.source import GGUFSource

MakeGGUF = Callable[..., Path]
Write = Callable[[TensorType, np.ndarray], Path]

NAME = "blk.0.ffn_down.weight"
COLUMNS = 256
FINITE = 0xBB
"""What random bytes are masked with so that no number among them is NaN or infinite, wherever it lies."""

OTHERS = {
    f"blk.0.ffn_{part}.weight": (int(TensorType.Q4_1), np.zeros((COLUMNS, 40), np.uint8)) for part in ("gate", "up")
}
"""What the other tensors of its shape are, in a model of this width."""

WITH_ONE = (TensorType.Q4_0, TensorType.Q5_0, TensorType.Q8_0, TensorType.IQ4_NL, TensorType.IQ4_XS)
POINTS = [item for item in TensorType if item.name.startswith(("IQ1_S", "IQ2", "IQ3"))]
WITH_TWO = (TensorType.Q4_1, TensorType.Q5_1, TensorType.Q4_K, TensorType.Q5_K)
HALVES = {
    **dict.fromkeys((*WITH_ONE, *POINTS), (0,)),
    **dict.fromkeys(WITH_TWO, (0, 2)),
    TensorType.Q2_K: (80, 82),
    TensorType.Q3_K: (108,),
    TensorType.Q6_K: (208,),
    TensorType.TQ1_0: (52,),
    TensorType.TQ2_0: (64,),
}
"""Where the f16 numbers of a block begin, of the types that have them whole."""

Patch = tuple[tuple[int, bytes], ...]
"""Bytes of a block that are overwritten: where, and with what."""


def iq1_m(half: int) -> Patch:
    """Return an f16 as IQ1_M has it: four bits at the top of each of the last four words, the lowest bits first."""
    return tuple((49 + 2 * word, bytes([(half >> 4 * word & 15) << 4])) for word in range(4))


def patches(numbers: str, e8m0: bytes, e4m3: bytes, f32: str) -> dict[TensorType, list[Patch]]:
    """Return by type what puts these numbers at each place where a block has a scale; `numbers` are f16, in hex."""
    f16 = [int(number, 16) for number in numbers.split()]
    found: dict[TensorType, list[Patch]] = {
        tensor_type: [((start, struct.pack("<H", number)),) for start in starts for number in f16]
        for tensor_type, starts in HALVES.items()
    }
    found[TensorType.IQ1_M] = [iq1_m(number) for number in f16]
    found[TensorType.Q8_K] = [((0, struct.pack("<I", int(number, 16))),) for number in f32.split()]
    found[TensorType.MXFP4] = [((0, bytes([number])),) for number in e8m0]
    found[TensorType.NVFP4] = [((start, bytes([number])),) for start in range(4) for number in e4m3]
    return found


REFUSED = patches("7C00 FC00 7E00 FC01", b"\xff", b"\x7f\xff", "7F800000 FF800000 7FC00000 FF800001")
"""Infinities and NaN."""
TAKEN = patches(
    "0000 8000 0001 83FF 7BFF FBFF", b"\x00\x01\xfe", b"\x00\x01\x7e", "00000000 80000000 00000001 807FFFFF 7F7FFFFF"
)
"""Zeros, subnormal numbers, the largest ones."""


def random_blocks(tensor_type: TensorType, rows: int) -> np.ndarray:
    """Return random blocks [rows, blocks per row, bytes per block] with finite scales."""
    shape = (rows, COLUMNS // tensor_type.block_elements, tensor_type.block_bytes)
    return np.random.default_rng(int(tensor_type)).integers(0, 256, shape, dtype=np.uint8) & FINITE


def overwritten(blocks: np.ndarray, at: tuple[int, int], patch: Patch) -> np.ndarray:
    """Return a copy with other bytes in the block of a row at `at`."""
    copy = blocks.copy()
    for start, found in patch:
        copy[*at, start : start + len(found)] = list(found)
    return copy


@pytest.fixture
def write(make_gguf: MakeGGUF) -> Callable[[TensorType, np.ndarray], Path]:
    """Return a function that writes a small model with one tensor of these blocks."""

    def written(tensor_type: TensorType, blocks: np.ndarray) -> Path:
        stored = {NAME: (int(tensor_type), blocks.reshape(len(blocks), -1))}
        return make_gguf({"llama.feed_forward_length": COLUMNS}, OTHERS | stored, name="scales.gguf")

    return written


@pytest.mark.parametrize("method", [Packed(), Unquantized()], ids=["packed", "expanded"])
@pytest.mark.parametrize("tensor_type", REFUSED, ids=lambda item: item.name)
def test_nan_and_infinite_scales_are_refused(write: Write, tensor_type: TensorType, method: QuantMethod[Any]) -> None:
    """In the first block, and in the last."""
    blocks = random_blocks(tensor_type, 64)
    for patch in REFUSED[tensor_type]:
        for at in ((0, 0), (63, blocks.shape[1] - 1)):
            path = write(tensor_type, overwritten(blocks, at, patch))
            with pytest.raises(CorruptModelFile) as caught:
                load_model(GGUFSource(path), quant=method)
            expected = f"{path}: tensor {NAME!r} of type {tensor_type.name}: expected finite scales of blocks"
            assert str(caught.value).startswith(expected), (at, patch)


@pytest.mark.parametrize("method", [Packed(), Unquantized()], ids=["packed", "expanded"])
@pytest.mark.parametrize("tensor_type", TAKEN, ids=lambda item: item.name)
def test_zero_subnormal_and_large_scales_are_taken(
    write: Write, tensor_type: TensorType, method: QuantMethod[Any]
) -> None:
    """All of them in one file."""
    blocks = random_blocks(tensor_type, 64)
    for row, patch in enumerate(TAKEN[tensor_type]):
        blocks = overwritten(blocks, (row, 0), patch)
    load_model(GGUFSource(write(tensor_type, blocks)), quant=method)


def test_every_type_with_blocks_is_checked() -> None:
    of_blocks = {item for item in TensorType if item.block_elements > 1}
    assert REFUSED.keys() == of_blocks
    assert TAKEN.keys() == of_blocks


@pytest.mark.parametrize("block", [16383, 16384, 16385, 32768 + 5])
def test_scales_are_found_among_many_blocks(block: int) -> None:
    blocks = np.zeros((3 << 14, 18), np.uint8)
    assert has_finite_scales(blocks, TensorType.Q4_0)
    blocks[block, :2] = (0, 0x7C)
    assert not has_finite_scales(blocks, TensorType.Q4_0)


def test_the_shard_of_a_fused_matrix_is_named(make_gguf: MakeGGUF) -> None:
    blocks = overwritten(random_blocks(TensorType.Q4_1, 256)[:, :2], (3, 1), REFUSED[TensorType.Q4_1][0])
    damaged = {"blk.0.ffn_up.weight": (int(TensorType.Q4_1), blocks.reshape(256, -1))}
    down = {NAME: (int(TensorType.Q8_0), np.zeros((64, 8 * 34), np.uint8))}
    path = make_gguf({"llama.feed_forward_length": COLUMNS}, OTHERS | down | damaged)
    with pytest.raises(CorruptModelFile, match=r"'blk\.0\.ffn_up\.weight' of type Q4_1"):
        load_model(GGUFSource(path), quant=Packed())


def test_the_part_that_a_tensor_is_in_is_named(make_gguf: MakeGGUF) -> None:
    """In a model of two files, whose second has the damaged tensor alone."""
    split = {"llama.feed_forward_length": COLUMNS, "split.count": 2, "split.tensors.count": ("i32", 11)}
    blocks = overwritten(random_blocks(TensorType.Q4_0, 64), (3, 1), REFUSED[TensorType.Q4_0][0])
    first = make_gguf(split | {"split.no": 0}, OTHERS | {NAME: None}, name="m-00001-of-00002.gguf")
    others = dict.fromkeys(GGUFFile(first).tensors)
    damaged = (int(TensorType.Q4_0), blocks.reshape(64, -1))
    second = make_gguf(split | {"split.no": 1}, others | {NAME: damaged}, name="m-00002-of-00002.gguf")
    with pytest.raises(CorruptModelFile) as caught:
        load_model(GGUFSource(first))
    assert str(caught.value).startswith(f"{second}: tensor {NAME!r}")
