"""Cache copies in CUDA C++: all caches of a call by two kernels, where Triton launches two for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels._blocks import flat_blocks
from octavo_kernels.cuda.load import ops

_ALIGNMENT = 16  # of each part's rows in the memory aside: csrc_cuda/copy_blocks.h


def copy_blocks(caches: Sequence[Tensor], src: Tensor, dst: Tensor) -> None:
    """Copy the source blocks of all caches aside, then to their places, so that chains and swaps are defined."""
    parts = [part for cache in caches for part in flat_blocks(cache)]
    num_bytes = sum(_aligned(len(src) * part.shape[1] * part.element_size()) for part in parts)
    with torch.cuda.device(src.device):
        aside = torch.empty(num_bytes, dtype=torch.uint8, device=src.device)
        stream = torch.cuda.current_stream().cuda_stream
        ops().copy_blocks(parts, src.contiguous(), dst.contiguous(), aside, stream)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
