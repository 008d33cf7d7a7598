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

// Vectors that are asked for from memory while others are computed with. Evenly spread over all that is done in a tile:
// a burst fills the processor's few outstanding reads and stalls it, and without requests memory stands idle.
template <class T>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const T* const* vectors, int count, int head_dim)
      : next_(vectors), end_(vectors + count), num_bytes_(head_dim * static_cast<int>(sizeof(T))) {}

  // Asks for up to `count` more vectors.
  OCTAVO_INLINE void fetch(int count) {
    for (; count > 0 && next_ != end_; --count, ++next_) {
      const char* at = reinterpret_cast<const char*>(*next_);
      // Into all caches: a tile and the next one are more than the first cache holds, and a line that has passed by the
      // second one (locality 0) is read from memory again once it has left the first.
      for (int i = 0; i < num_bytes_; i += kLine) __builtin_prefetch(at + i, 0, 3);
    }
  }

 private:
  const T* const* next_ = nullptr;
  const T* const* end_ = nullptr;
  int num_bytes_ = 0;
};

// A score is the sum of two chains: the products of even dimensions, and those of odd ones, each from dimension 0 upwards.
// One chain would leave the few rows of a decode step waiting for their own sums.

// Calls use(dimension, dimension % 2, vector) in the order of dimensions d .. d + W - 1 of W keys, with a vector of W keys
// for each. d is even.
template <class T, class Use>
OCTAVO_INLINE void by_dimension(const T* const* keys, int d, Use use) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = load(keys[i] + d);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) use(d + i, i % 2, r[i]);
}

// Likewise 2 W dimensions of bfloat16 keys, which are transposed in pairs and widened afterwards: half the shuffles.
template <class Use>
OCTAVO_INLINE void by_pairs(const BF16* const* keys, int d, Use use) {
  vf r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) std::memcpy(&r[i], keys[i] + d, sizeof(vf));
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    use(d + 2 * i, 0, even_bf16(r[i]));
    use(d + 2 * i + 1, 1, odd_bf16(r[i]));
  }
}
template <class T, class Use>
OCTAVO_INLINE void by_pairs(const T* const*, int, Use) {}

// Dimensions that are transposed at a time where there are so many left.
template <class T>
constexpr int kDimsAtOnce = std::is_same<T, BF16>::value ? 2 * W : W;

template <class T, class Use>
OCTAVO_INLINE void by_dimensions(const T* const* keys, int d, int head_dim, Use use) {
  constexpr int step = kDimsAtOnce<T>;
  if (step == 2 * W && d + step <= head_dim) return by_pairs(keys, d, use);
  for (int part = d; part < head_dim && part < d + step; part += W) by_dimension(keys, part, use);
}

// Writes the keys of a tile to out [head_dim][kTile]; positions outside begin .. end - 1 are unspecified.
template <class T>
void transpose_keys(const KvTile<T>& tile, int head_dim, float* out, Ahead<T>& values) {
  for (int i = tile.begin / W * W; i < tile.end; i += W) {
    values.fetch(W);
    for (int d = 0; d < head_dim; d += kDimsAtOnce<T>)
      by_dimensions(tile.k + i, d, head_dim,
                    [&](int dim, int, vf key) OCTAVO_INLINE_LAMBDA { vstore(out + dim * kTile + i, key); });
  }
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
void scores_of_few(const float* const* q, const KvTile<T>& tile, int head_dim, float* out, Ahead<T>& values) {
  const int per_step = (kDimsAtOnce<T> * W + head_dim - 1) / head_dim;
  for (int i = 0; i < kTile; i += W) {
    vf sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = vzero();
    if (i < tile.end && i + W > tile.begin) {
      for (int d = 0; d < head_dim; d += kDimsAtOnce<T>) {
        values.fetch(per_step);
        by_dimensions(tile.k + i, d, head_dim, [&](int dim, int odd, vf key) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) sum[r][odd] = vfma(vset(q[r][dim]), key, sum[r][odd]);
        });
      }
    }
    for (int r = 0; r < R; ++r) vstore(out + r * kTile + i, vadd(sum[r][0], sum[r][1]));
  }
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
                              Ahead<T>& keys) {
  vf sum[R][N];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < N; ++i) sum[r][i] = vload(sums + r * kMaxHeadDim + d + i * W);
    if constexpr (kByPairs<T, N>)
      for (int i = 0; i < N; i += 2) split_pairs(sum[r][i], sum[r][i + 1]);
  }
  for (int j = begin; j < end; ++j) {
    const T* at = v[j] + d;
    if (j % 2 == 1) keys.fetch(1);
    vf x[N];
    load_values<N>(at, x);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf weight = vset(weights[r * kTile + j]);
      for (int i = 0; i < N; ++i) sum[r][i] = vfma(weight, x[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if constexpr (kByPairs<T, N>)
      for (int i = 0; i < N; i += 2) join_pairs(sum[r][i], sum[r][i + 1]);
    for (int i = 0; i < N; ++i) vstore(sums + r * kMaxHeadDim + d + i * W, sum[r][i]);
  }
}

template <class T, int R>
void weigh(const T* const* v, const float* weights, int begin, int end, int head_dim, float* sums,
           Ahead<T>& keys) {
  constexpr int N = vectors_per_row<R>();
  if (begin >= end) return;
  int d = 0;
  for (; d + N * W <= head_dim; d += N * W) weigh_part<T, R, N>(v, weights, begin, end, d, sums, keys);
  for (; d < head_dim; d += W) weigh_part<T, R, 1>(v, weights, begin, end, d, sums, keys);
}

}  // namespace octavo
