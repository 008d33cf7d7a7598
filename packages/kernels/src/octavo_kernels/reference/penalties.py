"""apply_penalties, one row at a time."""

import torch
from torch import Tensor


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    prompt_bitmask: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    rows: Tensor | None,
    table_rows: Tensor | None,
) -> None:
    """Change the logits of tokens that were seen."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    for index in range(len(repetition)):
        scores = logits[index if rows is None else int(rows[index])]
        table = index if table_rows is None else int(table_rows[index])
        counts = output_counts[table]
        in_prompt = (prompt_bitmask[table][tokens // 32] >> (tokens % 32)) & 1 == 1
        repeated = torch.where(scores > 0, scores / repetition[index], scores * repetition[index])
        changed = torch.where(in_prompt | (counts > 0), repeated, scores)
        scores.copy_(changed - frequency[index] * counts - presence[index] * (counts > 0))
