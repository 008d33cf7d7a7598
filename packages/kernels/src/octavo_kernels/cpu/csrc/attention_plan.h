// AttentionPlan: the tasks of one paged_attention call. Every thread makes the same plan from the same arguments.
//
// Sequences that hold the same blocks (samples of one prompt, beams, prompts with a common beginning) are put into one
// item, which reads those blocks once for the rows of all of them: their block tables are a tree, and each branch of it
// is a leg. A row still takes its tiles in the order of positions.

#pragma once

#include <algorithm>

#include "attention_span.h"
#include "attention_tile.h"
#include "ops.h"

namespace octavo {

constexpr int kRowsPerItem = 48;  // what a transposed tile of keys serves
constexpr int kPartsPerThread = 4;
constexpr int kLeastShared = 8;  // one in so many tiles of a sequence must be shared to be worth an item with others

// Tiles that neighbouring rows of an item read from the same blocks.
struct Leg {
  int64_t sequence;  // whose table has the blocks
  int64_t first_row, num_rows;
  int64_t rows_at_once;  // a number up to kMaxRows that leaves no small rest
  Positions seen;        // by any of the rows
  int64_t first_tile, num_tiles;
  int64_t first_step;     // tiles of the legs before it
  int64_t first_partial;  // floats of their partials
};

struct Place {
  const Leg* leg;
  int64_t tile;

  Place next() const {
    if (tile + 1 < leg->first_tile + leg->num_tiles) return Place{leg, tile + 1};
    return Place{leg + 1, leg[1].first_tile};
  }
};

// Some spans. Each KV head has num_parts tasks of it, of steps_per_part steps each: a step is one tile of one leg.
struct Item {
  const Span* spans;
  const Leg* legs;
  int64_t num_spans, num_legs, num_rows;
  int64_t num_steps, steps_per_part, num_parts;
  int64_t first_task;
  int64_t first_join;          // among the (item, KV head) pairs whose parts are joined afterwards
  int64_t first_partial;       // floats before those of its parts
  int64_t num_partial_floats;  // per KV head

  Place place(int64_t step) const {
    const Leg* leg = legs;
    while (step >= leg->first_step + leg->num_tiles) ++leg;
    return Place{leg, leg->first_tile + step - leg->first_step};
  }
};

// Steps first_step .. end_step - 1 of an item for one KV head.
struct Task {
  const Item* item;
  int64_t kv_head;
  int64_t first_step, end_step;
};

class AttentionPlan {
 public:
  // An upper bound of the spans.
  static int64_t max_spans(const PagedAttentionArgs& a, int64_t num_seqs) {
    return a.query_start_loc[num_seqs] / queries_per_span(a) + num_seqs;
  }

  // The memory that a plan of so many spans takes. Spans are the leaves of trees, so there are not twice as many legs.
  static size_t num_bytes(int64_t max_spans) {
    return max_spans * (sizeof(Span) + sizeof(Item) + 2 * sizeof(Leg) + sizeof(int64_t));
  }

  AttentionPlan(const PagedAttentionArgs& a, int64_t num_seqs, int num_threads, void* memory)
      : num_kv_heads_(a.num_kv_heads) {
    const int64_t max_spans = AttentionPlan::max_spans(a, num_seqs);
    spans_ = static_cast<Span*>(memory);
    items_ = reinterpret_cast<Item*>(spans_ + max_spans);
    legs_ = reinterpret_cast<Leg*>(items_ + max_spans);
    ends_ = reinterpret_cast<int64_t*>(legs_ + 2 * max_spans);
    make_spans(a, num_seqs);
    if (may_share()) std::sort(spans_, spans_ + num_spans_, precedes);
    for (int64_t i = 0; i < num_spans_; ++i) ends_[i] = i == 0 ? 0 : end_of_shared(a, spans_[i - 1], spans_[i]);
    int64_t alone = 0;
    for (int64_t i = 0; i < num_spans_; ++i) alone += cost(num_tiles(i), spans_[i].num_rows) * num_kv_heads_;
    for (int64_t i = 0; i < num_spans_;) i = add_item(i, largest_of(alone, num_threads), a.head_dim);
    int64_t total = 0, longest = 0;
    for (int64_t i = 0; i < num_items_; ++i) {
      total += cost(items_[i]) * num_kv_heads_;
      longest = std::max(longest, cost(items_[i]));
    }
    // As many tasks of much the same cost for each thread need no cuts.
    const int64_t rounds = (num_items_ * num_kv_heads_ + num_threads - 1) / num_threads;
    const bool even = 8 * rounds * longest * num_threads <= 9 * total;
    for (int64_t i = 0; i < num_items_; ++i) split(items_[i], even ? total : largest_of(total, num_threads));
  }

