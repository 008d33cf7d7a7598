// Products by grouped weights with fp32 activations. In every group of inputs an output is a chain of fused
// multiply-adds of inputs and levels, in their order; the groups' sums are then scaled and added in theirs. So an output
// does not depend on how many rows there are. Few rows look up levels in registers; more rows share levels in L1.
//
// Where groups have zeros, (level - zero) * x summed over a group is the sum of level * x, and the zero times the sum of
// the inputs, which rows have prepared.

#include "grouped.h"
#include "grouped_levels.h"
#include "matmul.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int kColumns = 2 * W;  // outputs that a tile has
constexpr int kMaxTileRows = W == 16 ? 8 : (W == 8 ? 6 : 4);
constexpr int kMaxFewRows = 4;                // up to here levels are looked up in registers
constexpr int kChunk = 192;                   // inputs whose levels are looked up at once: 24 KiB
constexpr int kChunkGroups = 48;              // groups whose scales are read at once, at most: 6 KiB, and zeros likewise
constexpr int64_t kMaxRows = 128;             // of a part
constexpr int64_t kBytesAhead = 4096;         // how far ahead of its use memory is asked for

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The scales of some groups of a panel, and middle - zero.
struct GroupScales {
  float scale[kChunkGroups][kPanel];
  float zero[kChunkGroups][kPanel];
};

// A product's weight and its rows as they were prepared.
struct Grouped {
  const GroupedHeader& header;
  const uint8_t* begin;
  const Product& product;

  explicit Grouped(const Product& of)
      : header(*reinterpret_cast<const GroupedHeader*>(of.weight)), begin(of.weight), product(of) {}

  bool has_zeros() const { return header.zeros != ZeroKind::kNone; }
  bool copies_inputs() const { return header.order_at != 0 || header.padded_inputs != product.in_features; }
  const float* prepared(int64_t row) const {
    const int64_t bytes = header.padded_inputs / kGroup * kPreparedBytes;
    return reinterpret_cast<const float*>(static_cast<const uint8_t*>(product.rounded) + row * bytes);
  }
  const float* inputs(int64_t row) const {
    return copies_inputs() ? prepared(row) : product.x + row * product.x_stride;
  }
  const float* sums(int64_t row) const { return prepared(row) + header.padded_inputs; }
};

// ---- what rows need beforehand --------------------------------------------------------------------------------------

float sum_of(const float* values, int64_t count) {
  if (count % W != 0) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    return sum;
  }
  vf sum = vzero();
  for (int64_t i = 0; i < count; i += W) sum = vadd(sum, vload(values + i));
  return vsum(sum);
}

