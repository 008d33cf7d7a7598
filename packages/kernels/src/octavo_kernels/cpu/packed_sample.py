"""packed_sample of the `cpu` backend: native code, or torch where there is none."""

from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import packed_sample as fallback
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.cpu.matmul import linear_args, rounded_bytes, workspace_of
from octavo_kernels.cpu.sampling import draw_args
from octavo_kernels.packed_weight import PackedWeight


def packed_sample(
    x: Tensor,
    weight: PackedWeight,
    norms: Tensor | None,
    options: DrawOptions,
    logits: Tensor,
    token_ids: Tensor,
    best: Tensor,
) -> None:
    """Fill token_ids and best [draws]."""
    if library_for("packed_sample") is None:
        return fallback.packed_sample(x, weight, norms, options, logits, token_ids, best)
    workspace = workspace_of(rounded_bytes(x))
    linear = linear_args(x, weight, None, False, logits, workspace)
    draws, kept = draw_args(logits, options, token_ids, best)
    args = abi.PackedSampleArgs(linear, draws, pointer(norms), len(x))
    return launch(abi.OpKind.PACKED_SAMPLE, args, len(token_ids), x, weight.data, norms, workspace, *kept)
