// Sixteen groups of inputs rounded together: they find their largest inputs and their sums by turns of one transpose, and
// divide once.

#pragma once

#include <cstddef>

#include "codes.h"
#include "rounded_group.h"
#include "transpose.h"

namespace octavo {

#if defined(__AVX512F__)

// The union of lanes of sixteen vectors: lane i has those of vector i, joined by `join` in some order.
template <class Join>
OCTAVO_INLINE Words join_lanes(Words (&r)[W], Join join) {
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) r[i] = join(_mm512_unpacklo_epi32(r[i], r[i + 1]), _mm512_unpackhi_epi32(r[i], r[i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) r[i] = join(_mm512_unpacklo_epi64(r[i], r[i + 2]), _mm512_unpackhi_epi64(r[i], r[i + 2]));
  const auto halves = [&](Words a, Words b) OCTAVO_INLINE_LAMBDA {
    return join(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  };
  return halves(halves(r[0], r[4]), halves(r[8], r[12]));
}

// unit_of_group of sixteen groups.
template <int N>
OCTAVO_INLINE void units_of_groups(Words largest, vf& scale, vf& inverse) {
  const vf value = _mm512_castsi512_ps(largest);
  const auto words = [](vf x) OCTAVO_INLINE_LAMBDA { return _mm512_castps_si512(x); };
  const auto floats = [](Words x) OCTAVO_INLINE_LAMBDA { return _mm512_castsi512_ps(x); };
  if constexpr (N == 1) {
    scale = vdiv(value, vset(127.0f));
    inverse = vdiv(vset(1.0f), scale);
    inverse = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(inverse, vset(INFINITY), _CMP_LT_OQ), inverse);
    scale = floats(_mm512_and_si512(add(words(scale), repeat(2)), repeat(~3)));
  } else {
    const Words exponent = _mm512_srli_epi32(words(vmul(value, vset(kRoomForDigits))), 23);
    const Words used = _mm512_max_epu32(exponent, repeat(kLeastExponent));
    scale = floats(shift_left<23>(_mm512_sub_epi32(used, repeat(22))));
    inverse = floats(shift_left<23>(_mm512_sub_epi32(repeat(276), used)));
  }
  const __mmask16 numbers = _mm512_cmp_ps_mask(value, vset(N == 1 ? kTooLarge : INFINITY), _CMP_LT_OQ);
  scale = _mm512_mask_mov_ps(vset(NAN), numbers, scale);
  inverse = _mm512_maskz_mov_ps(numbers, inverse);
}

// Writes four floats of each of sixteen groups, of which the first one's begin at `to`.
OCTAVO_INLINE void store_quarters(vf a, vf b, vf c, vf d, float* to) {
  constexpr int kStride = sizeof(Group<1>) / sizeof(float);
  vf r[4] = {a, b, c, d};
  transpose_quarters(r);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm_store_ps(to + i * kStride, _mm512_castps512_ps128(r[i]));
    _mm_store_ps(to + (4 + i) * kStride, _mm512_extractf32x4_ps(r[i], 1));
    _mm_store_ps(to + (8 + i) * kStride, _mm512_extractf32x4_ps(r[i], 2));
    _mm_store_ps(to + (12 + i) * kStride, _mm512_extractf32x4_ps(r[i], 3));
  }
}

// Rounds sixteen groups of values to one digit, as round_group does one.
inline void round_groups(const float* const* values, Group<1>* groups) {
  static_assert(offsetof(Group<1>, moved) == offsetof(Group<1>, scale) + 12);
  Words lanes[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) lanes[i] = Inputs(values[i]).larger_of_halves();
  vf scale, inverse;
  units_of_groups<1>(join_lanes(lanes, [](Words a, Words b) { return _mm512_max_epu32(a, b); }), scale, inverse);
  alignas(64) float inverses[W];
  vstore(inverses, inverse);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    Words first, second;
    Inputs(values[i]).round(inverses[i], first, second);
    _mm_store_si128(reinterpret_cast<__m128i*>(groups[i].digits[0]), _mm512_cvtepi32_epi8(first));
    _mm_store_si128(reinterpret_cast<__m128i*>(groups[i].digits[0] + W), _mm512_cvtepi32_epi8(second));
    lanes[i] = add(first, second);
  }
  const __mmask16 finite = _mm512_cmp_ps_mask(scale, scale, _CMP_ORD_Q);
  const Words sum = _mm512_maskz_mov_epi32(finite, join_lanes(lanes, [](Words a, Words b) { return add(a, b); }));
  const vf moved = _mm512_castsi512_ps(_mm512_sub_epi32(repeat(0), shift_left<3>(sum)));
  store_quarters(scale, vmul(vset(-kMiddle), scale), vmul(scale, to_float(sum)), moved, &groups->scale);
  if constexpr (kSumsAreFloats<1>) {
    alignas(64) int32_t sums[W];
    store_words(reinterpret_cast<uint8_t*>(sums), sum);
    for (int i = 0; i < W; ++i) groups[i].begin_sums(sums[i]);
  }
}

#endif

// Rounds num_rows rows of x, [rows, num_groups * kGroup], to groups [rows, num_groups].
template <int N>
void round_rows(const float* x, int64_t x_stride, int64_t num_rows, int64_t num_groups, Group<N>* groups) {
  const int64_t total = num_rows * num_groups;
  const auto values = [&](int64_t i) { return x + i / num_groups * x_stride + i % num_groups * kGroup; };
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (N == 1)  // three digits need no division, and are as quick one by one
    for (; i + W <= total; i += W) {
      const float* of[W];
      for (int k = 0; k < W; ++k) of[k] = values(i + k);
      round_groups(of, groups + i);
    }
#endif
  for (; i < total; ++i) round_group(values(i), groups[i]);
}

}  // namespace octavo