void prepare(const Product& product, int64_t first_row, int64_t num_rows, void* out) {
  const Grouped weight(product);
  const GroupedHeader& header = weight.header;
  const auto* order = reinterpret_cast<const int32_t*>(weight.begin + header.order_at);
  for (int64_t row = first_row; row < first_row + num_rows; ++row) {
    auto* own = reinterpret_cast<float*>(static_cast<uint8_t*>(out) +
                                         row * (header.padded_inputs / kGroup * kPreparedBytes));
    const float* x = product.x + row * product.x_stride;
    if (weight.copies_inputs()) {
      for (int64_t k = 0; k < product.in_features; ++k) own[k] = x[header.order_at != 0 ? order[k] : k];
      for (int64_t k = product.in_features; k < header.padded_inputs; ++k) own[k] = 0.0f;
      x = own;
    }
    if (weight.has_zeros())
      for (int64_t g = 0; g < header.num_groups; ++g) {
        const int64_t first = g * header.group_inputs;
        own[header.padded_inputs + g] = sum_of(x + first, min(header.group_inputs, header.padded_inputs - first));
      }
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

void read_scales(const Grouped& weight, int64_t panel, int64_t first, int64_t count, GroupScales& out) {
  const GroupedHeader& header = weight.header;
  const uint8_t* scales = header.panel(panel) + header.scales_at;
  const ScaleReader reader(header, weight.begin, panel * kPanel);
  for (int64_t g = 0; g < count; ++g)
    for (int column = 0; column < kPanel; column += W)
      vstore(out.scale[g] + column, reader.read(scales, first + g, column));
  if (!weight.has_zeros()) return;
  const uint8_t* zeros = header.panel(panel) + header.zeros_at;
  for (int64_t g = 0; g < count; ++g) read_zeros(header, zeros, first + g, out.zero[g]);
}

// Adds a group's sums to an output: the same operations in every kind of product.
template <CodeKind K>
OCTAVO_INLINE void add_group(float* out, vf sum, const float* scale, const float* zero, const float* input_sum) {
  if constexpr (K == CodeKind::kE4M3) sum = vmul(sum, vset(kUnitOfE4M3));
  if (input_sum != nullptr) sum = vfma(vset(*input_sum), vload(zero), sum);
  vstore(out, vfma(sum, vload(scale), vload(out)));
}

void finish(const GroupedHeader& header, const Part& part) {
  if (header.finish == FinishKind::kNone) return;
  const vf factor = vset(header.factor);
  for (int64_t row = 0; row < part.num_rows; ++row) {
    float* out = part.out + row * part.out_stride;
    for (int64_t i = 0; i < part.num_panels * kPanel; i += W) {
      const vf sum = vload(out + i);
      vstore(out + i, header.finish == FinishKind::kTimes ? vmul(sum, factor) : vdiv(sum, factor));
    }
  }
}

void fill_with_zeros(float* out, int64_t out_stride, int64_t num_rows, int64_t num_columns) {
  for (int64_t row = 0; row < num_rows; ++row) std::memset(out + row * out_stride, 0, num_columns * sizeof(float));
}

// ---- few rows: R of them times P panels, levels looked up in registers ----------------------------------------------

template <CodeKind K, int R, int P>
void few_rows(const Product& product, const Part& part, int64_t panel, GroupScales* scales) {
  const Grouped weight(product);
  const GroupedHeader& header = weight.header;
  const Levels<K> levels(header.table);
  const float *x[R], *sums[R];
  for (int r = 0; r < R; ++r) {
    x[r] = weight.inputs(part.first_row + r);
    sums[r] = weight.has_zeros() ? weight.sums(part.first_row + r) : nullptr;
  }
  const uint8_t* codes = header.panel(part.first_panel + panel);
  const int64_t panel_bytes = header.panel_bytes;
  float* out = part.out + panel * kPanel;
  fill_with_zeros(out, part.out_stride, R, P * kPanel);
  for (int64_t begin = 0; begin < header.num_groups; begin += kChunkGroups) {
    const int64_t end = min(begin + kChunkGroups, header.num_groups);
    for (int p = 0; p < P; ++p) read_scales(weight, part.first_panel + panel + p, begin, end - begin, scales[p]);
    for (int column = 0; column < kPanel; column += kColumns)
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * header.group_inputs, stop = min(first + header.group_inputs, header.padded_inputs);
        vf acc[P][R][2];
        for (auto& rows : acc)
          for (auto& both : rows) both[0] = both[1] = vzero();
        for (int64_t k = first; k < stop; k += kUnit<K>) {
          Unit<K> units[P];
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p) {
            const uint8_t* at = codes + p * panel_bytes + k / kUnit<K> * kUnitBytes<K>;
            if (column == 0) prefetch(at + kBytesAhead, kUnitBytes<K>);
            units[p].load(at, column);
          }
#pragma GCC unroll 32
          for (int j = 0; j < kUnit<K>; ++j)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
              const vf first_level = units[p].level(levels, j, 0), second_level = units[p].level(levels, j, 1);
#pragma GCC unroll 8
              for (int r = 0; r < R; ++r) {
                const vf input = vset(x[r][k + j]);
                acc[p][r][0] = vfma(input, first_level, acc[p][r][0]);
                acc[p][r][1] = vfma(input, second_level, acc[p][r][1]);
              }
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
              const int at = column + i * W;
              add_group<K>(out + r * part.out_stride + p * kPanel + at, acc[p][r][i], scales[p].scale[g - begin] + at,
                           scales[p].zero[g - begin] + at, sums[r] == nullptr ? nullptr : sums[r] + g);
            }
      }
  }
}

using FewRowsFunction = void (*)(const Product&, const Part&, int64_t, GroupScales*);

// ---- more rows: tiles of R rows over levels in L1 -------------------------------------------------------------------

// A stretch of inputs whose levels are in L1, and what tiles do with it.
struct Stretch {
  const float* levels;  // [num_inputs][32]
  int64_t first, stop;  // inputs
  int64_t group_inputs, first_group;
  const GroupScales* scales;  // from first_group on
};

// partial [R][32]: the sums of a group that began in the last stretch, or ends in the next one.
template <CodeKind K, int R>
void tile(const Stretch& stretch, const float* const* x, const float* const* input_sums, int64_t padded_inputs,
          float* partial, float* out, int64_t out_stride) {
  for (int column = 0; column < kPanel; column += kColumns)
    for (int64_t k = stretch.first; k < stretch.stop;) {
      const int64_t g = k / stretch.group_inputs, group_stop = min((g + 1) * stretch.group_inputs, padded_inputs);
      const int64_t stop = min(group_stop, stretch.stop);
      const bool begins = k % stretch.group_inputs == 0;
      vf acc[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) acc[r][i] = begins ? vzero() : vload(partial + r * kPanel + column + i * W);
      const float* w = stretch.levels + (k - stretch.first) * kPanel + column;
      for (; k < stop; ++k, w += kPanel) {
        const vf w0 = vload(w), w1 = vload(w + W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vf input = vset(x[r][k]);
          acc[r][0] = vfma(input, w0, acc[r][0]);
          acc[r][1] = vfma(input, w1, acc[r][1]);
        }
      }
      const int64_t index = g - stretch.first_group;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int at = column + i * W;
          if (stop < group_stop) {
            vstore(partial + r * kPanel + at, acc[r][i]);
          } else {
            add_group<K>(out + r * out_stride + at, acc[r][i], stretch.scales->scale[index] + at,
                         stretch.scales->zero[index] + at, input_sums[r] == nullptr ? nullptr : input_sums[r] + g);
          }
        }
    }
}

