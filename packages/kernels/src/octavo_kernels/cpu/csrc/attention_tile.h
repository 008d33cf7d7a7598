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

constexpr int kAddressesAtOnce = 8;

// Where the keys and values of a tile's positions are. Positions that no row sees have the address of one that is seen,
// so that reading a whole vector of positions is safe.
template <class T>
struct KvTile {
  const T* k[kTile + kAddressesAtOnce];  // beyond kTile unspecified
  const T* v[kTile + kAddressesAtOnce];
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

// A score is the sum of four chains, added in turn. Runs of dimensions that take 16 bytes of the cache belong to chains 0,
// 1, 2, 3, 0, ...; a chain adds the products of its dimensions from 0 upwards. So where keys are transposed within
// quarters of 16 bytes alone, which takes the fewest shuffles, each quarter of a vector has a chain of its own.
constexpr int kChains = 4;
template <class T>
constexpr int kRun = std::is_same<T, BF16>::value ? 8 : kQuarter;  // other types than bfloat16 are made floats first

// Writes the keys of a tile to out [head_dim][kTile]; positions outside begin .. end - 1 are unspecified. bfloat16 is
// transposed in pairs that are widened afterwards. Asks for as many bytes ahead as it reads.
template <class T>
void transpose_keys(const KvTile<T>& tile, int head_dim, float* out, Ahead& values) {
  constexpr bool in_pairs = std::is_same<T, BF16>::value, as_stored = in_pairs || std::is_same<T, float>::value;
  constexpr int N = as_stored ? kColumns : W, kDims = in_pairs ? 2 * N : N;
  constexpr int kBytes = W * static_cast<int>(sizeof(T)) * kDims / N;
  Ahead ahead = values;  // in registers
  for (int i = tile.begin / W * W; i < tile.end; i += W)
    for (int d = 0; d < head_dim; d += kDims) {
      vf r[N];
      if constexpr (as_stored) {
        load_columns(tile.k + i, d, r);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) r[j] = load(tile.k[i + j] + d);
        transpose(r);
      }
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        ahead.keep_up<kBytes>(j);
        if constexpr (in_pairs) {
          vstore(out + (d + 2 * j) * kTile + i, even_bf16(r[j]));
          vstore(out + (d + 2 * j + 1) * kTile + i, odd_bf16(r[j]));
        } else {
          vstore(out + (d + j) * kTile + i, r[j]);
        }
      }
    }
  values = ahead;
}

// out [R][kTile] = q · k, with transposed keys of runs of `run` dimensions.
template <int R>
void scores(const float* const* q, const float* keys, int head_dim, int run, float* out) {
  constexpr int N = vectors_per_row<R>() * W > kTile ? kTile / W : vectors_per_row<R>();
  for (int part = 0; part < kChains * kTile / (N * W); ++part) {
    const int first = part / kChains * N * W, chain = part % kChains;
    vf sum[R][N];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) sum[r][i] = vzero();
    for (int of_run = chain * run; of_run < head_dim; of_run += kChains * run)
      for (int d = of_run; d < of_run + run; ++d) {
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
        vstore(at, chain > 0 ? vadd(vload(at), sum[r][i]) : sum[r][i]);
      }
  }
}

// Dimensions of a key that one vector holds: elements of bfloat16 in pairs.
template <class T>
constexpr int kDimsAtOnce = W / kQuarter * kRun<T>;
constexpr int kMaxSpread = kMaxHeadDim * kQuarter;

// Writes what transposed quarters of keys are multiplied with: kRun<T> vectors for each kDimsAtOnce<T> dimensions, the
// i-th with element i of each run in its quarter. Beyond head_dim there are zeros. out [kMaxSpread].
template <class T>
OCTAVO_INLINE void spread_query(const float* q, int head_dim, float* out) {
  for (int d = 0; d < head_dim; d += kDimsAtOnce<T>, out += kRun<T> * W) {
    const vf x = vload(q + d);
    if constexpr (kRun<T> == kQuarter) {
      spread_quarters(x, out);
    } else {
      const vf y = d + W < head_dim ? vload(q + d + W) : vzero();
      spread_quarters(even_quarters(x, y), out);
      spread_quarters(odd_quarters(x, y), out + kQuarter * W);
    }
  }
}

