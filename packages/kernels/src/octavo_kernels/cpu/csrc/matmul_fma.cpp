// Products with fp32 activations. Every output is one chain of fused multiply-adds over the inputs in their order, so
// that it does not depend on how many rows there are or how they are cut. Few rows decode weights in registers; more
// rows decode a part of a panel into L1 first and multiply it by all rows.

#include "matmul.h"
#include "vec.h"

namespace octavo {
namespace {

constexpr int kColumns = 2 * W;     // outputs that a tile has
constexpr int kMaxTileRows = W == 16 ? 8 : (W == 8 ? 6 : 4);
constexpr int kMaxFewRows = W == 16 ? 8 : 4;  // up to here weights are decoded in registers
constexpr int kChunk = 192;  // inputs that are decoded at once, in whole groups: 24 KiB

template <Format F>
constexpr int kGroupsAhead = 5120 / bytes_of_group(F);  // how far ahead of its use memory is asked for

// ---- decoding -------------------------------------------------------------------------------------------------------

template <Format F>
constexpr int kInputsOfRow = F == Format::kQ8_0 ? 4 : 8;  // inputs that a row of words holds

// Where the code of a row's input j begins in a word.
template <Format F>
constexpr int shift_of(int j) {
  return F == Format::kQ8_0 || j < 4 ? 8 * j : 8 * (j - 4) + 4;
}

#if defined(__AVX512F__)
using Words = __m512i;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <Format F>
OCTAVO_INLINE vf nibble(Words words, int shift) {  // the permutation looks at the low four bits of each word
  const vf table = F == Format::kQ4_0 ? _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8)
                                      : _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), table);
}
OCTAVO_INLINE vf byte_in_place(Words words, int shift) {
  return _mm512_cvtepu32_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(255u << shift))));
}
#elif defined(__AVX2__)
using Words = __m256i;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <Format F>
OCTAVO_INLINE vf nibble(Words words, int shift) {
  const vf code = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words, shift), _mm256_set1_epi32(15)));
  return F == Format::kQ4_0 ? vsub(code, vset(8.0f)) : code;
}
OCTAVO_INLINE vf byte_in_place(Words words, int shift) {  // numbers are converted with a sign, so the last one moves
  const bool last = shift == 24;
  const Words moved = last ? _mm256_srli_epi32(words, 1) : words;
  const vf byte = _mm256_cvtepi32_ps(_mm256_and_si256(moved, _mm256_set1_epi32(last ? 255 << 23 : 255 << shift)));
  return last ? vadd(byte, byte) : byte;
}
#else
using Words = uint32_t __attribute__((vector_size(16)));
OCTAVO_INLINE Words load_words(const uint8_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
template <Format F>
OCTAVO_INLINE vf nibble(Words words, int shift) {
  vf code;
  for (int i = 0; i < W; ++i)
    code[i] = static_cast<float>(static_cast<int>((words[i] >> shift) & 15u) - (F == Format::kQ4_0 ? 8 : 0));
  return code;
}
OCTAVO_INLINE vf byte_in_place(Words words, int shift) {
  vf code;
  for (int i = 0; i < W; ++i) code[i] = static_cast<float>(words[i] & (255u << shift));
  return code;
}
#endif

template <Format F>
OCTAVO_INLINE vf load_dense(const uint8_t* p) {
  if constexpr (F == Format::kF32) return vload(reinterpret_cast<const float*>(p));
  if constexpr (F == Format::kBF16) return vload_bf16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (F == Format::kF16) return vload_f16(reinterpret_cast<const uint16_t*>(p));
}

// What turns the codes of W outputs in a group into weights, which are rounded once at most.
template <Format F>
struct Scale {
  vf d, m;

  OCTAVO_INLINE void load(const uint8_t* group, int column) {
    const auto* halves = reinterpret_cast<const uint16_t*>(group) + column;
    d = vload_f16(halves);
    m = F == Format::kQ4_1 ? vload_f16(halves + kPanel) : vzero();
  }
  OCTAVO_INLINE vf weight(Words words, int j) const {
    const vf code = nibble<F>(words, shift_of<F>(j));
    return F == Format::kQ4_1 ? vfma(code, d, m) : vmul(code, d);
  }
};

// Bytes stay where they are in their words, as (code + 128) * 2**s, and the scales are divided by 2**s; the sum takes
// the 128 off again. All of it is exact.
template <>
struct Scale<Format::kQ8_0> {
  vf d[4], m;

  OCTAVO_INLINE void load(const uint8_t* group, int column) {
    const vf scale = vload_f16(reinterpret_cast<const uint16_t*>(group) + column);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) d[j] = vmul(scale, vset(1.0f / static_cast<float>(1 << (8 * j))));
    m = vmul(scale, vset(-128.0f));
  }
  OCTAVO_INLINE vf weight(Words words, int j) const { return vfma(byte_in_place(words, 8 * j), d[j], m); }
};

