// The softmax of attention, tile by tile: weights of a tile, and the joining of tiles in the order of their positions
// (online softmax, arXiv 1805.02867).

#pragma once

#include "attention_tile.h"
#include "ops.h"
#include "vmath.h"

namespace octavo {

#define OCTAVO_OUTLINE inline __attribute__((noinline))  // one copy for all kinds of cache

constexpr float kNothing = -__builtin_inff();

// The maximum m of some scores, the sum of exp(score - m), and the sum of exp(score - m) * v.
struct Softmax {
  float maximum = kNothing;
  float sum = 0.0f;
  float* value = nullptr;  // [head_dim]
};

// exp(a - m) and exp(b - m) for m = max(a, b), by which two sums are brought to the same maximum.
struct Joined {
  float maximum, factor_a, factor_b;

  Joined(float a, float b) : maximum(b > a ? b : a) {
    const float base = maximum == kNothing ? 0.0f : maximum;
    alignas(64) float lanes[W] = {a - base, b - base};
    vstore(lanes, vexp(vload(lanes)));
    factor_a = lanes[0];
    factor_b = lanes[1];
  }
};

// Joins the softmaxes of `count` rows in a later tile to those of the tiles before it. `values` is [count, stride].
OCTAVO_OUTLINE void join(Softmax* const* rows, int count, const float* maximum, const float* sum, const float* values,
                         int64_t stride, int head_dim) {
  constexpr int kHalf = 8;
  static_assert(kMaxRows <= kHalf && 2 * kHalf % W == 0, "factors of all rows fit");
  alignas(64) float factors[2 * kHalf] = {};
  for (int r = 0; r < count; ++r) {
    Softmax& all = *rows[r];
    const float before = all.maximum;
    all.maximum = maximum[r] > before ? maximum[r] : before;
    const float base = all.maximum == kNothing ? 0.0f : all.maximum;
    factors[r] = before - base;
    factors[kHalf + r] = maximum[r] - base;
  }
  for (int i = 0; i < 2 * kHalf; i += W) vstore(factors + i, vexp(vload(factors + i)));
  for (int r = 0; r < count; ++r) {
    Softmax& all = *rows[r];
    const float* value = values + r * stride;
    all.sum = all.sum * factors[r] + sum[r] * factors[kHalf + r];
    const vf a = vset(factors[r]), b = vset(factors[kHalf + r]);
    for (int d = 0; d < head_dim; d += W)
      vstore(all.value + d, vfma(vload(value + d), b, vmul(vload(all.value + d), a)));
  }
}

// Writes the attention of a row, and the logarithm of its denominator. A sink is a score without a value.
OCTAVO_OUTLINE void finish(Softmax& all, const float* sink, int head_dim, float* out, float* lse) {
  if (sink != nullptr) {
    const Joined both(all.maximum, *sink);
    all.maximum = both.maximum;
    all.sum = all.sum * both.factor_a + both.factor_b;
    for (int d = 0; d < head_dim; d += W) vstore(all.value + d, vmul(vload(all.value + d), vset(both.factor_a)));
  }
  const bool empty = all.sum == 0.0f;
  for (int d = 0; d < head_dim; d += W)
    vstore(out + d, empty ? vzero() : vdiv(vload(all.value + d), vset(all.sum)));
  if (lse != nullptr) *lse = empty ? kNothing : all.maximum + std::log(all.sum);
}

struct LaneNumbers {
  float lanes[kTile];
  constexpr LaneNumbers() : lanes() {
    for (int i = 0; i < kTile; ++i) lanes[i] = static_cast<float>(i);
  }
};
constexpr LaneNumbers kLaneNumbers;

// How products become scores, for one row and one tile.
struct Scoring {
  const PagedAttentionArgs* args;
  const float* k_scale;  // [kTile], or null
  const float* v_scale;
  float slope;     // of ALiBi
  float distance;  // position of the row minus that of the tile's first key
  int begin, end;  // the positions of the tile that the row sees
};

OCTAVO_INLINE vf score(const Scoring& how, vf product, int first) {
  const PagedAttentionArgs& a = *how.args;
  if (how.k_scale != nullptr) product = vmul(product, vload(how.k_scale + first));
  vf x = vmul(product, vset(a.scale));
  if (a.soft_cap != 0.0f) x = vmul(vset(a.soft_cap), vtanh(vdiv(x, vset(a.soft_cap))));
  const vf lane = vload(kLaneNumbers.lanes + first);
  if (a.alibi_slopes != nullptr) x = vfnma(vset(how.slope), vabs(vsub(vset(how.distance), lane)), x);
  if (how.begin == 0 && how.end == kTile) return x;
  const vf nothing = vset(kNothing);
  x = vselect_less(lane, vset(static_cast<float>(how.begin)), nothing, x);
  return vselect_less(lane, vset(static_cast<float>(how.end)), x, nothing);
}

constexpr int kLinesOfSoftmax = 48;  // that are asked for ahead
constexpr int kUnroll = W == 16 ? kTile / W : 1;  // what has no room in registers gains nothing but size

// Whether a score is a product times the scale, all positions are seen, and weights are not scaled.
inline bool is_plain(const Scoring& how) {
  const PagedAttentionArgs& a = *how.args;
  const bool scaled = how.k_scale != nullptr || how.v_scale != nullptr;
  return !scaled && a.soft_cap == 0.0f && a.alibi_slopes == nullptr && how.begin == 0 && how.end == kTile;
}

// Turns products [kTile] into scores, in place. Returns the largest.
OCTAVO_OUTLINE float score_all(const Scoring& how, float* products) {
  vf largest = vset(kNothing);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i += W) {
    const vf x = score(how, vload(products + i), i);
    vstore(products + i, x);
    largest = vmax(largest, x);
  }
  return vmax_of(largest);
}

