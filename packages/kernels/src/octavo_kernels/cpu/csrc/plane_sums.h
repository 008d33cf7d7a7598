// A group of 32 inputs, rounded to numbers of one or three digits, times 2W outputs of a format with planes.

#pragma once

#include "matmul.h"
#include "plane_codes.h"

namespace octavo {

// Which part of a group a sum is of.
enum Part16 { kFirstHalf = 0, kSecondHalf = 1, kWhole = 2 };

// 32 inputs of a row as numbers of N digits.
template <int N>
struct PlaneGroup {
  int8_t digits[N][kGroup];  // highest first
  float scale;
  int32_t high[2];  // by halves, the sum of the numbers without their lowest digit, as if the next one were the lowest
  int32_t low[2];   // and of the lowest digit alone
  float offset[3];  // the scale times the sum of the numbers, of each half and of all
};

// ---- a group of inputs times 2W outputs -----------------------------------------------------------------------------

// What turns the codes of 2W outputs into weights: d * (code - centre) + m, which is 0 in formats without minimums.
struct PlaneScales {
  vf d[2], m[2];
  int centre;
  bool has_m;
};

// Adds four products per lane of codes with a centre. Wide codes may be any byte; others fit into seven bits.
template <bool Wide>
OCTAVO_INLINE Words add_bytes(Words sum, Words codes, Words x) {
  return Wide ? add_codes<Format::kQ8_0>(sum, codes, x) : add_products(sum, codes, x);
}

// What takes the centre off again, in the sum of a digit. Wide codes lose it before, where bytes must be small.
template <int N, bool Wide>
OCTAVO_INLINE Words correction(const PlaneGroup<N>& x, int digit, Part16 part, int centre) {
  if ((Wide && !kUnsignedBytes) || centre == 0) return repeat(0);
  if (N == 3 && digit == 0) return repeat(0);  // the next digit's sum has it
  const int32_t* sums = digit == N - 1 ? x.low : x.high;
  return repeat(-centre * (part == kWhole ? sums[0] + sums[1] : sums[part]));
}

// Formats whose groups are summed by add_pair: codes of two or three bits leave room for all digits in one integer.
template <Format F, int N>
constexpr bool kIsPair = N == 3 && (F == Format::kQ2_K || F == Format::kQ3_K);

// What turns the codes of 2W outputs into weights in both halves: d * number * (code - centre) - m * minimum.
struct PairScales {
  vf d[2], m[2];
  vf number[2][2], minimum[2][2];  // of each half
  int centre;
  bool has_m;
};

// The sums of a half over all digits.
template <int N, int R, Part16 Half, class Codes>
OCTAVO_INLINE void dots(const Codes& codes, const PlaneGroup<N>* const* x, int64_t g, int centre, vf (&out)[R][2]) {
  Words products[N][R][2];
#pragma GCC unroll 3
  for (int digit = 0; digit < N; ++digit)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int32_t all = digit == N - 1 && centre != 0 ? 256 * x[r][g].high[Half] + x[r][g].low[Half] : 0;
      products[digit][r][0] = products[digit][r][1] = repeat(-centre * all);
    }
  codes.template each_row<Half>([&](int row, Words first, Words second) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 3
    for (int digit = 0; digit < N; ++digit)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Words inputs = repeat_word(x[r][g].digits[digit] + 4 * row);
        products[digit][r][0] = add_products(products[digit][r][0], first, inputs);
        products[digit][r][1] = add_products(products[digit][r][1], second, inputs);
      }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Words all = products[0][r][i];
#pragma GCC unroll 2
      for (int digit = 1; digit < N; ++digit) all = add(next_byte(all), products[digit][r][i]);
      out[r][i] = to_float(all);
    }
}

// Adds a group to the sums. Halves are put together before d, m and the scale of the inputs multiply them.
template <int N, int R, class Codes>
OCTAVO_INLINE void add_pair(const Codes& codes, const PairScales& weights, const PlaneGroup<N>* const* x, int64_t g,
                            vf (&sums)[R][2]) {
  vf first[R][2], second[R][2];
  dots<N, R, kFirstHalf>(codes, x, g, weights.centre, first);
  dots<N, R, kSecondHalf>(codes, x, g, weights.centre, second);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      vf sum = sums[r][i];
      if (weights.has_m) {
        const vf offset = vfma(vset(x[r][g].offset[1]), weights.minimum[1][i],
                               vmul(vset(x[r][g].offset[0]), weights.minimum[0][i]));
        sum = vfnma(offset, weights.m[i], sum);
      }
      const vf dot = vfma(second[r][i], weights.number[1][i], vmul(first[r][i], weights.number[0][i]));
      sums[r][i] = vfma(dot, vmul(weights.d[i], vset(x[r][g].scale)), sum);
    }
}

// Adds a group or a half to the sums. codes.each_row<Part>(use) calls use(row, codes of the first W outputs, of the second W).
template <int N, int R, bool Wide, Part16 Part, class Codes>
OCTAVO_INLINE void add_part(const Codes& codes, const PlaneScales& weights, const PlaneGroup<N>* const* x, int64_t g,
                            vf (&sums)[R][2]) {
  Words products[N][R][2];
#pragma GCC unroll 3
  for (int digit = 0; digit < N; ++digit)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      products[digit][r][0] = products[digit][r][1] = correction<N, Wide>(x[r][g], digit, Part, weights.centre);
  codes.template each_row<Part>([&](int row, Words first, Words second) OCTAVO_INLINE_LAMBDA {
#pragma GCC unroll 3
    for (int digit = 0; digit < N; ++digit)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Words inputs = repeat_word(x[r][g].digits[digit] + 4 * row);
        products[digit][r][0] = add_bytes<Wide>(products[digit][r][0], first, inputs);
        products[digit][r][1] = add_bytes<Wide>(products[digit][r][1], second, inputs);
      }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      vf sum = sums[r][i];
      if (weights.has_m) sum = vfma(vset(x[r][g].offset[Part]), weights.m[i], sum);
      if constexpr (N == 3) {  // two digits in one integer, and the third apart: so all bytes are within 32 bits
        const Words high = add(shift_left<8>(products[0][r][i]), products[1][r][i]);
        sum = vfma(vmul(to_float(high), vset(x[r][g].scale * 256.0f)), weights.d[i], sum);
      }
      sums[r][i] = vfma(vmul(to_float(products[N - 1][r][i]), vset(x[r][g].scale)), weights.d[i], sum);
    }
}

template <int N, int R>
struct GroupsOfRows {
  const PlaneGroup<N>* of[R];

  GroupsOfRows(const Product& product, int64_t first_row) {
    const int64_t num_groups = product.in_features / kGroup;
    for (int r = 0; r < R; ++r)
      of[r] = static_cast<const PlaneGroup<N>*>(product.rounded) + (first_row + r) * num_groups;
  }
};

}  // namespace octavo
