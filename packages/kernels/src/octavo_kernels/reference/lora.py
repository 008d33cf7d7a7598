"""Low-rank adapters, one tile of tokens after the other, in fp64."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from octavo_kernels.lora import LoraPart, lora_span_inputs
from octavo_kernels.row_groups import RowGroups


def lora_shrink(x: Tensor, a: Tensor, groups: RowGroups, ranks: Tensor, out: Tensor) -> None:
    """Fill out with the sums of spans."""
    length = lora_span_inputs(x.shape[1])
    for tokens, adapter, rank in _tiles(groups, ranks, len(x)):
        for span in range(len(out)):
            inputs = slice(span * length, (span + 1) * length)
            product = x[tokens, inputs].double() @ a[adapter, :rank, inputs].double().T
            out[span, tokens, :rank] = product.to(out.dtype)


def lora_expand(shrunk: Tensor, b: Tensor, groups: RowGroups, ranks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Add the products to out, rounded once."""
    for tokens, adapter, rank in _tiles(groups, ranks, len(out)):
        product = shrunk[:, tokens, :rank].double().sum(dim=0) @ b[adapter, :, :rank].double().T
        out[tokens] = (out[tokens].double() + scales[adapter].double() * product).to(out.dtype)


def lora_linear(x: Tensor, parts: Sequence[LoraPart], groups: RowGroups, out: Tensor, shrunk: Tensor) -> None:
    """Add the products of each part, one after the other."""
    for part, sums in zip(parts, shrunk, strict=True):
        lora_shrink(x, part.a, groups, part.ranks, sums)
        lora_expand(sums, part.b, groups, part.ranks, part.scales, out[:, part.columns])


def _tiles(groups: RowGroups, ranks: Tensor, num_tokens: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the tokens, the adapter and the rank of each tile."""
    for rows, adapter in zip(groups.rows, groups.groups.tolist(), strict=True):
        if adapter >= 0:
            yield rows[rows < num_tokens].to(torch.int64), adapter, int(ranks[adapter])
