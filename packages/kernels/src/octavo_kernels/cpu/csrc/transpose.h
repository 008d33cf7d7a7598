// Transposes of vectors in registers, whole or within quarters of 16 bytes, and the two halves of vectors of pairs of
// bfloat16.

#pragma once

#include "vec.h"

namespace octavo {

constexpr int kQuarter = 4;  // floats in 16 bytes

#if defined(__AVX512F__)

OCTAVO_INLINE vf vpairs(vf a, vf b, bool high) {  // two floats of a, two of b, in each quarter
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}

OCTAVO_INLINE void transpose(vf* r) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = vpairs(t[i], t[i + 2], false);
    r[i + 1] = vpairs(t[i], t[i + 2], true);
    r[i + 2] = vpairs(t[i + 1], t[i + 3], false);
    r[i + 3] = vpairs(t[i + 1], t[i + 3], true);
  }
  // Quarter c of r[4 i + j] now holds column 4 c + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vf even = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    const vf even2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const vf odd2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
    t[j] = _mm512_shuffle_f32x4(even, even2, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even, even2, 0xDD);
    t[4 + j] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(odd, odd2, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// kColumns floats of W rows, transposed on their way from memory. Halves of vectors are put together as they are loaded:
// one instruction in four less for the only port that shuffles.
constexpr int kColumns = 8;
template <class T>
OCTAVO_INLINE void load_columns(const T* const* rows, int64_t first, vf* to) {
  const auto row = [&](int i) OCTAVO_INLINE_LAMBDA { return reinterpret_cast<const double*>(rows[i] + first); };
  const auto both = [](const double* low, const double* high) OCTAVO_INLINE_LAMBDA {
    const __m512d first = _mm512_castpd256_pd512(_mm256_loadu_pd(low));
    return _mm512_castpd_ps(_mm512_insertf64x4(first, _mm256_loadu_pd(high), 1));
  };
  vf r[2][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vf a = both(row(i), row(i + 4)), b = both(row(i + 8), row(i + 12));
    r[0][i] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[1][i] = _mm512_shuffle_f32x4(a, b, 0xDD);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const vf* t = r[half];
    const vf a = _mm512_unpacklo_ps(t[0], t[1]), b = _mm512_unpackhi_ps(t[0], t[1]);
    const vf c = _mm512_unpacklo_ps(t[2], t[3]), d = _mm512_unpackhi_ps(t[2], t[3]);
    to[4 * half] = vpairs(a, c, false);
    to[4 * half + 1] = vpairs(a, c, true);
    to[4 * half + 2] = vpairs(b, d, false);
    to[4 * half + 3] = vpairs(b, d, true);
  }
}

// The even and the odd elements of a vector of pairs of bfloat16, as floats.
OCTAVO_INLINE vf even_bf16(vf pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
OCTAVO_INLINE vf odd_bf16(vf pairs) {
  return _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
}

// Two vectors in a row to their even and their odd elements, and back.
OCTAVO_INLINE void split_pairs(vf& a, vf& b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const vf first = a;
  a = _mm512_permutex2var_ps(first, even, b);
  b = _mm512_permutex2var_ps(first, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
}
OCTAVO_INLINE void join_pairs(vf& a, vf& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const vf even = a;
  a = _mm512_permutex2var_ps(even, low, b);
  b = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
}

// Transposes the quarters of four vectors, 4 x 4 floats each.
OCTAVO_INLINE void transpose_quarters(vf* r) {
  const vf a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
  const vf c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
  r[0] = vpairs(a, c, false);
  r[1] = vpairs(a, c, true);
  r[2] = vpairs(b, d, false);
  r[3] = vpairs(b, d, true);
}
// Writes four vectors: element i of each quarter, all over that quarter. out [kQuarter][W].
OCTAVO_INLINE void spread_quarters(vf x, float* out) {
  vstore(out, _mm512_permute_ps(x, 0x00));
  vstore(out + W, _mm512_permute_ps(x, 0x55));
  vstore(out + 2 * W, _mm512_permute_ps(x, 0xAA));
  vstore(out + 3 * W, _mm512_permute_ps(x, 0xFF));
}
// Of two vectors in a row the quarters 0, 2, ..., and 1, 3, ...
OCTAVO_INLINE vf even_quarters(vf a, vf b) { return _mm512_shuffle_f32x4(a, b, 0x88); }
OCTAVO_INLINE vf odd_quarters(vf a, vf b) { return _mm512_shuffle_f32x4(a, b, 0xDD); }
// Of quarters that follow each other in x[..][p] number c goes to quarter p of to[c].
OCTAVO_INLINE void gather_quarters(const vf (*x)[4], vf* to) {
  const vf* at = x[0];
  const vf a = even_quarters(at[0], at[1]), b = even_quarters(at[2], at[3]);
  const vf c = odd_quarters(at[0], at[1]), d = odd_quarters(at[2], at[3]);
  to[0] = even_quarters(a, b);
  to[1] = even_quarters(c, d);
  to[2] = odd_quarters(a, b);
  to[3] = odd_quarters(c, d);
}

#elif defined(__AVX2__)

OCTAVO_INLINE vf vpairs(vf a, vf b, bool high) {
  const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
}

OCTAVO_INLINE void transpose(vf* r) {
  vf t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = vpairs(t[i], t[i + 2], false);
    r[i + 1] = vpairs(t[i], t[i + 2], true);
    r[i + 2] = vpairs(t[i + 1], t[i + 3], false);
    r[i + 3] = vpairs(t[i + 1], t[i + 3], true);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

OCTAVO_INLINE void transpose_quarters(vf* r) {
  const vf a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
  const vf c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
  r[0] = vpairs(a, c, false);
  r[1] = vpairs(a, c, true);
  r[2] = vpairs(b, d, false);
  r[3] = vpairs(b, d, true);
}
OCTAVO_INLINE void spread_quarters(vf x, float* out) {
  vstore(out, _mm256_permute_ps(x, 0x00));
  vstore(out + W, _mm256_permute_ps(x, 0x55));
  vstore(out + 2 * W, _mm256_permute_ps(x, 0xAA));
  vstore(out + 3 * W, _mm256_permute_ps(x, 0xFF));
}
OCTAVO_INLINE vf even_quarters(vf a, vf b) { return _mm256_permute2f128_ps(a, b, 0x20); }
OCTAVO_INLINE vf odd_quarters(vf a, vf b) { return _mm256_permute2f128_ps(a, b, 0x31); }
OCTAVO_INLINE void gather_quarters(const vf (*x)[2], vf* to) {
  for (int v = 0; v < 2; ++v) {
    to[2 * v] = even_quarters(x[v][0], x[v][1]);
    to[2 * v + 1] = odd_quarters(x[v][0], x[v][1]);
  }
}

OCTAVO_INLINE vf even_bf16(vf pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
OCTAVO_INLINE vf odd_bf16(vf pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(-65536)));
}

OCTAVO_INLINE void split_pairs(vf& a, vf& b) {
  const vf low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  a = _mm256_shuffle_ps(low, high, 0x88);
  b = _mm256_shuffle_ps(low, high, 0xDD);
}
OCTAVO_INLINE void join_pairs(vf& a, vf& b) {
  const vf low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}

#else

OCTAVO_INLINE void transpose(vf* r) {
  for (int j = 0; j < W; ++j)
    for (int i = 0; i < j; ++i) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
}

OCTAVO_INLINE void transpose_quarters(vf* r) { transpose(r); }
OCTAVO_INLINE void spread_quarters(vf x, float* out) {
  for (int i = 0; i < kQuarter; ++i) vstore(out + i * W, vset(x[i]));
}
OCTAVO_INLINE vf even_quarters(vf a, vf) { return a; }
OCTAVO_INLINE vf odd_quarters(vf, vf b) { return b; }
OCTAVO_INLINE void gather_quarters(const vf (*x)[1], vf* to) {
  for (int v = 0; v < 4; ++v) to[v] = x[v][0];
}

OCTAVO_INLINE vf even_bf16(vf pairs) {
  uint32_t bits[W];
  std::memcpy(bits, &pairs, sizeof bits);
  for (uint32_t& lane : bits) lane <<= 16;
  std::memcpy(&pairs, bits, sizeof bits);
  return pairs;
}
OCTAVO_INLINE vf odd_bf16(vf pairs) {
  uint32_t bits[W];
  std::memcpy(bits, &pairs, sizeof bits);
  for (uint32_t& lane : bits) lane &= 0xFFFF0000u;
  std::memcpy(&pairs, bits, sizeof bits);
  return pairs;
}

#endif

#if !defined(__AVX512F__)

constexpr int kColumns = W;
template <class T>
OCTAVO_INLINE void load_columns(const T* const* rows, int64_t first, vf* to) {
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) std::memcpy(&to[i], rows[i] + first, sizeof(vf));
  transpose(to);
}

#endif

}  // namespace octavo
