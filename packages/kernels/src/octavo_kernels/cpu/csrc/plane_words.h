// Words of a block with planes, and the small numbers beside them, in vectors.

#pragma once

#include "codes.h"
#include "planes.h"

namespace octavo {

#if defined(__AVX512F__)
template <int N>
OCTAVO_INLINE Words shift_right(Words x) {
  return _mm512_srli_epi32(x, N);
}
OCTAVO_INLINE Words both(Words x, Words y) { return _mm512_and_si512(x, y); }
OCTAVO_INLINE Words either(Words x, Words y) { return _mm512_or_si512(x, y); }
OCTAVO_INLINE Words levels(Words codes, const uint8_t* sixteen) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}
OCTAVO_INLINE vf vload_nibbles(const uint8_t* p, bool high) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const vf numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);  // by the low four bits
  return high ? _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4)) : _mm512_permutexvar_ps(bytes, numbers);
}
OCTAVO_INLINE vf vload_e4m3(const uint8_t* p) {  // numbers of 8 bits, whose signs do not count; 0x7F is 240
  const __m256i halves = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i moved = _mm256_slli_epi16(_mm256_and_si256(halves, _mm256_set1_epi16(127)), 7);
  return _mm512_mul_ps(_mm512_cvtph_ps(moved), _mm512_set1_ps(256.0f));
}
OCTAVO_INLINE vf vload_e8m0(const uint8_t* p) {  // 2**(byte - 128), of two factors that are both normal numbers
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i first = _mm512_srli_epi32(bytes, 1), bias = _mm512_set1_epi32(64);
  const __m512i second = _mm512_sub_epi32(bytes, first);
  return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(first, bias), 23)),
                       _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(second, _mm512_set1_epi32(62)), 23)));
}
#elif defined(__AVX2__)
template <int N>
OCTAVO_INLINE Words shift_right(Words x) {
  return _mm256_srli_epi32(x, N);
}
OCTAVO_INLINE Words both(Words x, Words y) { return _mm256_and_si256(x, y); }
OCTAVO_INLINE Words either(Words x, Words y) { return _mm256_or_si256(x, y); }
OCTAVO_INLINE Words levels(Words codes, const uint8_t* sixteen) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}
OCTAVO_INLINE vf vload_nibbles(const uint8_t* p, bool high) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtepi32_ps(high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
}
OCTAVO_INLINE vf vload_e4m3(const uint8_t* p) {
  const __m128i halves = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i moved = _mm_slli_epi16(_mm_and_si128(halves, _mm_set1_epi16(127)), 7);
  return _mm256_mul_ps(_mm256_cvtph_ps(moved), _mm256_set1_ps(256.0f));
}
OCTAVO_INLINE vf vload_e8m0(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i first = _mm256_srli_epi32(bytes, 1), bias = _mm256_set1_epi32(64);
  const __m256i second = _mm256_sub_epi32(bytes, first);
  return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)),
                       _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, _mm256_set1_epi32(62)), 23)));
}
#else
template <int N>
OCTAVO_INLINE Words shift_right(Words x) {
  return x >> N;
}
OCTAVO_INLINE Words both(Words x, Words y) { return x & y; }
OCTAVO_INLINE Words either(Words x, Words y) { return x | y; }
OCTAVO_INLINE Words levels(Words codes, const uint8_t* sixteen) {
  uint8_t bytes[16];
  std::memcpy(bytes, &codes, 16);
  for (uint8_t& byte : bytes) byte = sixteen[byte];
  std::memcpy(&codes, bytes, 16);
  return codes;
}
OCTAVO_INLINE vf vload_nibbles(const uint8_t* p, bool high) {
  vf values = {};
  for (int i = 0; i < W; ++i) values[i] = static_cast<float>(high ? p[i] >> 4 : p[i] & 15);
  return values;
}
OCTAVO_INLINE vf vload_e4m3(const uint8_t* p) {
  vf values = {};
  for (int i = 0; i < W; ++i) values[i] = 256.0f * f16_to_float(static_cast<uint16_t>((p[i] & 127) << 7));
  return values;
}
OCTAVO_INLINE vf vload_e8m0(const uint8_t* p) {
  vf values = {};
  for (int i = 0; i < W; ++i) values[i] = std::ldexp(1.0f, p[i] - 128);
  return values;
}
#endif

template <int N>
OCTAVO_INLINE Words shift(Words x) {  // to the left, or to the right where N is negative
  if constexpr (N > 0) return shift_left<N>(x);
  if constexpr (N < 0) return shift_right<-N>(x);
  return x;
}

// The words times 256.
OCTAVO_INLINE Words next_byte(Words x) {
#if defined(__AVX512BW__)  // on another port than shifts, which take the one of products
  const __m128i bytes = _mm_set_epi8(14, 13, 12, -1, 10, 9, 8, -1, 6, 5, 4, -1, 2, 1, 0, -1);
  return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(bytes));
#else
  return shift_left<8>(x);
#endif
}

}  // namespace octavo
