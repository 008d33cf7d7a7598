"""The workspace of attention over split keys: how keys are cut, what it holds, and how large it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._workspace import aligned, check_workspace, take

# Batch-invariant attention joins keys by chunks: of 256 positions below position 16384, of 1024 from there on. Short
# chunks give one sequence to many programs, long ones leave less to join.
NEAR_CHUNK = 256
FAR_CHUNK = 1024
FAR = 16384

# Sequences with so many rows (queries times heads of a group) or fewer are split, with more they are prefilled.
SPLIT_ROWS = 64

_MOST_BYTES = 128 << 20


def attention_workspace(
    num_seqs: int, max_seq_len: int, num_heads: int, num_kv_heads: int, head_dim: int, *, max_query_len: int = 1
) -> int:
    """Return how many bytes of workspace make `paged_attention` as fast as it gets, for batches of some limits.

    Args:
        num_seqs: sequences of a batch, or more.
        max_seq_len: tokens of the longest sequence, or more.
        num_heads: query heads.
        num_kv_heads: key heads.
        head_dim: size of a head.
        max_query_len: the longest query_len of the batch, or more.

    Returns:
        Bytes, about 128 MiB at most. Less serves too, down to 12 bytes per sequence and 16 more: sequences for which
        there is no room are each done by one program per key head, which is slower, and has the same bits where the
        call is batch-invariant.

    Raises:
        OptionError: a limit is below 1, or num_heads is no multiple of num_kv_heads.

    """
    op = "attention_workspace"
    limits = {
        "num_seqs": num_seqs,
        "max_seq_len": max_seq_len,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_query_len": max_query_len,
    }
    for name, value in limits.items():
        _check.option(op, name, value, value >= 1, "at least 1")
    _check.option(op, "num_heads", num_heads, num_heads % num_kv_heads == 0, f"a multiple of {num_kv_heads}")
    longest = max(1, SPLIT_ROWS // (num_heads // num_kv_heads))
    num_rows = min(max_query_len, longest) * num_heads
    return _workspace_bytes(num_seqs, num_seqs * num_chunks(max_seq_len), num_rows, head_dim)


def num_chunks(seq_len: int) -> int:
    """Return how many chunks a sequence has."""
    near, far = min(seq_len, FAR), max(0, seq_len - FAR)
    return -(-near // NEAR_CHUNK) + -(-far // FAR_CHUNK)


def _slot_bytes(num_rows: int, head_dim: int) -> int:
    return aligned(4 * num_rows * head_dim) + aligned(4 * num_rows * 2)


def _workspace_bytes(num_seqs: int, num_slots: int, num_rows: int, head_dim: int) -> int:
    slot = _slot_bytes(num_rows, head_dim)
    return aligned(4 * (3 * num_seqs + 2)) + min(num_slots, max(1, _MOST_BYTES // slot)) * slot


class Workspace(NamedTuple):
    """A workspace cut into its parts.

    plan: int32. parts: num_slots * num_rows * head_dim in fp32. sums: num_slots * num_rows * 2 in fp32.
    """

    plan: Tensor
    parts: Tensor
    sums: Tensor


def cut_workspace(
    op: str,
    workspace: Tensor | None,
    num_seqs: int,
    most_slots: int,
    num_rows: int,
    head_dim: int,
    device: torch.device,
) -> Workspace:
    """Cut a workspace, or a new one where none is given, into a plan and at most most_slots slots.

    Raises: ShapeError, DtypeError, OptionError (no room for the plan, another form, or not aligned).
    """
    if workspace is None:
        workspace = torch.empty(
            _workspace_bytes(num_seqs, most_slots, num_rows, head_dim), dtype=torch.uint8, device=device
        )
    plan_size = 3 * num_seqs + 2
    workspace = check_workspace(op, workspace, aligned(4 * plan_size), device)
    plan, offset = take(workspace, 0, torch.int32, plan_size)
    num_slots = min(most_slots, (workspace.numel() - offset) // _slot_bytes(num_rows, head_dim))
    parts, offset = take(workspace, offset, torch.float32, num_slots * num_rows * head_dim)
    sums, _ = take(workspace, offset, torch.float32, num_slots * num_rows * 2)
    return Workspace(plan, parts, sums)
