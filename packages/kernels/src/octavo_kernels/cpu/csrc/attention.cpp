// paged_attention: each task walks some tiles of the cache of a sequence, or of some with blocks in common, for one KV
// head and all query heads of its group.
//
// A row (one query head of one token) is reduced tile by tile in the order of absolute positions, and inside a tile in a
// fixed order. So its bits depend on its own query and on the keys and values that it sees, and on nothing else: not on
// chunks of prompts, other rows, splits, or threads. Where few tasks would have to serve many threads, the tiles of a
// sequence are dealt out; each leaves its result in memory, and they are joined in the same order by the same arithmetic.

#include <algorithm>
#include <new>

#include "attention_plan.h"
#include "attention_softmax.h"
#include "attention_tile.h"
#include "ops.h"

namespace octavo {
namespace {

struct Row {
  const float* q;
  int64_t token, head;
  int64_t position;
  Positions seen;
  float slope;
  Softmax softmax;

  // The positions of a tile that this row sees, from the tile's first on.
  int begin_in(int64_t tile) const { return static_cast<int>(std::max<int64_t>(seen.begin - tile * kTile, 0)); }
  int end_in(int64_t tile) const {
    return static_cast<int>(std::max<int64_t>(std::min<int64_t>(seen.end - tile * kTile, kTile), 0));
  }
};

// What a task leaves of its tiles when another one joins them.
struct Partial {
  float* maximum;  // [rows]
  float* sum;
  float* value;  // [rows, head_dim]
};

size_t rounded(size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

// A thread's memory: the plan, and what one task needs.
class Memory {
 public:
  Memory(Team& team, const PagedAttentionArgs& a, int64_t max_spans) {
    const int64_t max_rows = std::max<int64_t>(kRowsPerItem, a.num_heads / a.num_kv_heads);
    const size_t sizes[4] = {rounded(AttentionPlan::num_bytes(max_spans)), rounded(max_rows * sizeof(Row)),
                             std::max(kTile * a.head_dim, int64_t{kFewRows} * kMaxSpread) * sizeof(float),
                             rounded(max_rows * a.head_dim * sizeof(float))};
    plan = static_cast<char*>(team.scratch(sizes[0] + sizes[1] + sizes[2] + sizes[3]));
    rows = reinterpret_cast<Row*>(plan + sizes[0]);
    keys = queries = reinterpret_cast<float*>(plan + sizes[0] + sizes[1]);
    values = reinterpret_cast<float*>(plan + sizes[0] + sizes[1] + sizes[2]);
  }

  char* plan;
  Row* rows;
  float* keys;     // [head_dim][kTile], the transposed keys of a tile; or
  float* queries;  // [kFewRows][kMaxSpread], those of a leg, spread
  float* values;   // [rows][head_dim]
};

// How far from each other the vectors of a block are.
struct Steps {
  int64_t bytes[kAddressesAtOnce];

  Steps(int64_t stride, size_t element) {
    for (int i = 0; i < kAddressesAtOnce; ++i) bytes[i] = i * stride * static_cast<int64_t>(element);
  }
  int64_t of_all() const { return kAddressesAtOnce * bytes[1]; }
};

// Fills pointers first .. end - 1, and up to kAddressesAtOnce - 1 more, with addresses in steps. Asks for the first of them,
// long before others are asked for: each block is in another page, and all that is asked for in a page waits until its
// address is looked up.
template <class T>
OCTAVO_INLINE void line_up(const T* start, const Steps& steps, int first, int end, const T** to) {
  __builtin_prefetch(start, 0, 2);
  const char* at = reinterpret_cast<const char*>(start);
  for (int j = first; j < end; j += kAddressesAtOnce, at += steps.of_all())
#pragma GCC unroll 8
    for (int i = 0; i < kAddressesAtOnce; ++i) to[j + i] = reinterpret_cast<const T*>(at + steps.bytes[i]);
}

// Looks up where the keys and values of a tile are.
template <class T>
void find(const PagedAttentionArgs& a, const Place& place, int64_t kv_head, KvTile<T>& tile) {
  const int64_t start = place.tile * kTile;
  const bool scaled = a.k_scale != nullptr;
  tile.begin = static_cast<int>(std::max(place.leg->seen.begin, start) - start);
  tile.end = static_cast<int>(std::min(place.leg->seen.end, start + kTile) - start);
  const int32_t* table = a.block_table + place.leg->sequence * a.block_table_stride;
  const Steps k_steps(a.k_slot_stride, sizeof(T)), v_steps(a.v_slot_stride, sizeof(T));
  int64_t index = (start + tile.begin) / a.block_size, offset = (start + tile.begin) % a.block_size;
  for (int j = tile.begin; j < tile.end; ++index, offset = 0) {
    const int64_t block = table[index];
    const int end = static_cast<int>(std::min<int64_t>(tile.end, j + a.block_size - offset));
    const T* k = static_cast<const T*>(a.k_cache) + block * a.k_block_stride + kv_head * a.k_head_stride;
    const T* v = static_cast<const T*>(a.v_cache) + block * a.v_block_stride + kv_head * a.v_head_stride;
    line_up(k + offset * a.k_slot_stride, k_steps, j, end, tile.k);
    line_up(v + offset * a.v_slot_stride, v_steps, j, end, tile.v);
    if (scaled) {
      const int64_t scale = (block * a.num_kv_heads + kv_head) * a.block_size + offset;
      std::copy_n(a.k_scale + scale, end - j, tile.k_scale + j);
      std::copy_n(a.v_scale + scale, end - j, tile.v_scale + j);
    }
    j = end;
  }
  const auto fill = [&](int first, int end) {
    std::fill(tile.k + first, tile.k + end, tile.k[tile.begin]);
    std::fill(tile.v + first, tile.v + end, tile.v[tile.begin]);
    if (!scaled) return;
    std::fill(tile.k_scale + first, tile.k_scale + end, 0.0f);
    std::fill(tile.v_scale + first, tile.v_scale + end, 0.0f);
  };
  if (tile.begin > 0) fill(0, tile.begin);
  if (tile.end < kTile) fill(tile.end, kTile);
}

// One task: the rows of its item, and the tiles of the cache that it walks.
template <class T>
class Walk {
 public:
  Walk(const PagedAttentionArgs& a, const Task& task, Memory& memory)
      : a_(a), task_(task), item_(*task.item), head_dim_(static_cast<int>(a.head_dim)), memory_(memory) {
    for (int64_t i = 0; i < item_.num_spans; ++i) add_rows(item_.spans[i]);
  }

  // Walks the tiles. Without `partials` they are joined to the rows, else left there. `upcoming` is the tile that this
  // thread probably needs after them, or null.
  void tiles(float* partials, const KvTile<T>* upcoming) {
    KvTile<T> buffers[2];
    Place place{};
    for (int64_t step = task_.first_step; step < task_.end_step; ++step) {
      const KvTile<T>& now = buffers[step % 2];
      if (step == task_.first_step) {
        place = item_.place(step);
        find(a_, place, task_.kv_head, buffers[step % 2]);
      }
      const bool last = step + 1 == task_.end_step;
      const Place following = last ? place : place.next();
      if (!last) find(a_, following, task_.kv_head, buffers[(step + 1) % 2]);
      const KvTile<T>* next = last ? upcoming : &buffers[(step + 1) % 2];
      attend_tile(place, now, next, partials == nullptr ? Partial{} : partial_of(place, partials));
      place = following;
    }
  }

  // Joins what the tasks of this item and KV head left.
  void join_partials(float* partials) {
    Place place{item_.legs, item_.legs->first_tile};
    for (int64_t step = 0; step < item_.num_steps; ++step) {
      if (step > 0) place = place.next();
      const Partial partial = partial_of(place, partials);
      for (int64_t i = 0; i < place.leg->num_rows; ++i) {
        Row& row = memory_.rows[place.leg->first_row + i];
        if (row.begin_in(place.tile) >= row.end_in(place.tile)) continue;
        Softmax* softmax = &row.softmax;
        join(&softmax, 1, partial.maximum + i, partial.sum + i, partial.value + i * head_dim_, head_dim_, head_dim_);
      }
    }
  }

  void write() {
    for (int64_t i = 0; i < num_rows_; ++i) {
      Row& row = memory_.rows[i];
      const float* sink = a_.sinks == nullptr ? nullptr : a_.sinks + row.head;
      float* out = a_.out + row.token * a_.out_token_stride + row.head * a_.out_head_stride;
      float* lse = a_.lse == nullptr ? nullptr : a_.lse + row.token * a_.num_heads + row.head;
      finish(row.softmax, sink, head_dim_, out, lse);
    }
  }

 private:
  void add_rows(const Span& span) {
    const int64_t group = a_.num_heads / a_.num_kv_heads;
    const int64_t start = a_.query_start_loc[span.sequence];
    const int64_t seq_len = a_.seq_lens[span.sequence];
    const int64_t query_len = a_.query_start_loc[span.sequence + 1] - start;
    for (int64_t query = span.first_query; query < span.first_query + span.num_queries; ++query) {
      const int64_t position = seq_len - query_len + query;
      const Positions seen = visible(a_, position, seq_len);
      for (int64_t head = task_.kv_head * group; head < (task_.kv_head + 1) * group; ++head) {
        Row& row = *new (memory_.rows + num_rows_) Row{};
        row.token = start + query;
        row.head = head;
        row.q = a_.q + row.token * a_.q_token_stride + head * a_.q_head_stride;
        row.position = position;
        row.seen = seen;
        row.slope = a_.alibi_slopes == nullptr ? 0.0f : a_.alibi_slopes[head];
        row.softmax.value = memory_.values + num_rows_ * head_dim_;
        std::fill_n(row.softmax.value, head_dim_, 0.0f);
        ++num_rows_;
      }
    }
  }

  Partial partial_of(const Place& place, float* partials) const {
    const Leg& leg = *place.leg;
    float* memory = partials + task_.kv_head * item_.num_partial_floats + leg.first_partial +
                    (place.tile - leg.first_tile) * AttentionPlan::partial_floats(leg.num_rows, head_dim_);
    return Partial{memory, memory + leg.num_rows, memory + 2 * leg.num_rows};
  }

  // One tile, as some rows use it.
  struct Visit {
    const KvTile<T>& tile;
    Ahead& values;
    Ahead& following;  // keys or values of the next tile
    Place place;
    bool few;         // keys are read from the cache, not from memory_.keys
    Partial partial;  // where the rows' results go, or null
  };

  // Attends all rows of a leg, some at once. Work on the first ones asks for the keys of the next tile, work on the others
  // for its values too: they leave time for it.
  void attend_tile(const Place& place, const KvTile<T>& now, const KvTile<T>* next, const Partial& partial) {
    const int64_t num_rows = place.leg->num_rows, at_once = place.leg->rows_at_once;
    const bool few = num_rows <= kFewRows;
    Ahead values(now.v + now.begin, now.end - now.begin, head_dim_), next_keys, next_values;
    if (next != nullptr) {
      next_keys = Ahead(next->k, kTile, head_dim_);
      next_values = Ahead(next->v, kTile, head_dim_);
    }
    if (!few) {
      transpose_keys(now, head_dim_, memory_.keys, values);
    } else if (spread_ != place.leg) {  // legs are walked in turn: none comes back once another has taken the memory
      for (int64_t row = 0; row < num_rows; ++row)
        spread_query<T>(memory_.rows[place.leg->first_row + row].q, head_dim_, memory_.queries + row * kMaxSpread);
      spread_ = place.leg;
    }
    for (int64_t row = 0; row < num_rows; row += at_once) {
      Ahead& following = row == 0 ? next_keys : next_values;
      attend(Visit{now, values, following, place, few, partial}, row, std::min(at_once, num_rows - row));
    }
    next_keys.fetch_all();
  }

  // Attends `count` rows from `row` on, among those of the leg.
  void attend(const Visit& visit, int64_t row, int64_t count) {
    switch (count) {
      case 1:
        return attend_rows<1>(visit, row);
      case 2:
        return attend_rows<2>(visit, row);
      case 3:
        return attend_rows<3>(visit, row);
      case 4:
        return attend_rows<4>(visit, row);
      case 5:
        return attend_rows<5>(visit, row);
      default:
        return attend_rows<kMaxRows>(visit, row);
    }
  }

  template <int R>
  void attend_rows(const Visit& visit, int64_t first_row) {
    Row* rows = memory_.rows + visit.place.leg->first_row + first_row;
    const int64_t tile = visit.place.tile;
    const float* q[R];
    int begin[R], end[R];
    int first = kTile, last = 0;  // what any row sees
    for (int r = 0; r < R; ++r) {
      q[r] = rows[r].q;
      begin[r] = rows[r].begin_in(tile);
      end[r] = rows[r].end_in(tile);
      first = std::min(first, begin[r]);
      last = std::max(last, end[r]);
    }
    if (first >= last) return;
    alignas(64) float weights[R * kTile];
    alignas(64) float sums[R * kMaxHeadDim];
    float maximum[R] = {}, sum[R] = {};
    if (visit.few) {
      scores_of_few<T, R>(memory_.queries + first_row * kMaxSpread, visit.tile, head_dim_, weights, visit.values);
    } else {
      scores<R>(q, memory_.keys, head_dim_, kRun<T>, weights);
    }
    const bool scaled = a_.k_scale != nullptr;
    bool plain = true;
    Scoring scoring[R];
    for (int r = 0; r < R; ++r) {
      scoring[r] = Scoring{&a_,
                           scaled ? visit.tile.k_scale : nullptr,
                           scaled ? visit.tile.v_scale : nullptr,
                           rows[r].slope,
                           static_cast<float>(rows[r].position - tile * kTile),
                           begin[r],
                           end[r]};
      plain &= is_plain(scoring[r]);
      std::fill_n(sums + r * kMaxHeadDim, head_dim_, 0.0f);
    }
    if (plain) {
      soften_plain<R>(a_.scale, weights, maximum, sum, visit.following);
    } else {
      for (int r = 0; r < R; ++r) {
        visit.following.fetch(kLinesOfSoftmax / R);
        maximum[r] = score_all(scoring[r], weights + r * kTile);
        sum[r] = soften(scoring[r], weights + r * kTile, maximum[r]);
      }
    }
    weigh_rows<R>(visit, weights, begin, end, sums);
    const Partial& partial = visit.partial;
    if (partial.maximum == nullptr) return join_rows<R>(rows, begin, end, maximum, sum, sums);
    for (int r = 0; r < R; ++r) {
      if (begin[r] >= end[r]) continue;
      partial.maximum[first_row + r] = maximum[r];
      partial.sum[first_row + r] = sum[r];
      std::copy_n(sums + r * kMaxHeadDim, head_dim_, partial.value + (first_row + r) * head_dim_);
    }
  }

  // Values are multiplied for the rows that see them alone: 0 * NaN would not be 0. Positions that all rows see are
  // taken together, those before and behind row by row.
  template <int R>
  void weigh_rows(const Visit& visit, const float* weights, const int* begin, const int* end, float* sums) {
    Ahead none;
    const T* const* v = visit.tile.v;
    const int all_begin = *std::max_element(begin, begin + R);
    const int all_end = std::max(all_begin, *std::min_element(end, end + R));
    for (int r = 0; r < R; ++r)
      weigh<T, 1>(v, weights + r * kTile, begin[r], std::min(all_begin, end[r]), head_dim_, sums + r * kMaxHeadDim,
                  none);
    weigh<T, R>(v, weights, all_begin, all_end, head_dim_, sums, visit.following);
    for (int r = 0; r < R; ++r)
      weigh<T, 1>(v, weights + r * kTile, std::max(all_end, begin[r]), end[r], head_dim_, sums + r * kMaxHeadDim,
                  none);
  }

  // Rows that see nothing of the tile are left as they are.
  template <int R>
  void join_rows(Row* rows, const int* begin, const int* end, const float* maximum, const float* sum,
                 const float* sums) {
    Softmax* all[R];
    for (int r = 0; r < R; ++r) all[r] = &rows[r].softmax;
    for (int r = 0; r < R;) {
      int count = 0;
      while (r + count < R && begin[r + count] < end[r + count]) ++count;
      if (count > 0) join(all + r, count, maximum + r, sum + r, sums + r * kMaxHeadDim, kMaxHeadDim, head_dim_);
      r += count + 1;
    }
  }

  const PagedAttentionArgs& a_;
  const Task& task_;
  const Item& item_;
  int head_dim_;
  Memory& memory_;
  int64_t num_rows_ = 0;
  const Leg* spread_ = nullptr;  // whose queries memory_.queries holds
};

// Looks up the first tile of a task, if there are such a task and a tile.
template <class T>
bool find_first_tile(const PagedAttentionArgs& a, const AttentionPlan& plan, int64_t number, KvTile<T>& tile) {
  if (number < 0 || number >= plan.num_tasks()) return false;
  const Task task = plan.task(number);
  if (task.first_step >= task.end_step) return false;
  find(a, task.item->place(task.first_step), task.kv_head, tile);
  return true;
}

template <class T>
void attend_all(const PagedAttentionArgs& a, int64_t num_seqs, Team& team) {
  Memory memory(team, a, AttentionPlan::max_spans(a, num_seqs));
  const AttentionPlan plan(a, num_seqs, team.num_threads(), memory.plan);
  float* partials = nullptr;
  if (plan.num_joins() > 0) {
    partials = static_cast<float*>(team.shared(plan.num_partial_floats() * sizeof(float)));
  }
  team.parallel_for(plan.num_tasks(), [&](int64_t number) {
    const Task task = plan.task(number);
    KvTile<T> upcoming;
    const bool more = find_first_tile(a, plan, team.task_after(number), upcoming);
    Walk<T> walk(a, task, memory);
    const bool whole = task.item->num_parts == 1;
    walk.tiles(whole ? nullptr : partials + task.item->first_partial, more ? &upcoming : nullptr);
    if (whole) walk.write();
  });
  if (plan.num_joins() == 0) return;
  team.parallel_for(plan.num_joins(), [&](int64_t number) {
    const Task task = plan.join(number);
    Walk<T> walk(a, task, memory);
    walk.join_partials(partials + task.item->first_partial);
    walk.write();
  });
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, int64_t, int64_t num_seqs, Team& team) {
  switch (static_cast<Dtype>(args.cache_dtype)) {
    case Dtype::kF32:
      return attend_all<float>(args, num_seqs, team);
    case Dtype::kBF16:
      return attend_all<BF16>(args, num_seqs, team);
    case Dtype::kF16:
      return attend_all<F16>(args, num_seqs, team);
    case Dtype::kI8:
      return attend_all<int8_t>(args, num_seqs, team);
  }
}

}  // namespace octavo