// Calls use(k, w) for each input k of a group and the weights w of W outputs from `column` on, k in order.
template <Format F, class Use>
OCTAVO_INLINE void decode_group(const uint8_t* group, int column, Use&& use) {
  Scale<F> scale;
  scale.load(group, column);
  const uint8_t* words = group + bytes_of_scales(F) + 4 * column;
#pragma GCC unroll 8
  for (int row = 0; row < kGroup / kInputsOfRow<F>; ++row) {
    const Words packed = load_words(words + row * 4 * kPanel);
#pragma GCC unroll 8
    for (int j = 0; j < kInputsOfRow<F>; ++j) use(row * kInputsOfRow<F> + j, scale.weight(packed, j));
  }
}

// Decodes inputs first .. first + num_inputs - 1 of a panel: out [num_inputs, 32]. For block formats whole groups.
template <Format F>
void decode_chunk(const uint8_t* panel, int64_t first, int64_t num_inputs, float* out) {
  if constexpr (is_dense(F)) {
    const uint8_t* values = panel + first * kPanel * bytes_of_value(F);
    for (int64_t i = 0; i < num_inputs * kPanel; i += W) vstore(out + i, load_dense<F>(values + i * bytes_of_value(F)));
  } else {
    for (int64_t g = 0; g < num_inputs / kGroup; ++g)
#pragma GCC unroll 8
      for (int column = 0; column < kPanel; column += W)
        decode_group<F>(panel + (first / kGroup + g) * bytes_of_group(F), column, [&](int k, vf w) {
          vstore(out + (g * kGroup + k) * kPanel + column, w);
        });
  }
}

// ---- few rows: R of them times P panels, weights decoded in registers ------------------------------------------------

