// Groups of 32 inputs as whole numbers of one or three digits: their scale, and the rounding.

#pragma once

#include "packed.h"
#include "vec.h"

namespace octavo {

#if defined(__AVX512F__)
OCTAVO_INLINE __m512i without_lowest_digit(__m512i x) {
  return _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
}

struct Inputs {
  __m512 first, second;

  OCTAVO_INLINE explicit Inputs(const float* values) : first(vload(values)), second(vload(values + W)) {}

  // Magnitudes as bits, which have their order, NaN last.
  OCTAVO_INLINE __m512i larger_of_halves() const {
    return _mm512_max_epu32(_mm512_castps_si512(vabs(first)), _mm512_castps_si512(vabs(second)));
  }
  // The largest magnitude; infinite or NaN if any is.
  OCTAVO_INLINE float largest() const {
    const uint32_t bits = _mm512_reduce_max_epu32(larger_of_halves());
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // Values times `inverse` as whole numbers, half to even; anything where one is not finite.
  OCTAVO_INLINE void round(float inverse, __m512i& a, __m512i& b) const {
    a = _mm512_cvtps_epi32(vmul(first, vset(inverse)));
    b = _mm512_cvtps_epi32(vmul(second, vset(inverse)));
  }
  // The same of finite values, and the sums of these numbers and of their lowest digits.
  template <int N>
  OCTAVO_INLINE void round(float inverse, int8_t (&digits)[N][kGroup], int32_t& sum, int32_t& sum_low) const {
    __m512i a, b;
    round(inverse, a, b);
    sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    if constexpr (N > 1) {
      const __m512i rest = _mm512_add_epi32(without_lowest_digit(a), without_lowest_digit(b));
      sum_low = sum - 256 * _mm512_reduce_add_epi32(rest);
    }
    for (int digit = N - 1; digit >= 0; --digit) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits[digit]), _mm512_cvtepi32_epi8(a));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits[digit] + W), _mm512_cvtepi32_epi8(b));
      a = without_lowest_digit(a);
      b = without_lowest_digit(b);
    }
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
  template <int N>
  OCTAVO_INLINE void round(float inverse, int8_t (&digits)[N][kGroup], int32_t& sum, int32_t& sum_low) const {
    float rounded[kGroup];
    for (int i = 0; i < kGroup; i += W) vstore(rounded + i, vround(vmul(vload(values + i), vset(inverse))));
    for (int i = 0; i < kGroup; ++i) {
      int32_t number = static_cast<int32_t>(rounded[i]);
      sum += number;
      for (int digit = N - 1; digit >= 0; --digit) {
        const int32_t rest = (number + 128) >> 8;
        digits[digit][i] = static_cast<int8_t>(number - 256 * rest);
        number = rest;
      }
      sum_low += digits[N - 1][i];
    }
  }
};
#endif

// The scale of a group, and what its inputs are multiplied by.
struct Unit {
  float scale, inverse;
};

constexpr float kRoomForDigits = 1.0041f;  // 2**23 over the largest number of three digits, and a little
constexpr uint32_t kLeastExponent = 23;    // smaller inputs are multiples of the smallest normal number

// One digit: the largest input becomes 127; a group whose scale has no reciprocal counts as zero. Three digits: a power of
// two that brings the largest input to 2**22 .. 2**23, or to 0.4 % less, which is as far as digits of -128 .. 127 reach.
template <int N>
Unit unit_of(float largest) {
  Unit unit;
  if constexpr (N == 1) {
    unit.scale = largest / 127.0f;
    unit.inverse = 1.0f / unit.scale;
    if (!(unit.scale > 0.0f && unit.inverse < INFINITY)) unit.inverse = 0.0f;
  } else {
    const float limit = largest * kRoomForDigits;
    uint32_t exponent;
    std::memcpy(&exponent, &limit, sizeof exponent);
    exponent = exponent >> 23 > kLeastExponent ? exponent >> 23 : kLeastExponent;
    const uint32_t scale = (exponent - 22) << 23, inverse = (276 - exponent) << 23;
    std::memcpy(&unit.scale, &scale, sizeof scale);
    std::memcpy(&unit.inverse, &inverse, sizeof inverse);
  }
  return unit;
}

}  // namespace octavo
