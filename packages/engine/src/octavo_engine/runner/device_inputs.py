"""DeviceInputs: the memory on the device where steps find their input, at addresses that stay."""

from __future__ import annotations

from functools import partial

import torch

from octavo_engine.runner.graph_plan import GraphShape
from octavo_engine.runner.model_input import GroupInput, KVLayer, ModelInput
from octavo_kernels import StepTensors


class DeviceInputs:
    """One piece of memory for all steps, of which each has the beginnings of the tensors.

    Args:
        max_num_tokens: tokens that a step can compute.
        max_num_seqs: sequences that a step can have.
        max_num_blocks: blocks that a sequence can have.
        num_groups: KV groups.
        block_size: tokens in a block.
        kv_layers: passed on.
        device: where the model is.
    """

    def __init__(
        self,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_num_blocks: int,
        num_groups: int,
        block_size: int,
        kv_layers: tuple[KVLayer, ...],
        device: torch.device,
    ) -> None:
        wide = partial(torch.zeros, dtype=torch.int64, device=device)
        narrow = partial(torch.zeros, dtype=torch.int32, device=device)
        self._tensors = StepTensors(
            token_ids=wide(max_num_tokens),
            positions=wide(max_num_tokens),
            query_start_loc=narrow(max_num_seqs + 1),
            seq_lens=narrow(max_num_seqs),
            logits_indices=wide(max_num_seqs),
            block_tables=narrow((num_groups, max_num_seqs, max_num_blocks)),
            slot_mapping=wide((num_groups, max_num_tokens)),
        )
        self._max_num_blocks = max_num_blocks
        self._block_size = block_size
        self._kv_layers = kv_layers
        self._of_graphs: dict[GraphShape, ModelInput] = {}

    def tensors(self, shape: GraphShape) -> StepTensors:
        """Return where a step of a shape is written; `logits_indices` have room for as many as there can be."""
        whole, (num_tokens, num_seqs, _) = self._tensors, shape
        return StepTensors(
            token_ids=whole.token_ids[:num_tokens],
            positions=whole.positions[:num_tokens],
            query_start_loc=whole.query_start_loc[: num_seqs + 1],
            seq_lens=whole.seq_lens[:num_seqs],
            logits_indices=whole.logits_indices,
            block_tables=whole.block_tables[:, :num_seqs],
            slot_mapping=whole.slot_mapping[:, :num_tokens],
        )

    def of_graph(self, shape: GraphShape) -> ModelInput:
        """Return the input of a shape, with the whole width of block tables: always the same for a shape."""
        if shape not in self._of_graphs:
            self._of_graphs[shape] = self._view(shape, self._max_num_blocks)
        return self._of_graphs[shape]

    def of_step(self, shape: GraphShape, max_seq_len: int) -> ModelInput:
        """Return the input of a step that is not filled up, with block tables for its longest sequence."""
        return self._view(shape, -(-max_seq_len // self._block_size))

    def _view(self, shape: GraphShape, num_blocks: int) -> ModelInput:
        tensors = self.tensors(shape)
        return ModelInput(
            token_ids=tensors.token_ids,
            positions=tensors.positions,
            query_start_loc=tensors.query_start_loc,
            seq_lens=tensors.seq_lens,
            max_query_len=shape.max_query_len,
            logits_indices=tensors.logits_indices[: shape.num_rows],
            groups=tuple(
                GroupInput(table[:, :num_blocks], slots)
                for table, slots in zip(tensors.block_tables, tensors.slot_mapping, strict=True)
            ),
            kv_layers=self._kv_layers,
        )
