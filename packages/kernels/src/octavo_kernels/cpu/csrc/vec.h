// Float vectors of the width that the instruction set has, and the few operations that the kernels are written in.
//
// Every kernel is compiled once per instruction set from the same source. `W` is the number of floats in a vector.
// Arithmetic is explicit (the compiler may not contract a product and a sum), so that two code paths which ask for the
// same operations in the same order give the same bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define OCTAVO_INLINE inline __attribute__((always_inline))
#define OCTAVO_INLINE_LAMBDA __attribute__((always_inline))

namespace octavo {

#if defined(__AVX512F__)

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;

OCTAVO_INLINE vf vzero() { return _mm512_setzero_ps(); }
OCTAVO_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
OCTAVO_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
OCTAVO_INLINE vf vload_half(const float* p) { return _mm512_zextps256_ps512(_mm256_loadu_ps(p)); }  // and zeros
OCTAVO_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
OCTAVO_INLINE void vstream(float* p, vf x) { _mm512_stream_ps(p, x); }  // past the caches, to an aligned p
OCTAVO_INLINE void vfence() { _mm_sfence(); }  // before others are told of what was streamed
OCTAVO_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
OCTAVO_INLINE vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
OCTAVO_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
OCTAVO_INLINE vf vdiv(vf a, vf b) { return _mm512_div_ps(a, b); }
OCTAVO_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
OCTAVO_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
OCTAVO_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
OCTAVO_INLINE vf vfnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
OCTAVO_INLINE vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2**n for vectors of whole numbers n in -126 .. 127.
OCTAVO_INLINE vf vpow2(vf n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
OCTAVO_INLINE vf vload_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
OCTAVO_INLINE vf vload_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
OCTAVO_INLINE vf vload_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
OCTAVO_INLINE vf vabs(vf x) {  // AVX512F alone: without DQ there is no _mm512_and_ps
  return _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
OCTAVO_INLINE bool any_not_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) != 0; }  // NaN is not less

#elif defined(__AVX2__)

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;

OCTAVO_INLINE vf vzero() { return _mm256_setzero_ps(); }
OCTAVO_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
OCTAVO_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
OCTAVO_INLINE vf vload_half(const float* p) { return _mm256_zextps128_ps256(_mm_loadu_ps(p)); }
OCTAVO_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
OCTAVO_INLINE void vstream(float* p, vf x) { _mm256_stream_ps(p, x); }
OCTAVO_INLINE void vfence() { _mm_sfence(); }
OCTAVO_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
OCTAVO_INLINE vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
OCTAVO_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
OCTAVO_INLINE vf vdiv(vf a, vf b) { return _mm256_div_ps(a, b); }
OCTAVO_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
OCTAVO_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
OCTAVO_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
OCTAVO_INLINE vf vfnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
OCTAVO_INLINE vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OCTAVO_INLINE vf vpow2(vf n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
OCTAVO_INLINE vf vload_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OCTAVO_INLINE vf vload_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
OCTAVO_INLINE vf vload_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
OCTAVO_INLINE vf vabs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
OCTAVO_INLINE bool any_not_less(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) != 0; }

#else  // any processor, by the compiler's own vectors

constexpr int W = 4;
using vf = float __attribute__((vector_size(16)));
using vi = int32_t __attribute__((vector_size(16)));

float f16_to_float(uint16_t bits);  // scalar.cpp

OCTAVO_INLINE vf vset(float x) { return vf{x, x, x, x}; }
OCTAVO_INLINE vf vzero() { return vset(0.0f); }
OCTAVO_INLINE vf vload(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
OCTAVO_INLINE vf vload_half(const float* p) { return vf{p[0], p[1], 0.0f, 0.0f}; }
OCTAVO_INLINE void vstore(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
OCTAVO_INLINE void vstream(float* p, vf x) { vstore(p, x); }
OCTAVO_INLINE void vfence() {}
OCTAVO_INLINE vf vadd(vf a, vf b) { return a + b; }
OCTAVO_INLINE vf vsub(vf a, vf b) { return a - b; }
OCTAVO_INLINE vf vmul(vf a, vf b) { return a * b; }
OCTAVO_INLINE vf vdiv(vf a, vf b) { return a / b; }
// As the x86 instructions: the second operand where the comparison is false, so a NaN in `a` is lost and one in `b` kept.
OCTAVO_INLINE vf vmax(vf a, vf b) {
  vf r = {};
  for (int i = 0; i < W; ++i) r[i] = a[i] > b[i] ? a[i] : b[i];
  return r;
}
OCTAVO_INLINE vf vmin(vf a, vf b) {
  vf r = {};
  for (int i = 0; i < W; ++i) r[i] = a[i] < b[i] ? a[i] : b[i];
  return r;
}
OCTAVO_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
OCTAVO_INLINE vf vfnma(vf a, vf b, vf c) { return c - a * b; }
OCTAVO_INLINE vf vround(vf x) {
  vf r = {};
  for (int i = 0; i < W; ++i) r[i] = __builtin_nearbyintf(x[i]);
  return r;
}
OCTAVO_INLINE vf vpow2(vf n) {
  vf r = {};
  for (int i = 0; i < W; ++i) {
    const uint32_t bits = (static_cast<uint32_t>(static_cast<int32_t>(n[i])) + 127u) << 23;  // a NaN gives any bits
    float value;
    std::memcpy(&value, &bits, sizeof value);
    r[i] = value;
  }
  return r;
}
OCTAVO_INLINE vf vload_f16(const uint16_t* p) {
  return vf{f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
OCTAVO_INLINE vf vload_bf16(const uint16_t* p) {
  const uint32_t bits[4] = {uint32_t(p[0]) << 16, uint32_t(p[1]) << 16, uint32_t(p[2]) << 16, uint32_t(p[3]) << 16};
  vf x;
  std::memcpy(&x, bits, sizeof x);
  return x;
}
OCTAVO_INLINE vf vload_i8(const int8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
OCTAVO_INLINE vf vabs(vf x) { return vmax(x, -x); }
OCTAVO_INLINE bool any_not_less(vf a, vf b) {
  bool any = false;
  for (int i = 0; i < W; ++i) any |= !(a[i] < b[i]);
  return any;
}

#endif

// Lanes are summed as a tree over halves: lane i with lane i + W/2, and so on. One order for a width.
#if defined(__AVX512F__)
OCTAVO_INLINE float vsum(vf x) { return _mm512_reduce_add_ps(x); }
OCTAVO_INLINE float vmax_of(vf x) { return _mm512_reduce_max_ps(x); }
#elif defined(__AVX2__)
OCTAVO_INLINE float vsum(vf x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
OCTAVO_INLINE float vmax_of(vf x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#else
OCTAVO_INLINE float vsum(vf x) { return (x[0] + x[2]) + (x[1] + x[3]); }
OCTAVO_INLINE float vmax_of(vf x) {
  float best = x[0];
  for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
#endif

// float -> bfloat16, round to nearest even; NaN stays NaN.
OCTAVO_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
OCTAVO_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace octavo
