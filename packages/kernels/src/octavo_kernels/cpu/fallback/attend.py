"""The dense part of attention on one bucket: masks, scores, softmax, values."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_kernels._options import AttentionOptions

NEVER = float("-inf")
# Queries per product: bounds the score matrix, and lets causal tiles skip the columns behind their last query.
TILE_QUERIES = 128


@dataclass(frozen=True, slots=True)
class Span:
    """Which positions the columns and queries of a bucket are, and the masks that follow from them, made once.

    starts: the position of column 0 per sequence. seq_lens: tokens per sequence. bounds: min and max over the bucket.
    """

    starts: Tensor
    seq_lens: Tensor
    query_len: int
    num_columns: int
    min_end: int
    max_end: int
    min_start: int
    min_seq_len: int
    max_seq_len: int
    _masks: dict[Hashable, Tensor] = field(default_factory=dict)

    @classmethod
    def make(
        cls, starts: list[int], seq_lens: list[int], query_len: int, num_columns: int, device: torch.device
    ) -> "Span":
        """Take the positions of a bucket from host lists."""
        ends = [seq_len - start for start, seq_len in zip(starts, seq_lens, strict=True)]
        return cls(
            torch.tensor(starts, device=device),
            torch.tensor(seq_lens, device=device),
            query_len,
            num_columns,
            min(ends),
            max(ends),
            min(starts),
            min(seq_lens),
            max(seq_lens),
        )

    def mask(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the mask of that name; the span's next user, such as the next layer, finds it made."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]

    def hidden_tail(self) -> Tensor:
        """Return [sequences, columns] bool, true behind a sequence's end, for the columns from min_end on."""
        columns = torch.arange(max(self.min_end, 0), self.num_columns, device=self.starts.device)
        return columns >= (self.seq_lens - self.starts)[:, None]

    def max_hidden_head(self, options: AttentionOptions) -> int:
        """Return how many leading columns may lie behind the window of every query, at most."""
        if options.window is None:
            return 0
        first_seen = self.max_seq_len - self.query_len - options.window + 1
        return min(max(0, first_seen - self.min_start), self.num_columns)

    def has_hidden_columns(self, options: AttentionOptions) -> bool:
        """Return whether some column is seen by no query."""
        return self.min_end < self.num_columns or self.max_hidden_head(options) > 0 or self.min_seq_len < self.query_len


