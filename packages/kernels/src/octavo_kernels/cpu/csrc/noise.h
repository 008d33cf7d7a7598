// The noise of sampling, many columns at once: the words of Philox4x32-10, and Gumbel noise as a function of one word.
//
// Whole numbers are vectors of the compiler, with its operators. Floats are added and multiplied apart, never fused, so
// that every instruction set gives the same bits.

#pragma once

#include "vmath.h"

namespace octavo {

using vu32 = uint32_t __attribute__((vector_size(4 * W)));
using vi32 = int32_t __attribute__((vector_size(4 * W)));
using vu64 = uint64_t __attribute__((vector_size(4 * W)));
using vfloat = float __attribute__((vector_size(4 * W)));  // what `vf` is to the compiler

constexpr float kLowestNoise = -3.2f;   // all noise lies between the two
constexpr float kHighestNoise = 22.9f;
constexpr int kNumRounds = 10;

OCTAVO_INLINE vu64 splat(uint64_t x) { return x - vu64{}; }

// Per lane, all 64 bits of the product of the lower halves.
OCTAVO_INLINE vu64 multiply_halves(vu64 a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(splat(b))));
#elif defined(__AVX2__)
  return reinterpret_cast<vu64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(splat(b))));
#else
  vu64 product = {};
  for (int i = 0; i < W / 2; ++i) product[i] = (a[i] & 0xFFFFFFFFu) * b;
  return product;
#endif
}

OCTAVO_INLINE vu64 exclusive_or(vu64 a, vu64 b, vu64 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu64>(_mm512_ternarylogic_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b),
                                                          reinterpret_cast<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

// Philox4x32-10 (doi 10.1145/2063384.2063405) of one row: block b of four words belongs to the columns from 4 b on.
class Philox {
 public:
  Philox(int64_t seed, int64_t sequence_index, int64_t position)
      : counter_{static_cast<uint32_t>(sequence_index), static_cast<uint32_t>(position),
                 static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)} {
    auto low = static_cast<uint32_t>(seed);
    auto high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < kNumRounds; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u)
      keys_[round][0] = low, keys_[round][1] = high;
  }

  // The four words of W / 2 blocks, in the lower halves of the lanes. A word is kept in 64 bits whose upper half is
  // arbitrary: the products do not read it, and their upper halves come down by a shift.
  OCTAVO_INLINE void blocks(vu64 numbers, vu64 (&words)[4]) const {
    vu64 c0 = splat(counter_[0]), c1 = splat(counter_[1]), c2 = splat(counter_[2]), c3 = numbers;
#pragma GCC unroll 10
    for (int round = 0; round < kNumRounds; ++round) {
      const vu64 first = multiply_halves(c0, 0xD2511F53u), second = multiply_halves(c2, 0xCD9E8D57u);
      c0 = exclusive_or(second >> 32, c1, splat(keys_[round][0]));
      c2 = exclusive_or(first >> 32, c3, splat(keys_[round][1]));
      c1 = second, c3 = first;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }

  // The words of 2 W columns from 4 * first_block on.
  OCTAVO_INLINE void columns(int64_t first_block, vu32 (&words)[2]) const {
    vu64 numbers = splat(static_cast<uint64_t>(first_block));
    for (int i = 0; i < W / 2; ++i) numbers[i] += i % 2 * (W / 4) + i / 2;  // as the last step deals blocks out
    vu64 w[4];
    blocks(numbers, w);
    const vu64 front = (w[0] & splat(0xFFFFFFFFu)) | (w[1] << 32), back = (w[2] & splat(0xFFFFFFFFu)) | (w[3] << 32);
#if defined(__AVX512F__)
    words[0] = reinterpret_cast<vu32>(
        _mm512_unpacklo_epi64(reinterpret_cast<__m512i>(front), reinterpret_cast<__m512i>(back)));
    words[1] = reinterpret_cast<vu32>(
        _mm512_unpackhi_epi64(reinterpret_cast<__m512i>(front), reinterpret_cast<__m512i>(back)));
#elif defined(__AVX2__)
    words[0] = reinterpret_cast<vu32>(
        _mm256_unpacklo_epi64(reinterpret_cast<__m256i>(front), reinterpret_cast<__m256i>(back)));
    words[1] = reinterpret_cast<vu32>(
        _mm256_unpackhi_epi64(reinterpret_cast<__m256i>(front), reinterpret_cast<__m256i>(back)));
#else
    words[0] = reinterpret_cast<vu32>(vu64{front[0], back[0]});
    words[1] = reinterpret_cast<vu32>(vu64{front[1], back[1]});
#endif
  }

 private:
  uint32_t counter_[3];
  uint64_t keys_[kNumRounds][2];
};

OCTAVO_INLINE vf to_float(vi32 x) { return reinterpret_cast<vf>(__builtin_convertvector(x, vfloat)); }

// x rounded once: both halves are exact.
OCTAVO_INLINE vf to_float(vu32 x) {
  const vf high = to_float(reinterpret_cast<vi32>(x >> 16)), low = to_float(reinterpret_cast<vi32>(x & 0xFFFFu));
  return vadd(vmul(high, vset(65536.0f)), low);
}

// x = 2^e * m with m in [sqrt(1/2), sqrt(2)), for positive normal x.
OCTAVO_INLINE void split(vf x, vi32& e, vf& m) {
  const vi32 bits = reinterpret_cast<vi32>(x);
  e = (bits - 0x3F3504F3) >> 23;
  m = reinterpret_cast<vf>(bits - (e << 23));
}

// log(x) for positive normal x.
OCTAVO_INLINE vf vlog(vf x) {
  vi32 e;
  vf m;
  split(x, e, m);
  return vlog_of_parts(to_float(e), vsub(m, vset(1.0f)));
}

// Standard Gumbel noise -log(-log(u)) of u = (x + 0.5) / 2^32, at most 3e-7 off, and from 1 on three units in the last
// place. Where u is near 1, its logarithm is taken from 1 - u, which floats hold better.
OCTAVO_INLINE vf gumbel(vu32 x) {
  const vf u = vmul(vadd(to_float(x), vset(0.5f)), vset(0x1p-32f));
  const vf below_one = vmul(vadd(to_float(~x), vset(0.5f)), vset(0x1p-32f));  // 1 - u
  vi32 e;
  vf m;
  split(u, e, m);
  const auto near_one = reinterpret_cast<vi32>(e == 0);
  const vi32 minus_below_one = reinterpret_cast<vi32>(below_one) ^ INT32_MIN;
  const vi32 f = (minus_below_one & near_one) | (reinterpret_cast<vi32>(vsub(m, vset(1.0f))) & ~near_one);
  const vf exponential = vsub(vzero(), vlog_of_parts(to_float(e), reinterpret_cast<vf>(f)));
  return vsub(vzero(), vlog(exponential));
}

// At least gumbel(x), by at most 0.11 where it matters (above 2): -log(u) >= 1 - u, and the bits of a float y, read as a
// whole number, are at most 2^23 (log2(y) + 127). The last summand covers all rounding.
OCTAVO_INLINE vf gumbel_bound(vu32 x) {
  constexpr float kLog2 = 0.69314718f;
  const vf y = to_float(reinterpret_cast<vi32>(~x >> 1));  // at most 2^31 (1 - u)
  const vf bits = to_float(reinterpret_cast<vi32>(y));
  return vsub(vset(kLog2 * (31.0f + 127.0f) + 1e-4f), vmul(bits, vset(kLog2 * 0x1p-23f)));
}

}  // namespace octavo
