// lora_shrink, lora_expand and both at once: low-rank products of rows that are grouped by adapter, tile by tile.
//
// Each sum is made in an order of its own: over the inputs, lane by lane, and over the ranks one after the other. How many
// rows a tile has, which of them and which ranks are computed together, and how threads share the work changes nothing but
// how often a number is read.

#include "ops.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int kRows = 4;                   // that are computed together
constexpr int kRanks = W == 16 ? 4 : 2;    // of a shrink, likewise; their sums or inputs stay in registers
constexpr int kVectors = W == 16 ? 4 : 2;  // of columns of an expand, likewise
constexpr int kAhead = 4;                  // ranks from one that is read to one whose memory is asked for
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMostTileRows = 128;
constexpr int64_t kTasksOfThread = 4;
constexpr int64_t kColumnsOfUnit = 256;    // of an expand that threads share by columns: a multiple
constexpr int64_t kTilesOfThread = 4;      // from so many on each thread takes whole ones

template <Dtype dtype>
constexpr int64_t bytes_of = dtype == Dtype::kF32 ? 4 : 2;

template <Dtype dtype>
OCTAVO_INLINE vf load(const void* matrix, int64_t at) {
  if constexpr (dtype == Dtype::kF32) return vload(static_cast<const float*>(matrix) + at);
  if constexpr (dtype == Dtype::kBF16) return vload_bf16(static_cast<const uint16_t*>(matrix) + at);
  if constexpr (dtype == Dtype::kF16) return vload_f16(static_cast<const uint16_t*>(matrix) + at);
}

// The first `size` numbers from `at`, and zeros in the other lanes.
template <Dtype dtype>
OCTAVO_INLINE vf load_some(const void* matrix, int64_t at, int64_t size) {
  alignas(64) char some[W * 4] = {};
  std::memcpy(some, static_cast<const char*>(matrix) + at * bytes_of<dtype>, size * bytes_of<dtype>);
  return load<dtype>(some, 0);
}

// The address of a matrix's number, for asking for its memory; it need not be of the matrix.
template <Dtype dtype>
OCTAVO_INLINE uintptr_t address(const void* matrix, int64_t at) {
  return reinterpret_cast<uintptr_t>(matrix) + static_cast<uintptr_t>(at * bytes_of<dtype>);
}

OCTAVO_INLINE void prefetch(uintptr_t at) { __builtin_prefetch(reinterpret_cast<const void*>(at)); }

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles that have a group; they come first.
int64_t num_used(const LoraArgs& args) {
  int64_t used = 0;
  while (used < args.num_tiles && args.groups[used] >= 0) ++used;
  return used;
}

// A tile's adapter and the rows that exist.
struct Tile {
  int64_t index = -1, adapter = -1, size = 0;
  int64_t rows[kMostTileRows];

  void become(const LoraArgs& args, int64_t tile, int64_t num_rows) {
    if (tile == index) return;
    index = tile;
    adapter = args.groups[tile];
    size = 0;
    const int32_t* entries = args.rows + tile * args.tile_rows;
    for (int64_t i = 0; i < args.tile_rows; ++i)
      if (entries[i] < num_rows) rows[size++] = entries[i];
  }
};

template <int number>
struct Count {
  static constexpr int value = number;
};

// Calls use(Count, first) for rows that are computed together, from the first of them on.
template <class Use>
OCTAVO_INLINE void for_rows(int64_t size, Use&& use) {
  int64_t i = 0;
  for (; i + kRows <= size; i += kRows) use(Count<kRows>(), i);
  if (i + 2 <= size) use(Count<2>(), i), i += 2;
  if (i < size) use(Count<1>(), i);
}

// ---- shrink ---------------------------------------------------------------------------------------------------------

// Dot products of some rows with `ranks` neighbouring rows of a, over the inputs from `first` to `end`: those of row i go
// to out[i].
template <Dtype dtype, int count, int ranks>
void dots(const LoraArgs& args, const void* a, const int64_t* rows, int64_t a_row, int64_t first, int64_t end,
          float* const* out) {
  const float* x[count];
  vf sums[ranks][count];
  for (int i = 0; i < count; ++i) x[i] = args.x + rows[i] * args.x_stride;
#pragma GCC unroll 4
  for (int r = 0; r < ranks; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) sums[r][i] = vzero();
  int64_t k = first;
  for (; k + W <= end; k += W) {
    vf inputs[count];
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) inputs[i] = vload(x[i] + k);
#pragma GCC unroll 4
    for (int r = 0; r < ranks; ++r) {
      const vf weights = load<dtype>(a, a_row + r * args.in_features + k);
      prefetch(address<dtype>(a, a_row + (r + kAhead) * args.in_features + k));
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sums[r][i] = vfma(inputs[i], weights, sums[r][i]);
    }
  }
  if (k < end)
    for (int r = 0; r < ranks; ++r) {
      const vf weights = load_some<dtype>(a, a_row + r * args.in_features + k, end - k);
      for (int i = 0; i < count; ++i)
        sums[r][i] = vfma(load_some<Dtype::kF32>(x[i], k, end - k), weights, sums[r][i]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < ranks; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) out[i][r] = vsum(sums[r][i]);
}

