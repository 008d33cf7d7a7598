"""make_batches: sequences of tokens as inputs of one step each, with room for the KV of one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.errors import InvalidConfig
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.registry import Model
from octavo_engine.runner.model_input import GroupInput, KVLayer, ModelInput
from octavo_kvcache.storage import KVStorage

_BLOCK_SIZE = 16
_TOKENS_OF_BATCH = 4096


def check_length(sequences: Sequence[Sequence[int]], config: ModelConfig) -> None:
    """Raise InvalidConfig if sequences, of equal lengths, have more tokens than the model has positions."""
    most = config.max_position_embeddings
    if sequences and len(sequences[0]) > most:
        raise InvalidConfig(
            f"sequences of {len(sequences[0])} tokens came, the model takes {most} at most; use shorter ones"
        )


def make_batches(model: Model, sequences: Sequence[Sequence[int]]) -> list[ModelInput]:
    """Return inputs that compute whole sequences, of equal lengths, several in each.

    Layers of one spec share their memory: a layer's KV is written before it is read, and not read again once the next
    layer has written its own. So nothing can be added to these sequences later.
    """
    check_length(sequences, model.config)
    num_rows = max(1, _TOKENS_OF_BATCH // len(sequences[0]))
    return [make_batch(model, sequences[start : start + num_rows]) for start in range(0, len(sequences), num_rows)]


def make_batch(model: Model, sequences: Sequence[Sequence[int]]) -> ModelInput:
    """Return the input of one step that computes whole sequences of one length, with KV memory of its own."""
    num_rows, length = len(sequences), len(sequences[0])
    num_blocks = -(-length // _BLOCK_SIZE)
    specs = model.kv_cache_specs(torch.float32)
    kinds = list(dict.fromkeys(specs))
    storage = KVStorage(kinds, 1 + num_rows * num_blocks, _BLOCK_SIZE)
    tables = torch.arange(num_rows * num_blocks, dtype=torch.int32).reshape(num_rows, num_blocks) + 1  # 0 is reserved
    positions = torch.arange(length)
    slots = tables[:, positions // _BLOCK_SIZE].long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
    return ModelInput(
        token_ids=torch.tensor([list(ids) for ids in sequences]).flatten(),
        positions=positions.repeat(num_rows),
        query_start_loc=torch.arange(0, (num_rows + 1) * length, length, dtype=torch.int32),
        seq_lens=torch.full((num_rows,), length, dtype=torch.int32),
        max_query_len=length,
        logits_indices=torch.arange(num_rows * length),
        groups=(GroupInput(tables, slots.flatten()),),
        kv_layers=tuple(KVLayer(*storage.layer(kinds.index(spec)), 0) for spec in specs),
    )
