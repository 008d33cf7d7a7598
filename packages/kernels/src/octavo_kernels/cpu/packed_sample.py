"""packed_sample of the `cpu` backend: native code, or torch where there is none."""

from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.cpu import abi
from octavo_kernels.cpu.fallback import packed_sample as fallback
from octavo_kernels.cpu.launch import launch, pointer
from octavo_kernels.cpu.load import library_for
from octavo_kernels.cpu.matmul import FORMAT_CODES, grid_of, rounded_bytes, workspace_of
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
    o = options
    given = (o.source_rows, o.temperature, o.seeds, o.sequence_index, o.positions)
    vectors = [None if vector is None else vector.contiguous() for vector in given]
    args = abi.PackedSampleArgs(
        x.data_ptr(),
        weight.data.data_ptr(),
        pointer(grid_of(weight)),
        pointer(norms),
        logits.data_ptr(),
        workspace.data_ptr(),
        *(pointer(vector) for vector in vectors),
        token_ids.data_ptr(),
        best.data_ptr(),
        x_stride=x.stride(0),
        logits_stride=logits.stride(0),
        format=FORMAT_CODES[weight.format],
        out_features=weight.out_features,
        in_features=weight.in_features,
        num_rows=len(x),
    )
    kept = (x, weight.data, norms, logits, workspace, *vectors, token_ids, best)
    return launch(abi.OpKind.PACKED_SAMPLE, args, len(token_ids), *kept)