// kDimsAtOnce<T> dimensions of kQuarter keys, transposed within quarters; zeros beyond head_dim.
template <class T>
OCTAVO_INLINE void load_quarters(const T* const* keys, int d, int head_dim, vf* to) {
#pragma GCC unroll 4
  for (int i = 0; i < kQuarter; ++i) {
    if constexpr (kRun<T> == kQuarter) {
      to[i] = load(keys[i] + d);
    } else {
      const auto* pairs = reinterpret_cast<const float*>(keys[i] + d);
      to[i] = d + kDimsAtOnce<T> <= head_dim ? vload(pairs) : vload_half(pairs);
    }
  }
  transpose_quarters(to);
}

// Adds the products of element j of some quarters of keys, once widened, with the rows' x to sum[..][v][p ..].
template <int R, int K, class Widen, class Sums>
OCTAVO_INLINE void add_products(const float* x, int x_stride, const vf (*keys)[kQuarter], int j, Widen widen, int v, int p,
                                Sums& sum) {
  vf wide[K];
  for (int k = 0; k < K; ++k) wide[k] = widen(keys[k][j]);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const vf query = vload(x + r * x_stride);
    for (int k = 0; k < K; ++k) sum[r][v][p + k] = vfma(query, wide[k], sum[r][v][p + k]);
  }
}

// The same sums straight from the cache, for rows too few to pay for keys that are transposed in memory. `spread` is
// [R][kMaxSpread], as spread_query writes it. Asks for as many bytes ahead as it reads. With bfloat16, which takes more work
// than reading, it does so between products, evenly, which was measured to be faster than a few lines at once.
template <class T, int R>
void scores_of_few(const float* spread, const KvTile<T>& tile, int head_dim, float* out, Ahead& values) {
  constexpr int P = W / kQuarter;  // quarters of keys: W positions
  constexpr int kVectors = kChains / P;  // that hold all chains of kQuarter positions
  constexpr int kAtOnce = P == 1 || R <= 3 ? P : P / 2;  // what registers have room for
  constexpr int kBytes = kQuarter * kDimsAtOnce<T> * static_cast<int>(sizeof(T));  // that load_quarters reads
  constexpr bool in_pairs = kRun<T> != kQuarter;
  constexpr int kBytesOfHalf = kAtOnce * kBytes / (2 * kQuarter);  // that even or odd elements of pairs stand for
  Ahead ahead = values;  // in registers
  for (int i = tile.begin / W * W; i < tile.end; i += W) {
    vf sum[R][kVectors][P];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        for (int p = 0; p < P; ++p) sum[r][v][p] = vzero();
    for (int first = 0; first < head_dim; first += kVectors * kDimsAtOnce<T>)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int d = first + v * kDimsAtOnce<T>;
        if (d >= head_dim) break;
#pragma GCC unroll 4
        for (int p = 0; p < P; p += kAtOnce) {
          vf keys[kAtOnce][kQuarter];
#pragma GCC unroll 4
          for (int k = 0; k < kAtOnce; ++k) {
            load_quarters(tile.k + i + (p + k) * kQuarter, d, head_dim, keys[k]);
            if constexpr (!in_pairs) ahead.fetch(std::max(1, kBytes / kLine));
          }
          const float* x = spread + d * kQuarter;
#pragma GCC unroll 4
          for (int j = 0; j < kQuarter; ++j) {
            if constexpr (!in_pairs) {
              add_products<R, kAtOnce>(x + j * W, kMaxSpread, keys, j, [](vf k) { return k; }, v, p, sum);
            } else {
              ahead.keep_up<kBytesOfHalf>(2 * j);
              add_products<R, kAtOnce>(x + 2 * j * W, kMaxSpread, keys, j, even_bf16, v, p, sum);
              ahead.keep_up<kBytesOfHalf>(2 * j + 1);
              add_products<R, kAtOnce>(x + (2 * j + 1) * W, kMaxSpread, keys, j, odd_bf16, v, p, sum);
            }
          }
        }
      }
    for (int r = 0; r < R; ++r) {
      vf chains[kChains];
      gather_quarters(sum[r], chains);
      vstore(out + r * kTile + i, vadd(vadd(vadd(chains[0], chains[1]), chains[2]), chains[3]));
    }
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
