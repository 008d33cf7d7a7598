"""A mixture of experts: every token goes through the gated feed-forward layers of its own experts.

Sums follow fixed orders: products over their inputs, and a token's experts as its ids list them, without atomics.
"""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation
from octavo_kernels._workspace import aligned, check_workspace
from octavo_kernels.row_groups import group_rows_workspace, num_row_tiles

ACTIVATIONS = ("silu", "gelu_tanh")


def fused_moe(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Return for each token the sum over its experts e of weight * (activation(x @ gate_e.T) * (x @ up_e.T)) @ w2_e.T.

    The products before the second product, and each expert's own result, are rounded to the dtype of x; sums are fp32.
    (Mixtures of experts: arXiv 1701.06538; sorted for grouped products as in MegaBlocks, arXiv 2211.15841.)

    Args:
        x: [num_tokens, hidden] fp32, fp16 or bf16; the stride of rows is free.
        w13: [num_experts, 2 * intermediate, hidden] in the dtype of x, contiguous; of each expert gate, then up.
        w2: [num_experts, hidden, intermediate] in the dtype of x, contiguous.
        topk_weights: [num_tokens, top_k] fp32, contiguous.
        topk_ids: [num_tokens, top_k] int32, contiguous; an id below 0 or from num_experts on adds nothing, as for
            experts that another device has.
        activation: "silu" or "gelu_tanh".
        out: like x; allocated when None.
        workspace: [at least moe_workspace(...)] uint8, which the call overwrites; allocated when None.

    Returns:
        out.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "fused_moe"
    device = _check.same_device(
        op, x=x, w13=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids, out=out, workspace=workspace
    )
    _check.rank(op, "x", x, ("num_tokens", "hidden"))
    _check.rank(op, "w2", w2, ("num_experts", "hidden", "intermediate"))
    num_tokens, hidden = x.shape
    num_experts, _, intermediate = w2.shape
    _check.shape(op, "w2", w2, (num_experts, hidden, intermediate))
    _check.shape(op, "w13", w13, (num_experts, 2 * intermediate, hidden))
    _check.floating(op, x=x)
    for name, weight in (("w13", w13), ("w2", w2)):
        _check.dtype(op, name, weight, x.dtype)
    _check.shape(op, "topk_ids", topk_ids, (num_tokens, "top_k"))
    _check.dtype(op, "topk_ids", topk_ids, torch.int32)
    _check.shape(op, "topk_weights", topk_weights, topk_ids.shape)
    _check.dtype(op, "topk_weights", topk_weights, torch.float32)
    _check.contiguous(op, w13=w13, w2=w2, topk_ids=topk_ids, topk_weights=topk_weights)
    _check.option(op, "activation", activation, activation in ACTIVATIONS, " or ".join(map(repr, ACTIVATIONS)))
    out = torch.empty_like(x) if out is None else out
    _check.shape(op, "out", out, x.shape)
    _check.dtype(op, "out", out, x.dtype)
    _check.last_dim_contiguous(op, x=x, out=out)
    num_bytes = moe_workspace(num_tokens, topk_ids.shape[1], num_experts, hidden, intermediate, x.dtype)
    workspace = check_workspace(op, workspace, num_bytes, device)
    if out.numel():
        implementation(op, device)(x, w13, w2, topk_weights, topk_ids, activation, out, workspace)
    return out


def moe_workspace(
    num_tokens: int, top_k: int, num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> int:
    """Return the bytes of workspace that `fused_moe` wants."""
    num_rows = num_tokens * top_k
    tile_rows = moe_tile_rows(num_rows, num_experts)
    num_tiles = num_row_tiles(num_rows, num_experts, tile_rows)
    sorted_rows = aligned(num_tiles * tile_rows * 4) + aligned(num_tiles * 4)
    results = aligned(num_rows * intermediate * dtype.itemsize) + aligned(num_rows * hidden * dtype.itemsize)
    return sorted_rows + results + group_rows_workspace(num_rows, num_experts)


def moe_tile_rows(num_rows: int, num_experts: int) -> int:
    """Return the height of tiles for so many pairs of a token and an expert: little of a tile should be empty."""
    rows_per_expert = num_rows // num_experts
    return 16 if rows_per_expert <= 16 else 64 if rows_per_expert <= 64 else 128
