"""Memory in large pages: aligned, apart, zero, and given back."""

import gc

import torch

import octavo_kernels as ok


def test_pieces_begin_at_a_cache_line_and_lie_apart():
    pieces = [ok.host_empty((size,), torch.uint8) for size in (1, 63, 64, 65, 1000)]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    for value, piece in enumerate(pieces, start=1):
        piece.fill_(value)
    assert [int(piece.float().mean()) for piece in pieces] == [1, 2, 3, 4, 5]


def test_memory_is_zero_and_has_the_shape_and_dtype_asked_for():
    tensor = ok.host_empty((3, 5, 7), torch.bfloat16)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous()
    assert tensor.float().abs().max() == 0


def test_no_elements_are_no_elements():
    assert ok.host_empty((0, 4), torch.float32).shape == (0, 4)


def test_a_piece_stays_when_others_of_its_region_go():
    kept = ok.host_empty((100,), torch.int32)
    kept.fill_(7)
    for _ in range(50):
        ok.host_empty((1 << 20,), torch.uint8).fill_(1)
    gc.collect()
    assert kept.tolist() == [7] * 100


def test_large_tensors_begin_at_different_places_in_a_large_page():
    layers = [ok.host_empty((40 << 20,), torch.uint8) for _ in range(32)]
    starts = sorted(layer.data_ptr() % (2 << 20) for layer in layers)
    gaps = [after - before for before, after in zip(starts, [*starts[1:], starts[0] + (2 << 20)], strict=True)]
    assert all(start % 4096 == 0 for start in starts)
    assert max(gaps) <= 2 * (2 << 20) // 32
    layers[-1].fill_(1)  # to its end
