// The dtypes of caches: how their elements become floats and floats become them.

#pragma once

#include "vec.h"

namespace octavo {

// One type per dtype, so that functions can be written once for all of them.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

uint16_t float_to_f16(float value);  // scalar.cpp: round to nearest even

OCTAVO_INLINE vf load(const float* p) { return vload(p); }
OCTAVO_INLINE vf load(const BF16* p) { return vload_bf16(&p->bits); }
OCTAVO_INLINE vf load(const F16* p) { return vload_f16(&p->bits); }
OCTAVO_INLINE vf load(const int8_t* p) { return vload_i8(p); }

OCTAVO_INLINE void convert(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, count * sizeof(float));
}
OCTAVO_INLINE void convert(const float* from, int64_t count, BF16* to) {
  for (int64_t i = 0; i < count; ++i) to[i].bits = to_bf16(from[i]);
}
OCTAVO_INLINE void convert(const float* from, int64_t count, F16* to) {
  int64_t i = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < count; ++i) to[i].bits = float_to_f16(from[i]);
}

}  // namespace octavo
