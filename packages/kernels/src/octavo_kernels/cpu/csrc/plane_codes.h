// Codes and scales out of a block with planes, in vectors.

#pragma once

#include "codes.h"
#include "planes.h"

namespace octavo {

// ---- words ----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
template <int N>
OCTAVO_INLINE Words shift_right(Words x) {
  return _mm512_srli_epi32(x, N);
}
OCTAVO_INLINE Words both(Words x, Words y) { return _mm512_and_si512(x, y); }
OCTAVO_INLINE Words either(Words x, Words y) { return _mm512_or_si512(x, y); }
OCTAVO_INLINE Words levels(Words codes) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}
OCTAVO_INLINE vf vload_nibbles(const uint8_t* p, bool high) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtepi32_ps(high ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15)));
}
#elif defined(__AVX2__)
template <int N>
OCTAVO_INLINE Words shift_right(Words x) {
  return _mm256_srli_epi32(x, N);
}
OCTAVO_INLINE Words both(Words x, Words y) { return _mm256_and_si256(x, y); }
OCTAVO_INLINE Words either(Words x, Words y) { return _mm256_or_si256(x, y); }
OCTAVO_INLINE Words levels(Words codes) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
OCTAVO_INLINE vf vload_nibbles(const uint8_t* p, bool high) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtepi32_ps(high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
}
#else
template <int N>
OCTAVO_INLINE Words shift_right(Words x) {
  return x >> N;
}
OCTAVO_INLINE Words both(Words x, Words y) { return x & y; }
OCTAVO_INLINE Words either(Words x, Words y) { return x | y; }
OCTAVO_INLINE Words levels(Words codes) {
  uint8_t bytes[16];
  std::memcpy(bytes, &codes, 16);
  for (uint8_t& byte : bytes) byte = kLevels[byte];
  std::memcpy(&codes, bytes, 16);
  return codes;
}
OCTAVO_INLINE vf vload_nibbles(const uint8_t* p, bool high) {
  vf values = {};
  for (int i = 0; i < W; ++i) values[i] = static_cast<float>(high ? p[i] >> 4 : p[i] & 15);
  return values;
}
#endif

template <int N>
OCTAVO_INLINE Words shift(Words x) {  // to the left, or to the right where N is negative
  if constexpr (N > 0) return shift_left<N>(x);
  if constexpr (N < 0) return shift_right<-N>(x);
  return x;
}

// ---- a group out of a block -----------------------------------------------------------------------------------------

// The codes of W outputs in a group, a byte per input.
template <Format F>
struct PlaneCodes {
  static constexpr Planes kPlanes = planes_of(F);
  const uint8_t* words;

  OCTAVO_INLINE PlaneCodes(const uint8_t* block, int group, int column)
      : words(block + start_of_codes(kPlanes) + group * bytes_of_codes(kPlanes) + 4 * column) {}

  // Inputs 4 Row .. 4 Row + 3.
  template <int Row>
  OCTAVO_INLINE Words row() const {
    constexpr int kLowRows = 8 / kPlanes.low_bits;  // rows of bytes that a row of words holds
    const Words low = load_words(words + Row / kLowRows * 4 * kPanel);
    constexpr int kLowMask = ((1 << kPlanes.low_bits) - 1) * 0x01010101;
    Words code = both(shift<-kPlanes.low_bits * (Row % kLowRows)>(low), repeat(kLowMask));
    if constexpr (kPlanes.levels) code = levels(code);
    if constexpr (kPlanes.high_bits > 0) {
      constexpr int kHighRows = 8 / kPlanes.high_bits;
      constexpr int kHighMask = ((1 << kPlanes.high_bits) - 1) * 0x01010101 << kPlanes.low_bits;
      const Words high = load_words(words + (8 / kLowRows + Row / kHighRows) * 4 * kPanel);
      code = either(code, both(shift<kPlanes.low_bits - kPlanes.high_bits * (Row % kHighRows)>(high), repeat(kHighMask)));
    }
    return code;
  }
};

// The scale of W outputs in a group, or in a half of it: weight = code * d + m.
struct PlaneScale {
  vf d, m;
};

template <Format F>
OCTAVO_INLINE PlaneScale plane_scale(const uint8_t* block, int group, int half, int column) {
  constexpr Planes kPlanes = planes_of(F);
  const auto* units = reinterpret_cast<const uint16_t*>(block) + column;
  const uint8_t* scales = block + start_of_scales(kPlanes) + (group * kPlanes.scales_of_group + half) * kPanel + column;
  PlaneScale scale{vload_f16(units), vzero()};
  if constexpr (kPlanes.nibble_scales) {
    scale.d = vmul(scale.d, vload_nibbles(scales, false));
  } else if constexpr (kPlanes.scales_of_group > 0) {
    scale.d = vmul(scale.d, vload_i8(reinterpret_cast<const int8_t*>(scales)));
  }
  if constexpr (!kPlanes.minimum) {
    scale.m = vmul(scale.d, vset(static_cast<float>(-kPlanes.centre)));
  } else if constexpr (kPlanes.scales_of_group == 0) {
    scale.m = vload_f16(units + kPanel);
  } else {
    const uint8_t* minimums = scales + (start_of_minimums(kPlanes) - start_of_scales(kPlanes));
    const vf number = kPlanes.nibble_scales ? vload_nibbles(scales, true)
                                            : vload_i8(reinterpret_cast<const int8_t*>(minimums));
    scale.m = vsub(vset(-0.0f), vmul(vload_f16(units + kPanel), number));
  }
  return scale;
}

}  // namespace octavo
