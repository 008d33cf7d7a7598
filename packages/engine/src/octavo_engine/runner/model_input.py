"""ModelInput: the tensors of one step, built once and handed down to every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class KVLayer(NamedTuple):
    """The cache of one layer, k and v [num_blocks, num_kv_heads, block_size, head_dim], and its KV group's index.

    Where its elements are codes, k_scale and v_scale [num_blocks, num_kv_heads, block_size] fp32 go with them.
    """

    k_cache: Tensor
    v_cache: Tensor
    group: int
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class GroupInput(NamedTuple):
    """What a KV group's layers share: block_table [num_seqs, max_blocks] int32, slot_mapping [num_tokens] int64."""

    block_table: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step on the device. Sequences are the batch's rows that compute tokens, in the batch's order.

    On a CPU the tensors are views of the runner's `StepBuffers`, which the next step fills anew: whoever wants to keep
    one copies it. Rows of a block table then lie as far apart as the longest sequence there may be is long.

    Attributes:
        token_ids: [num_tokens] int64.
        positions: [num_tokens] int64.
        query_start_loc: [num_seqs + 1] int32, where each sequence's tokens begin.
        seq_lens: [num_seqs] int32, tokens of each sequence up to and with this step's.
        max_query_len: the most tokens of one sequence in this step.
        logits_indices: [num_logits_rows] int64, the tokens whose logits are wanted.
        groups: one per KV group.
        kv_layers: one per layer.
    """

    token_ids: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    logits_indices: Tensor
    groups: tuple[GroupInput, ...]
    kv_layers: tuple[KVLayer, ...]