// One row times one panel has too few chains to keep the multipliers busy, so panels take turns, input by input.
template <Format F, int R, int P>
void few_rows(const Product& product, const Part& part, int64_t panel) {
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = product.x + (part.first_row + r) * product.x_stride;
  const int64_t panel_bytes = bytes_of_panel(F, product.in_features);
  const uint8_t* weights = product.weight + (part.first_panel + panel) * panel_bytes;
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[P][R][2];
    for (auto& rows : sums)
      for (auto& both : rows) both[0] = both[1] = vzero();
    const auto add = [&](int p, int64_t k, vf w0, vf w1) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf input = vset(x[r][k]);
        sums[p][r][0] = vfma(input, w0, sums[p][r][0]);
        sums[p][r][1] = vfma(input, w1, sums[p][r][1]);
      }
    };
    if constexpr (is_dense(F)) {
      for (int64_t k = 0; k < product.in_features; ++k)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const uint8_t* values = weights + p * panel_bytes + (k * kPanel + column) * bytes_of_value(F);
          add(p, k, load_dense<F>(values), load_dense<F>(values + W * bytes_of_value(F)));
        }
    } else {
      const int64_t num_groups = product.in_features / kGroup;
      for (int64_t g = 0; g < num_groups; ++g) {
        const uint8_t* group = weights + g * bytes_of_group(F);
        const int64_t ahead = g + kGroupsAhead<F>;
        const uint8_t* next = weights + ahead * bytes_of_group(F) + (ahead < num_groups ? 0 : (P - 1) * panel_bytes);
        Scale<F> scales[P][2];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          prefetch(next + p * panel_bytes, bytes_of_scales(F));
          scales[p][0].load(group + p * panel_bytes, column);
          scales[p][1].load(group + p * panel_bytes, column + W);
        }
#pragma GCC unroll 8
        for (int row = 0; row < kGroup / kInputsOfRow<F>; ++row) {
          Words words[P][2];
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            const uint8_t* at = group + p * panel_bytes + bytes_of_scales(F) + 4 * (row * kPanel + column);
            prefetch(next + p * panel_bytes + bytes_of_scales(F) + 4 * row * kPanel, 4 * kPanel);
            words[p][0] = load_words(at);
            words[p][1] = load_words(at + 4 * W);
          }
#pragma GCC unroll 8
          for (int j = 0; j < kInputsOfRow<F>; ++j)
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p)
              add(p, g * kGroup + row * kInputsOfRow<F> + j, scales[p][0].weight(words[p][0], j),
                  scales[p][1].weight(words[p][1], j));
        }
      }
    }
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) {
        float* out = part.out + r * part.out_stride + (panel + p) * kPanel + column;
        vstore(out, sums[p][r][0]);
        vstore(out + W, sums[p][r][1]);
      }
  }
}

using FewRowsFunction = void (*)(const Product&, const Part&, int64_t);
template <Format F>
constexpr FewRowsFunction kFewRows[] = {
    nullptr,           few_rows<F, 1, 1>, few_rows<F, 2, 1>, few_rows<F, 3, 1>, few_rows<F, 4, 1>,
    few_rows<F, 5, 1>, few_rows<F, 6, 1>, few_rows<F, 7, 1>, few_rows<F, 8, 1>};

// ---- more rows: tiles of R rows and 2W outputs over decoded weights --------------------------------------------------

