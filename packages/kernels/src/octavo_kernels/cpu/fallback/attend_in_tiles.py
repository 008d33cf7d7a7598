"""The dense part of attention for batches that must not show: products of fixed tiles, added up by position.

The matrix library orders its sums by the sizes of a product. Here a product is always rows filled up to a multiple of
16 by a tile of 64 keys, and tiles begin at multiples of 64 of the absolute position; what they bring is added one after
the other. Tiles beyond a query bring zeros, so that neither the length of a chunk nor that of a neighbour matters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_kernels._options import AttentionOptions
from octavo_kernels.cpu.fallback.attend import NEVER, TILE_QUERIES, Bias, Span, seen_columns, silence

_TILE_KEYS = 64
_ROW_MULTIPLE = 16


def attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, span: Span, options: AttentionOptions, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Do what `attend` does, for spans whose columns begin at position 0; k and v are fp32, or fp64 as q is."""
    silence(v, span, options)
    k, v = _cut(k), _cut(v)
    outs: list[Tensor] = []
    log_sums: list[Tensor] = []
    for start in range(0, span.query_len, TILE_QUERIES):
        stop = min(start + TILE_QUERIES, span.query_len)
        num_tiles = max(1, -(-seen_columns(span, options, start, stop).stop // _TILE_KEYS))
        bias = Bias.make(span, options, start, stop, slice(0, num_tiles * _TILE_KEYS), k.dtype)
        out, lse = _tiled(q[:, start:stop], k[:, :, :num_tiles], v[:, :, :num_tiles], bias, options)
        outs.append(out.to(q.dtype))
        log_sums.append(lse)
    return torch.cat(outs, dim=1), torch.cat(log_sums, dim=1) if with_lse else None


def _cut(x: Tensor) -> Tensor:
    """View [S, kv heads, columns, D] as [S, kv heads, tiles, 64, D]; the last tile is filled up with zeros."""
    missing = -x.shape[2] % _TILE_KEYS
    whole = F.pad(x, (0, 0, 0, missing)) if missing else x
    return whole.view(*x.shape[:2], -1, _TILE_KEYS, x.shape[3])


def _tiled(q: Tensor, k: Tensor, v: Tensor, bias: Bias, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Return out [S, Q, heads, D] and lse [S, Q, heads], in k's dtype."""
    num_sequences, query_len, num_heads, head_dim = q.shape
    num_kv_heads, num_tiles = k.shape[1:3]
    num_rows = num_heads // num_kv_heads * query_len
    # [S, Q, heads, D] -> [S, kv heads, 1, group * Q, D]
    rows = (q.to(k.dtype) * options.scale).view(num_sequences, query_len, num_kv_heads, -1, head_dim)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(num_sequences, num_kv_heads, 1, num_rows, head_dim)
    rows = F.pad(rows, (0, 0, 0, -num_rows % _ROW_MULTIPLE))
    scores = torch.matmul(rows, k.transpose(-1, -2))  # [S, kv heads, tiles, rows, 64]
    _bend(scores[:, :, :, :num_rows].view(*scores.shape[:3], -1, query_len, _TILE_KEYS), bias, options)
    peaks = scores.amax(dim=(2, 4))
    sinks = None
    if options.sinks is not None:  # [kv heads, rows]
        each = options.sinks.to(k.dtype).view(num_kv_heads, -1).repeat_interleave(query_len, dim=1)
        sinks = F.pad(each, (0, rows.shape[3] - num_rows))
        peaks = torch.maximum(peaks, sinks)
    peaks = peaks.masked_fill(peaks == NEVER, 0.0)
    weights = scores.sub_(peaks[:, :, None, :, None]).exp_()
    totals, outs = weights.sum(dim=-1), torch.matmul(weights, v)
    total, out = totals[:, :, 0], outs[:, :, 0]
    for tile in range(1, num_tiles):
        total, out = total + totals[:, :, tile], out + outs[:, :, tile]
    if sinks is not None:
        total = total + (sinks - peaks).exp()
    lse = total.log() + peaks
    out = out / total.masked_fill(total == 0, 1.0)[..., None]
    shape = num_sequences, num_kv_heads, -1, query_len
    lse = lse[:, :, :num_rows].view(shape).permute(0, 3, 1, 2).flatten(2)
    return out[:, :, :num_rows].view(*shape, head_dim).permute(0, 3, 1, 2, 4).flatten(2, 3), lse


def _bend(scores: Tensor, bias: Bias, options: AttentionOptions) -> None:
    """Cap, lower and mask scores [S, kv heads, tiles, group, Q, 64] in place."""
    num_sequences, num_kv_heads, num_tiles, group, query_len, _ = scores.shape
    if options.soft_cap is not None:
        scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
    if bias.penalty is not None:  # [S, heads, Q, columns]
        penalty = bias.penalty.view(num_sequences, num_kv_heads, group, query_len, num_tiles, -1)
        scores.sub_(penalty.permute(0, 1, 4, 2, 3, 5))
    if bias.hidden is not None:  # [S, Q, columns]
        hidden = bias.hidden.reshape(num_sequences, query_len, num_tiles, -1).permute(0, 2, 1, 3)
        scores.masked_fill_(hidden[:, None, :, None], NEVER)