using TileFunction = void (*)(const Stretch&, const float* const*, const float* const*, int64_t, float*, float*, int64_t);
template <CodeKind K, int R>
constexpr TileFunction tile_of() {
  if constexpr (R <= kMaxTileRows) return &tile<K, R>;
  return nullptr;
}

struct ManyRows {  // a thread's memory
  float levels[kChunk * kPanel];
  GroupScales scales;
  float partial[kMaxRows * kPanel];
};

template <CodeKind K>
void many_rows(const Product& product, const Part& part, ManyRows& memory) {
  static constexpr TileFunction kTiles[] = {nullptr,         tile_of<K, 1>(), tile_of<K, 2>(),
                                            tile_of<K, 3>(), tile_of<K, 4>(), tile_of<K, 5>(),
                                            tile_of<K, 6>(), tile_of<K, 7>(), tile_of<K, 8>()};
  const Grouped weight(product);
  const GroupedHeader& header = weight.header;
  const Levels<K> levels(header.table);
  const float *x[kMaxRows], *sums[kMaxRows];
  for (int64_t r = 0; r < part.num_rows; ++r) {
    x[r] = weight.inputs(part.first_row + r);
    sums[r] = weight.has_zeros() ? weight.sums(part.first_row + r) : nullptr;
  }
  const int64_t num_tiles = (part.num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t end = min(header.num_groups * header.group_inputs, header.padded_inputs);
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* codes = header.panel(part.first_panel + panel);
    float* out = part.out + panel * kPanel;
    fill_with_zeros(out, part.out_stride, part.num_rows, kPanel);
    for (int64_t first = 0; first < end; first += kChunk) {
      const int64_t stop = min(first + kChunk, end), first_group = first / header.group_inputs;
      for (int64_t k = first; k < stop; k += kUnit<K>)
        look_up<K>(levels, codes + k / kUnit<K> * kUnitBytes<K>, memory.levels + (k - first) * kPanel);
      read_scales(weight, part.first_panel + panel, first_group, (stop - 1) / header.group_inputs + 1 - first_group,
                  memory.scales);
      const Stretch stretch{memory.levels, first, stop, header.group_inputs, first_group, &memory.scales};
      const uint8_t* next = codes + stop / kUnit<K> * kUnitBytes<K>;
      const int64_t next_bytes = (kChunk / kUnit<K> * kUnitBytes<K> / num_tiles + 63) / 64 * 64;
      for (int64_t t = 0; t < num_tiles; ++t) {  // tiles of nearly equal height
        const int64_t row = part.num_rows * t / num_tiles, stop_row = part.num_rows * (t + 1) / num_tiles;
        prefetch(next + t * next_bytes, next_bytes);
        kTiles[stop_row - row](stretch, x + row, sums + row, header.padded_inputs, memory.partial + row * kPanel,
                          out + row * part.out_stride, part.out_stride);
      }
    }
  }
}

template <CodeKind K>
void multiply(const Product& product, const Part& part, void* scratch) {
  static constexpr FewRowsFunction kFewRows[] = {nullptr, &few_rows<K, 1, 1>, &few_rows<K, 2, 1>, &few_rows<K, 3, 1>,
                                                 &few_rows<K, 4, 1>};
  static_assert(kChunk % kUnit<K> == 0 && 2 * sizeof(GroupScales) <= kScratchBytes && sizeof(ManyRows) <= kScratchBytes);
  static_assert(kChunk / kLeastGroup <= kChunkGroups - 1);
  if (part.num_rows > kMaxFewRows) {
    many_rows<K>(product, part, *static_cast<ManyRows*>(scratch));
  } else {
    auto* scales = static_cast<GroupScales*>(scratch);
    int64_t panel = 0;
    if (part.num_rows == 1)
      for (; panel + 2 <= part.num_panels; panel += 2) few_rows<K, 1, 2>(product, part, panel, scales);
    for (; panel < part.num_panels; ++panel) kFewRows[part.num_rows](product, part, panel, scales);
  }
  finish(Grouped(product).header, part);
}

PartFunction part_of(CodeKind codes) {
  switch (codes) {
    case CodeKind::kTable4: return &multiply<CodeKind::kTable4>;
    case CodeKind::kTable3: return &multiply<CodeKind::kTable3>;
    case CodeKind::kTable2: return &multiply<CodeKind::kTable2>;
    case CodeKind::kInt8: return &multiply<CodeKind::kInt8>;
    case CodeKind::kE4M3: return &multiply<CodeKind::kE4M3>;
  }
  return nullptr;
}

}  // namespace

Method grouped_method(const Product& product) {
  const Grouped weight(product);
  Method method{part_of(weight.header.codes), nullptr, 0, nullptr};
  if (weight.has_zeros() || weight.copies_inputs()) {
    method.bytes_of_group = kPreparedBytes;
    method.prepare = &prepare;
  }
  return method;
}

}  // namespace octavo
