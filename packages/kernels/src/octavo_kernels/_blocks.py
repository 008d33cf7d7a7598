"""Cache blocks as rows of whole numbers, which is how backends move them, whatever a cache's layout and dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Values are moved as whole numbers of their size, so that every dtype is one kernel.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flat_blocks(cache: Tensor) -> Iterator[Tensor]:
    """Yield views [num_blocks, n] of whole numbers that cover a cache, whose blocks lie in memory in one piece each."""
    dims = sorted(range(1, cache.dim()), key=cache.stride, reverse=True)
    dense, expected = cache.permute(0, *dims), 1
    for size, stride in zip(reversed(dense.shape[1:]), reversed(dense.stride()[1:]), strict=True):
        if size > 1 and stride != expected:
            for index in range(dense.shape[1]):
                yield from flat_blocks(dense[:, index])
            return
        expected *= size
    flat = cache.as_strided((len(cache), expected), (cache.stride(0), 1))
    yield flat.view(_WHOLE[cache.element_size()])
