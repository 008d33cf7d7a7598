// Groups of 32 inputs as whole numbers of one or three digits: their scale, and the rounding.

#pragma once

#include "packed.h"
#include "vec.h"

namespace octavo {

#if defined(__AVX512F__)
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
    if constexpr (N == 1) {
      sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits[0]), _mm512_cvtepi32_epi8(a));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits[0] + W), _mm512_cvtepi32_epi8(b));
    } else {
      split(a, b, digits, sum, sum_low);
    }
  }

 private:
  // Once every digit is 128 larger, digits are the bytes of numbers.
  OCTAVO_INLINE static void split(__m512i a, __m512i b, int8_t (&digits)[3][kGroup], int32_t& sum, int32_t& sum_low) {
    const __m512i larger = _mm512_set1_epi32(0x808080), flip = _mm512_set1_epi8(-128);
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, -1, -1, -1, -1));
    const __m512i upper_two = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i lowest = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    a = _mm512_shuffle_epi8(_mm512_add_epi32(a, larger), by_digit);
    b = _mm512_shuffle_epi8(_mm512_add_epi32(b, larger), by_digit);
    const __m512i upper = _mm512_permutex2var_epi32(a, upper_two, b);
    const __m512i low = _mm512_permutex2var_epi32(a, lowest, b);  // its second half is zero
    _mm512_storeu_si512(digits[0], _mm512_xor_si512(upper, flip));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(digits[2]), _mm512_castsi512_si256(_mm512_xor_si512(low, flip)));
    const __m512i sums = _mm512_sad_epu8(upper, _mm512_setzero_si512());  // each of eight inputs
    const __m256i sums_high = _mm256_slli_epi64(_mm512_castsi512_si256(sums), 8);
    const __m256i sums_low = _mm256_sad_epu8(_mm512_castsi512_si256(low), _mm256_setzero_si256());
    // Numbers without their lowest digits in low words, the lowest digits in high ones.
    const __m256i both = _mm256_or_si256(_mm256_add_epi32(sums_high, _mm512_extracti64x4_epi64(sums, 1)),
                                         _mm256_slli_epi64(sums_low, 32));
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    const int64_t words = _mm_cvtsi128_si64(_mm_add_epi32(half, _mm_unpackhi_epi64(half, half)));
    sum_low = static_cast<int32_t>(words >> 32) - 128 * kGroup;
    sum = (static_cast<int32_t>(words) - 128 * 257 * kGroup) * 256 + sum_low;
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
