// What attention does with a tile of 64 positions: scores of some rows, and weighted sums of values.
//
// A row is one query head of one token. Rows that read the same keys are taken several at a time, so that a key or value
// is loaded once for all of them; the bits of a row's result do not depend on which rows are beside it.
//
// Hardware does not look ahead from block to block of the cache. So work on the keys asks for the tile's values, and work
// on the values for the keys of the next tile.

#pragma once

#include <algorithm>
#include <type_traits>

#include "cache.h"
#include "transpose.h"

namespace octavo {

constexpr int kTile = 64;
constexpr int kMaxRows = 6;  // times 4 vectors of 16 floats: 24 sums, beside 5 registers for operands
constexpr int kFewRows = 2 * kMaxRows;  // up to so many transpose keys in registers, kMaxRows at a time
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

// Lines that are asked for from memory while others are computed with. One by one, evenly spread over all that is done in
// a tile: the processor's few outstanding reads are always in use, and a burst of more would stop it until they are done.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* const* vectors, int count, int head_dim)
      : next_(reinterpret_cast<const char*>(vectors)),
        end_(reinterpret_cast<const char*>(vectors + count)),
        num_bytes_(head_dim * static_cast<int>(sizeof(T))) {
    take();
  }

  // Asks for up to `count` more lines.
  OCTAVO_INLINE void fetch(int count) {
    for (; count > 0 && at_ != nullptr; --count) {
      // Into the second cache: a tile and the next one are more than the first one holds, and the few reads that it can
      // wait for at a time are left to those that are needed now. A line that passed by the second one (locality 0)
      // would be read from memory again once it has left the first.
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ >= vector_end_) take();
    }
  }

  // Asks for kBytes at each step on average.
  template <int kBytes>
  OCTAVO_INLINE void keep_up(int step) {
    constexpr int kLines = (kBytes + kLine - 1) / kLine, kSteps = kLines * kLine / kBytes;
    if (step % kSteps == 0) fetch(kLines);
  }

  void fetch_all() {
    while (at_ != nullptr) fetch(1);
  }

 private:
  OCTAVO_INLINE void take() {
    at_ = nullptr;
    if (next_ == end_) return;
    std::memcpy(&at_, next_, sizeof at_);
    vector_end_ = at_ + num_bytes_;
    next_ += sizeof at_;
  }

  const char* at_ = nullptr;  // the next line, or null after the last one
  const char* vector_end_ = nullptr;
  const char* next_ = nullptr;  // among the pointers to vectors
  const char* end_ = nullptr;
  int num_bytes_ = 0;
};

// A score is the sum of two chains: the products of even dimensions, and those of odd ones, each from dimension 0 upwards.
// One chain would leave the few rows of a decode step waiting for their own sums.

// Dimensions that are transposed at once: floats as they are, bfloat16 in pairs that are widened afterwards, which takes
// half the shuffles, other types once they are floats.
template <class T>
constexpr int kDimsAtOnce = std::is_same<T, float>::value ? kColumns : std::is_same<T, BF16>::value ? 2 * kColumns : W;

