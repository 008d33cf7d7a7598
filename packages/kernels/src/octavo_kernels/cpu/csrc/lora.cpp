// lora_shrink, lora_expand: low-rank products of rows that are grouped by adapter, tile by tile.
//
// Each sum is made in an order of its own: over the inputs, lane by lane, and over the ranks one after the other. How many
// rows a tile has changes nothing but how often a matrix is read.

#include "ops.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int kRows = 4;             // that are computed together
constexpr int64_t kRanksOfTask = 4;  // of a shrink
constexpr int64_t kColumnsOfTask = 256;
constexpr int64_t kMostTileRows = 128;

template <Dtype dtype>
OCTAVO_INLINE vf load(const void* matrix, int64_t at) {
  if constexpr (dtype == Dtype::kF32) return vload(static_cast<const float*>(matrix) + at);
  if constexpr (dtype == Dtype::kBF16) return vload_bf16(static_cast<const uint16_t*>(matrix) + at);
  if constexpr (dtype == Dtype::kF16) return vload_f16(static_cast<const uint16_t*>(matrix) + at);
}

// The first `size` numbers from `at`, and zeros in the other lanes.
template <Dtype dtype>
OCTAVO_INLINE vf load_some(const void* matrix, int64_t at, int64_t size) {
  constexpr int64_t kBytes = dtype == Dtype::kF32 ? 4 : 2;
  alignas(64) char some[W * 4] = {};
  std::memcpy(some, static_cast<const char*>(matrix) + at * kBytes, size * kBytes);
  return load<dtype>(some, 0);
}

// The rows of a tile that exist.
struct Tile {
  int64_t rows[kMostTileRows];
  int64_t size = 0;

  Tile(const int32_t* entries, int64_t tile_rows, int64_t num_rows) {
    for (int64_t i = 0; i < tile_rows; ++i)
      if (entries[i] < num_rows) rows[size++] = entries[i];
  }
};

// Dot products of up to kRows rows with one row of a, over the inputs from `first` to `end`.
template <Dtype dtype, int count>
void dots(const LoraShrinkArgs& args, const int64_t* rows, int64_t a_row, int64_t first, int64_t end, float* sums) {
  const float* x[count];
  vf partial[count];
  for (int i = 0; i < count; ++i) x[i] = args.x + rows[i] * args.x_stride, partial[i] = vzero();
  int64_t k = first;
  for (; k + W <= end; k += W) {
    const vf weights = load<dtype>(args.a, a_row + k);
    for (int i = 0; i < count; ++i) partial[i] = vfma(vload(x[i] + k), weights, partial[i]);
  }
  if (k < end) {
    const vf weights = load_some<dtype>(args.a, a_row + k, end - k);
    for (int i = 0; i < count; ++i)
      partial[i] = vfma(load_some<Dtype::kF32>(x[i], k, end - k), weights, partial[i]);
  }
  for (int i = 0; i < count; ++i) sums[i] = vsum(partial[i]);
}

template <Dtype dtype>
void shrink(const LoraShrinkArgs& args, const Tile& tile, int64_t adapter, int64_t rank, int64_t span) {
  const int64_t first = span * args.span_inputs;
  const int64_t end = first + args.span_inputs < args.in_features ? first + args.span_inputs : args.in_features;
  const int64_t a_row = (adapter * args.max_rank + rank) * args.in_features;
  float* out = args.out + span * args.out_span_stride + rank;
  float sums[kRows];
  for (int64_t i = 0; i < tile.size;) {
    const int64_t* rows = tile.rows + i;
    const int64_t left = tile.size - i;
    if (left >= 4) dots<dtype, 4>(args, rows, a_row, first, end, sums);
    else if (left >= 2) dots<dtype, 2>(args, rows, a_row, first, end, sums);
    else dots<dtype, 1>(args, rows, a_row, first, end, sums);
    const int64_t count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    for (int64_t j = 0; j < count; ++j) out[rows[j] * args.max_rank] = sums[j];
    i += count;
  }
}

