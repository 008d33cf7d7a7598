"""sample_tokens of the `cpu` backend: native code, or batched torch where there is none."""

from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import sampling as fallback
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for


def sample_tokens(logits: Tensor, options: DrawOptions, token_ids: Tensor, best: Tensor) -> None:
    """Fill token_ids and best [draws]."""
    if library_for("sample_tokens") is None:
        return fallback.sample_tokens(logits, options, token_ids, best)
    args, kept = draw_args(logits, options, token_ids, best)
    return launch(abi.OpKind.SAMPLE_TOKENS, args, len(token_ids), *kept)


def draw_args(
    logits: Tensor, options: DrawOptions, token_ids: Tensor, best: Tensor
) -> tuple[abi.SampleTokensArgs, list[Tensor | None]]:
    """Return what native code is told of draws, and the tensors to be kept for it."""
    o = options
    given = (o.source_rows, o.temperature, o.top_k, o.top_p, o.min_p, o.seeds, o.sequence_index, o.positions)
    vectors = [None if vector is None else vector.contiguous() for vector in given]
    args = abi.SampleTokensArgs(
        logits.data_ptr(),
        *(pointer(vector) for vector in vectors),
        token_ids.data_ptr(),
        best.data_ptr(),
        logits.stride(0),
        logits.shape[1],
    )
    return args, [logits, *vectors, token_ids, best]