// The same for the ranks from `first_rank` to `end_rank` of an adapter, and one span.
template <Dtype dtype, int count>
void shrink(const LoraArgs& args, const LoraPart& part, int64_t adapter, const int64_t* rows, int64_t first_rank,
            int64_t end_rank, int64_t span, float* const* out) {
  const int64_t first = span * args.span_inputs, end = min(first + args.span_inputs, args.in_features);
  float* at[count];
  for (int64_t r = first_rank; r < end_rank;) {
    const int64_t a_row = (adapter * args.max_rank + r) * args.in_features;
    for (int i = 0; i < count; ++i) at[i] = out[i] + r;
    if (r + kRanks <= end_rank) {
      dots<dtype, count, kRanks>(args, part.a, rows, a_row, first, end, at);
      r += kRanks;
    } else {
      dots<dtype, count, 1>(args, part.a, rows, a_row, first, end, at);
      ++r;
    }
  }
}

// A unit of work is some ranks of one part by one span, for one tile. Units are in the order in which a lies.
struct ShrinkUnits {
  const LoraArgs& args;
  int64_t num_rows;
  int64_t rank_blocks = ceil_div(args.max_rank, kRanks);
  int64_t units_of_part = rank_blocks * args.num_spans;  // for a tile
  int64_t units_of_tile = units_of_part * args.num_parts;

  template <Dtype dtype>
  void run(int64_t unit, int64_t num_tiles, Tile& tile) const {
    const int64_t index = unit / (units_of_part * num_tiles), span = unit % args.num_spans;
    const LoraPart& part = args.parts[index];
    tile.become(args, unit / units_of_part % num_tiles, num_rows);
    const int64_t first_rank = unit / args.num_spans % rank_blocks * kRanks;
    const int64_t end_rank = min(first_rank + kRanks, part.ranks[tile.adapter]);
    float* sums = args.shrunk + index * args.shrunk_part_stride + span * args.shrunk_span_stride;
    for_rows(tile.size, [&](auto count, int64_t i) {
      float* out[count.value];
      for (int j = 0; j < count.value; ++j) out[j] = sums + tile.rows[i + j] * args.max_rank;
      shrink<dtype, count.value>(args, part, tile.adapter, tile.rows + i, first_rank, end_rank, span, out);
    });
  }
};

// ---- expand ---------------------------------------------------------------------------------------------------------

