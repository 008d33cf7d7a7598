// lora_shrink, lora_expand and both at once: low-rank products of rows that are grouped by adapter, tile by tile.
//
// Each sum is made in an order of its own: over the inputs, lane by lane, and over the ranks one after the other. How many
// rows a tile has, and which of them and which ranks are computed together, changes nothing but how often a number is read.

#include "ops.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int kRows = 4;                         // that are computed together
constexpr int kRanks = W == 16 ? 4 : 2;          // likewise; their sums or inputs stay in registers
constexpr int64_t kColumnsOfUnit = 1024;         // at most: the sums of kRows rows stay in L1
constexpr int64_t kLeastColumnsOfUnit = 256;
constexpr int kAhead = 4;               // ranks from one that is read to one whose memory is asked for
constexpr int64_t kMostTileRows = 128;
constexpr int64_t kTasksOfThread = 4;

template <Dtype dtype>
constexpr int64_t bytes_of = dtype == Dtype::kF32 ? 4 : 2;

template <Dtype dtype>
OCTAVO_INLINE vf load(const void* matrix, int64_t at) {
  if constexpr (dtype == Dtype::kF32) return vload(static_cast<const float*>(matrix) + at);
  if constexpr (dtype == Dtype::kBF16) return vload_bf16(static_cast<const uint16_t*>(matrix) + at);
  if constexpr (dtype == Dtype::kF16) return vload_f16(static_cast<const uint16_t*>(matrix) + at);
}

// Asks for the numbers around `at`, which need not be of the matrix.
template <Dtype dtype>
OCTAVO_INLINE void prefetch(const void* matrix, int64_t at) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(matrix) +
                                                   static_cast<uintptr_t>(at * bytes_of<dtype>)));
}

// The first `size` numbers from `at`, and zeros in the other lanes.
template <Dtype dtype>
OCTAVO_INLINE vf load_some(const void* matrix, int64_t at, int64_t size) {
  alignas(64) char some[W * 4] = {};
  std::memcpy(some, static_cast<const char*>(matrix) + at * bytes_of<dtype>, size * bytes_of<dtype>);
  return load<dtype>(some, 0);
}

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

// Dot products of some rows with `ranks` neighbouring rows of a, over the inputs from `first` to `end`.
template <Dtype dtype, int count, int ranks>
void dots(const LoraArgs& args, const void* a, const int64_t* rows, int64_t a_row, int64_t first, int64_t end,
          float* out) {
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
      prefetch<dtype>(a, a_row + (r + kAhead) * args.in_features + k);
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
    for (int i = 0; i < count; ++i) out[rows[i] * args.max_rank + r] = vsum(sums[r][i]);
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
    const int64_t first_rank = unit / args.num_spans % rank_blocks * kRanks, rank = part.ranks[tile.adapter];
    if (first_rank >= rank) return;
    const int64_t first = span * args.span_inputs, end = min(first + args.span_inputs, args.in_features);
    const int64_t num_ranks = min(kRanks, rank - first_rank);
    const int64_t a_row = (tile.adapter * args.max_rank + first_rank) * args.in_features;
    float* out = args.shrunk + index * args.shrunk_part_stride + span * args.shrunk_span_stride + first_rank;
    for_rows(tile.size, [&](auto count, int64_t i) {
      const int64_t* rows = tile.rows + i;
      if (num_ranks == kRanks) return dots<dtype, count.value, kRanks>(args, part.a, rows, a_row, first, end, out);
      for (int64_t r = 0; r < num_ranks; ++r)
        dots<dtype, count.value, 1>(args, part.a, rows, a_row + r * args.in_features, first, end, out + r);
    });
  }
};

// ---- expand ---------------------------------------------------------------------------------------------------------

// Adds the products of some rows' neighbouring ranks, at a distance of max_rank, to their sums: `size` columns from b_row on.
template <Dtype dtype, int count, int ranks>
void add_ranks(const LoraArgs& args, const LoraPart& part, const float* shrunk, int64_t b_row, int64_t size,
               float* sums) {
  vf inputs[ranks][count];
#pragma GCC unroll 4
  for (int r = 0; r < ranks; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) inputs[r][i] = vset(shrunk[i * args.max_rank + r]);
  const auto add = [&](int64_t c, const vf* weights) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      float* at = sums + i * kColumnsOfUnit + c;
      vf sum = vload(at);
#pragma GCC unroll 4
      for (int r = 0; r < ranks; ++r) sum = vfma(inputs[r][i], weights[r], sum);
      vstore(at, sum);
    }
  };
  vf weights[ranks];
  int64_t c = 0;
  for (; c + W <= size; c += W) {
#pragma GCC unroll 4
    for (int r = 0; r < ranks; ++r) {
      weights[r] = load<dtype>(part.b, b_row + r * part.num_columns + c);
      prefetch<dtype>(part.b, b_row + (r + kAhead) * part.num_columns + c);
    }
    add(c, weights);
  }
  if (c == size) return;
  for (int r = 0; r < ranks; ++r) weights[r] = load_some<dtype>(part.b, b_row + r * part.num_columns + c, size - c);
  add(c, weights);
}

