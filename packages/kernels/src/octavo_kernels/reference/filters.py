"""apply_filters, one row at a time, by sorting."""

import math

from torch import Tensor

from octavo_kernels.reference.sampling import is_kept


def apply_filters(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> None:
    """Remove the tokens that are not kept."""
    for index, row in enumerate(logits):
        if temperature[index] == 0 or not row.max().isfinite():
            continue
        kept = is_kept(
            (row - row.max()) / temperature[index],
            top_k=0 if top_k is None else int(top_k[index]),
            top_p=1.0 if top_p is None else float(top_p[index]),
            min_p=0.0 if min_p is None else float(min_p[index]),
        )
        row[~kept] = -math.inf
