// Span: query tokens of one sequence that are attended together; and what spans have in common.

#pragma once

#include <algorithm>
#include <cstring>

#include "attention_tile.h"
#include "ops.h"

namespace octavo {

struct Positions {
  int64_t begin, end;
};

// The positions that the query at `position` sees.
OCTAVO_INLINE Positions visible(const PagedAttentionArgs& a, int64_t position, int64_t seq_len) {
  Positions seen{0, seq_len};
  if (a.window != 0) {
    seen.begin = std::max<int64_t>(0, position - a.window + 1);
    seen.end = std::min(seen.end, position + a.window);
  }
  if (a.causal) seen.end = std::min(seen.end, position + 1);
  return seen;
}

struct Span {
  int64_t sequence, first_query, num_queries;
  Positions seen;  // by any of its queries
  int64_t first_tile, end_tile;
  const int32_t* blocks;  // the table from the first tile on
  int64_t num_blocks;     // to the last position that is seen
  int64_t num_rows;       // per KV head
  int64_t first_row;      // among those of its item
};

inline Span make_span(const PagedAttentionArgs& a, int64_t sequence, int64_t first, int64_t count, int64_t query_len) {
  const int64_t seq_len = a.seq_lens[sequence], position = seq_len - query_len + first;
  Span span{};
  span.sequence = sequence;
  span.first_query = first;
  span.num_queries = count;
  span.num_rows = count * (a.num_heads / a.num_kv_heads);
  span.seen = Positions{visible(a, position, seq_len).begin, visible(a, position + count - 1, seq_len).end};
  span.first_tile = span.end_tile = span.seen.begin / kTile;
  if (span.seen.end <= span.seen.begin) return span;
  span.end_tile = (span.seen.end + kTile - 1) / kTile;
  const int64_t first_block = span.first_tile * kTile / a.block_size;
  span.blocks = a.block_table + sequence * a.block_table_stride + first_block;
  span.num_blocks = (span.seen.end + a.block_size - 1) / a.block_size - first_block;
  return span;
}

// An order in which the spans that have most blocks in common from the first on are neighbours.
inline bool precedes(const Span& x, const Span& y) {
  if (x.first_tile != y.first_tile) return x.first_tile < y.first_tile;
  const int64_t num_blocks = std::min(x.num_blocks, y.num_blocks);
  if (num_blocks > 0) {
    if (x.blocks[0] != y.blocks[0]) return x.blocks[0] < y.blocks[0];
    const int order = std::memcmp(x.blocks, y.blocks, num_blocks * sizeof(int32_t));
    if (order != 0) return order < 0;
  }
  if (x.num_blocks != y.num_blocks) return x.num_blocks < y.num_blocks;
  return x.sequence != y.sequence ? x.sequence < y.sequence : x.first_query < y.first_query;
}

// The end of the tiles that `y` has in common with `x`: from the first tile of both on, in the same blocks, and seen to
// their ends by both. The first tile of `y` where there are none.
inline int64_t end_of_shared(const PagedAttentionArgs& a, const Span& x, const Span& y) {
  if (x.first_tile != y.first_tile) return y.first_tile;
  int64_t num_blocks = 0;
  const int64_t most = std::min(x.num_blocks, y.num_blocks);
  while (num_blocks < most && x.blocks[num_blocks] == y.blocks[num_blocks]) ++num_blocks;
  if (num_blocks == 0) return y.first_tile;
  const int64_t first_block = x.first_tile * kTile / a.block_size;
  const int64_t end = std::min({(first_block + num_blocks) * a.block_size, x.seen.end, y.seen.end});
  return std::max(y.first_tile, end / kTile);
}

}  // namespace octavo