// Adds scale times the sums to a row of out, and multiplies it by the factors if there are any.
void add_scaled(float scale, const float* sums, const float* factors, int64_t size, float* out) {
  int64_t c = 0;
  for (; c + W <= size; c += W) {
    const vf sum = vfma(vset(scale), vload(sums + c), vload(out + c));
    vstore(out + c, factors == nullptr ? sum : vmul(sum, vload(factors + c)));
  }
  if (c == size) return;
  float some[W];
  vf sum = vfma(vset(scale), vload(sums + c), load_some<Dtype::kF32>(out, c, size - c));
  if (factors != nullptr) sum = vmul(sum, load_some<Dtype::kF32>(factors, c, size - c));
  vstore(some, sum);
  std::memcpy(out + c, some, (size - c) * sizeof(float));
}

// A unit of work is some columns of one part, for one tile. Columns go by within some ranks, so that b is read as it lies.
struct ExpandUnits {
  const LoraArgs& args;
  int64_t num_rows;
  int64_t unit_columns;
  float* sums;    // the thread's own: [kRows, kColumnsOfUnit]
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
    if (tile.index != added_tile || index != added_part) add_spans(tile, index, rank);
    const int64_t size = min(unit_columns, part.num_columns - column);
    for_rows(tile.size, [&](auto count, int64_t i) {
      const int64_t b_row = tile.adapter * args.max_rank * part.num_columns + column;
      const float* own = shrunk + i * args.max_rank;
      std::memset(sums, 0, count.value * kColumnsOfUnit * sizeof(float));
      int64_t r = 0;
      for (; r + kRanks <= rank; r += kRanks)
        add_ranks<dtype, count.value, kRanks>(args, part, own + r, b_row + r * part.num_columns, size, sums);
      for (; r < rank; ++r)
        add_ranks<dtype, count.value, 1>(args, part, own + r, b_row + r * part.num_columns, size, sums);
      const float* factors =
          part.factors == nullptr ? nullptr : part.factors + tile.adapter * part.num_columns + column;
      for (int j = 0; j < count.value; ++j)
        add_scaled(part.scales[tile.adapter], sums + j * kColumnsOfUnit, factors, size,
                   args.out + tile.rows[i + j] * args.out_stride + part.first_column + column);
    });
  }

 private:
  void add_spans(const Tile& tile, int64_t index, int64_t rank) {
    const float* sums_of_spans = args.shrunk + index * args.shrunk_part_stride;
    for (int64_t i = 0; i < tile.size; ++i)
      for (int64_t r = 0; r < rank; ++r) {
        float sum = 0.0f;
        for (int64_t span = 0; span < args.num_spans; ++span)
          sum += sums_of_spans[span * args.shrunk_span_stride + tile.rows[i] * args.max_rank + r];
        shrunk[i * args.max_rank + r] = sum;
      }
    added_tile = tile.index;
    added_part = index;
  }
};

// Runs all units of the tiles that are used. The number of tasks must not depend on what a step writes, for a thread that
// comes late reads another step's: so each task takes an equal share of the units, neighbours in memory.
template <Dtype dtype, class Units>
void share_out(const LoraArgs& args, const Units& units, Team& team) {
  const int64_t num_tasks = min(args.num_tiles * units.units_of_tile, kTasksOfThread * team.num_threads());
  team.parallel_for(num_tasks, [&](int64_t task) {
    const int64_t num_tiles = num_used(args), num_units = num_tiles * units.units_of_tile;
    Units own = units;
    Tile tile;
    for (int64_t unit = task * num_units / num_tasks; unit < (task + 1) * num_units / num_tasks; ++unit)
      own.template run<dtype>(unit, num_tiles, tile);
  });
}

template <class Units>
void run(const LoraArgs& args, int64_t dtype, const Units& units, Team& team) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kBF16:
      return share_out<Dtype::kBF16>(args, units, team);
    case Dtype::kF16:
      return share_out<Dtype::kF16>(args, units, team);
    default:
      return share_out<Dtype::kF32>(args, units, team);
  }
}

}  // namespace

void lora_shrink(const LoraArgs& args, int64_t num_rows, Team& team) {
  run(args, args.a_dtype, ShrinkUnits{args, num_rows}, team);
}

void lora_expand(const LoraArgs& args, int64_t num_rows, Team& team) {
  int64_t columns = 0;
  for (int64_t i = 0; i < args.num_parts; ++i) columns += args.parts[i].num_columns;
  const int64_t blocks_of_unit = ceil_div(columns, kLeastColumnsOfUnit * team.num_threads());
  const int64_t unit_columns = min(kColumnsOfUnit, blocks_of_unit * kLeastColumnsOfUnit);
  auto* sums = static_cast<float*>(
      team.scratch((kRows * kColumnsOfUnit + args.tile_rows * args.max_rank) * sizeof(float)));
  run(args, args.b_dtype, ExpandUnits{args, num_rows, unit_columns, sums, sums + kRows * kColumnsOfUnit}, team);
}

void lora_linear(const LoraArgs& args, int64_t num_rows, Team& team) {
  lora_shrink(args, num_rows, team);
  lora_expand(args, num_rows, team);
}

}  // namespace octavo