// Adds scale times the products of some rows' ranks with columns of b to rows of out, and multiplies these by the factors
// if there are any: `vectors` times W columns, or the first `size` of W.
template <Dtype dtype, int count, int vectors, bool is_whole>
OCTAVO_INLINE void add_columns(const LoraPart& part, const float* shrunk, int64_t max_rank, int64_t adapter,
                               int64_t b_row, int64_t column, int64_t size, float* const* out) {
  vf sums[count][vectors];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[i][v] = vzero();
  const int64_t rank = part.ranks[adapter];
  int64_t at = b_row + column;
  for (int64_t r = 0; r < rank; ++r, at += part.num_columns) {
    vf weights[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      weights[v] = is_whole ? load<dtype>(part.b, at + v * W) : load_some<dtype>(part.b, at, size);
    if constexpr (is_whole && vectors == kVectors) {
      for (int64_t i = 0; i < vectors * W * bytes_of<dtype>; i += kLineBytes)
        prefetch(address<dtype>(part.b, at + 2 * vectors * W) + i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const vf input = vset(shrunk[i * max_rank + r]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[i][v] = vfma(input, weights[v], sums[i][v]);
    }
  }
  const float* factors = part.factors == nullptr ? nullptr : part.factors + adapter * part.num_columns + column;
  const vf scale = vset(part.scales[adapter]);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    float* row = out[i] + column;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      if constexpr (is_whole) {
        const vf sum = vfma(scale, sums[i][v], vload(row + v * W));
        vstore(row + v * W, factors == nullptr ? sum : vmul(sum, vload(factors + v * W)));
      } else {
        float some[W];
        vf sum = vfma(scale, sums[i][v], load_some<Dtype::kF32>(row, 0, size));
        if (factors != nullptr) sum = vmul(sum, load_some<Dtype::kF32>(factors, 0, size));
        vstore(some, sum);
        std::memcpy(row, some, size * sizeof(float));
      }
    }
  }
}

// The same for the columns from `first` to `end` of a part. shrunk: [count, max_rank]; out: rows of the part's columns.
template <Dtype dtype, int count>
void expand(const LoraArgs& args, const LoraPart& part, int64_t adapter, const float* shrunk, int64_t first,
            int64_t end, float* const* out) {
  const int64_t b_row = adapter * args.max_rank * part.num_columns;
  int64_t c = first;
  for (; c + kVectors * W <= end; c += kVectors * W)
    add_columns<dtype, count, kVectors, true>(part, shrunk, args.max_rank, adapter, b_row, c, 0, out);
  for (; c + W <= end; c += W)
    add_columns<dtype, count, 1, true>(part, shrunk, args.max_rank, adapter, b_row, c, 0, out);
  if (c < end) add_columns<dtype, count, 1, false>(part, shrunk, args.max_rank, adapter, b_row, c, end - c, out);
}

// Adds up the spans of some ranks of a row.
void add_spans(const LoraArgs& args, const float* spans, int64_t span_stride, int64_t rank, float* shrunk) {
  for (int64_t r = 0; r < rank; ++r) {
    float sum = 0.0f;
    for (int64_t span = 0; span < args.num_spans; ++span) sum += spans[span * span_stride + r];
    shrunk[r] = sum;
  }
}

// Finds where some rows of a part's columns lie in out.
template <int count>
OCTAVO_INLINE void find_rows(const LoraArgs& args, const LoraPart& part, const int64_t* rows, float** out) {
  for (int i = 0; i < count; ++i) out[i] = args.out + rows[i] * args.out_stride + part.first_column;
}

// A unit of work is some columns of one part, for one tile.
struct ExpandUnits {
  const LoraArgs& args;
  int64_t num_rows;
  int64_t unit_columns;
  float* shrunk;  // the thread's own: [tile_rows, max_rank]
  int64_t units_of_tile = count_units();
  int64_t added_tile = -1, added_part = -1;  // whose spans lie in `shrunk`

  int64_t count_units() const {
    int64_t units = 0;
    for (int64_t i = 0; i < args.num_parts; ++i) units += ceil_div(args.parts[i].num_columns, unit_columns);
    return units;
  }

  template <Dtype dtype>
  void run(int64_t unit, int64_t num_tiles, Tile& tile) {
    int64_t index = 0, blocks = ceil_div(args.parts[0].num_columns, unit_columns);
    while (unit >= blocks * num_tiles) {
      unit -= blocks * num_tiles;
      blocks = ceil_div(args.parts[++index].num_columns, unit_columns);
    }
    const LoraPart& part = args.parts[index];
    tile.become(args, unit / blocks, num_rows);
    const int64_t rank = part.ranks[tile.adapter], column = unit % blocks * unit_columns;
    if (rank == 0) return;
    if (tile.index != added_tile || index != added_part) {
      const float* spans = args.shrunk + index * args.shrunk_part_stride;
      for (int64_t i = 0; i < tile.size; ++i)
        add_spans(args, spans + tile.rows[i] * args.max_rank, args.shrunk_span_stride, rank, shrunk + i * args.max_rank);
      added_tile = tile.index;
      added_part = index;
    }
    for_rows(tile.size, [&](auto count, int64_t i) {
      float* out[count.value];
      find_rows<count.value>(args, part, tile.rows + i, out);
      expand<dtype, count.value>(args, part, tile.adapter, shrunk + i * args.max_rank, column,
                                 min(column + unit_columns, part.num_columns), out);
    });
  }
};

// ---- both -----------------------------------------------------------------------------------------------------------

// A unit of work is both products of one part, for one tile.
struct TileUnits {
  const LoraArgs& args;
  int64_t num_rows;
  float* spans;   // the thread's own: [kRows, num_spans, max_rank]
  float* shrunk;  // the thread's own: [kRows, max_rank]
  int64_t units_of_tile = args.num_parts;

  template <Dtype dtype>
  void run(int64_t unit, int64_t, Tile& tile) {
    const LoraPart& part = args.parts[unit % args.num_parts];
    tile.become(args, unit / args.num_parts, num_rows);
    const int64_t adapter = tile.adapter, rank = part.ranks[adapter];
    if (rank == 0) return;
    for_rows(tile.size, [&](auto count, int64_t i) {
      float* out[count.value];
      for (int64_t span = 0; span < args.num_spans; ++span) {
        for (int j = 0; j < count.value; ++j) out[j] = spans + (j * args.num_spans + span) * args.max_rank;
        shrink<dtype, count.value>(args, part, adapter, tile.rows + i, 0, rank, span, out);
      }
      for (int j = 0; j < count.value; ++j)
        add_spans(args, spans + j * args.num_spans * args.max_rank, args.max_rank, rank, shrunk + j * args.max_rank);
      find_rows<count.value>(args, part, tile.rows + i, out);
      expand<dtype, count.value>(args, part, adapter, shrunk, 0, part.num_columns, out);
    });
  }
};

// The number of tasks must not depend on what a step writes, for a thread that comes late reads another step's. So each task
// takes an equal share of the units of the tiles that are used, neighbours in memory.
template <class Units>
int64_t num_tasks_of(const LoraArgs& args, const Units& units, const Team& team) {
  return min(args.num_tiles * units.units_of_tile, kTasksOfThread * team.num_threads());
}

template <Dtype dtype, class Units>
void run_share_in(const Units& units, int64_t num_tiles, int64_t task, int64_t num_tasks) {
  const int64_t num_units = num_tiles * units.units_of_tile;
  Units own = units;
  Tile tile;
  for (int64_t unit = task * num_units / num_tasks; unit < (task + 1) * num_units / num_tasks; ++unit)
    own.template run<dtype>(unit, num_tiles, tile);
}

template <class Units>
void run_share(int64_t dtype, const Units& units, int64_t num_tiles, int64_t task, int64_t num_tasks) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kBF16:
      return run_share_in<Dtype::kBF16>(units, num_tiles, task, num_tasks);
    case Dtype::kF16:
      return run_share_in<Dtype::kF16>(units, num_tiles, task, num_tasks);
    default:
      return run_share_in<Dtype::kF32>(units, num_tiles, task, num_tasks);
  }
}

