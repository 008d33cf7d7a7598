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
constexpr int kPrefetchBytes = 2560;  // how far ahead of its use memory is asked for
constexpr int kChunk = 192;         // inputs that are decoded at once: 24 KiB

// ---- decoding: codes of W outputs as floats -------------------------------------------------------------------------

#if defined(__AVX512F__)
using Words = __m512i;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <Format F>
OCTAVO_INLINE vf code_of(Words words, int j) {
  if constexpr (F == Format::kQ8_0) {
    const Words signed_words = _mm512_xor_si512(words, _mm512_set1_epi8(-128));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(signed_words, 24 - 8 * j), 24));
  } else {  // the permutation looks at the low four bits of each word
    const vf table = F == Format::kQ4_0 ? _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8)
                                        : _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, j < 4 ? 8 * j : 8 * (j - 4) + 4), table);
  }
}
#elif defined(__AVX2__)
using Words = __m256i;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <Format F>
OCTAVO_INLINE vf code_of(Words words, int j) {
  if constexpr (F == Format::kQ8_0) {
    const Words signed_words = _mm256_xor_si256(words, _mm256_set1_epi8(-128));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(signed_words, 24 - 8 * j), 24));
  } else {
    const Words code = _mm256_and_si256(_mm256_srli_epi32(words, j < 4 ? 8 * j : 8 * (j - 4) + 4), _mm256_set1_epi32(15));
    const vf value = _mm256_cvtepi32_ps(code);
    return F == Format::kQ4_0 ? vsub(value, vset(8.0f)) : value;
  }
}
#else
using Words = uint32_t __attribute__((vector_size(16)));
OCTAVO_INLINE Words load_words(const uint8_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
template <Format F>
OCTAVO_INLINE vf code_of(Words words, int j) {
  vf r;
  for (int i = 0; i < W; ++i) {
    if constexpr (F == Format::kQ8_0) {
      r[i] = static_cast<float>(static_cast<int>((words[i] >> (8 * j)) & 255u) - 128);
    } else {
      const int code = static_cast<int>((words[i] >> (j < 4 ? 8 * j : 8 * (j - 4) + 4)) & 15u);
      r[i] = static_cast<float>(F == Format::kQ4_0 ? code - 8 : code);
    }
  }
  return r;
}
#endif

template <Format F>
constexpr int kInputsOfRow = F == Format::kQ8_0 ? 4 : 8;  // inputs that a row of words holds

template <Format F>
OCTAVO_INLINE vf load_dense(const uint8_t* p) {
  if constexpr (F == Format::kF32) return vload(reinterpret_cast<const float*>(p));
  if constexpr (F == Format::kBF16) return vload_bf16(reinterpret_cast<const uint16_t*>(p));
  if constexpr (F == Format::kF16) return vload_f16(reinterpret_cast<const uint16_t*>(p));
}

// Scales, and minima for Q4_1, of W outputs in a group.
template <Format F>
struct Scale {
  vf d, m;

  OCTAVO_INLINE Scale(const uint8_t* group, int column) {
    d = vload_f16(reinterpret_cast<const uint16_t*>(group) + column);
    m = F == Format::kQ4_1 ? vload_f16(reinterpret_cast<const uint16_t*>(group) + kPanel + column) : vzero();
  }
  // d * code is exact in fp32, so the fused form rounds as a product and a sum do.
  OCTAVO_INLINE vf value(vf code) const { return F == Format::kQ4_1 ? vfma(code, d, m) : vmul(code, d); }
};

// Calls use(k, w) for each input k of a group and the weights w of W outputs from `column` on, k in order.
template <Format F, class Use>
OCTAVO_INLINE void decode_group(const uint8_t* group, int column, Use&& use) {
  const Scale<F> scale(group, column);
  const uint8_t* words = group + bytes_of_scales(F) + 4 * column;
#pragma GCC unroll 8
  for (int row = 0; row < kGroup / kInputsOfRow<F>; ++row) {
    const Words packed = load_words(words + row * 4 * kPanel);
#pragma GCC unroll 8
    for (int j = 0; j < kInputsOfRow<F>; ++j) use(row * kInputsOfRow<F> + j, scale.value(code_of<F>(packed, j)));
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

// ---- few rows: R of them times a panel, weights decoded in registers ------------------------------------------------

template <Format F, int R>
void few_rows(const Product& product, const Part& part, int64_t panel) {
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = product.x + (part.first_row + r) * product.x_stride;
  const uint8_t* weights = product.weight + (part.first_panel + panel) * bytes_of_panel(F, product.in_features);
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[R][2];
    for (auto& both : sums) both[0] = both[1] = vzero();
    const auto add = [&](int64_t k, vf w0, vf w1) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf input = vset(x[r][k]);
        sums[r][0] = vfma(input, w0, sums[r][0]);
        sums[r][1] = vfma(input, w1, sums[r][1]);
      }
    };
    if constexpr (is_dense(F)) {
      for (int64_t k = 0; k < product.in_features; ++k) {
        const uint8_t* values = weights + (k * kPanel + column) * bytes_of_value(F);
        add(k, load_dense<F>(values), load_dense<F>(values + W * bytes_of_value(F)));
      }
    } else {
      for (int64_t g = 0; g < product.in_features / kGroup; ++g) {
        const uint8_t* group = weights + g * bytes_of_group(F);
        prefetch(group + kPrefetchBytes, bytes_of_group(F));
        const Scale<F> s0(group, column), s1(group, column + W);
        const uint8_t* words = group + bytes_of_scales(F) + 4 * column;
#pragma GCC unroll 8
        for (int row = 0; row < kGroup / kInputsOfRow<F>; ++row) {
          const Words packed0 = load_words(words + row * 4 * kPanel);
          const Words packed1 = load_words(words + row * 4 * kPanel + 4 * W);
#pragma GCC unroll 8
          for (int j = 0; j < kInputsOfRow<F>; ++j)
            add(g * kGroup + row * kInputsOfRow<F> + j, s0.value(code_of<F>(packed0, j)),
                s1.value(code_of<F>(packed1, j)));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      float* out = part.out + r * part.out_stride + panel * kPanel + column;
      vstore(out, sums[r][0]);
      vstore(out + W, sums[r][1]);
    }
  }
}

using FewRowsFunction = void (*)(const Product&, const Part&, int64_t);
template <Format F>
constexpr FewRowsFunction kFewRows[] = {nullptr,        few_rows<F, 1>, few_rows<F, 2>, few_rows<F, 3>, few_rows<F, 4>,
                                        few_rows<F, 5>, few_rows<F, 6>, few_rows<F, 7>, few_rows<F, 8>};

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
      prefetch(weights + bytes_of_panel(F, first + num_inputs), bytes_of_panel(F, kChunk));
      for (int64_t t = 0; t < num_tiles; ++t) {  // tiles of nearly equal height
        const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
        kTiles[stop - row](x + row * product.x_stride + first, product.x_stride, decoded, num_inputs, first == 0,
                           part.out + row * part.out_stride + panel * kPanel, part.out_stride);
      }
    }
  }
}

template <Format F>
void exact(const Product& product, const Part& part, void* scratch) {
  static_assert(kChunk * kPanel * sizeof(float) <= kScratchBytes);
  if (part.num_rows > kMaxFewRows) return many_rows<F>(product, part, static_cast<float*>(scratch));
  for (int64_t panel = 0; panel < part.num_panels; ++panel) kFewRows<F>[part.num_rows](product, part, panel);
}

}  // namespace

PartFunction exact_part(int64_t format) {
  PartFunction function = nullptr;
  with_format(format, [&](auto tag) { function = &exact<tag.value>; });
  return function;
}

}  // namespace octavo
