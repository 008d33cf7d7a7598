"""packed_sample by torch: all logits, then the draws."""

from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.cpu.fallback.matmul import packed_linear
from octavo_kernels.cpu.fallback.sampling import sample_tokens
from octavo_kernels.packed_weight import PackedWeight


def packed_sample(
    x: Tensor,
    weight: PackedWeight,
    norms: Tensor | None,  # noqa: ARG001  # nothing is screened here
    options: DrawOptions,
    logits: Tensor,
    token_ids: Tensor,
    best: Tensor,
) -> None:
    """Fill token_ids and best [draws]."""
    packed_linear(x, weight, None, False, logits, None)
    sample_tokens(logits, options, token_ids, best)