// Calls use(dimension, dimension % 2, vectors) in the order of dimensions d .. d + kDimsAtOnce<T> - 1 of G * W keys, with
// G vectors of W keys for each. Asks for as many bytes ahead as it reads. d is even.
template <int G, class T, class Use>
OCTAVO_INLINE void by_dimension(const T* const* keys, int d, Ahead& ahead, Use use) {
  constexpr bool in_pairs = std::is_same<T, BF16>::value, as_stored = in_pairs || std::is_same<T, float>::value;
  constexpr int N = as_stored ? kColumns : W;  // what is transposed at once
  constexpr int kBytes = G * W * static_cast<int>(sizeof(T)) * (in_pairs ? 2 : 1);
  vf r[G][N];
  for (int g = 0; g < G; ++g) {
    if constexpr (as_stored) {
      load_columns(keys + g * W, d, r[g]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[g][i] = load(keys[g * W + i] + d);
      transpose(r[g]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    ahead.keep_up<kBytes>(i);
    vf x[G];
    if constexpr (in_pairs) {
      for (int g = 0; g < G; ++g) x[g] = even_bf16(r[g][i]);
      use(d + 2 * i, 0, x);
      for (int g = 0; g < G; ++g) x[g] = odd_bf16(r[g][i]);
      use(d + 2 * i + 1, 1, x);
    } else {
      for (int g = 0; g < G; ++g) x[g] = r[g][i];
      use(d + i, i % 2, x);
    }
  }
}

// Writes the keys of a tile to out [head_dim][kTile]; positions outside begin .. end - 1 are unspecified.
template <class T>
void transpose_keys(const KvTile<T>& tile, int head_dim, float* out, Ahead& values) {
  Ahead ahead = values;  // in registers
  for (int i = tile.begin / W * W; i < tile.end; i += W)
    for (int d = 0; d < head_dim; d += kDimsAtOnce<T>)
      by_dimension<1>(tile.k + i, d, ahead,
                      [&](int dim, int, const vf* key) OCTAVO_INLINE_LAMBDA { vstore(out + dim * kTile + i, key[0]); });
  values = ahead;
}

// out [R][kTile] = q · k.
template <int R>
void scores(const float* const* q, const float* keys, int head_dim, float* out) {
  constexpr int N = vectors_per_row<R>() * W > kTile ? kTile / W : vectors_per_row<R>();
  for (int part = 0; part < 2 * kTile / (N * W); ++part) {
    const int first = part / 2 * N * W, odd = part % 2;
    vf sum[R][N];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) sum[r][i] = vzero();
    for (int d = odd; d < head_dim; d += 2) {
      vf k[N];
      for (int i = 0; i < N; ++i) k[i] = vload(keys + d * kTile + first + i * W);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const vf x = vset(q[r][d]);
        for (int i = 0; i < N; ++i) sum[r][i] = vfma(x, k[i], sum[r][i]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) {
        float* at = out + r * kTile + first + i * W;
        vstore(at, odd ? vadd(vload(at), sum[r][i]) : sum[r][i]);
      }
  }
}

// The same sums straight from the cache, for rows too few to pay for keys that are transposed in memory.
template <class T, int R>
void scores_of_few(const float* const* q, const KvTile<T>& tile, int head_dim, float* out, Ahead& values) {
  Ahead ahead = values;  // in registers
  constexpr int G = W == 16 && R <= 3 ? 2 : 1;  // two vectors of keys use a broadcast element of q together
  for (int i = 0; i < kTile; i += G * W) {
    vf sum[R][2][G];
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < G; ++g) sum[r][0][g] = sum[r][1][g] = vzero();
    if (i < tile.end && i + G * W > tile.begin) {
      for (int d = 0; d < head_dim; d += kDimsAtOnce<T>) {
        by_dimension<G>(tile.k + i, d, ahead, [&](int dim, int odd, const vf* keys) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            const vf x = vset(q[r][dim]);
            for (int g = 0; g < G; ++g) sum[r][odd][g] = vfma(x, keys[g], sum[r][odd][g]);
          }
        });
      }
    }
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < G; ++g) vstore(out + r * kTile + i + g * W, vadd(sum[r][0][g], sum[r][1][g]));
  }
  values = ahead;
}

// Whether N vectors of values are taken two at a time as one of pairs, whose even and odd elements take one instruction
// each to widen; sums then stand by even and odd dimensions.
template <class T, int N>
constexpr bool kByPairs = std::is_same<T, BF16>::value && W > 4 && N % 2 == 0;

template <int N, class T>
OCTAVO_INLINE void load_values(const T* from, vf* to) {
  if constexpr (kByPairs<T, N>) {
    for (int i = 0; i < N; i += 2) {
      vf pairs;
      std::memcpy(&pairs, from + i * W, sizeof pairs);
      to[i] = even_bf16(pairs);
      to[i + 1] = odd_bf16(pairs);
    }
  } else {
    for (int i = 0; i < N; ++i) to[i] = load(from + i * W);
  }
}

// Adds weights[r][j] * v[j] to sums [R][kMaxHeadDim] for j = begin .. end - 1 in order, in N vectors from dimension d on.
template <class T, int R, int N>
OCTAVO_INLINE void weigh_part(const T* const* v, const float* weights, int begin, int end, int d, float* sums,
                              Ahead& keys) {
  constexpr int kBytes = N * W * static_cast<int>(sizeof(T)) / 2;  // soften_rows asks for some before
  vf sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < N; ++i) sum[r][i] = vload(sums + r * kMaxHeadDim + d + i * W);
    if constexpr (kByPairs<T, N>)
      for (int i = 0; i < N; i += 2) split_pairs(sum[r][i], sum[r][i + 1]);
  }
  Ahead ahead = keys;  // in registers
  for (int j = begin; j < end; ++j) {
    const T* at = v[j] + d;
    ahead.keep_up<kBytes>(j);
    vf x[N];
    load_values<N>(at, x);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf weight = vset(weights[r * kTile + j]);
      for (int i = 0; i < N; ++i) sum[r][i] = vfma(weight, x[i], sum[r][i]);
    }
  }
  keys = ahead;
  for (int r = 0; r < R; ++r) {
    if constexpr (kByPairs<T, N>)
      for (int i = 0; i < N; i += 2) join_pairs(sum[r][i], sum[r][i + 1]);
    for (int i = 0; i < N; ++i) vstore(sums + r * kMaxHeadDim + d + i * W, sum[r][i]);
  }
}

template <class T, int R>
void weigh(const T* const* v, const float* weights, int begin, int end, int head_dim, float* sums,
           Ahead& keys) {
  constexpr int N = vectors_per_row<R>();
  if (begin >= end) return;
  int d = 0;
  for (; d + N * W <= head_dim; d += N * W) weigh_part<T, R, N>(v, weights, begin, end, d, sums, keys);
  for (; d < head_dim; d += W) weigh_part<T, R, 1>(v, weights, begin, end, d, sums, keys);
}

}  // namespace octavo