def attend(
    q: Tensor, k: Tensor, v: Tensor, span: Span, options: AttentionOptions, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out [sequences, query_len, num_heads, head_dim] in q's dtype, and lse [sequences, query_len, num_heads].

    q: [sequences, query_len, num_heads, head_dim]. k, v: [sequences, num_kv_heads, columns, head_dim]; modified where
    no query sees them.
    """
    everyone_sees = span.min_seq_len >= span.query_len
    # A row that sees nothing has no softmax; only the product gives it output 0.
    fused = everyone_sees and _fusable(q.dtype, q.shape[1], options, with_lse=with_lse)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (k, v) if fused else (k.to(wide), v.to(wide))
    silence(v, span, options)
    if fused:
        silence(k, span, options)
    outs: list[Tensor] = []
    log_sums: list[Tensor] = []
    for start in range(0, span.query_len, TILE_QUERIES):
        stop = min(start + TILE_QUERIES, span.query_len)
        columns = seen_columns(span, options, start, stop)
        tile = q[:, start:stop], k[:, :, columns], v[:, :, columns]
        bias = Bias.make(span, options, start, stop, columns, wide)
        if fused:
            outs.append(_fused(*tile, bias, options))
        else:
            out, lse = _product(*tile, bias, options, some_empty=not everyone_sees, with_lse=with_lse)
            outs.append(out.to(q.dtype))
            if lse is not None:
                log_sums.append(lse)
    lse_whole = torch.cat(log_sums, dim=1) if with_lse else None
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), lse_whole


def product_dtype(dtype: torch.dtype, query_len: int, options: AttentionOptions, *, with_lse: bool) -> torch.dtype:
    """Return the dtype in which `attend` wants keys and values for queries of `dtype`."""
    if dtype == torch.float64 or _fusable(dtype, query_len, options, with_lse=with_lse):
        return dtype
    return torch.float32


def _fusable(dtype: torch.dtype, query_len: int, options: AttentionOptions, *, with_lse: bool) -> bool:
    """Return whether torch's fused attention can serve: it is ahead on tiles of queries, the product on single rows."""
    plain = options.soft_cap is None and options.sinks is None and not with_lse and not options.batch_invariant
    return plain and query_len > 1 and dtype != torch.float64


@dataclass(frozen=True, slots=True)
class Bias:
    """What is laid over the scores of a tile.

    hidden: [sequences, query_len, columns] bool, or None when every query sees all. penalty: [sequences, num_heads,
    query_len, columns], ALiBi's, or None.
    """

    hidden: Tensor | None
    penalty: Tensor | None

    @classmethod
    def make(
        cls, span: Span, options: AttentionOptions, start: int, stop: int, columns: slice, dtype: torch.dtype
    ) -> "Bias":
        """Lay the options over queries start to stop and some columns; penalties are in `dtype`."""
        alone = stop - start == 1 and span.query_len == 1 and options.window is None
        if alone and options.alibi_slopes is None and span.min_end >= columns.stop:
            return cls(None, None)
        tile = start, stop, columns.start, columns.stop
        distance = span.mask(("distance", *tile), lambda: _distance(span, start, stop, columns))
        hidden = span.mask(
            ("hidden", *tile, options.causal, options.window), lambda: _hidden(span, options, distance, columns)
        )
        penalty = None
        if options.alibi_slopes is not None:
            penalty = options.alibi_slopes.to(dtype)[:, None, None] * distance.abs()[:, None]
        return cls(hidden, penalty)


def _distance(span: Span, start: int, stop: int, columns: slice) -> Tensor:
    """Return [sequences, stop - start, columns] int64, how far each key lies before each query."""
    device = span.starts.device
    keys = span.starts[:, None, None] + torch.arange(columns.start, columns.stop, device=device)
    queries = span.seq_lens[:, None] + torch.arange(start - span.query_len, stop - span.query_len, device=device)
    return queries[:, :, None] - keys


def _hidden(span: Span, options: AttentionOptions, distance: Tensor, columns: slice) -> Tensor:
    """Return [sequences, queries, columns] bool, true where a query does not see a key."""
    if options.causal:
        hidden = distance < 0
    else:
        keys = span.starts[:, None] + torch.arange(columns.start, columns.stop, device=distance.device)
        hidden = (keys >= span.seq_lens[:, None])[:, None].expand(distance.shape)
    return hidden if options.window is None else hidden | (distance.abs() >= options.window)


def seen_columns(span: Span, options: AttentionOptions, start: int, stop: int) -> slice:
    """Return the columns that some query of a tile may see."""
    last = span.max_end
    if options.causal:
        last = max(min(last, span.max_end - span.query_len + stop), 0)
    first = 0
    if options.window is not None:
        first = min(max(0, span.min_end - span.query_len + start - options.window + 1), last)
    return slice(first, last)


def silence(x: Tensor, span: Span, options: AttentionOptions) -> None:
    """Zero the columns that no query of a sequence sees: they may hold NaN, which no probability of 0 silences."""
    if span.min_end < x.shape[2]:
        hidden = span.mask("tail", span.hidden_tail)
        x[:, :, max(span.min_end, 0) :].masked_fill_(hidden[:, None, :, None], 0.0)
    head = span.max_hidden_head(options)
    if head:
        first_seen = span.seq_lens - span.query_len - (options.window or 0) + 1 - span.starts
        hidden = torch.arange(head, device=x.device) < first_seen[:, None]
        x[:, :, :head].masked_fill_(hidden[:, None, :, None], 0.0)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Bias, options: AttentionOptions) -> Tensor:
    """Return out by torch's fused attention."""
    mask: Tensor | None = None
    if bias.penalty is not None:
        mask = (-bias.penalty).to(q.dtype)
        if bias.hidden is not None:
            mask = mask.masked_fill(bias.hidden[:, None], NEVER)
    elif bias.hidden is not None:
        mask = ~bias.hidden[:, None]
    heads_first = q.transpose(1, 2)
    result = F.scaled_dot_product_attention(heads_first, k, v, attn_mask=mask, scale=options.scale, enable_gqa=True)
    return result.transpose(1, 2)


def _product(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias, options: AttentionOptions, *, some_empty: bool, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return out and, if asked for, lse by two batched products around a softmax, in k's dtype."""
    num_sequences, query_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    # [S, Q, heads, D] -> [S, kv heads, group * Q, D]
    rows = (q.to(k.dtype) * options.scale).view(num_sequences, query_len, num_kv_heads, group, head_dim)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(num_sequences, num_kv_heads, group * query_len, head_dim)
    scores = torch.matmul(rows, k.transpose(-1, -2)).view(num_sequences, num_heads, query_len, k.shape[2])
    if options.soft_cap is not None:
        scores = scores.div_(options.soft_cap).tanh_().mul_(options.soft_cap)
    if bias.penalty is not None:
        scores = scores.sub_(bias.penalty)
    if bias.hidden is not None:
        scores = scores.masked_fill_(bias.hidden[:, None], NEVER)
    lse: Tensor | None = None
    if with_lse or some_empty or options.sinks is not None:
        weights, lse = _softmax(scores, options.sinks)
        lse = lse.transpose(1, 2)
    else:
        weights = torch.softmax(scores, dim=-1)
    out = torch.matmul(weights.view(num_sequences, num_kv_heads, group * query_len, k.shape[2]), v)
    out = out.view(num_sequences, num_kv_heads, group, query_len, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(q.shape), lse if with_lse else None


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weights and the log of their denominator; rows that see nothing have weights 0 and lse -inf."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    shift = lse.masked_fill(lse == NEVER, 0.0)
    weights = torch.exp(scores - shift[..., None])
    return (weights if sinks is None else weights[..., :-1].contiguous()), lse
