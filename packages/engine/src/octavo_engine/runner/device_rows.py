"""DeviceRows: the running rows on the device, from which it makes each step's input itself."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from octavo_engine.runner.row_deltas import RowDelta
from octavo_engine.runner.step_plan import StepPlan, StepSize
from octavo_kernels import StepTensors, advance_rows, expand_rows, update_rows


class DeviceRows:
    """What steps read of each row: how far it is, its last token, its blocks, and how it draws.

    Only work that was launched touches it, in the order of the launches: so a step finds what the one before left,
    which nobody has seen yet.

    Args:
        max_num_rows: rows there can be.
        max_num_blocks: blocks that a sequence can have.
        num_groups: KV groups.
        block_size: tokens in a block.
        device: where the model is.
    """

    def __init__(
        self, max_num_rows: int, *, max_num_blocks: int, num_groups: int, block_size: int, device: torch.device
    ) -> None:
        zeros = partial(torch.zeros, device=device)
        self._num_computed_tokens = zeros(max_num_rows, dtype=torch.int32)
        self._last_tokens = zeros(max_num_rows, dtype=torch.int64)
        self._block_tables = zeros((num_groups, max_num_rows, max_num_blocks), dtype=torch.int32)
        self._fractions = zeros((3, max_num_rows), dtype=torch.float32)  # as in RowDelta
        self._integers = zeros((3, max_num_rows), dtype=torch.int64)
        self._step_rows = zeros(max_num_rows, dtype=torch.int32)  # of the last step
        self._block_size = block_size

    def update(self, delta: RowDelta[Tensor]) -> None:
        """Take over what has changed."""
        update_rows(
            self._num_computed_tokens,
            self._last_tokens,
            self._block_tables,
            rows=delta.rows,
            new_num_computed_tokens=delta.num_computed_tokens,
            new_last_tokens=delta.last_tokens,
            runs=delta.runs,
            run_starts=delta.run_starts,
            block_ids=delta.block_ids,
        )
        if len(delta.rows):
            rows = delta.rows.long()
            self._fractions[:, rows] = delta.fractions
            self._integers[:, rows] = delta.integers

    def expand(self, plan: StepPlan[Tensor], size: StepSize, out: StepTensors) -> None:
        """Make a step's input, once the rows are up to date."""
        if plan.rows is not None:
            self._step_rows[: size.num_seqs].copy_(plan.rows)
        expand_rows(
            self._num_computed_tokens,
            self._last_tokens,
            self._block_tables,
            self._step_rows[: size.num_seqs],
            block_size=self._block_size,
            max_query_len=size.max_query_len,
            max_seq_len=size.max_seq_len,
            out=out,
            query_start_loc=plan.query_start_loc,
            token_ids=plan.token_ids,
            logits_seqs=plan.logits_seqs,
        )

    def drawing_rows(self, plan: StepPlan[Tensor], size: StepSize) -> Tensor:
        """Return the rows that draw in the step that was expanded last: [num_draws] int32."""
        return self._step_rows[: size.num_seqs] if plan.drawing_rows is None else plan.drawing_rows

    def sampling(self, plan: StepPlan[Tensor], size: StepSize, seq_lens: Tensor) -> dict[str, Tensor]:
        """Return how the step that was expanded last draws, as `sample_tokens` takes it.

        Args:
            plan: of the step.
            size: of the step.
            seq_lens: [num_seqs] int32, which the step was expanded to.
        """
        rows = self.drawing_rows(plan, size)
        temperature, top_p, min_p = self._fractions.index_select(1, rows)
        top_k, seeds, sequence_index = self._integers.index_select(1, rows)
        ends = seq_lens[: size.num_seqs] if plan.logits_seqs is None else seq_lens.index_select(0, plan.logits_seqs)
        return {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seeds": seeds,
            "sequence_index": sequence_index,
            "positions": (ends if plan.shared is None else ends[plan.shared]).long(),
        }

    def advance(self, plan: StepPlan[Tensor], size: StepSize, seq_lens: Tensor, drawn: Tensor | None) -> None:
        """Let the rows of the step that was expanded last go on from it.

        Args:
            plan: of the step.
            size: of the step.
            seq_lens: [num_seqs] int32, which the step was expanded to.
            drawn: [num_draws] int64; None if nothing was.
        """
        rows = self._step_rows[: size.num_seqs]
        advance_rows(
            self._num_computed_tokens,
            self._last_tokens,
            rows=rows,
            seq_lens=seq_lens[: size.num_seqs],
            drawing_rows=rows[:0] if drawn is None else self.drawing_rows(plan, size),
            token_ids=self._last_tokens[:0] if drawn is None else drawn,
        )
