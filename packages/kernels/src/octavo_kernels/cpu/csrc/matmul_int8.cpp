// Products with activations rounded to 8 bits in groups of 32, for weights in block formats. Within a group codes are
// multiplied and summed as integers, exactly; the groups' sums are scaled and added in fp32 in their order. So an output
// does not depend on how many rows there are, nor on the instruction set's way to multiply bytes.

#include "matmul.h"
#include "vec.h"

namespace octavo {
namespace {

// ---- bytes: sums of four products of a weight's code and an activation, in W lanes ----------------------------------

#if defined(__AVX512F__)
using Words = __m512i;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
OCTAVO_INLINE void store_words(uint8_t* p, Words x) { _mm512_storeu_si512(p, x); }
OCTAVO_INLINE Words repeat(int32_t x) { return _mm512_set1_epi32(x); }
OCTAVO_INLINE Words low_nibbles(Words x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
OCTAVO_INLINE Words high_nibbles(Words x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }
OCTAVO_INLINE vf to_float(Words x) { return _mm512_cvtepi32_ps(x); }
#if defined(__AVX512VNNI__)
constexpr bool kUnsignedBytes = true;  // any unsigned byte is multiplied as it is
OCTAVO_INLINE Words add_products(Words sum, Words codes, Words x) { return _mm512_dpbusd_epi32(sum, codes, x); }
#else
constexpr bool kUnsignedBytes = false;
OCTAVO_INLINE Words add_products(Words sum, Words codes, Words x) {  // pairs of products must fit into 16 bits
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
}
OCTAVO_INLINE Words flip(Words x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
OCTAVO_INLINE Words magnitude(Words x) { return _mm512_abs_epi8(x); }
OCTAVO_INLINE Words with_sign(Words x, Words sign) {
  return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), x);
}
#endif
#elif defined(__AVX2__)
using Words = __m256i;
constexpr bool kUnsignedBytes = false;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
OCTAVO_INLINE void store_words(uint8_t* p, Words x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
OCTAVO_INLINE Words repeat(int32_t x) { return _mm256_set1_epi32(x); }
OCTAVO_INLINE Words low_nibbles(Words x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
OCTAVO_INLINE Words high_nibbles(Words x) { return low_nibbles(_mm256_srli_epi32(x, 4)); }
OCTAVO_INLINE vf to_float(Words x) { return _mm256_cvtepi32_ps(x); }
OCTAVO_INLINE Words add_products(Words sum, Words codes, Words x) {  // pairs of products must fit into 16 bits
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
OCTAVO_INLINE Words flip(Words x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
OCTAVO_INLINE Words magnitude(Words x) { return _mm256_abs_epi8(x); }
OCTAVO_INLINE Words with_sign(Words x, Words sign) { return _mm256_sign_epi8(x, sign); }
#else
using Words = int32_t __attribute__((vector_size(16)));
constexpr bool kUnsignedBytes = true;
OCTAVO_INLINE Words load_words(const uint8_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
OCTAVO_INLINE void store_words(uint8_t* p, Words x) { std::memcpy(p, &x, sizeof x); }
OCTAVO_INLINE Words repeat(int32_t x) { return Words{x, x, x, x}; }
OCTAVO_INLINE Words low_nibbles(Words x) { return x & repeat(0x0F0F0F0F); }
OCTAVO_INLINE Words high_nibbles(Words x) { return (x >> 4) & repeat(0x0F0F0F0F); }
OCTAVO_INLINE vf to_float(Words x) { return vf{float(x[0]), float(x[1]), float(x[2]), float(x[3])}; }
OCTAVO_INLINE Words add_products(Words sum, Words codes, Words x) {
  uint8_t a[16];
  int8_t b[16];
  std::memcpy(a, &codes, 16);
  std::memcpy(b, &x, 16);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += int32_t(a[4 * i + j]) * int32_t(b[4 * i + j]);
  return sum;
}
#endif

// Adds four products per lane, with codes as a panel stores them. For Q8_0 that is code + 128, unless bytes must be small.
template <Format F>
OCTAVO_INLINE Words add_codes(Words sum, Words codes, Words x) {
  if constexpr (F == Format::kQ8_0 && !kUnsignedBytes) {
#if (defined(__AVX512F__) && !defined(__AVX512VNNI__)) || (defined(__AVX2__) && !defined(__AVX512F__))
    const Words code = flip(codes);  // back to signed; then its sign moves over to x
    return add_products(sum, magnitude(code), with_sign(x, code));
#endif
  }
  return add_products(sum, codes, x);
}

// What a stored code exceeds the meant one by, where add_codes does not undo it.
template <Format F>
constexpr int kCodeOffset = F == Format::kQ4_0 ? 8 : (F == Format::kQ8_0 && kUnsignedBytes ? 128 : 0);

constexpr int kWordRows = kGroup / 4;  // rows of words with one byte per input

// ---- a group of 32 inputs times 2W outputs --------------------------------------------------------------------------

// Codes in memory one byte per input: [8 rows][32 outputs] words.
template <Format F>
struct ByteCodes {
  const uint8_t* words;

  OCTAVO_INLINE ByteCodes(const uint8_t* group_words, int column) : words(group_words + 4 * column) {}
  // Calls use(row, codes of the first W outputs, of the second W).
  template <class Use>
  OCTAVO_INLINE void each_row(Use&& use) const {
#pragma GCC unroll 8
    for (int row = 0; row < kWordRows; ++row)
      use(row, load_words(words + row * 4 * kPanel), load_words(words + row * 4 * kPanel + 4 * W));
  }
};

// Codes as a panel holds them.
template <Format F>
struct PackedCodes {
  const uint8_t* words;

  OCTAVO_INLINE PackedCodes(const uint8_t* group_words, int column) : words(group_words + 4 * column) {}
  template <class Use>
  OCTAVO_INLINE void each_row(Use&& use) const {
    if constexpr (F == Format::kQ8_0) {
      ByteCodes<F>(words, 0).each_row(use);
    } else {
#pragma GCC unroll 4
      for (int row = 0; row < kWordRows / 2; ++row) {
        const Words first = load_words(words + row * 4 * kPanel), second = load_words(words + row * 4 * kPanel + 4 * W);
        use(2 * row, low_nibbles(first), low_nibbles(second));
        use(2 * row + 1, high_nibbles(first), high_nibbles(second));
      }
    }
  }
};

OCTAVO_INLINE int32_t read_word(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Adds a group's part to sums: the same operations whatever R is, and wherever codes and scales were read from.
template <Format F, int R, class Codes>
OCTAVO_INLINE void add_group(const Codes& codes, vf d0, vf d1, vf m0, vf m1, const int8_t* const* x,
                             const float* const* scales, const float* const* offsets, int64_t g, vf (&sums)[R][2]) {
  Words products[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) products[r][0] = products[r][1] = repeat(0);
  codes.each_row([&](int row, Words first, Words second) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Words inputs = repeat(read_word(x[r] + g * kGroup + 4 * row));
      products[r][0] = add_codes<F>(products[r][0], first, inputs);
      products[r][1] = add_codes<F>(products[r][1], second, inputs);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf scale = vset(scales[r][g]);
    if constexpr (F == Format::kQ4_1) {
      const vf offset = vset(offsets[r][g]);
      sums[r][0] = vfma(vmul(to_float(products[r][0]), scale), d0, vfma(offset, m0, sums[r][0]));
      sums[r][1] = vfma(vmul(to_float(products[r][1]), scale), d1, vfma(offset, m1, sums[r][1]));
    } else if constexpr (kCodeOffset<F> != 0) {
      const vf offset = vset(-static_cast<float>(kCodeOffset<F>) * offsets[r][g]);
      sums[r][0] = vfma(vfma(to_float(products[r][0]), scale, offset), d0, sums[r][0]);
      sums[r][1] = vfma(vfma(to_float(products[r][1]), scale, offset), d1, sums[r][1]);
    } else {
      sums[r][0] = vfma(vmul(to_float(products[r][0]), scale), d0, sums[r][0]);
      sums[r][1] = vfma(vmul(to_float(products[r][1]), scale), d1, sums[r][1]);
    }
  }
}

// ---- few rows: codes out of the panel -------------------------------------------------------------------------------

constexpr int kColumns = 2 * W;
constexpr int kMaxTileRows = W == 16 ? 6 : 3;
constexpr int kChunkGroups = 20;  // the most groups whose codes are unpacked at once: 20 KiB, and 5 KiB of scales

template <int R>
struct RowPointers {
  const int8_t* codes[R];
  const float* scales[R];
  const float* offsets[R];

  RowPointers(const Product& product, int64_t first_row) {
    const int64_t num_groups = product.in_features / kGroup;
    for (int r = 0; r < R; ++r) {
      codes[r] = product.int8.codes + (first_row + r) * product.in_features;
      scales[r] = product.int8.scales + (first_row + r) * num_groups;
      offsets[r] = product.int8.offsets + (first_row + r) * num_groups;
    }
  }
};

template <Format F, int R>
void few_rows(const Product& product, const Part& part) {
  const RowPointers<R> rows(product, part.first_row);
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * bytes_of_panel(F, product.in_features);
    for (int column = 0; column < kPanel; column += kColumns) {
      vf sums[R][2];
      for (auto& both : sums) both[0] = both[1] = vzero();
      for (int64_t g = 0; g < product.in_features / kGroup; ++g) {
        const uint8_t* group = weights + g * bytes_of_group(F);
        const auto* d = reinterpret_cast<const uint16_t*>(group) + column;
        const uint16_t* m = F == Format::kQ4_1 ? d + kPanel : d;
        add_group<F, R>(PackedCodes<F>(group + bytes_of_scales(F), column), vload_f16(d), vload_f16(d + W),
                        vload_f16(m), vload_f16(m + W), rows.codes, rows.scales, rows.offsets, g, sums);
      }
      for (int r = 0; r < R; ++r) {
        float* out = part.out + r * part.out_stride + panel * kPanel + column;
        vstore(out, sums[r][0]);
        vstore(out + W, sums[r][1]);
      }
    }
  }
}

using FewRowsFunction = void (*)(const Product&, const Part&);
template <Format F>
constexpr FewRowsFunction kFewRows[] = {nullptr,        few_rows<F, 1>, few_rows<F, 2>, few_rows<F, 3>,
                                        few_rows<F, 4>, few_rows<F, 5>, few_rows<F, 6>};

// ---- more rows: codes and scales unpacked into L1 -------------------------------------------------------------------

struct Chunk {
  uint8_t words[kChunkGroups * kGroup * kPanel];
  float d[kChunkGroups * kPanel];
  float m[kChunkGroups * kPanel];
};

template <Format F>
void unpack(const uint8_t* groups, int64_t num_groups, Chunk& chunk) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* group = groups + g * bytes_of_group(F);
    const auto* d = reinterpret_cast<const uint16_t*>(group);
    uint8_t* words = chunk.words + g * kGroup * kPanel;
    for (int column = 0; column < kPanel; column += W) {
      vstore(chunk.d + g * kPanel + column, vload_f16(d + column));
      if constexpr (F == Format::kQ4_1) vstore(chunk.m + g * kPanel + column, vload_f16(d + kPanel + column));
    }
    for (int column = 0; column < kPanel; column += kColumns)
      PackedCodes<F>(group + bytes_of_scales(F), column).each_row([&](int row, Words first, Words second) {
        store_words(words + 4 * (row * kPanel + column), first);
        store_words(words + 4 * (row * kPanel + column + W), second);
      });
  }
}

template <Format F, int R>
void tile(const Product& product, const Chunk& chunk, int64_t first_group, int64_t num_groups, int64_t first_row,
          float* out, int64_t out_stride) {
  const RowPointers<R> rows(product, first_row);
  for (int column = 0; column < kPanel; column += kColumns) {
    vf sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* at = out + r * out_stride + column;
      sums[r][0] = first_group == 0 ? vzero() : vload(at);
      sums[r][1] = first_group == 0 ? vzero() : vload(at + W);
    }
    for (int64_t g = 0; g < num_groups; ++g) {
      const float* d = chunk.d + g * kPanel + column;
      const float* m = F == Format::kQ4_1 ? chunk.m + g * kPanel + column : d;
      add_group<F, R>(ByteCodes<F>(chunk.words + g * kGroup * kPanel, column), vload(d), vload(d + W), vload(m),
                      vload(m + W), rows.codes, rows.scales, rows.offsets, first_group + g, sums);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* at = out + r * out_stride + column;
      vstore(at, sums[r][0]);
      vstore(at + W, sums[r][1]);
    }
  }
}

using TileFunction = void (*)(const Product&, const Chunk&, int64_t, int64_t, int64_t, float*, int64_t);
template <Format F>
constexpr TileFunction kTiles[] = {nullptr, tile<F, 1>, tile<F, 2>, tile<F, 3>, tile<F, 4>, tile<F, 5>, tile<F, 6>};

template <Format F>
void many_rows(const Product& product, const Part& part, Chunk& chunk) {
  const int64_t num_tiles = (part.num_rows + kMaxTileRows - 1) / kMaxTileRows;
  const int64_t num_groups = product.in_features / kGroup;
  const int64_t num_chunks = (num_groups + kChunkGroups - 1) / kChunkGroups;
  for (int64_t panel = 0; panel < part.num_panels; ++panel) {
    const uint8_t* weights = product.weight + (part.first_panel + panel) * bytes_of_panel(F, product.in_features);
    for (int64_t c = 0; c < num_chunks; ++c) {  // chunks of nearly equal length
      const int64_t first = num_groups * c / num_chunks, count = num_groups * (c + 1) / num_chunks - first;
      unpack<F>(weights + first * bytes_of_group(F), count, chunk);
      const uint8_t* next = weights + (first + count) * bytes_of_group(F);
      const int64_t next_bytes = (count * bytes_of_group(F) / num_tiles + 63) / 64 * 64;
      for (int64_t t = 0; t < num_tiles; ++t) {  // tiles of nearly equal height
        prefetch(next + t * next_bytes, next_bytes);
        const int64_t row = part.num_rows * t / num_tiles, stop = part.num_rows * (t + 1) / num_tiles;
        kTiles<F>[stop - row](product, chunk, first, count, part.first_row + row,
                              part.out + row * part.out_stride + panel * kPanel, part.out_stride);
      }
    }
  }
}

template <Format F>
void int8(const Product& product, const Part& part, void* scratch) {
  static_assert(sizeof(Chunk) <= kScratchBytes);
  if (part.num_rows > kMaxTileRows) return many_rows<F>(product, part, *static_cast<Chunk*>(scratch));
  kFewRows<F>[part.num_rows](product, part);
}

}  // namespace

PartFunction int8_part(int64_t format) {
  switch (static_cast<Format>(format)) {
    case Format::kQ4_0: return &int8<Format::kQ4_0>;
    case Format::kQ4_1: return &int8<Format::kQ4_1>;
    case Format::kQ8_0: return &int8<Format::kQ8_0>;
    default: return nullptr;  // the Python side refuses dense formats
  }
}

// A group of inputs that is to be rounded.
#if defined(__AVX512F__)
struct Inputs {
  __m512 first, second;

  OCTAVO_INLINE explicit Inputs(const float* values) : first(vload(values)), second(vload(values + W)) {}

  // The largest magnitude; infinite or NaN if any is. Magnitudes are in the order of their bits, NaN last.
  OCTAVO_INLINE float largest() const {
    const __m512i of_both = _mm512_max_epu32(_mm512_castps_si512(vabs(first)), _mm512_castps_si512(vabs(second)));
    const uint32_t bits = _mm512_reduce_max_epu32(of_both);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // Finite values times `inverse` as whole numbers, half to even; returns their sum.
  OCTAVO_INLINE int32_t round(float inverse, int8_t* codes) const {
    const __m512i a = _mm512_cvtps_epi32(vmul(first, vset(inverse)));
    const __m512i b = _mm512_cvtps_epi32(vmul(second, vset(inverse)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + W), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
  }
};
#else
struct Inputs {
  const float* values;

  OCTAVO_INLINE explicit Inputs(const float* group) : values(group) {}

  OCTAVO_INLINE float largest() const {
    vf magnitudes = vzero(), not_finite = vzero();
    for (int i = 0; i < kGroup; i += W) {
      const vf v = vload(values + i);
      magnitudes = vmax(vabs(v), magnitudes);
      not_finite = vadd(not_finite, vsub(v, v));  // 0, or NaN for NaN and infinity
    }
    return vsum(not_finite) == 0.0f ? vmax_of(magnitudes) : NAN;
  }
  OCTAVO_INLINE int32_t round(float inverse, int8_t* codes) const {
    float rounded[kGroup];
    for (int i = 0; i < kGroup; i += W) vstore(rounded + i, vround(vmul(vload(values + i), vset(inverse))));
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      const int32_t code = static_cast<int32_t>(rounded[i]);
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
    return sum;
  }
};
#endif

void round_rows(const float* x, int64_t x_stride, int64_t in_features, int64_t first_row, int64_t num_rows,
                int8_t* codes, float* scales, float* offsets) {
  const int64_t num_groups = in_features / kGroup;
  for (int64_t row = first_row; row < first_row + num_rows; ++row) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const Inputs inputs(x + row * x_stride + g * kGroup);
      int8_t* out = codes + row * in_features + g * kGroup;
      float scale = inputs.largest() / 127.0f;
      int32_t sum = 0;
      if (scale < INFINITY) {
        const float inverse = 1.0f / scale;
        sum = inputs.round(scale > 0.0f && inverse < INFINITY ? inverse : 0.0f, out);
      } else {  // what is not a number has no code; the scale makes every output of the row NaN
        scale = NAN;
        std::memset(out, 0, kGroup);
      }
      scales[row * num_groups + g] = scale;
      offsets[row * num_groups + g] = scale * static_cast<float>(sum);
    }
  }
}

}  // namespace octavo
