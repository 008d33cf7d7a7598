// A group of 32 inputs of a row, rounded to whole numbers of one or three digits.

#pragma once

#include "rounding.h"

namespace octavo {

// With one digit a group's sum is at most 2**19 large. Begun at the bits of kMiddle it ends as those of kMiddle plus the
// sum, a float without conversion, and one fused product takes kMiddle off and applies the scale. Both products of the
// scale are exact, so that this rounds as a product of the converted sum does: kMiddle has two bits, the scale 22.
#if defined(__AVX512VNNI__)
template <int N>
constexpr bool kSumsAreFloats = N == 1;
#else
template <int N>
constexpr bool kSumsAreFloats = false;
#endif
constexpr float kMiddle = 12582912.0f;  // 3 * 2**22
constexpr int32_t kMiddleBits = 0x4B400000;
constexpr int32_t kBitsOfOne = 0x3F800000;
constexpr float kTooLarge = 0x1p111f;  // inputs of one digit whose scale times kMiddle might not be finite

// 32 inputs of a row as numbers of N digits.
template <int N>
struct Group {
  int8_t digits[N][kGroup];  // highest first
  float scale;
  union {
    float base;        // of one digit: minus the scale times kMiddle
    int32_t exponent;  // of three: what the scale, a power of two, adds to the bits of a float
  };
  float offset;        // the scale times the sum of the numbers
  int32_t moved;       // minus 8 times the sum of the numbers
  int32_t moved_high;  // the same of the numbers without their lowest digit, as if the next one were the lowest
  int32_t moved_low;   // and of the lowest digit alone
  union {
    int32_t begin[2];      // of one digit: where sums begin that are floats, with codes of 4 and of 8 bits
    int32_t has_exponent;  // of three: 1, or 0 where a weight's d times the scale might leave the range of floats
  };

  void begin_sums(int32_t sum) {
    begin[0] = kMiddleBits - 8 * sum;
    begin[1] = kMiddleBits - 128 * sum;
  }
  void find_exponent() {  // d is 2**-24 .. 2**16, and the factor of upper digits 2**8 times the scale
    int32_t bits;
    std::memcpy(&bits, &scale, sizeof bits);
    exponent = bits - kBitsOfOne;
    has_exponent = exponent >= -102 * (1 << 23) && exponent <= 73 * (1 << 23);
  }
};

// A scale of 22 bits, at most 2**-22 of it away.
inline float rounded_scale(float scale) {
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  bits = (bits + 2) & ~3u;
  std::memcpy(&scale, &bits, sizeof bits);
  return scale;
}

// The unit of a group; what is not a number has no digits, and a scale that makes every output of the row NaN.
template <int N>
OCTAVO_INLINE Unit unit_of_group(float largest) {
  if (!(largest < (N == 1 ? kTooLarge : INFINITY))) return {NAN, 0.0f};
  Unit unit = unit_of<N>(largest);
  if constexpr (N == 1) unit.scale = rounded_scale(unit.scale);
  return unit;
}

template <int N>
void round_group(const float* values, Group<N>& group) {
  const Inputs inputs(values);
  const Unit unit = unit_of_group<N>(inputs.largest());
  int32_t sum = 0, sum_low = 0;
  group.scale = unit.scale;
  if (unit.scale == unit.scale) {
    inputs.round(unit.inverse, group.digits, sum, sum_low);
  } else {
    std::memset(group.digits, 0, sizeof group.digits);
  }
  group.offset = group.scale * static_cast<float>(sum);
  if constexpr (kSumsAreFloats<N>) {
    group.base = -kMiddle * group.scale;
    group.begin_sums(sum);
  } else {
    if constexpr (N == 3) group.find_exponent();
    group.moved = -8 * sum;
    group.moved_high = -8 * ((sum - sum_low) / 256);
    group.moved_low = -8 * sum_low;
  }
}

}  // namespace octavo
