// Conversions of half precision, one number at a time, for processors and for rests of rows without an instruction.

#include "cache.h"
#include "vec.h"

namespace octavo {

float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  uint32_t exponent = (bits >> 10) & 0x1Fu;
  uint32_t mantissa = bits & 0x3FFu;
  uint32_t out;
  if (exponent == 31) {
    out = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    out = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa == 0) {
    out = sign;
  } else {  // subnormal: shift until the leading one is where the format hides it
    exponent = 113;
    while ((mantissa & 0x400u) == 0) {
      mantissa <<= 1;
      --exponent;
    }
    out = sign | (exponent << 23) | ((mantissa & 0x3FFu) << 13);
  }
  float value;
  std::memcpy(&value, &out, sizeof value);
  return value;
}

uint16_t float_to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | ((bits >> 13) & 0x3FFu));  // NaN
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);                            // 65536 and above
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 makes the unit in the last place that of a subnormal half
    float size;
    std::memcpy(&size, &bits, sizeof size);
    size += 0.5f;
    std::memcpy(&bits, &size, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  bits += 0xFFFu + ((bits >> 13) & 1u);  // a carry into the exponent is the right rounding, up to infinity
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

}  // namespace octavo
