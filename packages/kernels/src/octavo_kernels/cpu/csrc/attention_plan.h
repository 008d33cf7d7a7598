// AttentionPlan: the tasks of one paged_attention call. Every thread makes the same plan from the same arguments.

#pragma once

#include <algorithm>

#include "attention_tile.h"
#include "ops.h"

namespace octavo {

constexpr int kRowsPerItem = 48;  // of a prompt: what a transposed tile of keys serves
constexpr int kPartsPerThread = 4;

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

// Some query tokens of one sequence. Each KV head has num_parts tasks of it, of tiles_per_part tiles each.
struct Item {
  int64_t sequence, first_query, num_queries;
  int64_t first_tile, num_tiles;
  int64_t tiles_per_part, num_parts;
  int64_t first_task;
  int64_t first_join;     // among the (item, KV head) pairs whose parts are joined afterwards
  int64_t first_partial;  // floats before those of its parts
};

// Tiles first_tile .. end_tile - 1 of an item for one KV head.
struct Task {
  const Item* item;
  int64_t kv_head;
  int64_t first_tile, end_tile;
};

class AttentionPlan {
 public:
  // An upper bound of the items, for `memory`.
  static int64_t max_items(const PagedAttentionArgs& a, int64_t num_seqs) {
    const int64_t per_item = queries_per_item(a);
    return a.query_start_loc[num_seqs] / per_item + num_seqs;
  }

  AttentionPlan(const PagedAttentionArgs& a, int64_t num_seqs, int num_threads, Item* memory)
      : items_(memory), num_kv_heads_(a.num_kv_heads), group_(a.num_heads / a.num_kv_heads) {
    const int64_t per_item = queries_per_item(a);
    int64_t total = 0;
    for (int64_t sequence = 0; sequence < num_seqs; ++sequence) {
      const int64_t query_len = a.query_start_loc[sequence + 1] - a.query_start_loc[sequence];
      for (int64_t first = 0; first < query_len; first += per_item) {
        Item& item = items_[num_items_++];
        item = make_item(a, sequence, first, std::min(per_item, query_len - first), query_len);
        total += cost(item) * num_kv_heads_;
      }
    }
    const int64_t largest = num_threads == 1 ? total : total / (kPartsPerThread * num_threads);
    for (int64_t i = 0; i < num_items_; ++i) split(items_[i], largest, a.head_dim);
  }

  int64_t num_tasks() const { return num_tasks_; }
  int64_t num_joins() const { return num_joins_; }
  int64_t num_partial_floats() const { return num_partial_floats_; }
  int64_t num_rows(const Item& item) const { return item.num_queries * group_; }

  Task task(int64_t number) const {
    const auto precedes = [](int64_t value, const Item& item) { return value < item.first_task; };
    const Item& item = *(std::upper_bound(items_, items_ + num_items_, number, precedes) - 1);
    const int64_t part = (number - item.first_task) % item.num_parts;
    const int64_t first = item.first_tile + part * item.tiles_per_part;
    const int64_t end = std::min(first + item.tiles_per_part, item.first_tile + item.num_tiles);
    return Task{&item, (number - item.first_task) / item.num_parts, first, end};
  }

  // All tiles of an item whose parts are joined, for one KV head.
  Task join(int64_t number) const {
    const auto precedes = [](int64_t value, const Item& item) { return value < item.first_join; };
    const Item& item = *(std::upper_bound(items_, items_ + num_items_, number, precedes) - 1);
    return Task{&item, number - item.first_join, item.first_tile, item.first_tile + item.num_tiles};
  }

  // Floats of what the parts of an item's KV head leave: per tile and row its maximum, its sum and its values.
  static int64_t partial_floats(int64_t num_tiles, int64_t num_rows, int64_t head_dim) {
    return num_tiles * num_rows * (head_dim + 2);
  }

 private:
  static int64_t queries_per_item(const PagedAttentionArgs& a) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    return std::min<int64_t>(32, std::max<int64_t>(1, kRowsPerItem / group));
  }

  static Item make_item(const PagedAttentionArgs& a, int64_t sequence, int64_t first, int64_t count,
                        int64_t query_len) {
    const int64_t seq_len = a.seq_lens[sequence], position = seq_len - query_len + first;
    const int64_t begin = visible(a, position, seq_len).begin, end = visible(a, position + count - 1, seq_len).end;
    Item item{};
    item.sequence = sequence;
    item.first_query = first;
    item.num_queries = count;
    item.first_tile = begin / kTile;
    item.num_tiles = end > begin ? (end + kTile - 1) / kTile - item.first_tile : 0;
    return item;
  }

  int64_t cost(const Item& item) const { return item.num_tiles * ((num_rows(item) + kMaxRows - 1) / kMaxRows); }

  // Cuts an item that takes longer than `largest`, and numbers its tasks.
  void split(Item& item, int64_t largest, int64_t head_dim) {
    item.tiles_per_part = std::max<int64_t>(item.num_tiles, 1);
    if (item.num_tiles > 2 && cost(item) > largest) {
      const int64_t cost_per_tile = cost(item) / item.num_tiles;
      item.tiles_per_part = std::min(item.num_tiles, std::max<int64_t>(2, largest / (2 * cost_per_tile)));
    }
    item.num_parts = std::max<int64_t>(1, (item.num_tiles + item.tiles_per_part - 1) / item.tiles_per_part);
    item.first_task = num_tasks_;
    item.first_join = num_joins_;
    item.first_partial = num_partial_floats_;
    num_tasks_ += num_kv_heads_ * item.num_parts;
    if (item.num_parts == 1) return;
    num_joins_ += num_kv_heads_;
    num_partial_floats_ += num_kv_heads_ * partial_floats(item.num_tiles, num_rows(item), head_dim);
  }

  Item* items_;
  int64_t num_items_ = 0;
  int64_t num_kv_heads_, group_;
  int64_t num_tasks_ = 0;
  int64_t num_joins_ = 0;
  int64_t num_partial_floats_ = 0;
};

}  // namespace octavo
