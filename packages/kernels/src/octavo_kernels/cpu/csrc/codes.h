// The codes of weights in block formats as bytes, and products of bytes.

#pragma once

#include "packed.h"
#include "vec.h"

namespace octavo {

// ---- bytes: sums of four products of a weight's code and an activation, in W lanes ----------------------------------

#if defined(__AVX512F__)
using Words = __m512i;
OCTAVO_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
OCTAVO_INLINE void store_words(uint8_t* p, Words x) { _mm512_storeu_si512(p, x); }
OCTAVO_INLINE Words repeat(int32_t x) { return _mm512_set1_epi32(x); }
OCTAVO_INLINE Words low_nibbles(Words x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
OCTAVO_INLINE Words high_nibbles(Words x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }
OCTAVO_INLINE Words add(Words x, Words y) { return _mm512_add_epi32(x, y); }
template <int N>
OCTAVO_INLINE Words shift_left(Words x) {
  return _mm512_slli_epi32(x, N);
}
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
OCTAVO_INLINE Words add(Words x, Words y) { return _mm256_add_epi32(x, y); }
template <int N>
OCTAVO_INLINE Words shift_left(Words x) {
  return _mm256_slli_epi32(x, N);
}
OCTAVO_INLINE vf to_float(Words x) { return _mm256_cvtepi32_ps(x); }
OCTAVO_INLINE Words add_products(Words sum, Words codes, Words x) {  // pairs of products must fit into 16 bits
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
OCTAVO_INLINE Words flip(Words x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
OCTAVO_INLINE Words magnitude(Words x) { return _mm256_abs_epi8(x); }
OCTAVO_INLINE Words with_sign(Words x, Words sign) { return _mm256_sign_epi8(x, sign); }
#else
using Words = uint32_t __attribute__((vector_size(16)));
constexpr bool kUnsignedBytes = true;
OCTAVO_INLINE Words load_words(const uint8_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
OCTAVO_INLINE void store_words(uint8_t* p, Words x) { std::memcpy(p, &x, sizeof x); }
OCTAVO_INLINE Words repeat(int32_t x) { return Words{} + static_cast<uint32_t>(x); }
OCTAVO_INLINE Words low_nibbles(Words x) { return x & repeat(0x0F0F0F0F); }
OCTAVO_INLINE Words high_nibbles(Words x) { return (x >> 4) & repeat(0x0F0F0F0F); }
OCTAVO_INLINE Words add(Words x, Words y) { return x + y; }
template <int N>
OCTAVO_INLINE Words shift_left(Words x) {
  return x << N;
}
OCTAVO_INLINE vf to_float(Words x) {
  vf values;
  for (int i = 0; i < W; ++i) values[i] = static_cast<float>(static_cast<int32_t>(x[i]));
  return values;
}
OCTAVO_INLINE Words add_products(Words sum, Words codes, Words x) {
  uint8_t a[16];
  int8_t b[16];
  std::memcpy(a, &codes, 16);
  std::memcpy(b, &x, 16);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += static_cast<uint32_t>(a[4 * i + j] * b[4 * i + j]);
  return sum;
}
#endif

// Adding an exponent to a float's bits multiplies it by a power of two, unless it is 0, infinite or NaN. That leaves the
// multipliers to products of bytes.
#if defined(__AVX512VNNI__)
OCTAVO_INLINE bool all_take_exponents(vf x) { return _mm512_fpclass_ps_mask(x, 0x9F) == 0; }
OCTAVO_INLINE vf add_exponent(vf x, Words exponent) {
  return _mm512_castsi512_ps(add(_mm512_castps_si512(x), exponent));
}
#else
OCTAVO_INLINE bool all_take_exponents(vf) { return false; }
OCTAVO_INLINE vf add_exponent(vf x, Words) { return x; }
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

// Whether stored codes are multiplied as they are, 8 or 128 too large.
template <Format F>
constexpr bool kCodesAreMoved = F != Format::kQ8_0 || kUnsignedBytes;

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

// A word of memory in all lanes.
OCTAVO_INLINE Words repeat_word(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return repeat(word);
}

// What turns the codes of 2W outputs into weights: d * (code - 8) + m, or d * code for Q8_0.
struct Scales {
  vf d[2], m[2];
};

// The m of W outputs in a group, from what is stored for codes 0 .. 15.
OCTAVO_INLINE vf load_m(const uint16_t* m, vf d) { return vfma(d, vset(8.0f), vload_f16(m)); }

constexpr int kChunkGroups = 20;  // the most groups whose codes are unpacked at once: 20 KiB, and 5 KiB of scales

// Codes of 4 bits and scales of some groups of a panel, unpacked for many rows.
struct Chunk {
  uint8_t words[kChunkGroups * kGroup * kPanel];
  float d[kChunkGroups * kPanel];
  float m[kChunkGroups * kPanel];
  bool take_exponents[kChunkGroups];  // whether adding to the bits of a group's d multiplies all of them
};

template <Format F>  // from the codes of one group to those of the next
constexpr int64_t kBytesOfCodes = F == Format::kQ8_0 ? bytes_of_group(F) : kGroup * kPanel;

// Returns where the codes are, one byte per input: in the chunk, or in the panel where they are bytes already.
template <Format F>
const uint8_t* unpack(const uint8_t* groups, int64_t num_groups, Chunk& chunk) {
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* group = groups + g * bytes_of_group(F);
    const auto* d = reinterpret_cast<const uint16_t*>(group);
    bool take_exponents = true;
    for (int column = 0; column < kPanel; column += W) {
      const vf scale = vload_f16(d + column);
      take_exponents &= all_take_exponents(scale);
      vstore(chunk.d + g * kPanel + column, scale);
      if constexpr (F == Format::kQ4_1) vstore(chunk.m + g * kPanel + column, load_m(d + kPanel + column, scale));
    }
    chunk.take_exponents[g] = take_exponents;
    if constexpr (F != Format::kQ8_0) {
      uint8_t* words = chunk.words + g * kGroup * kPanel;
      for (int column = 0; column < kPanel; column += 2 * W)
        PackedCodes<F>(group + bytes_of_scales(F), column).each_row([&](int row, Words first, Words second) {
          store_words(words + 4 * (row * kPanel + column), first);
          store_words(words + 4 * (row * kPanel + column + W), second);
        });
    }
  }
  return F == Format::kQ8_0 ? groups + bytes_of_scales(F) : chunk.words;
}

}  // namespace octavo
