// What attention does with a tile of 64 positions: transposed keys, scores of some rows, weighted sums of values.
//
// A row is one query head of one token. Rows that read the same keys are taken several at a time, so that a key or value
// is loaded once for all of them; the bits of a row's result do not depend on which rows are beside it.

#pragma once

#include <type_traits>

#include "cache.h"

namespace octavo {

constexpr int kTile = 64;
constexpr int kMaxRows = 6;  // times 4 vectors of 16 floats: 24 sums, beside 5 registers for operands
constexpr int kMaxHeadDim = 256;
constexpr int kLine = 64;  // bytes of a cache line

// Where the keys and values of a tile's positions are. Positions that no row sees have the address of one that is seen,
// so that reading a whole vector of positions is safe.
template <class T>
struct KvTile {
  const T* k[kTile];
  const T* v[kTile];
  float k_scale[kTile];  // of int8 caches
  float v_scale[kTile];
  int begin, end;  // the positions that some row sees
};

// Vectors that are summed at once for a row: all registers but those of the operands.
template <int R>
constexpr int vectors_per_row() {
  return W == 16 ? 4 : R == 1 ? 8 : R == 2 ? 4 : 2;
}

// Vectors that are asked for from memory while others are computed with: hardware does not look ahead from block to block
// of the cache. Evenly spread, since a burst fills the processor's few outstanding reads and then stalls it.
template <class T>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const T* const* vectors, int count, int head_dim) : next_(vectors), end_(vectors + count), size_(head_dim) {}

  // Asks for up to `count` more vectors.
  OCTAVO_INLINE void fetch(int count) {
    for (; count > 0 && next_ != end_; --count, ++next_) {
      const char* at = reinterpret_cast<const char*>(*next_);
      for (int i = 0; i < size_ * static_cast<int>(sizeof(T)); i += kLine) __builtin_prefetch(at + i);
    }
  }

 private:
  const T* const* next_ = nullptr;
  const T* const* end_ = nullptr;
  int size_ = 0;
};

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

// The even and the odd elements of a vector of pairs of bfloat16, as floats.
OCTAVO_INLINE vf even_bf16(vf pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
OCTAVO_INLINE vf odd_bf16(vf pairs) {
  return _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
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

OCTAVO_INLINE vf even_bf16(vf pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
OCTAVO_INLINE vf odd_bf16(vf pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(-65536)));
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

// Writes W dimensions of W keys to out [W][kTile], dimension by dimension.
template <class T>
OCTAVO_INLINE void transpose_part(const T* const* keys, int d, float* out) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = load(keys[i] + d);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) vstore(out + i * kTile, r[i]);
}

// Likewise 2 W dimensions of bfloat16 keys, which are transposed in pairs and widened afterwards: half the shuffles.
OCTAVO_INLINE void transpose_pairs(const BF16* const* keys, int d, float* out) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) std::memcpy(&r[i], keys[i] + d, sizeof(vf));
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    vstore(out + 2 * i * kTile, even_bf16(r[i]));
    vstore(out + (2 * i + 1) * kTile, odd_bf16(r[i]));
  }
}
template <class T>
OCTAVO_INLINE void transpose_pairs(const T* const*, int, float*) {}

// Writes the keys of a tile to out [head_dim][kTile]; positions outside begin .. end - 1 are unspecified.
template <class T>
void transpose_keys(const KvTile<T>& tile, int head_dim, float* out, Ahead<T>& ahead) {
  constexpr bool in_pairs = std::is_same<T, BF16>::value;
  constexpr int step = in_pairs ? 2 * W : W;
  for (int i = tile.begin / W * W; i < tile.end; i += W) {
    for (int d = 0; d < head_dim; d += step) {
      ahead.fetch((step * W + 2 * head_dim - 1) / (2 * head_dim));  // half a tile in all
      if (in_pairs && d + step <= head_dim) {
        transpose_pairs(tile.k + i, d, out + d * kTile + i);
      } else {
        for (int part = d; part < head_dim && part < d + step; part += W)
          transpose_part(tile.k + i, part, out + part * kTile + i);
      }
    }
  }
}

// out [R][kTile] = q · k, each sum from dimension 0 upwards.
template <class T, int R>
void scores(const float* const* q, const float* keys, int head_dim, float* out, Ahead<T>& ahead) {
  constexpr int N = vectors_per_row<R>() * W > kTile ? kTile / W : vectors_per_row<R>();
  for (int first = 0; first < kTile; first += N * W) {
    vf sum[R][N];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) sum[r][i] = vzero();
    for (int part = 0; part < head_dim; part += 8) {
      ahead.fetch((4 * N * W + head_dim - 1) / head_dim);  // the other half
      for (int d = part; d < part + 8; ++d) {
        vf k[N];
        for (int i = 0; i < N; ++i) k[i] = vload(keys + d * kTile + first + i * W);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const vf x = vset(q[r][d]);
          for (int i = 0; i < N; ++i) sum[r][i] = vfma(x, k[i], sum[r][i]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) vstore(out + r * kTile + first + i * W, sum[r][i]);
  }
}

// Adds weights[r][j] * v[j] to sums [R][kMaxHeadDim] for j = begin .. end - 1 in order, in N vectors from dimension d on.
template <class T, int R, int N>
OCTAVO_INLINE void weigh_part(const T* const* v, const float* weights, int begin, int end, int d, float* sums,
                              Ahead<T>& ahead) {
  vf sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) sum[r][i] = vload(sums + r * kMaxHeadDim + d + i * W);
  for (int j = begin; j < end; ++j) {
    const T* at = v[j] + d;
    if (j % 2 == 1) ahead.fetch(1);
    vf x[N];
    for (int i = 0; i < N; ++i) x[i] = load(at + i * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf weight = vset(weights[r * kTile + j]);
      for (int i = 0; i < N; ++i) sum[r][i] = vfma(weight, x[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) vstore(sums + r * kMaxHeadDim + d + i * W, sum[r][i]);
}

template <class T, int R>
void weigh(const T* const* v, const float* weights, int begin, int end, int head_dim, float* sums, Ahead<T>& ahead) {
  constexpr int N = vectors_per_row<R>();
  int d = 0;
  for (; d + N * W <= head_dim; d += N * W) weigh_part<T, R, N>(v, weights, begin, end, d, sums, ahead);
  for (; d < head_dim; d += W) weigh_part<T, R, 1>(v, weights, begin, end, d, sums, ahead);
}

}  // namespace octavo