// Add to W columns of some rows; `shrunk` has a row's ranks at a distance of max_rank.
template <Dtype dtype, int count>
void add_columns(const LoraExpandArgs& args, const int64_t* rows, const float* shrunk, int64_t adapter, int64_t rank,
                 int64_t column, int64_t size) {
  const int64_t b_row = adapter * args.max_rank * args.out_features + column;
  const vf scale = vset(args.scales[adapter]);
  vf sums[count];
  for (int i = 0; i < count; ++i) sums[i] = vzero();
  for (int64_t r = 0; r < rank; ++r) {
    const int64_t at = b_row + r * args.out_features;
    const vf weights = size == W ? load<dtype>(args.b, at) : load_some<dtype>(args.b, at, size);
    for (int i = 0; i < count; ++i) sums[i] = vfma(vset(shrunk[i * args.max_rank + r]), weights, sums[i]);
  }
  for (int i = 0; i < count; ++i) {
    float* out = args.out + rows[i] * args.out_stride + column;
    if (size == W) {
      vstore(out, vfma(scale, sums[i], vload(out)));
      continue;
    }
    float some[W];
    vstore(some, vfma(scale, sums[i], load_some<Dtype::kF32>(out, 0, size)));
    std::memcpy(out, some, size * sizeof(float));
  }
}

template <Dtype dtype>
void expand(const LoraExpandArgs& args, const Tile& tile, int64_t adapter, int64_t rank, int64_t first, float* shrunk) {
  const int64_t end = first + kColumnsOfTask < args.out_features ? first + kColumnsOfTask : args.out_features;
  for (int64_t i = 0; i < tile.size; ++i)
    for (int64_t r = 0; r < rank; ++r) {
      float sum = 0.0f;
      for (int64_t span = 0; span < args.num_spans; ++span)
        sum += args.shrunk[span * args.span_stride + tile.rows[i] * args.max_rank + r];
      shrunk[i * args.max_rank + r] = sum;
    }
  for (int64_t column = first; column < end; column += W) {
    const int64_t size = end - column < W ? end - column : W;
    for (int64_t i = 0; i < tile.size;) {
      const int64_t* rows = tile.rows + i;
      const float* own = shrunk + i * args.max_rank;
      const int64_t left = tile.size - i;
      if (left >= 4) add_columns<dtype, 4>(args, rows, own, adapter, rank, column, size);
      else if (left >= 2) add_columns<dtype, 2>(args, rows, own, adapter, rank, column, size);
      else add_columns<dtype, 1>(args, rows, own, adapter, rank, column, size);
      i += left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
  }
}

}  // namespace

void lora_shrink(const LoraShrinkArgs& args, int64_t num_rows, Team& team) {
  const int64_t parts = (args.max_rank + kRanksOfTask - 1) / kRanksOfTask;
  team.parallel_for(args.num_tiles * parts * args.num_spans, [&](int64_t task) {
    const int64_t tile_index = task / (parts * args.num_spans), adapter = args.groups[tile_index];
    if (adapter < 0) return;
    const int64_t first = task / args.num_spans % parts * kRanksOfTask, rank = args.ranks[adapter];
    if (first >= rank) return;
    const Tile tile(args.rows + tile_index * args.tile_rows, args.tile_rows, num_rows);
    const int64_t end = first + kRanksOfTask < rank ? first + kRanksOfTask : rank;
    for (int64_t r = first; r < end; ++r) switch (static_cast<Dtype>(args.a_dtype)) {
        case Dtype::kBF16:
          shrink<Dtype::kBF16>(args, tile, adapter, r, task % args.num_spans);
          break;
        case Dtype::kF16:
          shrink<Dtype::kF16>(args, tile, adapter, r, task % args.num_spans);
          break;
        default:
          shrink<Dtype::kF32>(args, tile, adapter, r, task % args.num_spans);
      }
  });
}

void lora_expand(const LoraExpandArgs& args, int64_t num_rows, Team& team) {
  const int64_t parts = (args.out_features + kColumnsOfTask - 1) / kColumnsOfTask;
  auto* shrunk = static_cast<float*>(team.scratch(args.tile_rows * args.max_rank * sizeof(float)));
  team.parallel_for(args.num_tiles * parts, [&](int64_t task) {
    const int64_t tile_index = task / parts, adapter = args.groups[tile_index];
    if (adapter < 0 || args.ranks[adapter] == 0) return;
    const Tile tile(args.rows + tile_index * args.tile_rows, args.tile_rows, num_rows);
    const int64_t rank = args.ranks[adapter], first = task % parts * kColumnsOfTask;
    switch (static_cast<Dtype>(args.b_dtype)) {
      case Dtype::kBF16:
        return expand<Dtype::kBF16>(args, tile, adapter, rank, first, shrunk);
      case Dtype::kF16:
        return expand<Dtype::kF16>(args, tile, adapter, rank, first, shrunk);
      default:
        return expand<Dtype::kF32>(args, tile, adapter, rank, first, shrunk);
    }
  });
}

}  // namespace octavo