// Adds the products over num_inputs inputs to out; with `begin` out is filled instead.
template <int R>
void tile(const float* x, int64_t x_stride, const float* weights, int64_t num_inputs, bool begin, float* out,
          int64_t out_stride) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x + r * x_stride;
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* at = out + r * out_stride + column;
      sums[r][0] = begin ? vzero() : vload(at);
      sums[r][1] = begin ? vzero() : vload(at + W);
    }
    const float* w = weights + column;
    for (int64_t k = 0; k < num_inputs; ++k, w += kPanel) {
      const vf w0 = vload(w), w1 = vload(w + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf input = vset(rows[r][k]);
        sums[r][0] = vfma(input, w0, sums[r][0]);
        sums[r][1] = vfma(input, w1, sums[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* at = out + r * out_stride + column;
      vstore(at, sums[r][0]);
      vstore(at + W, sums[r][1]);
    }
  }
}

using TileFunction = void (*)(const float*, int64_t, const float*, int64_t, bool, float*, int64_t);
constexpr TileFunction kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

template <Format F>
void many_rows(const Product& product, const Part& part, float* chunk) {
  const int64_t num_tiles = (part.num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const float* x = product.x + part.first_row * product.x_stride;
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * bytes_of_panel(F, product.in_features);
    for (int64_t first = 0; first < product.in_features; first += kChunk) {
      const int64_t num_inputs = product.in_features - first < kChunk ? product.in_features - first : kChunk;
      const float* decoded = chunk;
      if constexpr (F == Format::kF32) {
        decoded = reinterpret_cast<const float*>(weights) + first * kPanel;
      } else {
        decode_chunk<F>(weights, first, num_inputs, chunk);
      }
      const uint8_t* next = weights + bytes_of_panel(F, first + num_inputs);
      const int64_t next_bytes = (bytes_of_panel(F, kChunk) / num_tiles + 63) / 64 * 64;
      for (int64_t t = 0; t < num_tiles; ++t) {  // tiles of nearly equal height
        const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
        prefetch(next + t * next_bytes, next_bytes);
        kTiles[stop - row](x + row * product.x_stride + first, product.x_stride, decoded, num_inputs, first == 0,
                           part.out + row * part.out_stride + panel * kPanel, part.out_stride);
      }
    }
  }
}

template <Format F>
void exact(const Product& product, const Part& part, void* scratch) {
  static_assert(kChunk % kGroup == 0 && kChunk * kPanel * sizeof(float) <= kScratchBytes);
  if (part.num_rows > kMaxFewRows) return many_rows<F>(product, part, static_cast<float*>(scratch));
  int64_t panel = 0;
  if (part.num_rows == 1)
    for (; panel + 2 <= part.num_panels; panel += 2) few_rows<F, 1, 2>(product, part, panel);
  for (; panel < part.num_panels; ++panel) kFewRows<F>[part.num_rows](product, part, panel);
}

// ---- formats with planes: groups unpacked to bytes, and these to floats ----------------------------------------------

// The weights of W outputs by one input of a row of words, rounded once at most.
OCTAVO_INLINE vf plane_weight(Words words, int j, vf d, vf m, const Planes& planes) {
  const vf code = byte_in_place(words, 8 * j), scale = vmul(d, vset(1.0f / static_cast<float>(1 << (8 * j))));
  if (planes.minimum) return vfma(code, scale, m);
  return vmul(vsub(code, vset(static_cast<float>(planes.centre) * static_cast<float>(1 << (8 * j)))), scale);
}

// As decode_chunk.
void decode_planes(const Product& product, const uint8_t* panel, int64_t first, int64_t num_inputs, float* out) {
  const PlaneFormat& format = *product.planes;
  const Planes& planes = format.planes;
  for (int64_t k = 0; k < num_inputs; k += kGroup) {
    UnpackedGroup group;
    const int64_t index = (first + k) / kGroup;
    format.unpack(panel + index / planes.groups_of_block * bytes_of_block(planes),
                  static_cast<int>(index % planes.groups_of_block), product.grid, group);
    for (int row = 0; row < kGroup / 4; ++row) {
      const int half = planes.scales_of_group == 2 ? row / (kGroup / 8) : 0;
      for (int column = 0; column < kPanel; column += W) {
        const Words words = load_words(group.codes + 4 * (row * kPanel + column));
        const vf d = vload(group.d[half] + column), m = vload(group.m[half] + column);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          vstore(out + (k + 4 * row + j) * kPanel + column, plane_weight(words, j, d, m, planes));
      }
    }
  }
}

void exact_planes(const Product& product, const Part& part, void* scratch) {
  auto* chunk = static_cast<float*>(scratch);
  const int64_t num_tiles = (part.num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t panel_bytes = bytes_of_panel(product.planes->planes, product.in_features);
  const float* x = product.x + part.first_row * product.x_stride;
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * panel_bytes;
    for (int64_t first = 0; first < product.in_features; first += kChunk) {
      const int64_t num_inputs = product.in_features - first < kChunk ? product.in_features - first : kChunk;
      decode_planes(product, weights, first, num_inputs, chunk);
      const uint8_t* next = weights + panel_bytes * (first + num_inputs) / product.in_features;
      const int64_t next_bytes = (panel_bytes * kChunk / product.in_features / num_tiles + 63) / 64 * 64;
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
        prefetch(next + t * next_bytes, next_bytes);
        kTiles[stop - row](x + row * product.x_stride + first, product.x_stride, chunk, num_inputs, first == 0,
                           part.out + row * part.out_stride + panel * kPanel, part.out_stride);
      }
    }
  }
}

}  // namespace

Method planes_fma_method() { return {&exact_planes, nullptr, 0}; }

Method fma_method(int64_t format) {
  Method method{};
  with_format(format, [&](auto tag) { method.part = &exact<tag.value>; });
  return method;
}

}  // namespace octavo