// Turns scores [kTile] into weights exp(score - maximum), times v_scale, in place. Returns the sum.
OCTAVO_OUTLINE float soften(const Scoring& how, float* scores, float maximum) {
  const vf base = vset(maximum == kNothing ? 0.0f : maximum);
  vf total = vzero();
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i += W) {
    vf x = vexp(vsub(vload(scores + i), base));
    total = vadd(total, x);
    if (how.v_scale != nullptr) x = vmul(x, vload(how.v_scale + i));
    vstore(scores + i, x);
  }
  return vsum(total);
}

// Both of products [R][kTile] of plain rows; writes each row's maximum and the sum of its weights. Rows are taken
// together, since each waits for its own maximum. Asks for some lines ahead.
template <int R>
OCTAVO_OUTLINE void soften_plain(float scale, float* products, float* maximum, float* sum, Ahead& lines) {
  constexpr int N = kTile / W;
  constexpr int kLines = (kLinesOfSoftmax + R * N - 1) / (R * N);  // per vector
  vf scores[R][N], largest[R], total[R], base[R];
  Ahead ahead = lines;  // in registers
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    largest[r] = vset(kNothing);
#pragma GCC unroll kUnroll
    for (int i = 0; i < N; ++i) {
      scores[r][i] = vmul(vload(products + r * kTile + i * W), vset(scale));
      largest[r] = vmax(largest[r], scores[r][i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    maximum[r] = vmax_of(largest[r]);
    base[r] = vset(maximum[r] == kNothing ? 0.0f : maximum[r]);
    total[r] = vzero();
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
    for (int i = 0; i < N; ++i) {
      ahead.fetch(kLines);
      const vf x = vexp(vsub(scores[r][i], base[r]));
      total[r] = vadd(total[r], x);
      vstore(products + r * kTile + i * W, x);
    }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) sum[r] = vsum(total[r]);
  lines = ahead;
}

}  // namespace octavo
