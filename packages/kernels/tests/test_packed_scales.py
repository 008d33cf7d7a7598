"""Scales of packed weights: those that are no numbers are found in every format, wherever they are."""

import numpy as np
import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat

BLOCK_FORMATS = [item for item in WeightFormat if item.dtype is None]
COLUMNS = 512
FINITE = 0xBB
"""What random bytes are masked with so that no number among them is NaN or infinite, wherever it lies."""

PLACES = {
    WeightFormat.Q2_K: (80, 82),
    WeightFormat.Q3_K: (108,),
    WeightFormat.Q6_K: (208,),
    WeightFormat.TQ1_0: (52,),
    WeightFormat.TQ2_0: (64,),
    **dict.fromkeys((WeightFormat.Q4_1, WeightFormat.Q5_1, WeightFormat.Q4_K, WeightFormat.Q5_K), (0, 2)),
}
"""Where a file's block has its f16 numbers; the first two bytes in other formats."""


def numbers(weight_format, of_halves, of_floats, of_powers, of_e4m3):
    """Return what puts numbers, given by their bits, into a block of a file: (place, bytes) each."""
    if weight_format is WeightFormat.Q8_K:
        return [((0, number.to_bytes(4, "little")),) for number in of_floats]
    if weight_format is WeightFormat.MXFP4:
        return [((0, bytes([number])),) for number in of_powers]
    if weight_format is WeightFormat.NVFP4:
        return [((place, bytes([number])),) for place in range(4) for number in of_e4m3]
    if weight_format is WeightFormat.IQ1_M:  # four bits at the top of each of the last four words
        return [tuple((49 + 2 * i, bytes([number >> 4 * i << 4 & 0xF0])) for i in range(4)) for number in of_halves]
    places = PLACES.get(weight_format, (0,))
    return [((place, number.to_bytes(2, "little")),) for place in places for number in of_halves]


def packed(weight_format, patch, row, block):
    shape = (70, COLUMNS // weight_format.block_inputs, weight_format.block_bytes)
    blocks = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) & FINITE
    for place, found in patch:
        blocks[row, block, place : place + len(found)] = list(found)
    return ok.pack_weight(torch.from_numpy(blocks.reshape(70, -1)), weight_format, in_features=COLUMNS)


@pytest.mark.parametrize("weight_format", BLOCK_FORMATS, ids=lambda item: item.value)
def test_scales_that_are_no_numbers_are_found(weight_format):
    bad = numbers(weight_format, (0x7C00, 0xFC00, 0x7E00, 0xFC01), (0x7F800000, 0xFFC00000), (0xFF,), (0xFF,))
    for patch in bad:
        for row, block in ((0, 0), (31, 1), (69, COLUMNS // weight_format.block_inputs - 1)):
            assert not ok.has_finite_scales(packed(weight_format, patch, row, block)), (patch, row, block)


@pytest.mark.parametrize("weight_format", BLOCK_FORMATS, ids=lambda item: item.value)
def test_zero_subnormal_and_large_scales_are_numbers(weight_format):
    good = numbers(weight_format, (0, 0x8001, 0x03FF, 0x7BFF, 0xFBFF), (0, 1, 0xFF7FFFFF), (0, 254), (0, 1, 0x7E))
    for patch in good:
        assert ok.has_finite_scales(packed(weight_format, patch, 31, 1)), patch


def test_dense_weights_have_no_scales():
    assert ok.has_finite_scales(ok.pack_weight(torch.full((3, 5), torch.nan), WeightFormat.F32, in_features=5))


def test_scales_are_found_behind_many_blocks():
    stored = torch.zeros((1, (1 << 12) + 1, 18), dtype=torch.uint8)
    stored[0, -1, 1] = 0x7C
    weight = ok.pack_weight(stored.flatten(1), WeightFormat.Q4_0, in_features=32 * stored.shape[1])
    assert not ok.has_finite_scales(weight)