  int64_t num_tasks() const { return num_tasks_; }
  int64_t num_joins() const { return num_joins_; }
  int64_t num_partial_floats() const { return num_partial_floats_; }

  Task task(int64_t number) const {
    const auto precedes = [](int64_t value, const Item& item) { return value < item.first_task; };
    const Item& item = *(std::upper_bound(items_, items_ + num_items_, number, precedes) - 1);
    const int64_t first = (number - item.first_task) % item.num_parts * item.steps_per_part;
    const int64_t end = std::min(first + item.steps_per_part, item.num_steps);
    return Task{&item, (number - item.first_task) / item.num_parts, first, end};
  }

  // All of an item whose parts are joined, for one KV head.
  Task join(int64_t number) const {
    const auto precedes = [](int64_t value, const Item& item) { return value < item.first_join; };
    const Item& item = *(std::upper_bound(items_, items_ + num_items_, number, precedes) - 1);
    return Task{&item, number - item.first_join, 0, item.num_steps};
  }

  // Floats of what a step leaves: per row its maximum, its sum and its values.
  static int64_t partial_floats(int64_t num_rows, int64_t head_dim) { return num_rows * (head_dim + 2); }

 private:
  static int64_t queries_per_span(const PagedAttentionArgs& a) {
    const int64_t group = a.num_heads / a.num_kv_heads;
    return std::min<int64_t>(32, std::max<int64_t>(1, kRowsPerItem / group));
  }

  void make_spans(const PagedAttentionArgs& a, int64_t num_seqs) {
    const int64_t per_span = queries_per_span(a);
    for (int64_t sequence = 0; sequence < num_seqs; ++sequence) {
      const int64_t query_len = a.query_start_loc[sequence + 1] - a.query_start_loc[sequence];
      for (int64_t first = 0; first < query_len; first += per_span)
        spans_[num_spans_++] = make_span(a, sequence, first, std::min(per_span, query_len - first), query_len);
    }
  }

  // Whether two spans may begin with the same block: a filter that costs next to nothing where they do not.
  bool may_share() const {
    uint64_t known[64] = {};
    for (int64_t i = 0; i < num_spans_; ++i) {
      const Span& span = spans_[i];
      if (span.num_blocks == 0 || 2 * span.num_rows > kRowsPerItem) continue;
      const uint32_t hash = static_cast<uint32_t>(span.blocks[0]) * 0x9E3779B1u >> 20;
      const uint64_t bit = uint64_t(1) << hash % 64;
      if (known[hash / 64] & bit) return true;
      known[hash / 64] |= bit;
    }
    return false;
  }

  static int64_t cost(int64_t num_tiles, int64_t num_rows) {
    return num_tiles * ((num_rows + kMaxRows - 1) / kMaxRows);
  }

  // What an item may cost: larger ones would leave threads idle at the end.
  static int64_t largest_of(int64_t total, int num_threads) {
    return num_threads == 1 ? total : total / (kPartsPerThread * num_threads);
  }

  int64_t num_tiles(int64_t i) const { return spans_[i].end_tile - spans_[i].first_tile; }
  int64_t num_shared(int64_t i) const { return ends_[i] - spans_[i].first_tile; }
  bool shares(int64_t i) const { return num_shared(i) > 0 && kLeastShared * num_shared(i) >= num_tiles(i); }

