"""sample_tokens, one draw at a time, over scores in falling order."""

import math

import torch
from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.reference.noise import gumbel_noise


def sample_tokens(logits: Tensor, options: DrawOptions, token_ids: Tensor, best: Tensor) -> None:
    """Fill token_ids and best [draws]."""
    for draw in range(len(token_ids)):
        row = logits[draw if options.source_rows is None else int(options.source_rows[draw])]
        best[draw] = row.max()
        token_ids[draw] = _draw(row, options, draw) if best[draw].isfinite() else 0


def is_kept(scores: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return which tokens the filters leave: scores [vocab_size], the largest of them 0 -> [vocab_size] bool."""
    lowest = torch.tensor(min_p).log() if min_p > 0 else torch.tensor(-math.inf)
    kept = scores >= lowest.to(scores)
    if top_k > 0:
        in_order = scores[kept].sort(descending=True).values
        kept &= scores >= in_order[min(top_k, len(in_order)) - 1]
    if top_p < 1:
        in_order = scores[kept].sort(descending=True).values
        held = in_order.double().softmax(dim=0).cumsum(dim=0)
        num_needed = int((held < top_p).sum()) + 1
        kept &= scores >= in_order[min(num_needed, len(in_order)) - 1]
    return kept


def _draw(row: Tensor, options: DrawOptions, draw: int) -> int:
    temperature = options.temperature[draw]
    if temperature == 0:
        return int(row.argmax())
    scores = (row - row.max()) / temperature
    kept = is_kept(
        scores,
        top_k=0 if options.top_k is None else int(options.top_k[draw]),
        top_p=1.0 if options.top_p is None else float(options.top_p[draw]),
        min_p=0.0 if options.min_p is None else float(options.min_p[draw]),
    )
    one = slice(draw, draw + 1)
    noise = torch.empty((1, len(row)), dtype=torch.float32, device=row.device)
    gumbel_noise(options.seeds[one], options.sequence_index[one], options.positions[one], noise)
    return int((scores + noise[0]).masked_fill(~kept, -math.inf).argmax())