ExpandUnits expand_units(const LoraArgs& args, int64_t num_rows, int num_threads, float* shrunk) {
  int64_t columns = 0;
  for (int64_t i = 0; i < args.num_parts; ++i) columns += args.parts[i].num_columns;
  return {args, num_rows, ceil_div(columns, kColumnsOfUnit * num_threads) * kColumnsOfUnit, shrunk};
}

}  // namespace

void lora_shrink(const LoraArgs& args, int64_t num_rows, Team& team) {
  const ShrinkUnits units{args, num_rows};
  const int64_t num_tasks = num_tasks_of(args, units, team);
  team.parallel_for(num_tasks,
                    [&](int64_t task) { run_share(args.a_dtype, units, num_used(args), task, num_tasks); });
}

void lora_expand(const LoraArgs& args, int64_t num_rows, Team& team) {
  auto* shrunk = static_cast<float*>(team.scratch(args.tile_rows * args.max_rank * sizeof(float)));
  const ExpandUnits units = expand_units(args, num_rows, team.num_threads(), shrunk);
  const int64_t num_tasks = num_tasks_of(args, units, team);
  team.parallel_for(num_tasks,
                    [&](int64_t task) { run_share(args.b_dtype, units, num_used(args), task, num_tasks); });
}

// Where there are many tiles, a thread makes both products of those that it takes, and the second loop has nothing to do.
void lora_linear(const LoraArgs& args, int64_t num_rows, Team& team) {
  const int64_t num_spans_of_rows = kRows * args.num_spans, num_shrunk = args.tile_rows * args.max_rank;
  auto* shrunk =
      static_cast<float*>(team.scratch((num_shrunk + num_spans_of_rows * args.max_rank) * sizeof(float)));
  const TileUnits whole{args, num_rows, shrunk + num_shrunk, shrunk};
  const ShrinkUnits first{args, num_rows};
  const ExpandUnits second = expand_units(args, num_rows, team.num_threads(), shrunk);
  const bool may_be_whole = args.a_dtype == args.b_dtype;
  const int64_t least_whole = kTilesOfThread * team.num_threads();
  const auto are_whole = [&](int64_t num_tiles) { return may_be_whole && num_tiles >= least_whole; };
  const int64_t num_first = num_tasks_of(args, first, team), num_second = num_tasks_of(args, second, team);
  team.parallel_for(num_first, [&](int64_t task) {
    const int64_t num_tiles = num_used(args);
    if (are_whole(num_tiles)) return run_share(args.a_dtype, whole, num_tiles, task, num_first);
    run_share(args.a_dtype, first, num_tiles, task, num_first);
  });
  team.parallel_for(num_second, [&](int64_t task) {
    const int64_t num_tiles = num_used(args);
    if (!are_whole(num_tiles)) run_share(args.b_dtype, second, num_tiles, task, num_second);
  });
}

}  // namespace octavo