  // Makes an item of span `first` and of those after it that share tiles, of a cost up to `largest`; returns the first
  // span that is not in it.
  int64_t add_item(int64_t first, int64_t largest, int64_t head_dim) {
    int64_t end = first + 1, num_rows = spans_[first].num_rows, all = cost(num_tiles(first), num_rows);
    for (; end < num_spans_ && shares(end); ++end) {
      const int64_t more = spans_[end].num_rows;
      all += cost(num_tiles(end) - num_shared(end), more);
      all += cost(num_shared(end), num_rows + more) - cost(num_shared(end), num_rows);
      num_rows += more;
      if (num_rows > kRowsPerItem || all > largest) break;
    }
    // Where there is no room for more, those that have least in common are parted.
    if (end < num_spans_ && end > first + 1 && shares(end))
      for (int64_t i = end - 1; i > first; --i)
        if (ends_[i] < ends_[end]) end = i;
    Item& item = items_[num_items_++];
    item = Item{};
    item.spans = spans_ + first;
    item.num_spans = end - first;
    item.legs = legs_ + num_legs_;
    for (int64_t i = first; i < end; ++i) {
      spans_[i].first_row = item.num_rows;
      item.num_rows += spans_[i].num_rows;
    }
    add_legs(item, first, end, spans_[first].first_tile, head_dim);
    return end;
  }

  // Adds the tiles that spans begin .. end - 1 read from `tile` on: those of all, then those that fewer have in common.
  void add_legs(Item& item, int64_t begin, int64_t end, int64_t tile, int64_t head_dim) {
    const bool alone = end == begin + 1;
    const int64_t shared = alone ? spans_[begin].end_tile : *std::min_element(ends_ + begin + 1, ends_ + end);
    if (shared > tile) add_leg(item, begin, end, tile, shared, head_dim);
    if (alone) return;
    for (int64_t i = begin + 1; i <= end; ++i) {
      if (i < end && ends_[i] > shared) continue;
      add_legs(item, begin, i, shared, head_dim);
      begin = i;
    }
  }

  void add_leg(Item& item, int64_t begin, int64_t end, int64_t first_tile, int64_t end_tile, int64_t head_dim) {
    const Span& span = spans_[begin];
    Leg& leg = legs_[num_legs_++];
    ++item.num_legs;
    leg = Leg{span.sequence, span.first_row, 0, 0, span.seen, first_tile, end_tile - first_tile, item.num_steps,
              item.num_partial_floats};
    for (int64_t i = begin; i < end; ++i) {
      leg.num_rows += spans_[i].num_rows;
      leg.seen.begin = std::min(leg.seen.begin, spans_[i].seen.begin);
      leg.seen.end = std::min(std::max(leg.seen.end, spans_[i].seen.end), end_tile * kTile);
    }
    const int64_t num_visits = (leg.num_rows + kMaxRows - 1) / kMaxRows;
    leg.rows_at_once = (leg.num_rows + num_visits - 1) / num_visits;
    item.num_steps += leg.num_tiles;
    item.num_partial_floats += leg.num_tiles * partial_floats(leg.num_rows, head_dim);
  }

  static int64_t cost(const Item& item) {
    int64_t sum = 0;
    for (int64_t i = 0; i < item.num_legs; ++i) sum += cost(item.legs[i].num_tiles, item.legs[i].num_rows);
    return sum;
  }

  // Cuts an item that takes longer than `largest`, and numbers its tasks.
  void split(Item& item, int64_t largest) {
    item.steps_per_part = std::max<int64_t>(item.num_steps, 1);
    if (item.num_steps > 2 && cost(item) > largest)
      item.steps_per_part = std::min(item.num_steps, std::max<int64_t>(2, largest * item.num_steps / (2 * cost(item))));
    item.num_parts = std::max<int64_t>(1, (item.num_steps + item.steps_per_part - 1) / item.steps_per_part);
    item.first_task = num_tasks_;
    item.first_join = num_joins_;
    item.first_partial = num_partial_floats_;
    num_tasks_ += num_kv_heads_ * item.num_parts;
    if (item.num_parts == 1) return;
    num_joins_ += num_kv_heads_;
    num_partial_floats_ += num_kv_heads_ * item.num_partial_floats;
  }

  Span* spans_;
  Item* items_;
  Leg* legs_;
  int64_t* ends_;  // of the tiles that a span shares with the span before it
  int64_t num_spans_ = 0;
  int64_t num_items_ = 0;
  int64_t num_legs_ = 0;
  int64_t num_kv_heads_;
  int64_t num_tasks_ = 0;
  int64_t num_joins_ = 0;
  int64_t num_partial_floats_ = 0;
};

}  // namespace octavo
