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
        if part.factors is not None:
            multiply_by_factors(part.factors, groups, part.ranks, out[:, part.columns])


def multiply_by_factors(factors: Tensor, groups: RowGroups, ranks: Tensor, out: Tensor) -> None:
    """Multiply rows of out [num_tokens, out_features] by their adapters' factors, without a look at any value."""
    adapters = torch.full((len(out) + 1,), -1, dtype=torch.int64, device=out.device)
    rows = groups.rows.to(torch.int64)
    used = (groups.groups >= 0)[:, None].expand_as(rows)
    places = torch.where(used, rows, len(out))  # what is no row goes to the last place
    adapters[places.flatten()] = groups.groups.to(torch.int64)[:, None].expand_as(rows).flatten()
    adapters = adapters[:-1]
    known = adapters.clamp(min=0)
    applies = (adapters >= 0) & (ranks[known] > 0)
    out.mul_(torch.where(applies[:, None], factors[known], 1.0).to(out.dtype))


def _tiles(groups: RowGroups, ranks: Tensor, num_tokens: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield the tokens, the adapter and the rank of each tile."""
    for rows, adapter in zip(groups.rows, groups.groups.tolist(), strict=True):
        if adapter >= 0:
            yield rows[rows < num_tokens].to(torch.int64), adapter, int(ranks[adapter])
